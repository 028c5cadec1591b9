//! The model: configuration, weights, decoder.
