//! One request's sampler: its parameters, its random numbers, the tokens it has seen.

use std::{cmp::Ordering, collections::HashMap};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::{Mask, SamplingParams};
use crate::backend::{MOST_BEST, Need, Row};

/// Logits this far (in units of the temperature) under the best carry less probability, all of a 10^6
/// vocabulary together, than f32 resolves (10^6 · e^-30 < 2^-23), so nothing is lost by leaving them out.
const NEGLIGIBLE: f32 = 30.0;

/// Chooses one request's tokens. Owns its random stream, so neighbours in a batch cannot disturb it.
#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// Tokens of the prompt and the output, with how often the output holds them.
    seen: HashMap<u32, u32>,
    /// A copy of the row, only where bias, penalties or a mask change it.
    changed: Vec<f32>,
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler for a request whose prompt is `prompt` (the repetition penalty counts it as seen).
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let seed = params.seed.unwrap_or_else(fresh_seed);
        let seen = if params.repetition_penalty == 1.0 {
            HashMap::new()
        } else {
            prompt.iter().map(|&token| (token, 0)).collect()
        };
        let rng = ChaCha8Rng::seed_from_u64(seed);
        Self { params, rng, seen, changed: Vec::new(), candidates: Vec::new() }
    }

    /// How much of a row the next [`Sampler::sample`] looks at.
    pub fn need(&self) -> Need {
        let p = &self.params;
        match p.top_k {
            _ if p.changes_logits() => Need::All,
            _ if p.is_greedy() => Need::Best(1),
            k @ 1..=MOST_BEST => Need::Best(k),
            _ => Need::All,
        }
    }

    /// The next token for a row that holds at least what [`Sampler::need`] says, or `None` when no logit
    /// is a number.
    pub fn sample(&mut self, row: Row<'_>) -> Option<u32> {
        let row = match row {
            Row::Best(best) if self.params.is_greedy() => return best.first().map(|&(id, _)| id),
            Row::Best(best) => {
                let &(_, highest) = best.first()?;
                let floor = self.floor(highest);
                let kept = best.iter().take(self.params.top_k).filter(|&&(_, logit)| logit >= floor);
                self.candidates.clear();
                self.candidates.extend(kept);
                return self.draw(highest);
            }
            Row::All(row) => row,
        };
        if self.params.changes_logits() { self.sample_changed(row, None) } else { self.choose(row) }
    }

    /// As [`Sampler::sample`], from the tokens of `mask` alone.
    pub fn sample_within(&mut self, row: &[f32], mask: &Mask) -> Option<u32> {
        self.sample_changed(row, Some(mask))
    }

    /// Samples from a copy of the row, with bias, penalties and mask.
    fn sample_changed(&mut self, row: &[f32], mask: Option<&Mask>) -> Option<u32> {
        let mut changed = std::mem::take(&mut self.changed);
        changed.clear();
        changed.extend_from_slice(row);
        let adjusts = self.params.changes_logits();
        if adjusts {
            self.adjust(&mut changed);
        }
        if let Some(mask) = mask {
            mask.apply(&mut changed);
        }
        let token = self.choose(&changed);
        self.changed = changed;
        if let Some(token) = token.filter(|_| adjusts) {
            *self.seen.entry(token).or_insert(0) += 1;
        }
        token
    }

    fn choose(&mut self, row: &[f32]) -> Option<u32> {
        if self.params.is_greedy() { argmax(row).map(|(id, _)| id) } else { self.draw_from(row) }
    }

    /// Bias and penalties.
    fn adjust(&self, row: &mut [f32]) {
        let p = &self.params;
        for (&token, &count) in &self.seen {
            let Some(logit) = row.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
            if count > 0 {
                *logit -= p.presence_penalty + p.frequency_penalty * count as f32;
            }
        }
        for &(token, bias) in &p.logit_bias {
            if let Some(logit) = row.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Logits below this carry no probability: of min-p's doing, or because they are too far under the best.
    fn floor(&self, best: f32) -> f32 {
        // min-p is a bound on the logit's distance from the best: p >= m·p_max.
        let reach = if self.params.min_p > 0.0 { -self.params.min_p.ln() } else { NEGLIGIBLE };
        best - reach.min(NEGLIGIBLE) * self.temperature()
    }

    fn temperature(&self) -> f32 {
        self.params.temperature.max(1e-4)
    }

    /// A random token of a whole row under temperature, top-k, top-p and min-p.
    fn draw_from(&mut self, row: &[f32]) -> Option<u32> {
        let (_, best) = argmax(row)?;
        let floor = self.floor(best);
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend((0u32..).zip(row).filter(|&(_, &l)| l >= floor).map(|(id, &l)| (id, l)));
        let k = self.params.top_k;
        if k > 0 && k < candidates.len() {
            candidates.select_nth_unstable_by(k - 1, by_logit);
            candidates.truncate(k);
        }
        self.draw(best)
    }

    /// A random token of the candidates, whose logits are at most `best`, under temperature and top-p. One
    /// random number a token, so that a seed's stream depends on nothing but the number of tokens drawn.
    fn draw(&mut self, best: f32) -> Option<u32> {
        let temperature = self.temperature();
        let candidates = &mut self.candidates;
        for (_, weight) in candidates.iter_mut() {
            *weight = ((*weight - best) / temperature).exp();
        }
        let mut total: f64 = candidates.iter().map(|&(_, w)| f64::from(w)).sum();
        if self.params.top_p < 1.0 {
            total = keep_nucleus(candidates, f64::from(self.params.top_p) * total);
        } else {
            // The order of selection depends on the buffer's history; the draw must not.
            candidates.sort_unstable_by_key(|&(id, _)| id);
        }

        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * total;
        for &(id, weight) in candidates.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return Some(id);
            }
        }
        // Rounding can leave a sliver past the last weight.
        candidates.last().map(|&(id, _)| id)
    }
}

/// Highest first; equal ones by id, so that the order is total and repeatable.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that sorting wants")]
fn by_logit(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Sorts and truncates to the smallest set of the heaviest whose weights reach `mass`; returns their sum.
/// Sorts only as many as needed: a flat distribution over 150k tokens must not cost a full sort.
fn keep_nucleus(candidates: &mut Vec<(u32, f32)>, mass: f64) -> f64 {
    let mut head = 64;
    let (mut sorted, mut sum) = (0, 0.0);
    while sorted < candidates.len() {
        let end = head.min(candidates.len());
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted - 1, by_logit);
        }
        candidates[sorted..end].sort_unstable_by(by_logit);
        for i in sorted..end {
            sum += f64::from(candidates[i].1);
            if sum >= mass {
                candidates.truncate(i + 1);
                return sum;
            }
        }
        sorted = end;
        head *= 4;
    }
    sum
}

fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    // RandomState is keyed by the system's randomness, once a thread, and differs on every call.
    RandomState::new().build_hasher().finish()
}

/// The largest number of a row and its index, the first of equals; `None` when there is none.
pub fn argmax(row: &[f32]) -> Option<(u32, f32)> {
    // Two passes that the compiler vectorises beat one that carries an index.
    let best = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let at = row.iter().position(|&x| x == best)?;
    (best > f32::NEG_INFINITY).then_some((at as u32, best))
}

/// Natural log-probability of `token` under softmax(`row`), and the log of the row's normaliser, which
/// turns any of its logits into a log-probability by subtraction.
pub fn log_softmax_of(row: &[f32], token: u32) -> (f32, f32) {
    let best = argmax(row).map_or(0.0, |(_, l)| l);
    let sum: f64 = row.iter().map(|&l| f64::from((l - best).exp())).sum();
    let normaliser = best + sum.ln() as f32;
    (row.get(token as usize).map_or(f32::NEG_INFINITY, |l| l - normaliser), normaliser)
}

/// The `n` most likely tokens and their log-probabilities, best first.
pub fn top_logprobs(row: &[f32], normaliser: f32, n: usize) -> Vec<(u32, f32)> {
    if n == 0 {
        return Vec::new();
    }
    let mut all: Vec<(u32, f32)> = (0u32..).zip(row.iter().copied()).collect();
    let n = n.min(all.len());
    if n < all.len() {
        all.select_nth_unstable_by(n - 1, by_logit);
        all.truncate(n);
    }
    all.sort_unstable_by(by_logit);
    all.iter().map(|&(id, l)| (id, l - normaliser)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(params: &SamplingParams, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(SamplingParams { seed: Some(7), ..params.clone() }, &[]);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(Row::All(logits)).unwrap() as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        for (temperature, expected) in
            [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.5, [0.684_93, 0.246_58, 0.061_64, 0.006_85])]
        {
            let seen =
                histogram(&SamplingParams { temperature, ..SamplingParams::default() }, &logits, 200_000);
            for (s, e) in seen.iter().zip(expected) {
                // Four standard deviations of a binomial share at 200,000 draws are below 0.0045.
                assert!((s - e).abs() < 0.0045, "{seen:?} against {expected:?}");
            }
        }
    }

    #[test]
    fn filters_keep_what_they_promise() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let base = SamplingParams::default();
        let kept =
            |p: &SamplingParams| histogram(p, &logits, 20_000).iter().map(|&s| s > 0.0).collect::<Vec<_>>();
        assert_eq!(kept(&SamplingParams { top_k: 2, ..base.clone() }), [true, true, false, false]);
        assert_eq!(kept(&SamplingParams { top_p: 0.75, ..base.clone() }), [true, true, false, false]);
        assert_eq!(kept(&SamplingParams { top_p: 0.81, ..base.clone() }), [true, true, true, false]);
        assert_eq!(kept(&SamplingParams { min_p: 0.25, ..base.clone() }), [true, true, true, false]);
        assert_eq!(kept(&SamplingParams { top_k: 1, ..base.clone() }), [true, false, false, false]);
        assert_eq!(kept(&SamplingParams { temperature: 0.0, ..base.clone() }), [true, false, false, false]);
        assert_eq!(kept(&SamplingParams { top_p: 0.0, ..base }), [true, false, false, false]);
    }

    #[test]
    fn nucleus_of_a_flat_row_is_cut_where_a_full_sort_would() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut row: Vec<(u32, f32)> =
            (0..5000).map(|i| (i, (rng.next_u32() % 1000) as f32 / 1000.0)).collect();
        let mut sorted = row.clone();
        sorted.sort_by(by_logit);
        let mass = row.iter().map(|r| f64::from(r.1)).sum::<f64>() * 0.6;
        let mut sum = 0.0;
        let n = 1 + sorted
            .iter()
            .position(|r| {
                sum += f64::from(r.1);
                sum >= mass
            })
            .unwrap();
        keep_nucleus(&mut row, mass);
        assert_eq!(row, sorted[..n]);
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let logits = [2.0, 1.9, -1.0];
        let greedy = SamplingParams::greedy();
        let mut s = Sampler::new(SamplingParams { presence_penalty: 0.5, ..greedy.clone() }, &[]);
        assert_eq!((s.sample(Row::All(&logits)), s.sample(Row::All(&logits))), (Some(0), Some(1)));
        let mut s = Sampler::new(SamplingParams { repetition_penalty: 1.2, ..greedy.clone() }, &[0]);
        assert_eq!(s.sample(Row::All(&logits)), Some(1));
        let mut s = Sampler::new(SamplingParams { logit_bias: vec![(2, 100.0)], ..greedy.clone() }, &[]);
        assert_eq!(s.sample(Row::All(&logits)), Some(2));
        let mut s = Sampler::new(SamplingParams { frequency_penalty: 0.04, ..greedy }, &[]);
        let picks: Vec<_> = (0..6).map(|_| s.sample(Row::All(&logits)).unwrap()).collect();
        // 0 leads by 0.1: after three picks it has lost 0.12, after one pick of 1 it leads again.
        assert_eq!(picks, [0, 0, 0, 1, 0, 1]);
    }

    #[test]
    fn seeds_repeat_and_differ() {
        let logits = vec![0.0f32; 1000];
        let run = |seed| {
            let mut s = Sampler::new(SamplingParams { seed, ..SamplingParams::default() }, &[]);
            (0..8).map(|_| s.sample(Row::All(&logits)).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(Some(1)), run(Some(1)));
        assert_ne!(run(Some(1)), run(Some(2)));
        assert_ne!(run(None), run(None));
    }

    #[test]
    fn the_best_of_a_row_draw_what_the_whole_row_draws() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let logits: Vec<f32> = (0..3000).map(|_| (rng.next_u32() % 400) as f32 / 40.0).collect();
        let mut best: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
        best.sort_by(by_logit);
        best.truncate(MOST_BEST);
        let base = SamplingParams { seed: Some(5), ..SamplingParams::default() };
        for params in [
            SamplingParams { temperature: 0.0, ..base.clone() },
            SamplingParams { top_k: 40, ..base.clone() },
            SamplingParams { top_k: MOST_BEST, temperature: 1.7, min_p: 0.02, ..base.clone() },
            SamplingParams { top_k: 7, top_p: 0.8, temperature: 0.6, ..base.clone() },
        ] {
            let mut whole = Sampler::new(params.clone(), &[]);
            let mut part = Sampler::new(params.clone(), &[]);
            assert!(matches!(part.need(), Need::Best(_)), "{params:?}");
            for _ in 0..200 {
                assert_eq!(part.sample(Row::Best(&best)), whole.sample(Row::All(&logits)), "{params:?}");
            }
        }
        for params in [
            base.clone(),
            SamplingParams { top_k: MOST_BEST + 1, ..base.clone() },
            SamplingParams { logit_bias: vec![(1, 1.0)], ..SamplingParams::greedy() },
        ] {
            assert_eq!(Sampler::new(params, &[]).need(), Need::All);
        }
        assert_eq!(Sampler::new(base, &[]).sample(Row::Best(&[])), None);
    }

    #[test]
    fn rows_without_numbers_choose_nothing() {
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), None);
        assert_eq!(argmax(&[f32::NAN, 1.0, 1.0]), Some((1, 1.0)));
        assert_eq!(Sampler::new(SamplingParams::default(), &[]).sample(Row::All(&[f32::NAN])), None);
    }

    #[test]
    fn logprobs_are_normalised() {
        let row = [1.0f32, 2.0, 3.0];
        let (lp, norm) = log_softmax_of(&row, 2);
        assert!((lp - -0.407_606).abs() < 1e-5, "{lp}");
        let top = top_logprobs(&row, norm, 2);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [2, 1]);
        assert!((top[1].1 - -1.407_606).abs() < 1e-5);
    }
}
