//! CUDA devices: the kernels of `kernels/*.cu` behind the driver API, which is found at run time.
//!
//! | module | holds |
//! | --- | --- |
//! | [`device`] | asking the driver, opening the device that was chosen |
//! | [`error`] | a failed call in the user's words |
//! | [`module`] | the embedded kernels, loaded file by file |
//! | `gpu` | the stream, memory, launches counted and timed |
//! | `weights` | matrices on their way in, repacked by the device |
//! | `arguments` | the kernels' structs |
//! | `kernels` | those that a step needs beside its products |
//! | `products` | which kernel multiplies, and its geometry |
//! | `cublas` | products of many tokens by the library, on request |
//! | `metadata`, `state` | the step's batch on the device; activations and the KV cache |
//! | `graphs` | fused steps captured once and run again |
//! | `clock` | when a step began and ended on the device |
//! | `rows` | logits, or the best of them, on their way to the host |
//! | `speed` | copies and products alone, as a measure |
//! | `backend` | the decoder's operations as launches |
//! | `trace` | kernels timed one by one |

mod arguments;
mod backend;
mod clock;
mod cublas;
pub mod device;
pub mod error;
mod gpu;
#[cfg(all(test, feature = "gpu-tests"))]
mod gpu_tests;
mod graphs;
mod kernels;
mod metadata;
pub mod module;
mod products;
mod rows;
mod speed;
mod state;
mod trace;
mod weights;

pub use backend::{CudaBackend, CudaOptions};
pub use device::Device;
pub use module::Kernels;
pub use speed::measure;
pub use weights::{Matrix, Vector};
