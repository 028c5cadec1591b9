//! GGUF inference in process: FP16 storage, FP32 compute, paged KV, continuous batches.
//!
//! The way of a request, one direction only:
//! [`Engine::submit`] → `worker` → `sched` plans a [`sched::Batch`] → `model::Decoder` over a
//! [`backend::Backend`] → `sampling` → detokenise and stop → the request's own channel.
//!
//! | module | holds |
//! | --- | --- |
//! | [`gguf`] | mapping, checked parsing, metadata, tensors, block formats |
//! | [`text`] | tokenizer, chat templates, streaming detokeniser, stop matcher |
//! | [`model`] | configuration from metadata, weights by name, the decoder written once |
//! | [`sched`] | integers only: sequences, block pool, batches |
//! | [`backend`] | the `Backend` trait and its implementations |
//! | [`device`] | CUDA devices as data: chosen and judged without a driver |
//! | [`sampling`] | logits and parameters to a token |
//! | [`handle`], `worker` | the public handle and the thread behind it |
//! | [`source`] | a thread of the caller's in the worker's place, for tests and benchmarks |
//! | `spans` | a request's timings, and its spans for whoever traces |
//! | [`ffi`] | the same for C: `m40llm_*`, `include/m40llm.h` |
//!
//! Knows nothing of HTTP or of anybody's JSON.

pub mod backend;
pub mod config;
pub mod device;
pub mod error;
pub mod ffi;
pub mod gguf;
pub mod handle;
pub mod info;
pub mod memory;
pub mod meter;
pub mod model;
pub mod request;
pub mod sampling;
pub mod sched;
pub mod source;
mod spans;
pub mod text;
pub mod trace;
mod worker;

pub use config::{BackendChoice, EngineConfig, KvType};
pub use device::DeviceId;
pub use error::{EngineError, SubmitError};
pub use handle::{Admission, Distribution, Engine, Generation, LoadProgress, Stats};
pub use info::ModelInfo;
pub use meter::Meter;
pub use model::Pooling;
pub use request::{Allowance, Event, FinishReason, GenerateRequest, TokenLogprob, TokenOut, Usage};
pub use sampling::{Constraint, ConstraintError, Grammar, SamplingParams};
pub use sched::{CallerId, Forecast, PrefixCache};
pub use spans::Timings;
