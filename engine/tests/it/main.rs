//! Integration tests of the engine: one binary, one module a subject.

mod cpu_backend;
mod engine;
mod matmul;
