//! The engine's public handle: load a model, submit requests, receive events.

use std::{path::Path, sync::Arc};

use tokio::sync::mpsc;

use crate::{
    error::{EngineError, SubmitError},
    sampling::SamplingParams,
    text::{ChatTemplate, Tokenizer},
};

/// Where the model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// The best device there is.
    #[default]
    Auto,
    /// The CPU's fast paths.
    Cpu,
    /// The plain f32 reference on the CPU: slow, exact, the oracle of the tests.
    Reference,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvType {
    /// Half precision, the default.
    #[default]
    F16,
    /// Single precision, for comparisons.
    F32,
    /// 8-bit blocks of 32 with an f16 scale.
    Q8,
}

/// What [`Engine::load`] needs to know beside the file.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where the model runs.
    pub backend: BackendChoice,
    /// Longest sequence served, in tokens; `None`: the model's own, as far as memory allows.
    pub ctx_size: Option<usize>,
    /// Most sequences in one step.
    pub max_batch: usize,
    /// Most requests waiting for a place in the batch.
    pub max_queue: usize,
    /// CPU threads; `None`: one per core this process may use.
    pub threads: Option<usize>,
    /// Storage of keys and values.
    pub kv_type: KvType,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self { backend: BackendChoice::Auto, ctx_size: None, max_batch: 16, max_queue: 256, threads: None, kv_type: KvType::F16 }
    }
}

/// Loading, in bytes of weights.
#[derive(Debug, Clone, Copy)]
pub struct LoadProgress {
    /// Bytes taken in so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// What is loaded, for `/v1/models`, `inspect` and logs.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// `general.name`, when the file has it.
    pub name: Option<String>,
    /// `general.architecture`.
    pub architecture: String,
    /// The quantisation as users know it: `Q4_K_M`, `Q8_0`, `F16`.
    pub quantization: String,
    /// Weights, counted.
    pub parameters: u64,
    /// Bytes of tensor data.
    pub size_bytes: u64,
    /// The longest sequence served.
    pub ctx_size: usize,
    /// The context the model was trained for.
    pub ctx_train: usize,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Embedding width.
    pub embedding_length: usize,
    /// Transformer layers.
    pub layers: usize,
    /// The backend in words, such as `cpu (avx512-vnni, 2 threads)`.
    pub backend: String,
    /// Tokens the KV pool holds, over all sequences.
    pub kv_tokens: usize,
    /// Bytes of the KV pool.
    pub kv_bytes: u64,
}

/// One sequence to generate.
#[derive(Debug, Clone, Default)]
pub struct GenerateRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; `None`: what the context leaves; 0: only read the prompt.
    pub max_tokens: Option<usize>,
    /// How a token is chosen.
    pub sampling: SamplingParams,
    /// Text that ends the generation; it is not part of the output.
    pub stop: Vec<String>,
    /// Go on past end-of-generation tokens (for benchmarks).
    pub ignore_eos: bool,
    /// Log-probabilities of each generated token, with so many alternatives (0: the token's own only).
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens, delivered in one [`Event::Prompt`].
    pub prompt_logprobs: Option<usize>,
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
    /// The end; nothing follows.
    Done {
        /// Why.
        reason: FinishReason,
        /// The counts.
        usage: Usage,
    },
    /// The end by a failure; nothing follows.
    Failed(EngineError),
}

/// A submitted request. Dropping it cancels the work within one step.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::UnboundedReceiver<Event>,
}

impl Generation {
    /// The next event; `None` after [`Event::Done`] or [`Event::Failed`].
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// As [`Generation::next`], for callers without a runtime.
    pub fn blocking_next(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

/// Counters and gauges of the worker, for metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Requests waiting for a place.
    pub waiting: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// KV blocks in use.
    pub kv_blocks_used: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
}

/// A loaded model and the thread that runs it. Cheap to clone; the last clone dropped ends the thread.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<()>,
}

impl Engine {
    /// Maps and checks the file, takes the weights in and starts the worker.
    pub fn load(path: &Path, config: &EngineConfig, progress: impl FnMut(LoadProgress)) -> Result<Self, EngineError> {
        unimplemented!()
    }
    /// What is loaded.
    pub fn info(&self) -> &ModelInfo {
        unimplemented!()
    }
    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        unimplemented!()
    }
    /// The model's own chat template, when the file has one that compiles.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        unimplemented!()
    }
    /// Queues a request. Never blocks.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        unimplemented!()
    }
    /// The worker's numbers now.
    pub fn stats(&self) -> Stats {
        unimplemented!()
    }
    /// Refuses new requests from now on; what was taken is finished.
    pub fn drain(&self) {
        unimplemented!()
    }
    /// True while submitted work is unfinished.
    pub fn is_busy(&self) -> bool {
        unimplemented!()
    }
    /// The worker's last words, when it has ended.
    pub fn failure(&self) -> Option<String> {
        unimplemented!()
    }
}
