//! Integration tests of the engine: one binary, one module a subject.

mod cpu_backend;
mod engine;
mod gguf;
mod logits;
mod matmul;
mod support;
