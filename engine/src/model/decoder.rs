//! The decoder-only transformer, written once over [`Backend`].

use super::Weights;
use crate::{backend::Backend, error::EngineError, sched::Batch};

/// Weights and the device that runs them.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    backend: B,
    weights: Weights<B::Weight>,
}

impl<B: Backend> Decoder<B> {
    /// A decoder over a backend that has been given its capacity.
    pub fn new(backend: B, weights: Weights<B::Weight>) -> Self {
        Self { backend, weights }
    }

    /// One step: keys and values of the batch's tokens go to the cache; returns the logits of
    /// `batch.logit_rows`, `[logit_rows, vocab]`.
    pub fn forward(&mut self, batch: &Batch) -> Result<&[f32], EngineError> {
        let Self { backend, weights } = self;
        backend.begin(batch)?;
        backend.embed(&weights.embedding)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            backend.qkv(index, &layer.attention)?;
            backend.attend(index)?;
            backend.attention_output(&layer.attention)?;
            backend.feed_forward(&layer.feed_forward)?;
        }
        backend.logits(&weights.norm, weights.output.as_ref().unwrap_or(&weights.embedding))
    }
}
