//! The decoder's operations in plain f32 over dequantised blocks: the oracle of the tests.
//!
//! Loops are as the formulas read; activations are never quantised; sums that are cheap are taken in f64.
//! Threads share out whole outputs, so they change no arithmetic. Unlike the fast paths this one allocates
//! as it goes.

use super::{
    random,
    state::{RunState, expect, not_allocated, places},
};
use crate::{
    backend::{AttentionWeights, Backend, Capacity, Demand, FeedForwardWeights, Need, RopeStyle, Row, Shape},
    error::EngineError,
    gguf::{DType, Tensor, dequantize},
    memory,
    sched::{BLOCK_TOKENS, Batch},
};

/// The plain f32 path on the CPU.
pub struct ReferenceBackend {
    threads: usize,
    state: Option<RunState>,
    /// Attention's result, `[T, heads * head_dim]`.
    a: Vec<f32>,
}

impl ReferenceBackend {
    /// A backend on `threads` threads, at least one.
    pub fn new(threads: usize) -> Self {
        Self { threads: threads.max(1), state: None, a: Vec::new() }
    }

    fn state(&mut self) -> Result<(usize, &mut RunState), EngineError> {
        Ok((self.threads, self.state.as_mut().ok_or_else(not_allocated)?))
    }

    /// Stores the step's keys and values of a layer, as `change` leaves them; it is given block, slot and KV head of each
    /// pair. `qkv` has stored them as they are: after it, this puts what another backend has stored into their
    /// place, so that what follows can be compared free of the rounding between.
    pub fn store(
        &mut self,
        layer: usize,
        mut change: impl FnMut([usize; 3], [&mut [f32]; 2]),
    ) -> Result<(), EngineError> {
        let (_, s) = self.state()?;
        let (kv_heads, head_dim) = (s.shape.kv_heads, s.shape.head_dim);
        let writer = s.cache.writer();
        for (t, place) in places(&s.batch).enumerate() {
            for head in 0..kv_heads {
                let first = (t * kv_heads + head) * head_dim;
                let (key, value) = (&mut s.k[first..first + head_dim], &mut s.v[first..first + head_dim]);
                change([place.block as usize, place.slot, head], [&mut *key, &mut *value]);
                // SAFETY: `begin` held every block to the cache; this is the only thread.
                unsafe { writer.store(place.block, layer, head, place.slot, key, value) };
            }
        }
        Ok(())
    }
}

impl Backend for ReferenceBackend {
    type Weight = Tensor;
    type Vector = Vec<f32>;

    fn describe(&self) -> String {
        format!("cpu (reference, {} threads)", self.threads)
    }

    fn load(&mut self, tensor: &Tensor) -> Result<Tensor, EngineError> {
        Ok(tensor.clone())
    }

    fn random(&mut self, dtype: DType, rows: usize, cols: usize, seed: u32) -> Result<Tensor, EngineError> {
        random::tensor(dtype, rows, cols, seed)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, EngineError> {
        Ok(values)
    }

    fn kv_room(&self, _: &Demand<'_>) -> Result<u64, EngineError> {
        Ok(memory::available() / 2)
    }

    fn allocate(&mut self, shape: &Shape, capacity: &Capacity) -> Result<(), EngineError> {
        self.state = Some(RunState::new(shape, capacity)?);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.state()?.1.begin(batch)
    }

    fn embed(&mut self, table: &Tensor) -> Result<(), EngineError> {
        let (_, s) = self.state()?;
        embed(table, s)
    }

    fn qkv(&mut self, layer: usize, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let (threads, s) = self.state()?;
        let (dim, head_dim, tokens) = (s.shape.dim, s.shape.head_dim, s.tokens());
        let h = norm_rows(&s.x[..tokens * dim], &w.norm, s.shape.norm_epsilon);
        for (i, (weight, out)) in
            [(&w.q, &mut s.q), (&w.k, &mut s.k), (&w.v, &mut s.v)].into_iter().enumerate()
        {
            let heads = if i == 0 { s.shape.heads } else { s.shape.kv_heads };
            expect(weight, heads * head_dim, dim)?;
            matmul(threads, weight, &h, out);
            if let Some(bias) = &w.bias {
                for row in out.chunks_exact_mut(heads * head_dim).take(tokens) {
                    row.iter_mut().zip(&bias[i]).for_each(|(o, b)| *o += b);
                }
            }
            // Queries and keys are normalised and rotated; values are not.
            let Some(norms) = (i < 2).then_some(w.qk_norm.as_ref()) else { continue };
            let angles = s.shape.rope.inverse_frequencies.len();
            for (t, row) in out.chunks_exact_mut(heads * head_dim).take(tokens).enumerate() {
                for head in row.chunks_exact_mut(head_dim) {
                    if let Some(norms) = norms {
                        let plain = head.to_vec();
                        rms_norm(&plain, &norms[i], s.shape.norm_epsilon, head);
                    }
                    let at = t * angles..(t + 1) * angles;
                    rotate(s.shape.rope.style, &s.cos[at.clone()], &s.sin[at], head);
                }
            }
        }
        self.store(layer, |_, _| {})
    }

    fn attend(&mut self, layer: usize, _: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let (threads, s) = self.state()?;
        let mut a = vec![0f32; s.tokens() * s.shape.heads * s.shape.head_dim];
        let (kv_heads, head_dim) = (s.shape.kv_heads, s.shape.head_dim);
        let group = s.shape.heads / kv_heads;
        let state = &*s;
        let parts = parallel(threads, s.batch.sequences.len() * kv_heads, |i| {
            attend_head(state, layer, i / kv_heads, i % kv_heads)
        });
        for (i, part) in parts.iter().enumerate() {
            let first = s.batch.sequences[i / kv_heads].start;
            for (j, heads) in part.chunks_exact(group * head_dim).enumerate() {
                let at = ((first + j) * kv_heads + i % kv_heads) * group * head_dim;
                a[at..at + group * head_dim].copy_from_slice(heads);
            }
        }
        self.a = a;
        Ok(())
    }

    fn attention_output(&mut self, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let a = std::mem::take(&mut self.a);
        let (threads, s) = self.state()?;
        let (dim, width) = (s.shape.dim, s.shape.heads * s.shape.head_dim);
        expect(&w.output, dim, width)?;
        let mut out = vec![0f32; s.tokens() * dim];
        matmul(threads, &w.output, &a, &mut out);
        s.x.iter_mut().zip(&out).for_each(|(x, o)| *x += o);
        Ok(())
    }

    fn feed_forward(&mut self, w: &FeedForwardWeights<Tensor>) -> Result<(), EngineError> {
        let (threads, s) = self.state()?;
        let (dim, ffn, tokens) = (s.shape.dim, s.shape.ffn_dim, s.tokens());
        for (weight, rows, cols) in [(&w.gate, ffn, dim), (&w.up, ffn, dim), (&w.down, dim, ffn)] {
            expect(weight, rows, cols)?;
        }
        let h = norm_rows(&s.x[..tokens * dim], &w.norm, s.shape.norm_epsilon);
        let (mut gate, mut up) = (vec![0f32; tokens * ffn], vec![0f32; tokens * ffn]);
        matmul(threads, &w.gate, &h, &mut gate);
        matmul(threads, &w.up, &h, &mut up);
        gate.iter_mut().zip(&up).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
        let mut out = vec![0f32; tokens * dim];
        matmul(threads, &w.down, &gate, &mut out);
        s.x.iter_mut().zip(&out).for_each(|(x, o)| *x += o);
        Ok(())
    }

    fn logits(&mut self, norm: &Vec<f32>, output: &Tensor) -> Result<(), EngineError> {
        let (threads, s) = self.state()?;
        let (dim, vocab, rows) = (s.shape.dim, s.shape.vocab, s.batch.logit_rows.len());
        expect(output, vocab, dim)?;
        let mut h = vec![0f32; rows * dim];
        for (h, &t) in h.chunks_exact_mut(dim).zip(&s.batch.logit_rows) {
            rms_norm(&s.x[t as usize * dim..][..dim], norm, s.shape.norm_epsilon, h);
        }
        matmul(threads, output, &h, &mut s.logits);
        Ok(())
    }

    fn keep_hidden(&mut self, norm: &Vec<f32>) -> Result<(), EngineError> {
        let (_, s) = self.state()?;
        let dim = s.shape.dim;
        for (out, &t) in s.hidden.chunks_exact_mut(dim).zip(&s.batch.hidden_rows) {
            rms_norm(&s.x[t as usize * dim..][..dim], norm, s.shape.norm_epsilon, out);
        }
        Ok(())
    }

    fn rows(&mut self, _: &[Need]) -> Result<(), EngineError> {
        Ok(())
    }

    fn row(&self, index: usize) -> Row<'_> {
        Row::All(self.state.as_ref().map_or(&[], |state| state.row(index)))
    }

    fn hidden(&self, index: usize) -> &[f32] {
        self.state.as_ref().map_or(&[], |state| state.hidden(index))
    }
}

/// `x = table[tokens]`, dequantised; shared with the fast path.
pub(super) fn embed(table: &Tensor, s: &mut RunState) -> Result<(), EngineError> {
    expect(table, table.rows(), s.shape.dim)?;
    let row_bytes = table.dtype().row_bytes(table.cols());
    for (x, &token) in s.x.chunks_exact_mut(s.shape.dim).zip(&s.batch.tokens) {
        let first = token as usize * row_bytes;
        let row = table.bytes().get(first..first + row_bytes).ok_or_else(|| {
            EngineError::Backend(format!("token {token} is outside the vocabulary of {}", table.rows()))
        })?;
        dequantize(table.dtype(), row, x);
    }
    Ok(())
}

/// `f(0) … f(items - 1)`, in this order, computed by `threads` threads.
fn parallel<T: Send>(threads: usize, items: usize, f: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..items).map(|_| None).collect();
    let share = items.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (i, slots) in results.chunks_mut(share).enumerate() {
            let f = &f;
            scope.spawn(move || {
                slots.iter_mut().enumerate().for_each(|(j, slot)| *slot = Some(f(i * share + j)));
            });
        }
    });
    results.into_iter().flatten().collect()
}

/// `out[t][r] = Σ_c weight[r][c] · x[t][c]`; `x: [T, cols]`, `out: [≥T, rows]`.
fn matmul(threads: usize, weight: &Tensor, x: &[f32], out: &mut [f32]) {
    let (rows, cols) = (weight.rows(), weight.cols());
    let row_bytes = weight.dtype().row_bytes(cols);
    let tokens = x.len() / cols;
    let share = rows.div_ceil(threads);
    let parts = parallel(threads, rows.div_ceil(share), |i| {
        let mut row = vec![0f32; cols];
        let mut part = Vec::with_capacity(share * tokens);
        for r in i * share..rows.min((i + 1) * share) {
            dequantize(weight.dtype(), &weight.bytes()[r * row_bytes..(r + 1) * row_bytes], &mut row);
            part.extend(x.chunks_exact(cols).map(|x| dot(&row, x)));
        }
        part
    });
    for (i, part) in parts.iter().enumerate() {
        for (r, sums) in part.chunks_exact(tokens.max(1)).enumerate() {
            for (t, &sum) in sums.iter().enumerate() {
                out[t * rows + i * share + r] = sum;
            }
        }
    }
}

/// A dot product in 16 partial sums: faster, and closer to the true sum, than one.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + tail
}

/// RMSNorm (Zhang and Sennrich 2019): `out = x / sqrt(mean(x²) + ε) · weight`.
fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let scale = (1.0 / (squares / x.len() as f64 + f64::from(epsilon)).sqrt()) as f32;
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * scale * w;
    }
}

/// [`rms_norm`] of each row of `x: [T, weight.len()]`.
fn norm_rows(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        rms_norm(x, weight, epsilon, out);
    }
    out
}

/// `RoPE` (Su et al. 2021): turns each pair of the head by its angle.
fn rotate(style: RopeStyle, cos: &[f32], sin: &[f32], head: &mut [f32]) {
    let pairs = cos.len();
    for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
        let (a, b) = match style {
            RopeStyle::Adjacent => (2 * i, 2 * i + 1),
            RopeStyle::SplitHalf => (i, i + pairs),
        };
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
    }
}

/// Causal attention of one sequence's queries over one KV head; `[len, group, head_dim]`.
fn attend_head(s: &RunState, layer: usize, sequence: usize, kv_head: usize) -> Vec<f32> {
    let (heads, head_dim) = (s.shape.heads, s.shape.head_dim);
    let group = heads / s.shape.kv_heads;
    let sequence = &s.batch.sequences[sequence];
    let length = sequence.context + sequence.len;
    let mut keys = vec![0f32; length * head_dim];
    let mut values = vec![0f32; length * head_dim];
    for (t, (key, value)) in
        keys.chunks_exact_mut(head_dim).zip(values.chunks_exact_mut(head_dim)).enumerate()
    {
        let block = s.batch.blocks_of(sequence)[t / BLOCK_TOKENS];
        s.cache.load_key(block, layer, kv_head, t % BLOCK_TOKENS, key);
        s.cache.load_value(block, layer, kv_head, t % BLOCK_TOKENS, value);
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut out = Vec::with_capacity(sequence.len * group * head_dim);
    for i in 0..sequence.len {
        // A query sees its own position and those before it.
        let seen = (sequence.context + i + 1) * head_dim;
        for head in kv_head * group..(kv_head + 1) * group {
            let query = &s.q[((sequence.start + i) * heads + head) * head_dim..][..head_dim];
            let mut scores: Vec<f32> =
                keys[..seen].chunks_exact(head_dim).map(|key| dot(query, key) * scale).collect();
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for score in &mut scores {
                *score = (*score - largest).exp();
            }
            let total: f64 = scores.iter().map(|&p| f64::from(p)).sum();
            let mut sums = vec![0f32; head_dim];
            for (p, value) in scores.iter().zip(values.chunks_exact(head_dim)) {
                sums.iter_mut().zip(value).for_each(|(sum, v)| *sum += p * v);
            }
            out.extend(sums.iter().map(|sum| sum / total as f32));
        }
    }
    out
}
