//! The decoder-only transformer, written once over [`Backend`].

use super::Weights;
use crate::{
    backend::{Backend, Counters, Need, Row, StepTimes},
    error::EngineError,
    sched::Batch,
};

/// Weights and the device that runs them.
#[derive(Debug)]
pub struct Decoder<B: Backend> {
    backend: B,
    weights: Weights<B::Weight, B::Vector>,
}

impl<B: Backend> Decoder<B> {
    /// A decoder over a backend that has been given its capacity.
    pub fn new(backend: B, weights: Weights<B::Weight, B::Vector>) -> Self {
        Self { backend, weights }
    }

    /// One step: keys and values of the batch's tokens go to the cache, and what `needs` asks for of each
    /// of `batch.logit_rows` comes to the host.
    pub fn forward(&mut self, batch: &Batch, needs: &[Need]) -> Result<(), EngineError> {
        let Self { backend, weights } = self;
        backend.begin(batch)?;
        backend.embed(&weights.embedding)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            backend.qkv(index, &layer.attention)?;
            backend.attend(index, &layer.attention)?;
            backend.next_norm(&layer.feed_forward.norm);
            backend.attention_output(&layer.attention)?;
            if let Some(next) = weights.layers.get(index + 1) {
                backend.next_norm(&next.attention.norm);
            }
            backend.feed_forward(&layer.feed_forward)?;
        }
        backend.logits(&weights.norm, weights.output.as_ref().unwrap_or(&weights.embedding))?;
        if !batch.hidden_rows.is_empty() {
            backend.keep_hidden(&weights.norm)?;
        }
        backend.rows(needs)
    }

    /// Waits until the first `count` rows of the last step's logits are there for [`Decoder::row`].
    pub fn wait_for_rows(&mut self, count: usize) -> Result<(), EngineError> {
        self.backend.wait_for_rows(count)
    }

    /// Row `index` of the last step's logits.
    pub fn row(&self, index: usize) -> Row<'_> {
        self.backend.row(index)
    }

    /// Number `index` of the last step's hidden states, after the final norm.
    pub fn hidden(&self, index: usize) -> &[f32] {
        self.backend.hidden(index)
    }

    /// The device that it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// When the last step's work was done, where the device knows.
    pub fn step_times(&self) -> Option<StepTimes> {
        self.backend.step_times()
    }

    /// What the device has done so far.
    pub fn counters(&self) -> Counters {
        self.backend.counters()
    }
}
