//! How many tokens of prompts may join a step in which others decode: as many as the measured speed of steps
//! allows without a gap in their streams.
//!
//! A step with prompts takes so much by itself, and so much for each thing in it: [`Load`] counts them, and their
//! [`Costs`] are learned from every such step. What a token costs grows with all that it looks back on, so a prompt
//! gets smaller pieces as it goes on, and the first piece of the next one is not judged by the last of this.
//! Steps that only decode are measured apart: few columns take other kernels than many.

use std::f64::consts::LN_2;

use super::BLOCK_TOKENS;

/// A step with prompts may take so many times what it would take without. A third of the room up to four times is
/// left for what no model foresees: with six streams, one slow step in a hundred is one gap in a hundred of each.
pub(super) const STRETCH: f64 = 3.0;
/// But no longer than this, in seconds, as far as decoding leaves room for it.
pub(super) const LONGEST: f64 = 0.24;
/// Tokens of prompts that always may join: without them, prompts would never end on a slow machine.
pub(super) const LEAST: usize = 8;
/// Variance of a step's time, of a cost from one step to the next, and of a guess; all as logarithms.
const NOISE: f64 = 0.05 * 0.05;
const DRIFT: f64 = 0.005 * 0.005;
const DOUBT: f64 = 1.0;
/// The largest error that is believed, as a logarithm: one hiccup says little.
const OUTLIER: f64 = 0.3;
/// The weight of a new measurement of a step without prompts, and the largest error of one that is believed: so small that
/// it is the median that is followed, which hiccups do not move.
const DECODE_RATE: f64 = 0.3;
const DECODE_OUTLIER: f64 = 0.05;
/// Steps of a width after which its estimate follows the median.
const DECODE_START: u32 = 8;

/// What a step's time depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that decode.
    pub decoding: usize,
    /// Tokens that those look back on, all together.
    pub context: usize,
    /// Tokens of prompts.
    pub prompt: usize,
    /// Tokens that each of those looks back on, all together.
    pub lookback: usize,
}

impl Load {
    /// Adds a piece of a prompt, with so many tokens before it.
    pub fn read(&mut self, tokens: usize, before: usize) {
        self.prompt += tokens;
        self.lookback += tokens * before + tokens * tokens.saturating_sub(1) / 2;
    }

    fn counts(self) -> [f64; 5] {
        [1.0, self.decoding as f64, self.context as f64, self.prompt as f64, self.lookback as f64]
    }
}

/// Seconds of a step with prompts, of a decoding sequence in it and of a token that it looks back on, of a prompt's token
/// and of a token that that one looks back on.
///
/// Learned by a Kalman filter over the costs' logarithms: they stay positive, and whatever their units, an error is
/// divided by how much each has in the step and how little is known of it.
#[derive(Debug, Clone, Copy)]
struct Costs {
    seconds: [f64; 5],
    /// Covariance of their logarithms.
    doubt: [[f64; 5]; 5],
}

impl Costs {
    /// Before anything is known of a machine, in units of a prompt's token: about what most have in common. Reading the
    /// weights once takes as long as some tokens' arithmetic.
    const GUESS: [f64; 5] = [16.0, 2.0, 0.002, 1.0, 0.0005];

    /// The guess, on a machine where this took so long.
    fn guess(load: Load, seconds: f64) -> Self {
        let doubt = std::array::from_fn(|i| std::array::from_fn(|j| if i == j { DOUBT } else { 0.0 }));
        let mut costs = Self { seconds: Self::GUESS, doubt };
        let unit = seconds / costs.of(load);
        costs.seconds = costs.seconds.map(|cost| cost * unit);
        costs
    }

    fn of(&self, load: Load) -> f64 {
        self.seconds.iter().zip(load.counts()).map(|(cost, count)| cost * count).sum()
    }

    fn learn(&mut self, load: Load, seconds: f64) {
        let expected = self.of(load);
        let error = (seconds / expected).ln().clamp(-OUTLIER, OUTLIER);
        let counts = load.counts();
        let parts: [f64; 5] = std::array::from_fn(|i| self.seconds[i] * counts[i] / expected);
        let doubt: [f64; 5] = self.doubt.map(|row| row.iter().zip(parts).map(|(d, part)| d * part).sum());
        let known = NOISE + doubt.iter().zip(parts).map(|(d, part)| d * part).sum::<f64>();
        for i in 0..5 {
            // Logarithms are straight for small errors only: no cost changes by more than half or double at once.
            self.seconds[i] *= (doubt[i] / known * error).clamp(-LN_2, LN_2).exp();
            for j in 0..5 {
                self.doubt[i][j] -= doubt[i] * doubt[j] / known;
            }
            self.doubt[i][i] += DRIFT;
        }
        // What is not in any step for long is doubted more and more, but never more than at first.
        for i in 0..5 {
            let shrink = (DOUBT / self.doubt[i][i]).sqrt().min(1.0);
            for j in 0..5 {
                self.doubt[i][j] *= shrink;
                self.doubt[j][i] *= shrink;
            }
        }
    }
}

/// A step without prompts, as it was measured.
#[derive(Debug, Clone, Copy)]
struct Decode {
    seconds: f64,
    /// Steps that it was measured in.
    steps: u32,
    /// Tokens that its sequences looked back on then.
    context: usize,
}

/// What steps have taken, in seconds.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Of steps with prompts; none before the first.
    costs: Option<Costs>,
    /// Steps without prompts by the number of their sequences, where there were any.
    decode: Vec<Option<Decode>>,
}

/// How much of prompts may join a step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    pub(super) tokens: usize,
    pub(super) seconds: f64,
}

impl Pace {
    /// For steps of up to `sequences` sequences.
    pub fn new(sequences: usize) -> Self {
        Self { costs: None, decode: vec![None; sequences + 1] }
    }

    /// A step has taken `seconds`.
    pub fn observe(&mut self, load: Load, seconds: f64) {
        // A clock that stood still has measured nothing.
        if seconds <= 0.0 || load.decoding >= self.decode.len() {
            return;
        }
        if load.prompt > 0 {
            match &mut self.costs {
                Some(costs) => costs.learn(load, seconds),
                None => self.costs = Some(Costs::guess(load, seconds)),
            }
        } else if load.decoding > 0 {
            let steps = self.decode[load.decoding].map_or(0, |known| known.steps);
            let known = if steps == 0 { seconds } else { self.decode_seconds(load) };
            let error = (seconds / known).ln().clamp(-DECODE_OUTLIER, DECODE_OUTLIER);
            // The first steps of a width may load kernels and record graphs: the shortest of them is what is to come.
            let is_start = steps < DECODE_START && seconds < known;
            let seconds = if is_start { seconds } else { known * (DECODE_RATE * error).exp() };
            self.decode[load.decoding] =
                Some(Decode { seconds, steps: steps.saturating_add(1), context: load.context });
            // Other kernels may do it in less time than with prompts, but not in more.
            if let Some(costs) = self.costs.as_mut().filter(|costs| costs.of(load) < seconds) {
                costs.learn(load, seconds);
            }
        }
    }

    /// Seconds of a step with prompts; 0 before the first.
    pub fn seconds(&self, load: Load) -> f64 {
        self.costs.map_or(0.0, |costs| costs.of(load))
    }

    /// Seconds of a step that decodes as this one does, and reads nothing; 0 when nothing is known.
    pub fn decode_seconds(&self, load: Load) -> f64 {
        let Load { decoding, context, .. } = load;
        let decoding = decoding.min(self.decode.len() - 1);
        if decoding == 0 {
            return 0.0;
        }
        if let Some(measured) = self.decode[decoding] {
            // Those that looked back on more then had more to do. What they have grown by since is not counted: a step
            // beside prompts is held against those before the prompts came.
            let each = self.costs.map_or(0.0, |costs| costs.seconds[2]);
            let more = each * measured.context.saturating_sub(context) as f64;
            return (measured.seconds - more).max(measured.seconds / 2.0);
        }
        self.seconds(Load { prompt: 0, lookback: 0, ..load })
    }

    /// The longest that a step may take in which these decode and prompts are read.
    pub fn limit(&self, load: Load) -> f64 {
        (STRETCH * self.decode_seconds(load)).min(LONGEST)
    }

    /// What may join the sequences that decode in a step of at most `most` more tokens.
    pub(super) fn budget(&self, load: Load, most: usize) -> Budget {
        if load.decoding == 0 {
            return Budget { tokens: most, seconds: f64::INFINITY };
        }
        if self.costs.is_none() {
            return Budget { tokens: most.min(BLOCK_TOKENS), seconds: f64::INFINITY };
        }
        let decode = self.seconds(Load { prompt: 0, lookback: 0, ..load });
        let seconds = (self.limit(load) - decode).max(self.prompt_seconds(LEAST, 0));
        Budget { tokens: most, seconds }
    }

    /// Seconds that a piece of a prompt takes, with so many tokens before it; 0 before the first.
    pub fn prompt_seconds(&self, tokens: usize, before: usize) -> f64 {
        let mut load = Load::default();
        load.read(tokens, before);
        self.seconds(load) - self.seconds(Load::default())
    }

    /// The longest piece of a prompt that takes no longer than this, with so many tokens before it.
    pub(super) fn piece(&self, seconds: f64, before: usize) -> usize {
        let Some(Costs { seconds: [.., token, lookback], .. }) = self.costs.filter(|_| seconds.is_finite())
        else {
            return usize::MAX;
        };
        // Of token * n + lookback * (before * n + n * (n - 1) / 2) = seconds.
        let each = token + lookback * (before as f64 - 0.5);
        let tokens = 2.0 * seconds / (each + (each * each + 2.0 * lookback * seconds).sqrt());
        tokens as usize
    }

    /// Tokens of prompts that could be computed while these decode.
    pub(super) fn decode_worth(&self, load: Load) -> f64 {
        let token = self.prompt_seconds(1, 0);
        if token == 0.0 { load.decoding as f64 } else { self.decode_seconds(load) / token }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A machine whose steps take so long, in the order of [`Costs`]; and less by a share of the first where nothing
    /// is read.
    #[derive(Debug, Clone, Copy)]
    struct Machine {
        costs: [f64; 5],
        saved: f64,
    }

    impl Machine {
        fn new(base: f64, sequence: f64, token: f64) -> Self {
            Self { costs: [base, sequence, 0.0, token, 0.0], saved: 0.0 }
        }

        fn step(&self, load: Load, noise: f64) -> f64 {
            let saved = if load.prompt == 0 { self.saved * self.costs[0] } else { 0.0 };
            (Costs { seconds: self.costs, doubt: [[0.0; 5]; 5] }.of(load) - saved) * noise
        }
    }

    fn decoding(decoding: usize, context: usize) -> Load {
        Load { decoding, context, ..Load::default() }
    }

    /// As much of a prompt as may join.
    fn beside(pace: &Pace, decode: Load, before: usize) -> Load {
        let budget = pace.budget(decode, 512);
        let mut load = decode;
        load.read(pace.piece(budget.seconds, before).clamp(LEAST, budget.tokens), before);
        load
    }

    fn machine() -> impl Strategy<Value = Machine> {
        // Reading the weights takes as long as the arithmetic of five to thirty tokens.
        let costs = (0.001f64..0.04, 0.02f64..0.3, 0.03f64..0.2, 0.0003f64..0.002, 0.0f64..0.3);
        costs.prop_map(|(base, sequence, token, lookback, saved)| {
            let (sequence, token) = (base * sequence, base * token);
            Machine { costs: [base, sequence, sequence * lookback, token, token * lookback], saved }
        })
    }

    /// Below the four times that streams are promised, and in seconds; [`STRETCH`] and [`LONGEST`] leave room to them for
    /// noise and errors.
    const PROMISE: (f64, f64) = (3.9, 0.2875);

    proptest! {
        /// On machines of all speeds: prompts get what the bound allows and no more, from the first to the last token of
        /// a long one and at the beginning of the next.
        #[test]
        fn steps_stay_within_the_stretch(
            machine in machine(),
            sequences in 1usize..17,
            noise in proptest::collection::vec(0.9f64..1.1, 64),
        ) {
            let mut pace = Pace::new(16);
            let mut noise = noise.iter().copied().cycle();
            let mut observe = |pace: &mut Pace, load: Load| {
                let noise = noise.next().unwrap();
                let took = machine.step(load, noise);
                pace.observe(load, took);
                (took, noise)
            };
            // The streams' own prompts, a long one, then the streams' steps alone.
            for tokens in [40, 240, 512] {
                let mut load = Load::default();
                load.read(tokens, 0);
                observe(&mut pace, load);
            }
            let mut context = 40 * sequences;
            for _ in 0..50 {
                observe(&mut pace, decoding(sequences, context));
                context += sequences;
            }
            let alone = machine.step(decoding(sequences, context), 1.0);
            for round in 0..3 {
                let (mut before, mut step) = (0, 0);
                while before < 3000 {
                    let load = beside(&pace, decoding(sequences, context), before);
                    let (took, noise) = observe(&mut pace, load);
                    let bound = (alone * STRETCH).min(LONGEST);
                    let known = round > 0 || step >= 20;
                    if known && load.prompt > LEAST {
                        let most = (alone * PROMISE.0).min(PROMISE.1.max(alone * 1.15));
                        prop_assert!(took <= most, "{step} at {before}: {took} beside {alone}, {load:?}");
                    }
                    if round > 0 && load.prompt < 512 && load.prompt > 4 * LEAST {
                        prop_assert!(took >= bound * 0.6 * noise, "{step} at {before}: {took} of {bound} used, {load:?}");
                    }
                    (before, step) = (before + load.prompt, step + 1);
                }
            }
        }
    }

    #[test]
    fn a_machine_that_slows_down_is_followed_and_a_hiccup_is_not() {
        let (fast, slow) = (Machine::new(0.01, 0.001, 0.001), Machine::new(0.01, 0.001, 0.003));
        let mut pace = Pace::new(16);
        let run = |pace: &mut Pace, machine: &Machine, steps: usize| {
            for _ in 0..steps {
                for load in [decoding(4, 0), beside(pace, decoding(4, 0), 0)] {
                    pace.observe(load, machine.step(load, 1.0));
                }
            }
            beside(pace, decoding(4, 0), 0)
        };
        let before = run(&mut pace, &fast, 50);
        assert!((24..=32).contains(&before.prompt), "{before:?}");
        pace.observe(before, 1.0);
        assert!(beside(&pace, decoding(4, 0), 0).prompt >= before.prompt - LEAST);
        let after = run(&mut pace, &slow, 50);
        assert!((8..=10).contains(&after.prompt), "{after:?}");
    }

    #[test]
    fn a_first_step_that_loads_kernels_is_soon_forgotten() {
        let machine = Machine::new(0.01, 0.001, 0.001);
        let mut pace = Pace::new(16);
        pace.observe(decoding(4, 0), 1.0);
        for _ in 0..3 {
            pace.observe(decoding(4, 0), machine.step(decoding(4, 0), 1.0));
        }
        let known = pace.decode_seconds(decoding(4, 0));
        assert!((known / machine.step(decoding(4, 0), 1.0) - 1.0).abs() < 0.01, "{known}");
    }

    #[test]
    fn sequences_that_look_back_further_leave_less_room_and_more_time() {
        let machine = Machine { costs: [0.006, 0.0005, 1.4e-6, 0.00026, 2.7e-7], saved: 0.0 };
        let mut pace = Pace::new(16);
        for (context, before) in (0..600).map(|i| (1000 + 5 * i, 10 * i % 3000)) {
            let load = beside(&pace, decoding(6, context), before);
            pace.observe(load, machine.step(load, 1.0));
            pace.observe(decoding(6, context), machine.step(decoding(6, context), 1.0));
        }
        let seconds = |context| pace.decode_seconds(decoding(6, context));
        let expected = |context| machine.step(decoding(6, context), 1.0);
        for context in [500, 2000, 3995] {
            assert!(
                (seconds(context) / expected(context) - 1.0).abs() < 0.2,
                "{context}: {}",
                seconds(context)
            );
        }
        assert_eq!(seconds(8000), seconds(3995), "what they have grown by is not counted");
        let piece = |before| beside(&pace, decoding(6, 4000), before).prompt;
        assert!(piece(0) > 2 * piece(3000), "{} and {}", piece(0), piece(3000));
    }

    #[test]
    fn nothing_measured_means_a_block_and_nobody_decoding_means_all() {
        let mut pace = Pace::new(16);
        assert_eq!(pace.budget(Load::default(), 512).tokens, 512);
        assert_eq!(pace.budget(decoding(3, 9), 512).tokens, BLOCK_TOKENS);
        assert_eq!(pace.decode_seconds(decoding(3, 9)), 0.0);
        pace.observe(decoding(2, 9), 0.01);
        assert!((pace.decode_seconds(decoding(2, 9)) - 0.01).abs() < 1e-9);
        let mut load = Load::default();
        load.read(512, 0);
        pace.observe(load, 100.0);
        assert_eq!(beside(&pace, decoding(2, 9), 0).prompt, LEAST);
    }
}
