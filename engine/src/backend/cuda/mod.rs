//! CUDA devices: the kernels of `kernels/*.cu` behind the driver API, which is found at run time.
//!
//! | module | holds |
//! | --- | --- |
//! | [`device`] | asking the driver, opening the device that was chosen |
//! | [`error`] | a failed call in the user's words |
//! | [`module`] | the embedded kernels, loaded file by file |

pub mod device;
pub mod error;
pub mod module;

pub use device::Device;
pub use module::Kernels;
