//! Integration tests of the engine: one binary, one module a subject.

mod engine;
mod gguf;
mod logits;
mod support;
