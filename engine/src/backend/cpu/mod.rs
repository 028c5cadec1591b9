//! The CPU: a plain reference and fast paths chosen at run time.

mod kv;
pub mod matmul;
pub mod pool;
mod reference;
mod state;

pub use reference::ReferenceBackend;
