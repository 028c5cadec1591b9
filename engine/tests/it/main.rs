//! Integration tests of the engine: one binary, one module a subject.

mod allowance;
#[cfg(feature = "cuda")]
#[path = "../../../build.rs"]
#[allow(dead_code, reason = "for its tests; cargo runs its main")]
mod build_script;
mod c_api;
mod constraint;
mod cpu_backend;
mod detokenizer;
mod embeddings;
mod engine;
mod gguf;
mod logits;
mod matmul;
mod scheduling;
mod stop;
mod support;
mod template;
mod tokenizer;
mod vocabularies;
