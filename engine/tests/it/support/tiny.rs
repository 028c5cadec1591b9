//! Tiny models of random weights in the shapes of the real ones, as GGUF files.

use half::{bf16, f16};
use m40llm_engine::gguf::DType;

use super::{Rng, writer::Writer};

/// The families the engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    Llama,
    /// Biases of q, k, v; split-half RoPE.
    Qwen2,
    /// RMSNorm of each head of q and k, a head width of its own.
    Qwen3,
}

/// Which tokenizer goes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vocabulary {
    /// Byte-level BPE: 256 bytes, three merges, three special tokens.
    Bpe,
    /// SentencePiece: three special tokens, 256 bytes, a few pieces.
    Spm,
}

/// A model to be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) family: Family,
    pub(crate) vocabulary: Vocabulary,
    /// Of the matrices; vectors are F32. Types with blocks of 256 want `dim`, `ffn` and
    /// `heads * head_dim` to be multiples of 256.
    pub(crate) dtype: DType,
    /// Of `attn_v` and `ffn_up`, which mixtures store otherwise than their neighbours.
    pub(crate) other: Option<DType>,
    pub(crate) layers: usize,
    pub(crate) dim: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) ffn: usize,
    /// No output matrix of its own: the embedding's is used.
    pub(crate) tied: bool,
    /// Llama 3.1's `rope_freqs.weight`, which divides the frequencies.
    pub(crate) rope_freqs: bool,
    pub(crate) seed: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            family: Family::Llama,
            vocabulary: Vocabulary::Bpe,
            dtype: DType::Q8_0,
            other: None,
            layers: 2,
            dim: 64,
            heads: 2,
            kv_heads: 1,
            head_dim: 64,
            ffn: 128,
            tied: true,
            rope_freqs: false,
            seed: 1,
        }
    }
}

/// The model's file.
pub(crate) fn model(spec: &Spec) -> Vec<u8> {
    writer(spec).bytes()
}

/// The model, still to be changed.
pub(crate) fn writer(spec: &Spec) -> Writer {
    let mut rng = Rng(spec.seed);
    let writer = tokenizer(hyperparameters(spec), spec.vocabulary);
    let vocab = tokens(spec.vocabulary).len();
    let matrix = |w: Writer, rng: &mut Rng, name: &str, cols: usize, rows: usize| {
        let rms = 1.0 / (cols as f32).sqrt();
        let other = name.ends_with("attn_v.weight") || name.ends_with("ffn_up.weight");
        let dtype = spec.other.filter(|_| other).unwrap_or(spec.dtype);
        w.tensor(name, &[cols, rows], dtype, random_blocks(dtype, cols * rows, rms, rng))
    };
    let near = |rng: &mut Rng, n: usize, centre: f32, spread: f32| -> Vec<f32> {
        (0..n).map(|_| centre + spread * rng.signed()).collect()
    };
    let (q_rows, kv_rows) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);

    let mut w = matrix(writer, &mut rng, "token_embd.weight", spec.dim, vocab);
    if spec.rope_freqs {
        let factors: Vec<f32> =
            (0..spec.head_dim / 2).map(|i| if i < spec.head_dim / 4 { 1.0 } else { 8.0 }).collect();
        w = w.vector("rope_freqs.weight", &factors);
    }
    for layer in 0..spec.layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        w = w.vector(&name("attn_norm.weight"), &near(&mut rng, spec.dim, 1.0, 0.2));
        for (part, rows) in [("q", q_rows), ("k", kv_rows), ("v", kv_rows)] {
            w = matrix(w, &mut rng, &name(&format!("attn_{part}.weight")), spec.dim, rows);
            if spec.family == Family::Qwen2 {
                w = w.vector(&name(&format!("attn_{part}.bias")), &near(&mut rng, rows, 0.0, 0.5));
            }
            if spec.family == Family::Qwen3 && part != "v" {
                w = w.vector(
                    &name(&format!("attn_{part}_norm.weight")),
                    &near(&mut rng, spec.head_dim, 1.0, 0.2),
                );
            }
        }
        w = matrix(w, &mut rng, &name("attn_output.weight"), q_rows, spec.dim);
        w = w.vector(&name("ffn_norm.weight"), &near(&mut rng, spec.dim, 1.0, 0.2));
        w = matrix(w, &mut rng, &name("ffn_gate.weight"), spec.dim, spec.ffn);
        w = matrix(w, &mut rng, &name("ffn_up.weight"), spec.dim, spec.ffn);
        w = matrix(w, &mut rng, &name("ffn_down.weight"), spec.ffn, spec.dim);
    }
    // Large enough that the distributions have a clear best token.
    w = w.vector("output_norm.weight", &near(&mut rng, spec.dim, 3.0, 0.5));
    if spec.tied { w } else { matrix(w, &mut rng, "output.weight", spec.dim, vocab) }
}

fn hyperparameters(spec: &Spec) -> Writer {
    let arch = match spec.family {
        Family::Llama => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    };
    let key = |name: &str| format!("{arch}.{name}");
    Writer::default()
        .string("general.architecture", arch)
        .string("general.name", "tiny")
        .u32(&key("block_count"), spec.layers as u32)
        .u32(&key("context_length"), 512)
        .u32(&key("embedding_length"), spec.dim as u32)
        .u32(&key("feed_forward_length"), spec.ffn as u32)
        .u32(&key("attention.head_count"), spec.heads as u32)
        .u32(&key("attention.head_count_kv"), spec.kv_heads as u32)
        .u32(&key("attention.key_length"), spec.head_dim as u32)
        .u32(&key("attention.value_length"), spec.head_dim as u32)
        .u32(&key("rope.dimension_count"), spec.head_dim as u32)
        .f32(&key("rope.freq_base"), 10_000.0)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .u32(&key("vocab_size"), tokens(spec.vocabulary).len() as u32)
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const BYTE: i32 = 6;

/// GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follow from U+0100.
fn byte_characters() -> Vec<String> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    (0..=255u8)
        .map(|b| {
            let code = if printable(b) {
                u32::from(b)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("below U+0144").to_string()
        })
        .collect()
}

/// Text and type of each token.
fn tokens(vocabulary: Vocabulary) -> Vec<(String, i32)> {
    let with = |texts: &[&str], kind: i32| -> Vec<(String, i32)> {
        texts.iter().map(|t| ((*t).to_owned(), kind)).collect()
    };
    match vocabulary {
        Vocabulary::Bpe => {
            let bytes = byte_characters().into_iter().map(|c| (c, NORMAL)).collect();
            let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
            [bytes, with(&["th", "the", "Ġthe"], NORMAL), with(&specials, CONTROL)].concat()
        }
        Vocabulary::Spm => {
            let bytes = (0..256).map(|b| (format!("<0x{b:02X}>"), BYTE)).collect();
            let pieces = ["▁", "t", "h", "e", "th", "the", "▁the", "a", "b", "c"];
            [with(&["<unk>"], UNKNOWN), with(&["<s>", "</s>"], CONTROL), bytes, with(&pieces, NORMAL)]
                .concat()
        }
    }
}

fn tokenizer(w: Writer, vocabulary: Vocabulary) -> Writer {
    let all = tokens(vocabulary);
    let texts: Vec<&str> = all.iter().map(|(text, _)| text.as_str()).collect();
    let kinds: Vec<i32> = all.iter().map(|(_, kind)| *kind).collect();
    let id = |text: &str| texts.iter().position(|t| *t == text).expect("in the vocabulary") as u32;
    let w = w.strings("tokenizer.ggml.tokens", &texts).i32s("tokenizer.ggml.token_type", &kinds);
    match vocabulary {
        Vocabulary::Bpe => w
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", "qwen2")
            .strings("tokenizer.ggml.merges", &["t h", "th e", "Ġ the"])
            .u32("tokenizer.ggml.bos_token_id", id("<|endoftext|>"))
            .u32("tokenizer.ggml.eos_token_id", id("<|im_end|>"))
            .bool("tokenizer.ggml.add_bos_token", false),
        Vocabulary::Spm => {
            let scores: Vec<f32> = (0..texts.len()).map(|i| -(i as f32)).collect();
            w.string("tokenizer.ggml.model", "llama")
                .f32s("tokenizer.ggml.scores", &scores)
                .u32("tokenizer.ggml.bos_token_id", id("<s>"))
                .u32("tokenizer.ggml.eos_token_id", id("</s>"))
                .u32("tokenizer.ggml.unknown_token_id", id("<unk>"))
                .bool("tokenizer.ggml.add_bos_token", true)
                .bool("tokenizer.ggml.add_space_prefix", true)
        }
    }
}

/// Blocks of `n` random weights, mean about 0 and root mean square about `rms`. Float types hold random
/// numbers; in the others the quants (and the small scales) are random bits, and the half-precision scales
/// are such that the size comes out right.
pub(crate) fn random_blocks(dtype: DType, n: usize, rms: f32, rng: &mut Rng) -> Vec<u8> {
    assert_eq!(n % dtype.block_len(), 0, "whole blocks of {}", dtype.name());
    let mut bytes = vec![0; dtype.row_bytes(n)];
    let width = rms * 3f32.sqrt();
    // Offsets of the scale and of the minimum, the spread of a weight in units of the scale, and the mean
    // to take off, in the same units; the sign is that of the stored minimum.
    let (scale, spread, min) = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => {
            for chunk in bytes.chunks_exact_mut(dtype.block_bytes()) {
                let value = width * rng.signed();
                match dtype {
                    DType::F32 => chunk.copy_from_slice(&value.to_le_bytes()),
                    DType::F16 => chunk.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
                    _ => chunk.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
                }
            }
            return bytes;
        }
        DType::Q4_0 => (0, 4.6, None),
        DType::Q4_1 => (0, 4.6, Some((2, -7.5))),
        DType::Q5_0 => (0, 9.2, None),
        DType::Q5_1 => (0, 9.2, Some((2, -15.5))),
        DType::Q8_0 => (0, 74.0, None),
        DType::Q2_K => (80, 13.0, Some((82, 1.5))),
        DType::Q3_K => (108, 43.0, None),
        DType::Q4_K => (0, 250.0, Some((2, 7.5))),
        DType::Q5_K => (0, 510.0, Some((2, 15.5))),
        DType::Q6_K => (208, 1370.0, None),
        DType::IQ4_NL => (0, 70.0, None),
        DType::IQ4_XS => (0, 1300.0, None),
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        block.fill_with(|| rng.next() as u8);
        let d = rms / spread * (1.0 + 0.3 * rng.signed());
        block[scale..scale + 2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        if let Some((at, units)) = min {
            block[at..at + 2].copy_from_slice(&f16::from_f32(d * units).to_le_bytes());
        }
    }
    bytes
}
