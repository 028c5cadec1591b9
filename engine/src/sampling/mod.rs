//! Logits and parameters to a token.

/// How a token is chosen. The defaults are OpenAI's; a `temperature` of 0 or a `top_k` of 1 is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 to 2.
    pub temperature: f32,
    /// Keep the k most likely; 0: all.
    pub top_k: usize,
    /// Keep the smallest set whose probability reaches p; 0 to 1.
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the best; 0 to 1.
    pub min_p: f32,
    /// Divides (or multiplies, where negative) logits of tokens seen; 1: off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens generated; -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of tokens generated; -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens, whatever runs beside; `None`: a fresh one.
    pub seed: Option<u64>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}
