//! Tensor names to weights, each checked against the shape.

use std::collections::HashSet;

use super::{Mixture, NamedShape};
use crate::{
    backend::{AttentionWeights, Backend, FeedForwardWeights, Shape},
    error::EngineError,
    gguf::{Gguf, Tensor, dequantize},
};

/// A layer's weights.
#[derive(Debug)]
pub struct Layer<W, V> {
    /// Attention.
    pub attention: AttentionWeights<W, V>,
    /// Feed-forward.
    pub feed_forward: FeedForwardWeights<W, V>,
}

/// All of a model's weights in a backend's form.
#[derive(Debug)]
pub struct Weights<W, V> {
    /// `[vocab, dim]`.
    pub embedding: W,
    /// One a layer.
    pub layers: Vec<Layer<W, V>>,
    /// RMSNorm before the output, `[dim]`.
    pub norm: V,
    /// `[vocab, dim]`; `None`: the embedding, tied.
    pub output: Option<W>,
}

/// Reads tensors of a file into a backend, counting bytes for the progress bar.
struct Loader<'a, B: Backend> {
    file: &'a Gguf,
    backend: &'a mut B,
    taken: HashSet<String>,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<B: Backend> Loader<'_, B> {
    fn find(&mut self, name: &str, rows: usize, cols: usize) -> Result<Option<Tensor>, EngineError> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        if (tensor.rows(), tensor.cols()) != (rows, cols) {
            return Err(EngineError::Model(format!(
                "tensor {name} is {:?}; the metadata make it [{cols}, {rows}]",
                tensor.info.dims
            )));
        }
        self.taken.insert(name.to_owned());
        self.done += tensor.bytes().len() as u64;
        (self.progress)(self.done);
        Ok(Some(tensor))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<B::Weight, EngineError> {
        let tensor = self.find(name, rows, cols)?.ok_or_else(|| missing(name))?;
        self.backend.load(&tensor)
    }

    fn optional_vector(&mut self, name: &str, len: usize) -> Result<Option<B::Vector>, EngineError> {
        let Some(tensor) = self.find(name, 1, len)? else { return Ok(None) };
        let mut values = vec![0.0; len];
        dequantize(tensor.dtype(), tensor.bytes(), &mut values);
        self.backend.load_vector(values).map(Some)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<B::Vector, EngineError> {
        self.optional_vector(name, len)?.ok_or_else(|| missing(name))
    }

    /// A tensor left over would be a part of the model that is not computed: better no answer than a
    /// wrong one.
    fn refuse_leftovers(&self) -> Result<(), EngineError> {
        // The rotary tables that some files carry are in the configuration already.
        let known = |name: &str| name == "rope_freqs.weight" || name.ends_with(".attn_rot_embd");
        match self.file.tensors().iter().find(|t| !known(&t.name) && !self.taken.contains(&t.name)) {
            Some(t) => {
                Err(EngineError::Model(format!("tensor {} has no place in this architecture", t.name)))
            }
            None => Ok(()),
        }
    }

    fn layer(
        &mut self,
        index: usize,
        architecture: &str,
        s: &Shape,
    ) -> Result<Layer<B::Weight, B::Vector>, EngineError> {
        let name = |part: &str| format!("blk.{index}.{part}");
        let (q_rows, kv_rows) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let bias = match self.optional_vector(&name("attn_q.bias"), q_rows)? {
            Some(q) => {
                let k = self.vector(&name("attn_k.bias"), kv_rows)?;
                Some([q, k, self.vector(&name("attn_v.bias"), kv_rows)?])
            }
            None if architecture == "qwen2" => return Err(missing(&name("attn_q.bias"))),
            None => None,
        };
        let qk_norm = if architecture == "qwen3" {
            let q = self.vector(&name("attn_q_norm.weight"), s.head_dim)?;
            Some([q, self.vector(&name("attn_k_norm.weight"), s.head_dim)?])
        } else {
            None
        };
        let attention = AttentionWeights {
            norm: self.vector(&name("attn_norm.weight"), s.dim)?,
            q: self.matrix(&name("attn_q.weight"), q_rows, s.dim)?,
            k: self.matrix(&name("attn_k.weight"), kv_rows, s.dim)?,
            v: self.matrix(&name("attn_v.weight"), kv_rows, s.dim)?,
            output: self.matrix(&name("attn_output.weight"), s.dim, q_rows)?,
            bias,
            qk_norm,
        };
        let feed_forward = FeedForwardWeights {
            norm: self.vector(&name("ffn_norm.weight"), s.dim)?,
            gate: self.matrix(&name("ffn_gate.weight"), s.ffn_dim, s.dim)?,
            up: self.matrix(&name("ffn_up.weight"), s.ffn_dim, s.dim)?,
            down: self.matrix(&name("ffn_down.weight"), s.dim, s.ffn_dim)?,
        };
        Ok(Layer { attention, feed_forward })
    }
}

fn missing(name: &str) -> EngineError {
    EngineError::Model(format!("the file lacks the tensor {name}"))
}

impl<W, V> Weights<W, V> {
    /// Loads every tensor of `file` that the architecture uses. `progress` hears the bytes done.
    pub fn load<B: Backend<Weight = W, Vector = V>>(
        file: &Gguf,
        architecture: &str,
        shape: &Shape,
        backend: &mut B,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, EngineError> {
        let mut loader = Loader { file, backend, taken: HashSet::new(), done: 0, progress };
        let output = match file.tensor("output.weight") {
            Some(_) => Some(loader.matrix("output.weight", shape.vocab, shape.dim)?),
            None => None,
        };
        let weights = Self {
            embedding: loader.matrix("token_embd.weight", shape.vocab, shape.dim)?,
            layers: (0..shape.layers)
                .map(|i| loader.layer(i, architecture, shape))
                .collect::<Result<_, _>>()?,
            norm: loader.vector("output_norm.weight", shape.dim)?,
            output,
        };
        loader.refuse_leftovers()?;
        Ok(weights)
    }

    /// Random weights in the dimensions of a known model, made by the backend itself.
    pub fn random<B: Backend<Weight = W, Vector = V>>(
        named: &NamedShape,
        mixture: Mixture,
        backend: &mut B,
    ) -> Result<Self, EngineError> {
        let config = named.config();
        let s = &config.shape;
        let (q_rows, kv_rows) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (bias, qk_norm) = (config.architecture == "qwen2", config.architecture == "qwen3");
        let mut seed = 0;
        let mut matrix = |backend: &mut B, dtype, rows, cols| {
            seed += 1;
            backend.random(dtype, rows, cols, seed)
        };
        let output =
            if named.tied { None } else { Some(matrix(backend, mixture.of_ends(true), s.vocab, s.dim)?) };
        let embedding = matrix(backend, mixture.of_ends(named.tied), s.vocab, s.dim)?;
        let ones = |backend: &mut B, n: usize| backend.load_vector(vec![1.0; n]);
        let mut layers = Vec::with_capacity(s.layers);
        for index in 0..s.layers {
            let of = |part: &str| mixture.of_layer(part, index);
            let attention = AttentionWeights {
                norm: ones(backend, s.dim)?,
                q: matrix(backend, of("attn_q"), q_rows, s.dim)?,
                k: matrix(backend, of("attn_k"), kv_rows, s.dim)?,
                v: matrix(backend, of("attn_v"), kv_rows, s.dim)?,
                output: matrix(backend, of("attn_output"), s.dim, q_rows)?,
                bias: if bias {
                    let [q, k, v] = [q_rows, kv_rows, kv_rows].map(|n| backend.load_vector(vec![0.01; n]));
                    Some([q?, k?, v?])
                } else {
                    None
                },
                qk_norm: if qk_norm {
                    Some([ones(backend, s.head_dim)?, ones(backend, s.head_dim)?])
                } else {
                    None
                },
            };
            let feed_forward = FeedForwardWeights {
                norm: ones(backend, s.dim)?,
                gate: matrix(backend, of("ffn_gate"), s.ffn_dim, s.dim)?,
                up: matrix(backend, of("ffn_up"), s.ffn_dim, s.dim)?,
                down: matrix(backend, of("ffn_down"), s.dim, s.ffn_dim)?,
            };
            layers.push(Layer { attention, feed_forward });
        }
        Ok(Self { embedding, layers, norm: ones(backend, s.dim)?, output })
    }
}
