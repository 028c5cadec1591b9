//! What a model needs on a card, from its metadata alone.

use m40llm_engine::{gguf::Gguf, sched::BLOCK_TOKENS};
use serde::Serialize;

const MIB: u64 = 1 << 20;
/// Taken by the driver's context and its code before the first byte of ours.
const DRIVER_BYTES: u64 = 350 * MIB;
/// Tokens in the longest step and sequences in the widest one, for the scratch estimate.
const STEP_TOKENS: u64 = 512;
const STEP_SEQUENCES: u64 = 16;
/// Contexts that the plan lists, as far as the model goes.
const CONTEXTS: [u64; 8] = [2048, 4096, 8192, 16384, 32768, 65536, 131_072, 262_144];

/// A model's dimensions, as far as memory depends on them.
#[derive(Debug, Serialize)]
pub(crate) struct Dimensions {
    /// Context the model was trained for.
    pub context_length: u64,
    /// Width of the residual stream.
    pub embedding_length: u64,
    /// Transformer layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads of the first layer.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Width of the feed-forward's inside.
    pub feed_forward_length: u64,
    /// Rows of the embedding.
    pub vocab_size: u64,
}

/// The plan of `inspect`.
#[derive(Debug, Serialize)]
pub(crate) struct Plan {
    /// Tensor data.
    pub weights_bytes: u64,
    /// Estimate of activations and logits of the largest step.
    pub scratch_bytes: u64,
    /// Keys and values of one token.
    pub kv_bytes_per_token: PerKvType,
    /// One entry a card.
    pub cards: Vec<Card>,
}

/// A number for each `--kv-type` that a card would use.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct PerKvType {
    /// Half precision.
    pub f16: u64,
    /// 8-bit blocks of 32 with an f16 scale.
    pub q8: u64,
}

/// What fits on a card.
#[derive(Debug, Serialize)]
pub(crate) struct Card {
    /// Its name on the box.
    pub gigabytes: u64,
    /// What is left of it with ECC on (one sixteenth) and the driver's context loaded.
    pub usable_bytes: u64,
    /// The weights, the scratch and one block of keys and values fit.
    pub fits: bool,
    /// Tokens that the cache may hold beside the weights, over all sequences.
    pub cache_tokens: PerKvType,
    /// The longest one sequence may get: the cache's tokens, at most the model's own context.
    pub max_context: PerKvType,
    /// Bytes in all at some lengths of one sequence.
    pub contexts: Vec<AtContext>,
}

/// A line of the plan.
#[derive(Debug, Serialize)]
pub(crate) struct AtContext {
    /// Tokens.
    pub context: u64,
    /// Weights, scratch, keys and values.
    pub total_bytes: PerKvType,
    /// Whether that is on the card.
    pub fits_f16: bool,
    /// Whether that is on the card.
    pub fits_q8: bool,
}

impl Dimensions {
    /// Reads and checks them; an error names the key.
    pub(crate) fn read(file: &Gguf) -> anyhow::Result<Self> {
        let metadata = file.metadata();
        let architecture = metadata.str("general.architecture")?;
        let architecture =
            architecture.ok_or_else(|| anyhow::anyhow!("the key general.architecture is missing"))?;
        let optional = |name: &str| -> anyhow::Result<Option<u64>> {
            let key = format!("{architecture}.{name}");
            let value = metadata.u64s(&key)?.and_then(|list| list.first().copied());
            match value {
                Some(v) if !(1..=1 << 30).contains(&v) => {
                    anyhow::bail!("the key {key} is {v}: 1 to 2^30 is allowed")
                }
                value => Ok(value),
            }
        };
        let required = |name: &str| {
            optional(name)?.ok_or_else(|| anyhow::anyhow!("the key {architecture}.{name} is missing"))
        };
        let embedding_length = required("embedding_length")?;
        let heads = required("attention.head_count")?;
        let embedding = file.tensor("token_embd.weight");
        let embedding =
            embedding.ok_or_else(|| anyhow::anyhow!("the tensor token_embd.weight is missing"))?;
        Ok(Self {
            context_length: required("context_length")?,
            embedding_length,
            layers: required("block_count")?,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: optional("attention.key_length")?.unwrap_or(embedding_length / heads).max(1),
            feed_forward_length: required("feed_forward_length")?,
            vocab_size: embedding.rows() as u64,
        })
    }

    /// Bytes of one token's keys and values: f16 takes 64 bytes for 32 numbers, q8 takes 34. Dimensions
    /// are below 2^30 each, so u128 holds every product; what exceeds u64 saturates.
    pub(crate) fn kv_bytes_per_token(&self) -> PerKvType {
        let numbers = 2 * u128::from(self.layers) * u128::from(self.kv_heads) * u128::from(self.head_dim);
        PerKvType { f16: saturate(numbers * 2), q8: saturate(numbers * 34 / 32) }
    }

    fn scratch_bytes(&self) -> u64 {
        let wide = |n: u64| u128::from(n);
        let attention = (wide(self.heads) * 2 + wide(self.kv_heads) * 2) * wide(self.head_dim);
        let per_token = wide(self.embedding_length) * 3 + attention + wide(self.feed_forward_length) * 3;
        let logits = wide(STEP_SEQUENCES) * wide(self.vocab_size);
        saturate((per_token * wide(STEP_TOKENS) + logits) * 4)
    }
}

fn saturate(n: u128) -> u64 {
    n.try_into().unwrap_or(u64::MAX)
}

impl Plan {
    /// For cards of 12 and 24 GB.
    pub(crate) fn new(dimensions: &Dimensions, weights_bytes: u64) -> Self {
        let scratch_bytes = dimensions.scratch_bytes();
        let kv = dimensions.kv_bytes_per_token();
        let fixed = weights_bytes.saturating_add(scratch_bytes);
        let cards = [12, 24].map(|gigabytes| card(gigabytes, fixed, kv, dimensions.context_length));
        Self { weights_bytes, scratch_bytes, kv_bytes_per_token: kv, cards: cards.into() }
    }
}

fn card(gigabytes: u64, fixed: u64, kv: PerKvType, context_length: u64) -> Card {
    let usable_bytes = gigabytes * 1024 * MIB / 16 * 15 - DRIVER_BYTES;
    let block = BLOCK_TOKENS as u64;
    let tokens = |per_token: u64| usable_bytes.saturating_sub(fixed) / per_token.max(1) / block * block;
    let cache_tokens = PerKvType { f16: tokens(kv.f16), q8: tokens(kv.q8) };
    let total = |context: u64, per_token: u64| fixed.saturating_add(per_token.saturating_mul(context));
    let lengths = CONTEXTS.into_iter().filter(|c| *c < context_length).chain([context_length]);
    let contexts = lengths.map(|context| {
        let total_bytes = PerKvType { f16: total(context, kv.f16), q8: total(context, kv.q8) };
        let [fits_f16, fits_q8] = [total_bytes.f16, total_bytes.q8].map(|bytes| bytes <= usable_bytes);
        AtContext { context, total_bytes, fits_f16, fits_q8 }
    });
    Card {
        gigabytes,
        usable_bytes,
        fits: cache_tokens.f16 > 0,
        max_context: PerKvType {
            f16: cache_tokens.f16.min(context_length),
            q8: cache_tokens.q8.min(context_length),
        },
        cache_tokens,
        contexts: contexts.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3 8B.
    const LLAMA: Dimensions = Dimensions {
        context_length: 8192,
        embedding_length: 4096,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        feed_forward_length: 14336,
        vocab_size: 128_256,
    };

    #[test]
    fn llama_3_8b_as_q4_fits_a_12_gb_card_and_as_f16_does_not() {
        let plan = Plan::new(&LLAMA, 4_920_000_000);
        assert_eq!(plan.kv_bytes_per_token.f16, 128 * 1024);
        assert!(plan.cards[0].fits && plan.cards[1].fits);
        assert_eq!(plan.cards[0].max_context.f16, 8192);
        let plan = Plan::new(&LLAMA, 16_060_000_000);
        assert!(!plan.cards[0].fits && plan.cards[1].fits);
        assert_eq!(plan.cards[0].max_context.f16, 0);
    }

    #[test]
    fn what_the_plan_calls_fitting_is_what_it_adds_up() {
        for weights in [1, 4_000_000_000, 10_000_000_000, u64::MAX] {
            for card in Plan::new(&LLAMA, weights).cards {
                for at in card.contexts {
                    assert_eq!(at.fits_f16, at.total_bytes.f16 <= card.usable_bytes);
                    assert_eq!(at.fits_q8, at.total_bytes.q8 <= card.usable_bytes);
                }
            }
        }
    }

    #[test]
    fn absurd_dimensions_saturate() {
        let top = 1 << 30;
        let absurd = Dimensions {
            context_length: top,
            embedding_length: top,
            layers: top,
            heads: top,
            kv_heads: top,
            head_dim: top,
            feed_forward_length: top,
            vocab_size: top,
        };
        let plan = Plan::new(&absurd, u64::MAX);
        assert!(!plan.cards[1].fits);
    }
}
