//! The CPU: a plain reference, and fast paths chosen at run time.
//!
//! | module | holds |
//! | --- | --- |
//! | `reference` | plain f32, the oracle |
//! | [`pool`] | threads that share out a loop |
//! | [`matmul`] | products with quantised weights, activations in 8 bits |
//! | `attention` | online softmax over the paged cache |
//! | `elementwise` | `RMSNorm`, biases, `RoPE` |
//! | `simd` | vectors for each instruction set |
//! | `kv`, `state`, `buffer` | the cache, run state, aligned memory |
//!
//! A token's results are the same to the bit whatever else is in the batch, however its prompt was cut,
//! and on any number of threads: each operation sums in an order that its own sequence alone decides.

mod attention;
mod buffer;
mod elementwise;
mod kv;
pub mod matmul;
pub mod pool;
mod random;
mod reference;
mod simd;
mod state;

pub use matmul::Isa;
pub use reference::ReferenceBackend;

use crate::{
    backend::{AttentionWeights, Backend, Capacity, Demand, FeedForwardWeights, Need, Row, Shape},
    error::EngineError,
    gguf::{DType, Tensor},
    memory,
    sched::Batch,
};
use attention::Attention;
use elementwise::{Heads, RmsNorm};
use matmul::{Activations, Job, Matrix, Mode, Output};
use pool::{Pool, SharedMut};
use simd::Level;
use state::{Place, RunState, expect, not_allocated};

/// Below so many numbers, work on single tokens is done by the calling thread: handing it out costs
/// about as much.
const INLINE: usize = 16 * 1024;

/// How the CPU is used.
#[derive(Debug, Clone, Copy)]
pub struct CpuOptions {
    /// Threads, the calling one included; at least one.
    pub threads: usize,
    /// Kernels; one of [`Isa::available`].
    pub isa: Isa,
}

/// The fast path on the CPU.
pub struct CpuBackend {
    isa: Isa,
    level: Level,
    pool: Pool,
    notice: Option<String>,
    run: Option<Run>,
}

/// What `allocate` makes.
struct Run {
    state: RunState,
    attention: Attention,
    /// The input of q, k, v, of gate and up, and of the logits: `[T, dim]`.
    hidden: Activations,
    /// Attention's result, `[T, heads * head_dim]`.
    attended: Activations,
    /// The feed-forward's inside, `[T, ffn_dim]`.
    inside: Activations,
    scratch: matmul::Scratch,
    /// Each token's place in the cache.
    places: Vec<Place>,
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// When this machine lacks the instruction set.
    pub fn new(options: CpuOptions) -> Result<Self, EngineError> {
        if !Isa::available().contains(&options.isa) {
            return Err(EngineError::Config(format!("this processor has no {}", options.isa.name())));
        }
        let level = Level::of(options.isa);
        Ok(Self { isa: options.isa, level, pool: Pool::new(options.threads), notice: None, run: None })
    }

    /// With something that the user should know of this choice.
    #[must_use]
    pub fn with_notice(self, notice: Option<String>) -> Self {
        Self { notice, ..self }
    }

    fn parts(&mut self) -> Result<(Device<'_>, &mut Run), EngineError> {
        let device = Device { isa: self.isa, level: self.level, pool: &self.pool };
        Ok((device, self.run.as_mut().ok_or_else(not_allocated)?))
    }
}

impl Backend for CpuBackend {
    type Weight = Tensor;
    type Vector = Vec<f32>;

    fn describe(&self) -> String {
        format!("cpu ({}, {} threads)", self.isa.name(), self.pool.threads())
    }

    fn notices(&self) -> Vec<String> {
        self.notice.clone().into_iter().collect()
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
        let threads = self.pool.threads();
        let state = RunState::new(shape, capacity)?;
        let (width, rows) = (shape.heads * shape.head_dim, capacity.tokens.max(capacity.logit_rows));
        self.run = Some(Run {
            attention: Attention::new(&state, threads),
            hidden: Activations::new(rows, shape.dim),
            attended: Activations::new(capacity.tokens, width),
            inside: Activations::new(capacity.tokens, shape.ffn_dim),
            scratch: matmul::Scratch::new(threads, shape.dim.max(width).max(shape.ffn_dim)),
            places: Vec::with_capacity(capacity.tokens),
            state,
        });
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let (_, run) = self.parts()?;
        run.state.begin(batch)?;
        run.attention.begin(&run.state);
        run.places.clear();
        run.places.extend(state::places(&run.state.batch));
        Ok(())
    }

    fn embed(&mut self, table: &Tensor) -> Result<(), EngineError> {
        reference::embed(table, &mut self.parts()?.1.state)
    }

    fn qkv(&mut self, layer: usize, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &mut run.state;
        let (dim, tokens) = (s.shape.dim, s.tokens());
        let (width, kv_width) = (s.shape.heads * s.shape.head_dim, s.shape.kv_heads * s.shape.head_dim);
        device.norm(&s.x[..tokens * dim], dim, &w.norm, s.shape.norm_epsilon, run.hidden.set(tokens, dim));
        let mut jobs = [
            Job::Plain { weight: matrix(&w.q, width, dim)?, out: Output::new(&mut s.q, width, Mode::Store) },
            Job::Plain {
                weight: matrix(&w.k, kv_width, dim)?,
                out: Output::new(&mut s.k, kv_width, Mode::Store),
            },
            Job::Plain {
                weight: matrix(&w.v, kv_width, dim)?,
                out: Output::new(&mut s.v, kv_width, Mode::Store),
            },
        ];
        matmul::matmuls(device.isa, device.pool, &mut jobs, &mut run.hidden, &mut run.scratch);
        device.finish_qkv(layer, w, s, &run.places);
        Ok(())
    }

    fn attend(&mut self, layer: usize, _: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &run.state;
        let out = run.attended.set(s.tokens(), s.shape.heads * s.shape.head_dim);
        run.attention.run(device.level, device.pool, s, layer, out);
        Ok(())
    }

    fn attention_output(&mut self, w: &AttentionWeights<Tensor>) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &mut run.state;
        let weight = matrix(&w.output, s.shape.dim, s.shape.heads * s.shape.head_dim)?;
        let out = Output::new(&mut s.x, s.shape.dim, Mode::Add);
        matmul::matmul(device.isa, device.pool, weight, &mut run.attended, out, &mut run.scratch);
        Ok(())
    }

    fn feed_forward(&mut self, w: &FeedForwardWeights<Tensor>) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &mut run.state;
        let (dim, ffn, tokens) = (s.shape.dim, s.shape.ffn_dim, s.tokens());
        let (gate, up) = (matrix(&w.gate, ffn, dim)?, matrix(&w.up, ffn, dim)?);
        let down = matrix(&w.down, dim, ffn)?;
        device.norm(&s.x[..tokens * dim], dim, &w.norm, s.shape.norm_epsilon, run.hidden.set(tokens, dim));
        let out = Output::new(run.inside.set(tokens, ffn), ffn, Mode::Store);
        let mut jobs = [Job::Gated { gate, up, out }];
        matmul::matmuls(device.isa, device.pool, &mut jobs, &mut run.hidden, &mut run.scratch);
        let out = Output::new(&mut s.x, dim, Mode::Add);
        matmul::matmul(device.isa, device.pool, down, &mut run.inside, out, &mut run.scratch);
        Ok(())
    }

    fn logits(&mut self, norm: &Vec<f32>, output: &Tensor) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &mut run.state;
        let (dim, vocab, rows) = (s.shape.dim, s.shape.vocab, s.batch.logit_rows.len());
        let weight = matrix(output, vocab, dim)?;
        let hidden = run.hidden.set(rows, dim);
        for (out, &t) in hidden.chunks_exact_mut(dim).zip(&s.batch.logit_rows) {
            let x = &s.x[t as usize * dim..][..dim];
            device.level.run(RmsNorm { x, weight: norm, epsilon: s.shape.norm_epsilon, out });
        }
        let out = Output::new(&mut s.logits, vocab, Mode::Store);
        matmul::matmul(device.isa, device.pool, weight, &mut run.hidden, out, &mut run.scratch);
        Ok(())
    }

    fn keep_hidden(&mut self, norm: &Vec<f32>) -> Result<(), EngineError> {
        let (device, run) = self.parts()?;
        let s = &mut run.state;
        let dim = s.shape.dim;
        for (out, &t) in s.hidden.chunks_exact_mut(dim).zip(&s.batch.hidden_rows) {
            let x = &s.x[t as usize * dim..][..dim];
            device.level.run(RmsNorm { x, weight: norm, epsilon: s.shape.norm_epsilon, out });
        }
        Ok(())
    }

    fn rows(&mut self, _: &[Need]) -> Result<(), EngineError> {
        Ok(())
    }

    fn row(&self, index: usize) -> Row<'_> {
        Row::All(self.run.as_ref().map_or(&[], |run| run.state.row(index)))
    }

    fn hidden(&self, index: usize) -> &[f32] {
        self.run.as_ref().map_or(&[], |run| run.state.hidden(index))
    }
}

/// A tensor as a matrix of the shape the model needs.
fn matrix(weight: &Tensor, rows: usize, cols: usize) -> Result<Matrix<'_>, EngineError> {
    expect(weight, rows, cols)?;
    Ok(Matrix::new(weight.dtype(), weight.bytes(), rows, cols))
}

/// What operations run on.
#[derive(Clone, Copy)]
struct Device<'a> {
    isa: Isa,
    level: Level,
    pool: &'a Pool,
}

impl Device<'_> {
    /// Runs `f` for each of `rows`, shared out when there is enough to do.
    fn rows(&self, rows: usize, width: usize, f: impl Fn(usize) + Sync) {
        if rows * width <= INLINE {
            (0..rows).for_each(f);
        } else {
            self.pool.for_each(rows, |row, _| f(row));
        }
    }

    /// RMSNorm of each row of `x: [T, dim]`.
    fn norm(&self, x: &[f32], dim: usize, weight: &[f32], epsilon: f32, out: &mut [f32]) {
        let rows = x.len() / dim;
        assert!(out.len() >= rows * dim && weight.len() == dim);
        let out = SharedMut::new(out);
        self.rows(rows, dim, |row| {
            // SAFETY: checked above; each row is one item.
            let out = unsafe { out.part(row * dim, dim) };
            self.level.run(RmsNorm { x: &x[row * dim..(row + 1) * dim], weight, epsilon, out });
        });
    }

    /// Bias, QK norm and `RoPE`; keys and values to the cache.
    fn finish_qkv(&self, layer: usize, w: &AttentionWeights<Tensor>, s: &mut RunState, places: &[Place]) {
        let (head_dim, kv_heads) = (s.shape.head_dim, s.shape.kv_heads);
        let (width, kv_width) = (s.shape.heads * head_dim, kv_heads * head_dim);
        let (q, k, v) = (SharedMut::new(&mut s.q), SharedMut::new(&mut s.k), SharedMut::new(&mut s.v));
        let writer = s.cache.writer();
        let (shape, cos, sin) = (&s.shape, &s.cos, &s.sin);
        let pairs = shape.rope.inverse_frequencies.len();
        self.rows(places.len(), width + 2 * kv_width, |t| {
            // SAFETY: the buffers hold all of the batch's tokens, and each token is one item.
            let parts = unsafe {
                [q.part(t * width, width), k.part(t * kv_width, kv_width), v.part(t * kv_width, kv_width)]
            };
            let angles = (&cos[t * pairs..(t + 1) * pairs], &sin[t * pairs..(t + 1) * pairs]);
            let [q, k, v] = parts;
            for (i, rows) in [&mut *q, &mut *k, &mut *v].into_iter().enumerate() {
                let bias = w.bias.as_ref().map(|b| b[i].as_slice());
                // Queries and keys are normalised and rotated; values are not.
                let norm =
                    w.qk_norm.as_ref().and_then(|n| n.get(i)).map(|n| (n.as_slice(), shape.norm_epsilon));
                let angles = if i < 2 { angles } else { Default::default() };
                if i < 2 || bias.is_some() {
                    self.level.run(Heads { rows, head_dim, bias, norm, style: shape.rope.style, angles });
                }
            }
            let Place { block, slot } = places[t];
            for (head, (key, value)) in k.chunks_exact(head_dim).zip(v.chunks_exact(head_dim)).enumerate() {
                // SAFETY: `begin` held every block to the cache; each token is one item, and two tokens
                // of a step never share a slot.
                unsafe { writer.store(block, layer, head, slot, key, value) };
            }
        });
    }
}
