//! Integration tests of the engine: one binary, one module a subject.

mod engine;
mod matmul;
