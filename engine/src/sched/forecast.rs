//! How long a request would wait, by what is going on and how fast that has been.

use std::time::Duration;

use super::{CallerId, CallerLoad, Load, Pace};

/// What is going on, as of the last step.
#[derive(Debug, Clone, Default)]
pub struct Forecast {
    /// Callers with anything to do.
    pub callers: Vec<CallerLoad>,
    /// Places in the batch, and how many are taken.
    pub places: usize,
    /// Sequences that have one.
    pub running: usize,
    /// All sequences that are known, with those that wait or are paused.
    pub known: usize,
    /// Seconds that a sequence keeps its place; 0 before the first has given it up.
    pub held: f64,
    /// Seconds that a token of a prompt takes by itself; 0 before the first.
    pub prompt: f64,
    /// And what it takes for each token before it.
    pub lookback: f64,
    /// How much longer prompts take with what goes on beside them, as a factor.
    pub slowdown: f64,
    /// Seconds of a step in which those that run decode.
    pub step: f64,
}

impl Forecast {
    /// Takes the speed of steps over; the last one had this to decode.
    pub(crate) fn measure(&mut self, pace: &Pace, decode: Load) {
        self.step = pace.decode_seconds(decode);
        self.prompt = pace.prompt_seconds(1, 0);
        self.lookback = pace.prompt_seconds(1, 1) - self.prompt;
        let budget = pace.budget(decode, 1).seconds;
        self.slowdown = 1.0 + if budget.is_finite() { self.step / budget } else { 0.0 };
    }

    /// Until the first token of a prompt of so many tokens: a place, the prompts that are read before and beside it,
    /// and a step. What the cache has of them is not counted.
    pub fn first_token(&self, caller: CallerId, weight: u32, prompt: usize) -> Duration {
        let (own, has_place) = (self.own(caller), self.has_place(caller, weight));
        let weight = f64::from(weight.max(1));
        let others = || self.callers.iter().filter(|c| c.caller != caller);

        let first_tokens = (own.tokens + prompt) as f64;
        // In turns, by weight: others come as far as their own prompts go.
        let beside: f64 =
            others().map(|c| (c.tokens as f64).min(first_tokens * f64::from(c.weight) / weight)).sum();
        let attention = self.lookback * (prompt * prompt) as f64 / 2.0;
        let reading = ((first_tokens + beside) * self.prompt + attention) * self.slowdown;

        let place = if has_place {
            0.0
        } else {
            let weights: f64 = others().map(|c| f64::from(c.weight)).sum::<f64>() + weight;
            let share = (self.places as f64 * weight / weights).max(1.0);
            (own.waiting + 1) as f64 * self.held / share
        };
        seconds(place + reading + self.step)
    }

    /// Where a request stands in the queue: 0 has a place at once, 1 gets the next one. Callers take turns by weight, so
    /// those of others come before it that their turns bring before it. `unseen` came since the last step.
    pub fn position(&self, caller: CallerId, weight: u32, unseen: usize) -> usize {
        if unseen == 0 && self.has_place(caller, weight) {
            return 0;
        }
        let free = self.places.saturating_sub(self.running + self.waiting());
        if unseen < free {
            return 0;
        }
        let own = self.own(caller).waiting + unseen - free;
        let turns = |c: &CallerLoad| ((own + 1) * c.weight as usize).div_ceil(weight.max(1) as usize);
        let others = self.callers.iter().filter(|c| c.caller != caller);
        1 + own + others.map(|c| c.waiting.min(turns(c))).sum::<usize>()
    }

    /// Whether one more of this caller's has a place at once: there is a free one, or somebody gives it one.
    fn has_place(&self, caller: CallerId, weight: u32) -> bool {
        let own = self.own(caller);
        let is_given_one = self.callers.iter().filter(|c| c.caller != caller).any(|c| {
            (own.running + own.waiting + 1) * c.weight as usize
                <= c.running.saturating_sub(1) * weight.max(1) as usize
        });
        self.running + self.waiting() < self.places || is_given_one
    }

    fn waiting(&self) -> usize {
        self.callers.iter().map(|c| c.waiting).sum()
    }

    fn own(&self, caller: CallerId) -> CallerLoad {
        let nothing = CallerLoad { caller, weight: 1, waiting: 0, running: 0, tokens: 0 };
        self.callers.iter().find(|c| c.caller == caller).copied().unwrap_or(nothing)
    }

    /// Until somebody gives a place up, and with it the queue one: when a request that finds it full may come again.
    pub fn next_place(&self) -> Duration {
        seconds(self.held / self.places.max(1) as f64)
    }
}

/// At most a day: what is longer is not to be waited for.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.clamp(0.0, 86_400.0)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(caller: u64, waiting: usize, running: usize, tokens: usize) -> CallerLoad {
        CallerLoad { caller: CallerId(caller), weight: 1, waiting, running, tokens }
    }

    fn forecast(callers: Vec<CallerLoad>) -> Forecast {
        let running = callers.iter().map(|c| c.running).sum();
        let speeds = Forecast { held: 8.0, prompt: 0.001, slowdown: 1.0, step: 0.02, ..Forecast::default() };
        Forecast { callers, places: 4, running, ..speeds }
    }

    fn wait(f: &Forecast, caller: u64, prompt: usize) -> f64 {
        f.first_token(CallerId(caller), 1, prompt).as_secs_f64()
    }

    #[test]
    fn a_free_place_costs_the_prompt_and_what_is_read_beside_it() {
        assert!((wait(&forecast(vec![]), 1, 1000) - 1.02).abs() < 1e-9);
        let f = forecast(vec![load(1, 0, 1, 500), load(2, 0, 1, 100)]);
        assert!((wait(&f, 1, 1000) - 1.62).abs() < 1e-9, "its own first, the other one's beside");
        assert!((wait(&f, 3, 50) - 0.17).abs() < 1e-9, "each in turn");
    }

    #[test]
    fn the_queue_counts_for_who_stands_in_it_and_not_for_who_is_given_a_place() {
        let f = forecast(vec![load(1, 6, 4, 0)]);
        assert!((wait(&f, 1, 0) - (7.0 * 8.0 / 4.0 + 0.02)).abs() < 1e-9);
        assert!((wait(&f, 2, 0) - 0.02).abs() < 1e-9);
        assert_eq!(f.next_place(), Duration::from_secs(2));
        let f = forecast((1..5).map(|c| load(c, 0, 1, 0)).collect());
        assert!((wait(&f, 9, 0) - 8.02).abs() < 1e-9, "a fair share is less than one place");
    }

    #[test]
    fn positions_count_who_comes_first() {
        let position = |f: &Forecast, caller, unseen| f.position(CallerId(caller), 1, unseen);
        let free = forecast(vec![load(1, 0, 2, 0)]);
        assert_eq!([0, 1, 2, 3].map(|unseen| position(&free, 1, unseen)), [0, 0, 1, 2]);
        let full = forecast(vec![load(1, 0, 4, 0)]);
        assert_eq!(position(&full, 1, 0), 1);
        assert_eq!(position(&full, 2, 0), 0, "it is given a place");
        let two = |first, second| {
            forecast(vec![load(1, first, 1, 0), load(2, second, 1, 0), load(4, 0, 1, 0), load(5, 0, 1, 0)])
        };
        let f = two(6, 1);
        assert_eq!((position(&f, 1, 0), position(&f, 2, 0), position(&f, 3, 0)), (8, 4, 3));
        let f = two(9, 3);
        assert_eq!((f.position(CallerId(2), 1, 0), f.position(CallerId(2), 4, 0)), (8, 5), "heavier turns");
    }

    #[test]
    fn nothing_measured_is_nothing_to_wait_for() {
        assert_eq!(Forecast::default().first_token(CallerId(0), 0, 5000), Duration::ZERO);
    }
}
