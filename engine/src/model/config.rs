//! A model's dimensions, read from GGUF metadata and checked key by key.

use std::f64::consts::PI;

use crate::{
    backend::{Rope, RopeStyle, Shape},
    error::EngineError,
    gguf::{Gguf, Metadata, Value, dequantize},
};

/// Architectures the decoder is written for.
const SUPPORTED: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// How one vector is made of the hidden states of a text's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the last token, which has seen all others.
    Last,
}

/// What metadata says of a model, checked.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// `general.architecture`.
    pub architecture: String,
    /// Context the model was trained for, in tokens.
    pub ctx_train: usize,
    /// How it makes one vector of a text; `None`: in a way that is not known here.
    pub pooling: Option<Pooling>,
    /// The dimensions.
    pub shape: Shape,
}

/// Typed access to `{architecture}.*` with errors that name the key.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, EngineError> {
        Ok(self.metadata.f64(&self.name(key))?)
    }

    /// An integer within `range`; a list (some files give one value a layer) must repeat one number.
    fn count(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<usize>, EngineError> {
        let name = self.name(key);
        let Some(values) = self.metadata.u64s(&name)? else { return Ok(None) };
        let Some(&first) = values.first() else {
            return Err(EngineError::Model(format!("{name} is an empty list")));
        };
        if values.iter().any(|&v| v != first) {
            return Err(EngineError::Model(format!(
                "{name} differs from layer to layer, which is not supported"
            )));
        }
        if !range.contains(&first) {
            let (low, high) = (range.start(), range.end());
            return Err(EngineError::Model(format!("{name} is {first}; it must be {low} to {high}")));
        }
        Ok(Some(first as usize))
    }

    fn require(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<usize, EngineError> {
        self.count(key, range)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> EngineError {
        EngineError::Model(format!("the file lacks the metadata key {}", self.name(key)))
    }
}

impl ModelConfig {
    /// Reads and checks the configuration of the model in `file`.
    pub fn from_gguf(file: &Gguf) -> Result<Self, EngineError> {
        let metadata = file.metadata();
        let architecture = metadata
            .str("general.architecture")?
            .ok_or_else(|| EngineError::Model("the file lacks the metadata key general.architecture".into()))?
            .to_owned();
        if !SUPPORTED.contains(&architecture.as_str()) {
            return Err(EngineError::Model(format!(
                "general.architecture is {architecture:?}; supported are {}",
                SUPPORTED.join(", ")
            )));
        }
        let keys = Keys { metadata, architecture: &architecture };
        if keys.count("expert_count", 0..=u64::MAX)?.unwrap_or(0) > 0 {
            return Err(EngineError::Model(format!(
                "{} says that this is a mixture of experts, which is not supported",
                keys.name("expert_count")
            )));
        }
        let dim = keys.require("embedding_length", 8..=1 << 17)?;
        let heads = keys.require("attention.head_count", 1..=1 << 12)?;
        let kv_heads = keys.count("attention.head_count_kv", 1..=1 << 12)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(EngineError::Model(format!(
                "{} is {kv_heads}; it must divide attention.head_count, which is {heads}",
                keys.name("attention.head_count_kv")
            )));
        }
        let ctx_train = keys.require("context_length", 1..=1 << 26)?;
        let head_dim = head_dim(&keys, dim, heads)?;
        let epsilon = keys
            .number("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?;
        if !(0.0..=1.0).contains(&epsilon) {
            let name = keys.name("attention.layer_norm_rms_epsilon");
            return Err(EngineError::Model(format!("{name} is {epsilon}; it must be 0 to 1")));
        }
        let shape = Shape {
            layers: keys.require("block_count", 1..=1 << 10)?,
            dim,
            heads,
            kv_heads,
            head_dim,
            ffn_dim: keys.require("feed_forward_length", 8..=1 << 20)?,
            vocab: vocabulary(file)?,
            norm_epsilon: epsilon as f32,
            rope: rope(file, &keys, head_dim, ctx_train)?,
        };
        let pooling = pooling(&keys)?;
        Ok(Self { architecture, ctx_train, pooling, shape })
    }
}

/// `pooling_type` in the numbers of the format: 1 is the mean, 3 the last token. A model that was not trained to embed
/// says nothing, or 0. One that does it in another way still generates.
fn pooling(keys: &Keys<'_>) -> Result<Option<Pooling>, EngineError> {
    Ok(match keys.count("pooling_type", 0..=u64::MAX)? {
        None | Some(0 | 1) => Some(Pooling::Mean),
        Some(3) => Some(Pooling::Last),
        Some(_) => None,
    })
}

fn head_dim(keys: &Keys<'_>, dim: usize, heads: usize) -> Result<usize, EngineError> {
    let key = keys.count("attention.key_length", 1..=1 << 12)?;
    let value = keys.count("attention.value_length", 1..=1 << 12)?;
    if key.is_none() && !dim.is_multiple_of(heads) {
        return Err(EngineError::Model(format!(
            "{} is {heads}; it must divide embedding_length, which is {dim}",
            keys.name("attention.head_count")
        )));
    }
    let head_dim = key.unwrap_or(dim / heads);
    if value.unwrap_or(head_dim) != head_dim {
        return Err(EngineError::Model(format!(
            "{} differs from attention.key_length, which is not supported",
            keys.name("attention.value_length")
        )));
    }
    if !head_dim.is_multiple_of(16) || head_dim > 256 {
        return Err(EngineError::Model(format!(
            "{} makes heads {head_dim} wide; supported are multiples of 16 up to 256",
            keys.name("attention.key_length")
        )));
    }
    Ok(head_dim)
}

/// Rows of the embedding, which must be as many as there are tokens.
fn vocabulary(file: &Gguf) -> Result<usize, EngineError> {
    let rows = file
        .tensors()
        .iter()
        .find(|t| t.name == "token_embd.weight")
        .ok_or_else(|| EngineError::Model("the file lacks the tensor token_embd.weight".into()))?
        .dims
        .get(1)
        .copied()
        .unwrap_or(1);
    if let Some(Value::Strings(tokens)) = file.metadata().get("tokenizer.ggml.tokens")
        && tokens.len() != rows
    {
        return Err(EngineError::Model(format!(
            "tokenizer.ggml.tokens has {} entries, but token_embd.weight has {rows} rows",
            tokens.len()
        )));
    }
    Ok(rows)
}

/// The rotary embedding with its scaling folded into the frequencies.
///
/// Sources: Su et al. (arXiv 2104.09864); linear position interpolation, Chen et al. (arXiv 2306.15595);
/// `YaRN`, Peng et al. (arXiv 2309.00071); `rope_freqs.weight` holds Llama 3.1's divisors.
fn rope(file: &Gguf, keys: &Keys<'_>, head_dim: usize, ctx_train: usize) -> Result<Rope, EngineError> {
    let style = if keys.architecture == "llama" { RopeStyle::Adjacent } else { RopeStyle::SplitHalf };
    let width = keys.count("rope.dimension_count", 2..=head_dim as u64)?.unwrap_or(head_dim);
    if width % 2 != 0 {
        return Err(EngineError::Model(format!(
            "{} is {width}; it must be even",
            keys.name("rope.dimension_count")
        )));
    }
    let base = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    if !(1.0..=1e12).contains(&base) {
        return Err(EngineError::Model(format!(
            "{} is {base}; it must be 1 to 1e12",
            keys.name("rope.freq_base")
        )));
    }
    let mut frequencies: Vec<f64> =
        (0..width / 2).map(|i| base.powf(-2.0 * i as f64 / width as f64)).collect();
    for (frequency, divisor) in frequencies.iter_mut().zip(divisors(file, width / 2)?) {
        *frequency /= f64::from(divisor);
    }

    let kind = keys.metadata.str(&keys.name("rope.scaling.type"))?.unwrap_or("linear").to_owned();
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.number("rope.scale_linear")?,
    };
    let factor = factor.filter(|&f| f != 0.0).unwrap_or(1.0);
    if !(1e-3..=1e6).contains(&factor) {
        let name = keys.name("rope.scaling.factor");
        return Err(EngineError::Model(format!("{name} is {factor}; it must be 0.001 to 1000000")));
    }
    let mut magnitude = keys.number("rope.scaling.attn_factor")?.filter(|&f| f != 0.0).unwrap_or(1.0);
    match kind.as_str() {
        "none" => {}
        "linear" => {
            for frequency in &mut frequencies {
                *frequency /= factor;
            }
        }
        "yarn" => {
            let original =
                keys.count("rope.scaling.original_context_length", 1..=1 << 26)?.unwrap_or(ctx_train) as f64;
            yarn(&mut frequencies, width, base, factor, original);
            magnitude *= 1.0 + 0.1 * factor.ln();
        }
        other => {
            return Err(EngineError::Model(format!(
                "{} is {other:?}; supported are none, linear, yarn",
                keys.name("rope.scaling.type")
            )));
        }
    }
    let inverse_frequencies = frequencies.iter().map(|&f| f as f32).collect();
    Ok(Rope { style, inverse_frequencies, magnitude: magnitude as f32 })
}

/// `rope_freqs.weight` when the file has it: one divisor a pair.
fn divisors(file: &Gguf, pairs: usize) -> Result<Vec<f32>, EngineError> {
    let Some(tensor) = file.tensor("rope_freqs.weight") else { return Ok(vec![1.0; pairs]) };
    let mut values = vec![0.0; tensor.cols() * tensor.rows()];
    dequantize(tensor.dtype(), tensor.bytes(), &mut values);
    if values.len() != pairs || values.iter().any(|v| !v.is_finite() || *v <= 0.0) {
        return Err(EngineError::Model(format!("rope_freqs.weight must hold {pairs} positive numbers")));
    }
    Ok(values)
}

/// Blends interpolated and original frequencies: fast pairs keep theirs, slow ones are interpolated.
fn yarn(frequencies: &mut [f64], width: usize, base: f64, factor: f64, original: f64) {
    // Pairs that turn 32 times (beta_fast) within the original context, down to once (beta_slow).
    let pair_turning = |turns: f64| width as f64 * (original / (turns * 2.0 * PI)).ln() / (2.0 * base.ln());
    let low = pair_turning(32.0).floor().max(0.0);
    let high = pair_turning(1.0).ceil().min(width as f64 - 1.0);
    for (i, frequency) in frequencies.iter_mut().enumerate() {
        let kept = 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
        *frequency = *frequency / factor * (1.0 - kept) + *frequency * kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yarn_keeps_fast_pairs_and_interpolates_slow_ones() {
        let base = 1e6f64;
        let original: Vec<f64> = (0..64).map(|i| base.powf(-2.0 * f64::from(i) / 128.0)).collect();
        let mut scaled = original.clone();
        yarn(&mut scaled, 128, base, 4.0, 32768.0);
        assert_eq!(scaled[0], original[0]);
        assert!((scaled[63] - original[63] / 4.0).abs() < 1e-15);
        assert!(scaled.windows(2).all(|w| w[0] > w[1]));
    }
}
