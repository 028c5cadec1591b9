//! What a model needs on a card, from its metadata alone.

use m40llm_engine::{
    KvType, backend::Shape, memory::kv_bytes_per_token, model::ModelConfig, sched::BLOCK_TOKENS,
};
use serde::Serialize;

const MIB: u64 = 1 << 20;
/// Taken by the driver's context and its code before the first byte of ours.
const DRIVER_BYTES: u64 = 350 * MIB;
/// Tokens in the longest step and sequences in the widest one, for the scratch estimate.
const STEP_TOKENS: usize = 512;
const STEP_SEQUENCES: usize = 16;
/// Contexts that the plan lists, as far as the model goes.
const CONTEXTS: [u64; 8] = [2048, 4096, 8192, 16384, 32768, 65536, 131_072, 262_144];

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

/// Activations of the largest step, and its logits. The engine bounds each dimension when it reads them,
/// so that u64 holds every product.
fn scratch_bytes(shape: &Shape) -> u64 {
    let attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let per_token = 3 * shape.dim + attention + 3 * shape.ffn_dim;
    ((per_token * STEP_TOKENS + shape.vocab * STEP_SEQUENCES) * 4) as u64
}

impl Plan {
    /// For cards of 12 and 24 GB.
    pub(crate) fn new(model: &ModelConfig, weights_bytes: u64) -> Self {
        let scratch_bytes = scratch_bytes(&model.shape);
        let kv_bytes = |kv_type| kv_bytes_per_token(model, kv_type) as u64;
        let kv = PerKvType { f16: kv_bytes(KvType::F16), q8: kv_bytes(KvType::Q8) };
        let fixed = weights_bytes.saturating_add(scratch_bytes);
        let cards = [12, 24].map(|gigabytes| card(gigabytes, fixed, kv, model.ctx_train as u64));
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
    use m40llm_engine::backend::{Rope, RopeStyle};

    use super::*;

    fn llama_3_8b() -> ModelConfig {
        let rope = Rope { style: RopeStyle::Adjacent, inverse_frequencies: vec![1.0; 64], magnitude: 1.0 };
        let shape = Shape {
            layers: 32,
            dim: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn_dim: 14336,
            vocab: 128_256,
            norm_epsilon: 1e-5,
            rope,
        };
        ModelConfig {
            architecture: "llama".into(),
            ctx_train: 8192,
            pooling: Some(m40llm_engine::Pooling::Mean),
            shape,
        }
    }

    #[test]
    fn llama_3_8b_as_q4_fits_a_12_gb_card_and_as_f16_does_not() {
        let plan = Plan::new(&llama_3_8b(), 4_920_000_000);
        assert_eq!(plan.kv_bytes_per_token.f16, 128 * 1024);
        assert!(plan.cards[0].fits && plan.cards[1].fits);
        assert_eq!(plan.cards[0].max_context.f16, 8192);
        let plan = Plan::new(&llama_3_8b(), 16_060_000_000);
        assert!(!plan.cards[0].fits && plan.cards[1].fits);
        assert_eq!(plan.cards[0].max_context.f16, 0);
    }

    #[test]
    fn what_the_plan_calls_fitting_is_what_it_adds_up() {
        for weights in [1, 4_000_000_000, 10_000_000_000, u64::MAX] {
            for card in Plan::new(&llama_3_8b(), weights).cards {
                for at in card.contexts {
                    assert_eq!(at.fits_f16, at.total_bytes.f16 <= card.usable_bytes);
                    assert_eq!(at.fits_q8, at.total_bytes.q8 <= card.usable_bytes);
                }
            }
        }
    }
}
