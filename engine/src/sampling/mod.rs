//! Logits and parameters to a token.
//!
//! The order: bias and penalties on the logits, then temperature, then top-k, top-p and min-p on what is
//! left, as `OpenAI`, vLLM and Hugging Face have it (llama.cpp divides by the temperature last).

mod constraint;
mod sampler;

pub use constraint::{Constraint, ConstraintError, Grammar, Mask};
pub(crate) use constraint::{Constraints, Masks, Walk};
pub use sampler::{Sampler, argmax, log_softmax_of, top_logprobs};

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
    /// Divides positive logits of tokens seen in prompt or output, multiplies negative ones; 1: off.
    /// Source: Keskar et al., CTRL (arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens generated; -2 to 2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence from logits of tokens generated; -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; -100 bans, 100 forces.
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

impl SamplingParams {
    /// Greedy decoding: always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }

    fn changes_logits(&self) -> bool {
        !self.logit_bias.is_empty()
            || self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}
