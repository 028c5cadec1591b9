//! Whole models on a CUDA device against the CPU reference. `make test-gpu` runs them; they fail where there is no
//! device.

#[path = "../it/support/mod.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod support;

mod decoder;
mod embeddings;
mod run;
mod serving;
mod stored;
