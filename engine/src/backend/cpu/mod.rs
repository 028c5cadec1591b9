//! The CPU: a plain reference and fast paths chosen at run time.

mod kv;
mod reference;
mod state;

pub use reference::ReferenceBackend;
