//! Whether a model fits a card, and what would.

use super::{DeviceInfo, gigabytes};
use crate::{error::EngineError, sched::BLOCK_TOKENS};

/// Left alone: the driver loads code, and grows its own tables, after we have asked what is free.
pub const RESERVE_BYTES: u64 = 192 << 20;

/// What a model asks of a device.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Weights, as they are stored there.
    pub weights: u64,
    /// Activations and logits of the largest step, and workspaces.
    pub scratch: u64,
    /// Keys and values of one token, over all layers.
    pub token_bytes: u64,
    /// The longest sequence asked for; `None`: whatever fits.
    pub ctx_size: Option<usize>,
}

/// Bytes left for keys and values once the rest is there; an error says what is missing and what would fit.
pub fn room(device: &DeviceInfo, free: u64, need: &Need) -> Result<u64, EngineError> {
    let fixed = need.weights.saturating_add(need.scratch).saturating_add(RESERVE_BYTES);
    let left = free.saturating_sub(fixed);
    let tokens = left / need.token_bytes.max(1) / BLOCK_TOKENS as u64 * BLOCK_TOKENS as u64;
    let there = || {
        let taken = device.total_memory.saturating_sub(free);
        format!(
            "{} of {} are free on {device}, {} are taken",
            gigabytes(free),
            gigabytes(device.total_memory),
            gigabytes(taken)
        )
    };
    if tokens == 0 {
        return Err(EngineError::Backend(format!(
            "the model needs {} (weights {}, activations and the driver {}) and keys and values; {}: end what else runs \
             there, or take a smaller quantisation, a larger card or --backend cpu",
            gigabytes(fixed),
            gigabytes(need.weights),
            gigabytes(fixed - need.weights),
            there()
        )));
    }
    match need.ctx_size {
        Some(asked) if asked as u64 > tokens => Err(EngineError::Config(format!(
            "ctx-size {asked} needs {} for keys and values beside {} for the model; {}: --ctx-size {tokens} would fit, or \
             a smaller --kv-type",
            gigabytes(need.token_bytes.saturating_mul(asked as u64)),
            gigabytes(fixed),
            there()
        ))),
        _ => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::card;

    const GB: u64 = 1_000_000_000;

    fn need(weights: u64, ctx_size: Option<usize>) -> Need {
        Need { weights, scratch: GB / 10, token_bytes: 131_072, ctx_size }
    }

    #[test]
    fn what_fits_is_what_is_free_less_the_model_and_the_reserve() {
        let m40 = card(0, "Tesla M40", (5, 2));
        let left = room(&m40, 11 * GB, &need(5 * GB, Some(8192))).expect("it fits");
        assert_eq!(left, 11 * GB - 5 * GB - GB / 10 - RESERVE_BYTES);
    }

    #[test]
    fn a_context_that_does_not_fit_is_told_the_one_that_does() {
        let m40 = card(0, "Tesla M40", (5, 2));
        let error = room(&m40, 11 * GB, &need(10 * GB, Some(8192))).expect_err("too long");
        assert!(matches!(error, EngineError::Config(_)));
        let words = error.to_string();
        let fits =
            words.split("--ctx-size ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<usize>().ok());
        let fits = fits.expect(&words);
        assert!(room(&m40, 11 * GB, &need(10 * GB, Some(fits))).is_ok());
        assert!(room(&m40, 11 * GB, &need(10 * GB, Some(fits + 1))).is_err());
    }

    #[test]
    fn a_model_that_does_not_fit_says_how_much_is_missing_and_what_to_do() {
        let m40 = card(0, "Tesla M40", (5, 2));
        for weights in [11 * GB, u64::MAX / 2] {
            let words = room(&m40, 11 * GB, &need(weights, None)).expect_err("too large").to_string();
            assert!(words.contains("11.0 GB of 12.1 GB are free on device 0 (Tesla M40)"), "{words}");
            assert!(words.contains("smaller quantisation") && words.lines().count() == 1, "{words}");
        }
    }
}
