//! The CPU backend.
use super::*;
pub struct CpuBackend;
pub struct CpuOptions {
    pub threads: Option<usize>,
    pub reference: bool,
}
impl CpuBackend {
    pub fn new(_: CpuOptions) -> Result<Self, EngineError> {
        Ok(Self)
    }
}
impl Backend for CpuBackend {
    type Weight = Tensor;
    fn describe(&self) -> String {
        unimplemented!()
    }
    fn load(&mut self, tensor: &Tensor) -> Result<Self::Weight, EngineError> {
        unimplemented!()
    }
    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn embed(&mut self, table: &Self::Weight) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn qkv(&mut self, layer: usize, weights: &AttentionWeights<Self::Weight>) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn attend(&mut self, layer: usize) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn attention_output(&mut self, weights: &AttentionWeights<Self::Weight>) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn feed_forward(&mut self, weights: &FeedForwardWeights<Self::Weight>) -> Result<(), EngineError> {
        unimplemented!()
    }
    fn logits(&mut self, norm: &[f32], output: &Self::Weight) -> Result<&[f32], EngineError> {
        unimplemented!()
    }
}
