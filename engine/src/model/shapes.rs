//! Models by name, without a file: dimensions of well-known ones, for benchmarks with random weights.

use crate::{
    backend::{Rope, RopeStyle, Shape},
    gguf::DType,
};

use super::{ModelConfig, Pooling};

/// The dimensions of a known model.
#[derive(Debug, Clone, Copy)]
pub struct NamedShape {
    /// What it is asked for by.
    pub name: &'static str,
    architecture: &'static str,
    layers: usize,
    dim: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn_dim: usize,
    vocab: usize,
    rope_base: f64,
    /// The output matrix is the embedding.
    pub(super) tied: bool,
}

#[rustfmt::skip]
const SHAPES: [NamedShape; 9] = [
    NamedShape { name: "smollm2-135m", architecture: "llama", layers: 30, dim: 576, heads: 9, kv_heads: 3, head_dim: 64, ffn_dim: 1536, vocab: 49152, rope_base: 1e5, tied: true },
    NamedShape { name: "qwen2.5-0.5b", architecture: "qwen2", layers: 24, dim: 896, heads: 14, kv_heads: 2, head_dim: 64, ffn_dim: 4864, vocab: 151_936, rope_base: 1e6, tied: true },
    NamedShape { name: "qwen2.5-3b", architecture: "qwen2", layers: 36, dim: 2048, heads: 16, kv_heads: 2, head_dim: 128, ffn_dim: 11008, vocab: 151_936, rope_base: 1e6, tied: true },
    NamedShape { name: "qwen2.5-7b", architecture: "qwen2", layers: 28, dim: 3584, heads: 28, kv_heads: 4, head_dim: 128, ffn_dim: 18944, vocab: 152_064, rope_base: 1e6, tied: false },
    NamedShape { name: "qwen2.5-14b", architecture: "qwen2", layers: 48, dim: 5120, heads: 40, kv_heads: 8, head_dim: 128, ffn_dim: 13824, vocab: 152_064, rope_base: 1e6, tied: false },
    NamedShape { name: "qwen3-8b", architecture: "qwen3", layers: 36, dim: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn_dim: 12288, vocab: 151_936, rope_base: 1e6, tied: false },
    NamedShape { name: "llama2-7b", architecture: "llama", layers: 32, dim: 4096, heads: 32, kv_heads: 32, head_dim: 128, ffn_dim: 11008, vocab: 32000, rope_base: 1e4, tied: false },
    NamedShape { name: "llama3-8b", architecture: "llama", layers: 32, dim: 4096, heads: 32, kv_heads: 8, head_dim: 128, ffn_dim: 14336, vocab: 128_256, rope_base: 5e5, tied: false },
    // As wide as the 70B model, cut to 16 of its 80 layers so that it fits one card.
    NamedShape { name: "llama3-70b-16l", architecture: "llama", layers: 16, dim: 8192, heads: 64, kv_heads: 8, head_dim: 128, ffn_dim: 28672, vocab: 32000, rope_base: 5e5, tied: false },
];

impl NamedShape {
    /// The shape of that name; otherwise which there are.
    pub fn find(name: &str) -> Result<&'static Self, String> {
        SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| {
            let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
            format!("the shapes are {}", names.join(", "))
        })
    }

    /// As metadata would say it.
    pub fn config(&self) -> ModelConfig {
        let (head_dim, base) = (self.head_dim, self.rope_base);
        let style = if self.architecture == "llama" { RopeStyle::Adjacent } else { RopeStyle::SplitHalf };
        let frequencies =
            (0..head_dim / 2).map(|i| base.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect();
        ModelConfig {
            pooling: Some(Pooling::default()),
            architecture: self.architecture.to_owned(),
            ctx_train: 32768,
            shape: Shape {
                layers: self.layers,
                dim: self.dim,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim,
                ffn_dim: self.ffn_dim,
                vocab: self.vocab,
                norm_epsilon: 1e-5,
                rope: Rope { style, inverse_frequencies: frequencies, magnitude: 1.0 },
            },
        }
    }
}

impl NamedShape {
    /// Type, rows and columns of each matrix, the embedding first.
    pub fn matrices(&self, mixture: Mixture) -> Vec<(DType, usize, usize)> {
        let (q_rows, kv_rows) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut matrices = vec![(mixture.of_ends(self.tied), self.vocab, self.dim)];
        for layer in 0..self.layers {
            let parts = [
                ("attn_q", q_rows, self.dim),
                ("attn_k", kv_rows, self.dim),
                ("attn_v", kv_rows, self.dim),
                ("attn_output", self.dim, q_rows),
                ("ffn_gate", self.ffn_dim, self.dim),
                ("ffn_up", self.ffn_dim, self.dim),
                ("ffn_down", self.dim, self.ffn_dim),
            ];
            matrices.extend(parts.map(|(part, rows, cols)| (mixture.of_layer(part, layer), rows, cols)));
        }
        if !self.tied {
            matrices.push((mixture.of_ends(true), self.vocab, self.dim));
        }
        matrices
    }

    /// Whether the output matrix is the embedding.
    pub fn is_tied(&self) -> bool {
        self.tied
    }
}

/// A quantisation as users name it: one type for all matrices, or a mixture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixture {
    base: DType,
    /// Takes some matrices of every second layer, and the output: what llama.cpp's `_M` mixtures do.
    better: Option<DType>,
}

impl Mixture {
    /// The mixture of a name such as `q8_0` or `q4_k_m`.
    pub fn find(name: &str) -> Result<Self, String> {
        let name = name.to_uppercase();
        let base = match name.as_str() {
            "Q4_K_M" => return Ok(Self { base: DType::Q4_K, better: Some(DType::Q6_K) }),
            "Q5_K_M" => return Ok(Self { base: DType::Q5_K, better: Some(DType::Q6_K) }),
            "Q4_K_S" => "Q4_K",
            "Q5_K_S" => "Q5_K",
            other => other,
        };
        let base = DType::ALL.into_iter().find(|dtype| dtype.name() == base);
        base.map(|base| Self { base, better: None }).ok_or_else(|| {
            let names: Vec<_> = DType::ALL.iter().map(|dtype| dtype.name().to_lowercase()).collect();
            format!("the types are {}, q4_k_m, q5_k_m", names.join(", "))
        })
    }

    /// The name users know.
    pub fn name(self) -> String {
        let base = self.base.name();
        if self.better.is_some() { format!("{base}_M") } else { base.to_owned() }
    }

    /// The type of a matrix of a layer by its GGUF name's part, such as `attn_v`; layers count from 0.
    pub(super) fn of_layer(self, part: &str, layer: usize) -> DType {
        let better =
            self.better.filter(|_| layer.is_multiple_of(2) && ["attn_v", "ffn_down"].contains(&part));
        better.unwrap_or(self.base)
    }

    /// The type of the embedding, or of an output matrix of its own.
    pub(super) fn of_ends(self, is_output: bool) -> DType {
        self.better.filter(|_| is_output).unwrap_or(self.base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_sizes_of_their_names() {
        for (name, billions) in [("llama3-8b", 8.03), ("qwen2.5-0.5b", 0.494), ("smollm2-135m", 0.1345)] {
            let shape = NamedShape::find(name).unwrap();
            let matrices = shape.matrices(Mixture::find("q8_0").unwrap());
            let size = matrices.iter().map(|&(_, rows, cols)| rows * cols).sum::<usize>() as f64 / 1e9;
            assert!((size - billions).abs() < 0.01 * billions, "{name}: {size}");
        }
        assert!(NamedShape::find("gpt-5").unwrap_err().contains("llama3-8b"));
    }

    #[test]
    fn mixtures_have_their_names_and_types() {
        let mixture = Mixture::find("q4_k_m").unwrap();
        assert_eq!(mixture.name(), "Q4_K_M");
        assert_eq!(mixture.of_layer("ffn_down", 4), DType::Q6_K);
        assert_eq!(mixture.of_layer("ffn_down", 5), DType::Q4_K);
        assert_eq!(mixture.of_layer("attn_q", 4), DType::Q4_K);
        assert_eq!((mixture.of_ends(false), mixture.of_ends(true)), (DType::Q4_K, DType::Q6_K));
        assert_eq!(Mixture::find("F16").unwrap().name(), "F16");
        assert!(Mixture::find("q9").unwrap_err().contains("q4_k_m"));
    }
}
