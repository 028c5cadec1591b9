//! The model: configuration from metadata, weights by name, the decoder written once.

mod config;
mod decoder;
mod shapes;
mod weights;

pub use config::{ModelConfig, Pooling};
pub use decoder::Decoder;
pub use shapes::{Mixture, NamedShape};
pub use weights::Weights;
