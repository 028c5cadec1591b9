//! How many tokens of prompts may join a step in which others decode: as many as the measured speed of steps
//! allows without a gap in their streams.

use super::BLOCK_TOKENS;

/// A step with prompts may take so many times what it would take without.
pub(super) const STRETCH: f64 = 3.4;
/// But no longer than this, in seconds, as far as decoding leaves room for it.
pub(super) const LONGEST: f64 = 0.25;
/// Tokens of prompts that always may join: without them, prompts would never end on a slow machine.
pub(super) const LEAST: usize = 8;
/// The weight of a new measurement on the careful side: a shorter step without prompts, a dearer token of one.
const CAREFUL: f64 = 0.3;
/// And on the other: what is estimated stays near the edge of what was measured, so that most steps keep the bound
/// and not every second one.
const EASY: f64 = 0.05;
/// Prompts read alone go in larger pieces, and cost less a token, than beside others.
const ALONE: f64 = 1.4;
/// A measurement counts as at most so many times what was expected: one hiccup says little.
const OUTLIER: f64 = 2.0;

/// What steps have taken, in seconds: so much for their decoding sequences, and so much for a prompt's token.
#[derive(Debug, Clone)]
pub struct Pace {
    /// By the number of decoding sequences; 0 where nothing was measured.
    decode: Vec<f64>,
    /// Where steps without prompts were measured.
    alone: Vec<bool>,
    /// Whether a prompt's token was measured beside decoding sequences.
    beside: bool,
    /// What a token of a prompt adds; 0 before the first.
    prompt: f64,
    most: usize,
}

impl Pace {
    /// For steps of up to `tokens` tokens and `sequences` sequences.
    pub fn new(tokens: usize, sequences: usize) -> Self {
        Self {
            decode: vec![0.0; sequences + 1],
            alone: vec![false; sequences + 1],
            beside: false,
            prompt: 0.0,
            most: tokens,
        }
    }

    /// A step of `decoding` sequences and `prompt` tokens of others has taken `seconds`.
    pub fn observe(&mut self, decoding: usize, prompt: usize, seconds: f64) {
        if decoding + prompt == 0 || decoding >= self.decode.len() {
            return;
        }
        if prompt == 0 {
            let known = if self.alone[decoding] { self.decode[decoding] } else { seconds };
            self.decode[decoding] = towards(known, seconds, CAREFUL, EASY);
            self.alone[decoding] = true;
            return;
        }
        if decoding == 0 && self.beside {
            return;
        }
        // Reading the weights, which a step of prompts alone does too, is about what one sequence takes.
        let decode = self.decode_seconds(decoding.max(1));
        let sample = (seconds - decode).max(0.05 * seconds) / prompt as f64;
        if decoding == 0 {
            let known = if self.prompt == 0.0 { sample * ALONE } else { self.prompt };
            self.prompt = towards(known, sample * ALONE, CAREFUL, CAREFUL);
        } else if self.prompt == 0.0 || self.alone[decoding] {
            let known = if self.prompt == 0.0 { sample } else { self.prompt };
            // The first times say more than what was known from prompts alone.
            let easy = if self.beside { EASY } else { CAREFUL };
            self.prompt = towards(known, sample, easy, CAREFUL);
            self.beside = true;
        } else {
            // So many sequences were never measured alone: what was expected was wrong in both parts alike.
            let expected = decode + self.prompt * prompt as f64;
            let error = towards(expected, seconds, CAREFUL, CAREFUL) / expected;
            self.decode[decoding] = decode * error;
            self.prompt *= error;
        }
    }

    /// Tokens of prompts that may join `decoding` sequences.
    pub fn budget(&self, decoding: usize) -> usize {
        if decoding == 0 {
            return self.most;
        }
        let decode = self.decode_seconds(decoding);
        if decode == 0.0 || self.prompt == 0.0 {
            return BLOCK_TOKENS;
        }
        let allowed = ((STRETCH - 1.0) * decode).min(LONGEST - decode).max(0.0);
        let tokens = (allowed / self.prompt) as usize;
        // Whole groups of columns, which matrix products work in.
        (tokens / LEAST * LEAST).clamp(LEAST, self.most)
    }

    /// Tokens of prompts that could be computed while so many sequences decode.
    pub(super) fn decode_worth(&self, decoding: usize) -> f64 {
        if self.prompt == 0.0 { decoding as f64 } else { self.decode_seconds(decoding) / self.prompt }
    }

    /// Seconds of a step in which so many sequences decode; 0 when none was measured.
    pub fn decode_seconds(&self, decoding: usize) -> f64 {
        let decoding = decoding.min(self.decode.len() - 1);
        if self.decode[decoding] > 0.0 || decoding == 0 {
            return self.decode[decoding];
        }
        // Nearest measured: more sequences take no less, and so many times as many no more than so many times as long.
        if let Some(fewer) = self.decode[..decoding].iter().rev().find(|&&s| s > 0.0) {
            return *fewer;
        }
        let more = (decoding + 1..self.decode.len()).find(|&n| self.decode[n] > 0.0);
        more.map_or(0.0, |n| self.decode[n] * decoding as f64 / n as f64)
    }

    /// Seconds that a prompt's token adds to a step; 0 before the first.
    pub fn prompt_seconds(&self) -> f64 {
        self.prompt
    }
}

/// The estimate after one more measurement, which weighs so much where it is lower, and so much where it is higher.
fn towards(known: f64, measured: f64, lower: f64, higher: f64) -> f64 {
    let rate = if measured < known { lower } else { higher };
    known + rate * (measured.min(known * OUTLIER) - known)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A machine whose steps take so long, give or take the noise.
    struct Machine {
        base: f64,
        per_sequence: f64,
        per_token: f64,
    }

    impl Machine {
        fn step(&self, decoding: usize, prompt: usize, noise: f64) -> f64 {
            let decode =
                if decoding > 0 { self.base + self.per_sequence * decoding as f64 } else { self.base };
            (decode + self.per_token * prompt as f64) * noise
        }
    }

    proptest! {
        /// On machines of all speeds: prompts get what the bound allows and no more, whatever came before.
        #[test]
        fn steps_stay_within_the_stretch(
            base in 0.001f64..0.04,
            per_sequence in 0.0001f64..0.002,
            per_token in 0.00001f64..0.004,
            decoding in 1usize..17,
            noise in proptest::collection::vec(0.9f64..1.1, 200),
        ) {
            let machine = Machine { base, per_sequence, per_token };
            let mut pace = Pace::new(512, 16);
            // The streams' own prompts, then their first steps alone.
            for &n in &noise[..decoding] {
                pace.observe(0, 64, machine.step(0, 64, n));
            }
            for &n in &noise[..20] {
                pace.observe(decoding, 0, machine.step(decoding, 0, n));
            }
            let alone = machine.step(decoding, 0, 1.0);
            for (i, &n) in noise.iter().enumerate() {
                let budget = pace.budget(decoding);
                let took = machine.step(decoding, budget, n);
                if i >= 50 && budget > LEAST {
                    prop_assert!(took <= alone * STRETCH * 1.15, "step {i}: {took} beside {alone}, {budget} tokens");
                    prop_assert!(took <= LONGEST.max(alone) * 1.15, "step {i}: {took}");
                }
                if i >= 50 && budget < 512 && budget > 4 * LEAST {
                    let bound = (alone * STRETCH).min(LONGEST);
                    prop_assert!(took >= bound * 0.6 * n, "step {i}: {took} of {bound} used");
                }
                pace.observe(decoding, budget, took);
            }
        }
    }

    #[test]
    fn a_machine_that_slows_down_is_followed_and_a_hiccup_is_not() {
        let (fast, slow) = (
            Machine { base: 0.01, per_sequence: 0.001, per_token: 0.001 },
            Machine { base: 0.01, per_sequence: 0.001, per_token: 0.003 },
        );
        let mut pace = Pace::new(512, 16);
        let run = |pace: &mut Pace, machine: &Machine, steps: usize| {
            for _ in 0..steps {
                pace.observe(4, 0, machine.step(4, 0, 1.0));
                let budget = pace.budget(4);
                pace.observe(4, budget, machine.step(4, budget, 1.0));
            }
            pace.budget(4)
        };
        let before = run(&mut pace, &fast, 50);
        assert!((24..=32).contains(&before), "{before}");
        pace.observe(4, before, 1.0);
        assert!(pace.budget(4) >= before / 2);
        let after = run(&mut pace, &slow, 50);
        assert!((8..=10).contains(&after), "{after}");
    }

    #[test]
    fn nothing_measured_means_a_block_and_nobody_decoding_means_all() {
        let mut pace = Pace::new(512, 16);
        assert_eq!((pace.budget(0), pace.budget(3)), (512, BLOCK_TOKENS));
        pace.observe(2, 0, 0.01);
        assert_eq!((pace.decode_seconds(1), pace.decode_seconds(9)), (0.005, 0.01));
        pace.observe(0, 512, 100.0);
        assert_eq!(pace.budget(2), LEAST);
    }
}
