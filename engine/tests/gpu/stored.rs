//! Keys and values as a device has stored them, and the reference run on them.
//!
//! Storing rounds, and where two backends differ by 1e-6 before it, a number half way between two steps goes up on one
//! side and down on the other: in 8 bits by a 127th of the largest of 32, which a sharp attention turns into a percent of a row of
//! logits. So no bound on logits tells a fault from such a flip. Held apart, both parts have a strict one: each number
//! stored is the nearest to the reference's (but for ties within rounding), and logits over the same stored numbers
//! differ by sums alone.

use std::path::Path;

use half::f16;
use m40llm_engine::{
    EngineError, KvType,
    backend::{
        AttentionWeights, Backend, Capacity, Demand, FeedForwardWeights, Need, Row, Shape,
        cpu::ReferenceBackend, cuda::CudaBackend,
    },
    gguf::{DType, Tensor},
    sched::{BLOCK_TOKENS, Batch},
};

use crate::run::{Run, fresh, reference};

/// Numbers that share a scale in 8 bits.
const GROUP: usize = 32;
/// What f32 sums may differ by before they are stored, relative to the size of the head.
const SUMS: f32 = 2e-5;

/// A device's cache, in the layout of `kernels/attention.cuh`.
pub(crate) struct Stored {
    layers: Vec<Vec<u8>>,
    kv_type: KvType,
    kv_heads: usize,
    head_dim: usize,
}

impl Stored {
    /// What a run has left.
    pub(crate) fn of(run: &Run<'_, CudaBackend>, kv_type: KvType) -> Self {
        let Shape { layers, kv_heads, head_dim, .. } = run.shape;
        let layers = (0..layers).map(|layer| run.decoder.backend().stored(layer).unwrap()).collect();
        Self { layers, kv_type, kv_heads, head_dim }
    }

    /// A token's key (0) or value (1), and each number's scale in 8 bits.
    fn head(&self, layer: usize, [block, slot, head]: [usize; 3], half: usize) -> (Vec<f32>, Vec<f32>) {
        let (width, groups) = (self.head_dim, self.head_dim.div_ceil(GROUP));
        let token_bytes = if self.kv_type == KvType::Q8 { width + 2 * groups } else { 2 * width };
        let half_bytes = BLOCK_TOKENS * token_bytes;
        let bytes =
            &self.layers[layer][((block * self.kv_heads + head) * 2 + half) * half_bytes..][..half_bytes];
        let float = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        match self.kv_type {
            KvType::F16 => ((0..width).map(|d| float(2 * (slot * width + d))).collect(), Vec::new()),
            KvType::Q8 => {
                let scales: Vec<f32> = (0..width)
                    .map(|d| float(BLOCK_TOKENS * width + 2 * (slot * groups + d / GROUP)))
                    .collect();
                let steps = bytes[slot * width..].iter().map(|&byte| f32::from(byte as i8));
                (steps.zip(&scales).map(|(steps, scale)| steps * scale).collect(), scales)
            }
            KvType::F32 => panic!("nothing is rounded there"),
        }
    }

    /// Holds a key or a value to what it should be, and puts what is stored in its place.
    fn take(&self, layer: usize, place: [usize; 3], half: usize, exact: &mut [f32]) {
        let (stored, scales) = self.head(layer, place, half);
        let sums = SUMS * exact.iter().map(|x| x * x).sum::<f32>().sqrt();
        // Half of the last of an f16's 11 digits, or of what is below its smallest.
        let rounding = |x: f32| (x.abs() / 2048.0).max(0.5f32.powi(25));
        let kind = ["key", "value"][half];
        for (d, (&x, &found)) in exact.iter().zip(&stored).enumerate() {
            let most = scales.get(d).map_or(rounding(x), |scale| scale / 2.0) + sums;
            assert!((found - x).abs() <= most, "layer {layer}, {place:?}, {kind} {d}: {found} for {x}");
        }
        for (g, (group, scales)) in exact.chunks(GROUP).zip(scales.chunks(GROUP)).enumerate() {
            let scale = group.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            let off = (scales[0] - scale).abs();
            assert!(
                off <= rounding(scale) + sums / 127.0,
                "layer {layer}, {place:?}, {kind}: scale {g} is {} for {scale}",
                scales[0]
            );
        }
        exact.copy_from_slice(&stored);
    }
}

/// What the reference makes of the tokens of a run on a device over the keys and values that the device has stored,
/// each of which is held to its own.
pub(crate) fn on_stored<'a>(run: &Run<'a, CudaBackend>, path: &Path, kv_type: KvType) -> Run<'a, Changed> {
    let stored = Stored::of(run, kv_type);
    let change = move |layer, place, [key, value]: [&mut [f32]; 2]| {
        stored.take(layer, place, 0, key);
        stored.take(layer, place, 1, value);
    };
    let backend = Changed { reference: reference(), change: Box::new(change) };
    // In f32, which keeps what is put there.
    Run::over(run.tables.clone(), backend, path, run.sequences, KvType::F32).one_by_one()
}

type Change = dyn FnMut(usize, [usize; 3], [&mut [f32]; 2]) + Send;

/// The reference with keys and values changed before they are stored.
pub(crate) struct Changed {
    pub(crate) reference: ReferenceBackend,
    /// Is given layer; block, slot and KV head; key and value.
    pub(crate) change: Box<Change>,
}

impl Backend for Changed {
    type Weight = Tensor;
    type Vector = Vec<f32>;

    fn describe(&self) -> String {
        self.reference.describe()
    }

    fn load(&mut self, tensor: &Tensor) -> Result<Tensor, EngineError> {
        self.reference.load(tensor)
    }

    fn random(&mut self, dtype: DType, rows: usize, cols: usize, seed: u32) -> Result<Tensor, EngineError> {
        self.reference.random(dtype, rows, cols, seed)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        self.reference.load_vector(values)
    }

    fn kv_room(&self, demand: &Demand<'_>) -> Result<u64, EngineError> {
        self.reference.kv_room(demand)
    }

    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError> {
        self.reference.allocate(shape, capacity)
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.reference.begin(batch)
    }

    fn embed(&mut self, table: &Tensor) -> Result<(), EngineError> {
        self.reference.embed(table)
    }

    fn qkv(&mut self, layer: usize, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        self.reference.qkv(layer, w)?;
        self.reference.store(layer, |place, pair| (self.change)(layer, place, pair))
    }

    fn attend(&mut self, layer: usize, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        self.reference.attend(layer, w)
    }

    fn attention_output(&mut self, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        self.reference.attention_output(w)
    }

    fn feed_forward(&mut self, w: &FeedForwardWeights<Tensor>) -> Result<(), EngineError> {
        self.reference.feed_forward(w)
    }

    fn logits(&mut self, norm: &Vec<f32>, output: &Tensor) -> Result<(), EngineError> {
        self.reference.logits(norm, output)
    }

    fn keep_hidden(&mut self, norm: &Vec<f32>) -> Result<(), EngineError> {
        self.reference.keep_hidden(norm)
    }

    fn hidden(&self, index: usize) -> &[f32] {
        self.reference.hidden(index)
    }

    fn rows(&mut self, needs: &[Need]) -> Result<(), EngineError> {
        self.reference.rows(needs)
    }

    fn row(&self, index: usize) -> Row<'_> {
        self.reference.row(index)
    }
}

/// Needs no device: what holds the numbers that a device has stored would see one wrong step, and one wrong scale.
#[test]
fn a_number_stored_wrong_shows() {
    let (mut rng, head_dim, slot) = (fresh(), 80usize, 3);
    let exact: Vec<f32> = (0..head_dim).map(|_| rng.signed()).collect();
    let groups = head_dim.div_ceil(GROUP);
    let mut bytes = vec![0; 2 * BLOCK_TOKENS * (head_dim + 2 * groups)];
    let scale_at = |g: usize| BLOCK_TOKENS * head_dim + 2 * (slot * groups + g);
    let mut scales = Vec::new();
    for (g, group) in exact.chunks(GROUP).enumerate() {
        let scale = f16::from_f32(group.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0);
        bytes[scale_at(g)..scale_at(g) + 2].copy_from_slice(&scale.to_le_bytes());
        scales.push(scale.to_f32());
        for (i, x) in group.iter().enumerate() {
            let step = (x / scale.to_f32()).round().clamp(-127.0, 127.0) as i8;
            bytes[slot * head_dim + g * GROUP + i] = step as u8;
        }
    }
    let is_taken = |bytes: &[u8]| {
        let stored = Stored { layers: vec![bytes.to_vec()], kv_type: KvType::Q8, kv_heads: 1, head_dim };
        let mut key = exact.clone();
        std::panic::catch_unwind(move || stored.take(0, [0, slot, 0], 0, &mut key)).is_ok()
    };
    assert!(is_taken(&bytes));
    for wrong in [slot * head_dim + 7, slot * head_dim + head_dim - 1] {
        let mut bytes = bytes.clone();
        // Away from the exact number: where that lies halfway, the step on its other side is as near.
        let (d, stored) = (wrong - slot * head_dim, bytes[wrong] as i8);
        let away = if f32::from(stored) * scales[d / GROUP] >= exact[d] { 1 } else { -1 };
        bytes[wrong] = stored.wrapping_add(away) as u8;
        assert!(!is_taken(&bytes), "a step away at {wrong} was not seen");
    }
    for g in 0..groups {
        let mut bytes = bytes.clone();
        bytes[scale_at(g)] = bytes[scale_at(g)].wrapping_add(3);
        assert!(!is_taken(&bytes), "another scale of group {g} was not seen");
    }
}
