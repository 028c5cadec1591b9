//! Whole models on a CUDA device against the CPU reference. `make test-gpu` runs them; they fail where there is no
//! device.

#[path = "../it/support/mod.rs"]
mod support;

mod decoder;
mod serving;
