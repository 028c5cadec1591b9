//! What a request asks for and what it is told.

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    error::EngineError,
    model::Pooling,
    sampling::{Constraint, SamplingParams},
    sched::CallerId,
};

/// One sequence to generate.
#[derive(Debug, Clone, Default)]
pub struct GenerateRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; `None`: what the context leaves; 0: only read the prompt.
    pub max_tokens: Option<usize>,
    /// How a token is chosen.
    pub sampling: SamplingParams,
    /// What the output must be; `None`: anything. It ends the output where nothing may follow, as a stop.
    pub constraint: Option<Constraint>,
    /// Text that ends the generation; it is not part of the output.
    pub stop: Vec<String>,
    /// Tokens that end the generation beside those that always do; none is part of the output.
    pub stop_tokens: Vec<u32>,
    /// Control tokens that are printed all the same, for who tells a model's markers apart.
    pub printed: Vec<u32>,
    /// Go on past end-of-generation tokens (for benchmarks).
    pub ignore_eos: bool,
    /// Log-probabilities of each generated token, with so many alternatives (0: the token's own only).
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens, delivered in one [`Event::Prompt`].
    pub prompt_logprobs: Option<usize>,
    /// Nothing is generated: one [`Event::Embedding`] tells what the model makes of the prompt.
    pub embedding: Option<Pooling>,
    /// Whom it is for. The engine is fair between callers, and keeps their prompts apart in its cache.
    pub caller: CallerId,
    /// The caller's weight beside others; 0 counts as 1.
    pub weight: u32,
    /// Refuse at once what is not expected to have its first token by then.
    pub max_wait: Option<Duration>,
    /// Who allows its tokens, one by one; `None`: nobody need be asked. Requests may share one.
    pub allowance: Option<Arc<dyn Allowance>>,
}

/// Allows tokens to be generated, so that a caller who has used up its share pauses instead of failing.
///
/// Asked on the worker's thread before each token: an answer must come at once.
pub trait Allowance: fmt::Debug + Send + Sync {
    /// Takes the right to generate one token more; otherwise says after how long to ask again. Until then
    /// the sequence is left out of steps and keeps its blocks, unless others need them.
    fn draw(&self) -> Result<(), Duration>;

    /// Gives back a token that was drawn and will not be generated, as its request was cancelled or failed.
    fn give_back(&self);
}

/// A token's log-probability and that of its best alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Natural log-probability of the token; `None` for a prompt's first token, which nothing predicts.
    pub logprob: Option<f32>,
    /// The most likely tokens at this place with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// A token of the prompt or of the output.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    /// Its id.
    pub id: u32,
    /// Asked for by `logprobs` or `prompt_logprobs`.
    pub logprob: Option<TokenLogprob>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-generation token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

/// Token counts of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Of these, taken from a cache.
    pub cached_tokens: usize,
    /// Token ids generated, the end-of-generation token included.
    pub completion_tokens: usize,
}

/// What a running request tells.
#[derive(Debug, Clone)]
pub enum Event {
    /// The prompt's tokens scored, once, before any [`Event::Text`]; only with `prompt_logprobs`.
    Prompt(Vec<TokenOut>),
    /// More output. `text` never ends within a character; `tokens` are those whose text (or whose
    /// being held back) this event settles, and `text` may be empty when tokens carry none.
    Text {
        /// UTF-8 that is final.
        text: String,
        /// Tokens released with it.
        tokens: Vec<TokenOut>,
    },
    /// The prompt's vector, not normalised; only with `embedding`, and only once.
    Embedding(Vec<f32>),
    /// The end; nothing follows.
    Done {
        /// Why.
        reason: FinishReason,
        /// Which of the request's stop strings it was, by its place among them.
        matched: Option<usize>,
        /// Or which token: one that ends generations, or one of `stop_tokens`. No [`Event::Text`] has it.
        ending: Option<TokenOut>,
        /// The counts.
        usage: Usage,
    },
    /// The end by a failure; nothing follows.
    Failed(EngineError),
}
