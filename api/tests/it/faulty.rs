//! A backend that is another one, but for one step, or for its pace.

use std::{
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use m40llm_engine::{
    EngineError,
    backend::{AttentionWeights, Backend, Capacity, Counters, Demand, FeedForwardWeights, Need, Row, Shape},
    gguf::{DType, Tensor},
    sched::Batch,
};

/// What goes wrong: an error, or a panic.
pub(crate) type Fault = Box<dyn FnOnce() -> EngineError + Send>;

/// `inner`, whose step `at` (counted from 1) waits in the midst of the first layer for a fault to have.
pub(crate) struct Faulty<B> {
    inner: B,
    steps: usize,
    at: usize,
    faults: Receiver<Fault>,
    pace: Duration,
}

impl<B> Faulty<B> {
    pub(crate) fn new(inner: B, at: usize, faults: Receiver<Fault>) -> Self {
        Self { inner, steps: 0, at, faults, pace: Duration::ZERO }
    }

    /// `inner`, whose every step takes at least `pace`.
    pub(crate) fn slow(inner: B, pace: Duration) -> Self {
        Self { pace, ..Self::new(inner, usize::MAX, mpsc::channel().1) }
    }
}

type Attention<B> = AttentionWeights<<B as Backend>::Weight, <B as Backend>::Vector>;
type FeedForward<B> = FeedForwardWeights<<B as Backend>::Weight, <B as Backend>::Vector>;

impl<B: Backend> Backend for Faulty<B> {
    type Weight = B::Weight;
    type Vector = B::Vector;

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn load(&mut self, tensor: &Tensor) -> Result<B::Weight, EngineError> {
        self.inner.load(tensor)
    }

    fn random(&mut self, t: DType, rows: usize, cols: usize, seed: u32) -> Result<B::Weight, EngineError> {
        self.inner.random(t, rows, cols, seed)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<B::Vector, EngineError> {
        self.inner.load_vector(values)
    }

    fn kv_room(&self, demand: &Demand<'_>) -> Result<u64, EngineError> {
        self.inner.kv_room(demand)
    }

    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError> {
        self.inner.allocate(shape, capacity)
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.steps += 1;
        thread::sleep(self.pace);
        self.inner.begin(batch)
    }

    fn embed(&mut self, table: &B::Weight) -> Result<(), EngineError> {
        self.inner.embed(table)
    }

    fn qkv(&mut self, layer: usize, weights: &Attention<B>) -> Result<(), EngineError> {
        self.inner.qkv(layer, weights)
    }

    fn attend(&mut self, layer: usize, weights: &Attention<B>) -> Result<(), EngineError> {
        if self.steps == self.at && layer == 0 {
            let fault = self.faults.recv().expect("a fault for this step");
            return Err(fault());
        }
        self.inner.attend(layer, weights)
    }

    fn attention_output(&mut self, weights: &Attention<B>) -> Result<(), EngineError> {
        self.inner.attention_output(weights)
    }

    fn feed_forward(&mut self, weights: &FeedForward<B>) -> Result<(), EngineError> {
        self.inner.feed_forward(weights)
    }

    fn logits(&mut self, norm: &B::Vector, output: &B::Weight) -> Result<(), EngineError> {
        self.inner.logits(norm, output)
    }

    fn keep_hidden(&mut self, norm: &B::Vector) -> Result<(), EngineError> {
        self.inner.keep_hidden(norm)
    }

    fn rows(&mut self, needs: &[Need]) -> Result<(), EngineError> {
        self.inner.rows(needs)
    }

    fn wait_for_rows(&mut self, count: usize) -> Result<(), EngineError> {
        self.inner.wait_for_rows(count)
    }

    fn row(&self, index: usize) -> Row<'_> {
        self.inner.row(index)
    }

    fn hidden(&self, index: usize) -> &[f32] {
        self.inner.hidden(index)
    }

    fn counters(&self) -> Counters {
        Counters { launches: self.steps as u64, syncs: 2 * self.steps as u64 }
    }
}
