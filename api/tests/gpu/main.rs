//! The built binary on a CUDA device. `make test-gpu` runs them; they fail where there is none.

#[path = "../../../engine/tests/it/support/mod.rs"]
#[allow(dead_code, reason = "the engine's tests use the rest of it")]
mod gguf_files;

#[path = "../it/device_selection/page.rs"]
mod page;

mod devices;
mod fault;
