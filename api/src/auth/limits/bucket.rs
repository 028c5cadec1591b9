//! A token bucket in whole numbers.

/// A token of the bucket in its units. As many as a minute has nanoseconds, so that a bucket of n tokens a
/// minute gets n units in each nanosecond: nothing is ever rounded, and nothing drifts.
const TOKEN: u128 = 60_000_000_000;

/// A bucket that holds a minute's worth and fills steadily.
///
/// What is **held** has been promised and not been spent yet. It still lies in the bucket and takes up room
/// there, so that what is spent in any time is at most a full bucket and what flowed in meanwhile, however
/// late a promise is used. What nobody has been promised is **free**.
///
/// Times are nanoseconds of any one clock.
#[derive(Debug)]
pub(crate) struct Bucket {
    per_minute: u64,
    /// Units in the bucket, held ones included.
    level: u128,
    /// Tokens held.
    held: u64,
    /// When it was filled up last.
    at: u64,
}

impl Bucket {
    /// A full bucket.
    pub(crate) fn full(per_minute: u64, now: u64) -> Self {
        Self { per_minute, level: u128::from(per_minute) * TOKEN, held: 0, at: now }
    }

    /// Tokens a minute, and the most that it holds.
    pub(crate) fn limit(&self) -> u64 {
        self.per_minute
    }

    /// Another limit from now on. What has been spent stays spent.
    pub(crate) fn set_limit(&mut self, per_minute: u64, now: u64) {
        self.fill(now);
        let missing = self.capacity() - self.level;
        self.per_minute = per_minute;
        self.level = self.capacity().saturating_sub(missing);
    }

    /// Lets in what has flowed since the last time. All else is as of that time.
    pub(crate) fn fill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        self.level = (self.level + u128::from(self.per_minute) * u128::from(elapsed)).min(self.capacity());
    }

    /// Spends free tokens, or says in how many nanoseconds there will be enough.
    pub(crate) fn spend(&mut self, tokens: u64) -> Result<(), u64> {
        self.check(tokens)?;
        self.level -= u128::from(tokens) * TOKEN;
        Ok(())
    }

    /// Holds free tokens, or says in how many nanoseconds there will be enough.
    pub(crate) fn hold(&mut self, tokens: u64) -> Result<(), u64> {
        self.check(tokens)?;
        self.held += tokens;
        Ok(())
    }

    /// Spends tokens that were held.
    pub(crate) fn spend_held(&mut self, tokens: u64) {
        self.release(tokens);
        self.level = self.level.saturating_sub(u128::from(tokens) * TOKEN);
    }

    /// Makes held tokens free.
    pub(crate) fn release(&mut self, tokens: u64) {
        self.held = self.held.saturating_sub(tokens);
    }

    /// Puts back tokens that were spent for nothing.
    pub(crate) fn put_back(&mut self, tokens: u64) {
        self.level = (self.level + u128::from(tokens) * TOKEN).min(self.capacity());
    }

    /// Whole free tokens.
    pub(crate) fn remaining(&self) -> u64 {
        (self.free() / TOKEN) as u64
    }

    /// Nanoseconds until it is full, if nothing more is spent.
    pub(crate) fn reset(&self) -> u64 {
        self.flowing(self.capacity() - self.free())
    }

    fn check(&self, tokens: u64) -> Result<(), u64> {
        let missing = (u128::from(tokens) * TOKEN).saturating_sub(self.free());
        if missing == 0 { Ok(()) } else { Err(self.flowing(missing)) }
    }

    fn capacity(&self) -> u128 {
        u128::from(self.per_minute) * TOKEN
    }

    fn free(&self) -> u128 {
        self.level.saturating_sub(u128::from(self.held) * TOKEN)
    }

    /// Nanoseconds in which so many units flow.
    fn flowing(&self, units: u128) -> u64 {
        units.div_ceil(u128::from(self.per_minute.max(1))).try_into().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_minute_fills_it_and_no_more() {
        let mut bucket = Bucket::full(60, 0);
        assert_eq!((bucket.remaining(), bucket.reset()), (60, 0));
        bucket.spend(60).unwrap();
        assert_eq!(bucket.spend(1), Err(SECOND));
        assert_eq!(bucket.reset(), 60 * SECOND);
        bucket.fill(SECOND - 1);
        assert_eq!(bucket.spend(1), Err(1));
        bucket.fill(SECOND);
        bucket.spend(1).unwrap();
        bucket.fill(500 * SECOND);
        assert_eq!(bucket.remaining(), 60);
        // A clock that went back changes nothing.
        bucket.fill(3);
        assert_eq!((bucket.remaining(), bucket.reset()), (60, 0));
    }

    #[test]
    fn waits_are_the_truth_to_the_nanosecond() {
        let mut bucket = Bucket::full(7, 5);
        bucket.spend(7).unwrap();
        let wait = bucket.spend(3).unwrap_err();
        bucket.fill(5 + wait - 1);
        assert_eq!(bucket.spend(3), Err(1));
        bucket.fill(5 + wait);
        bucket.spend(3).unwrap();
    }

    #[test]
    fn what_is_held_takes_up_room() {
        let mut bucket = Bucket::full(100, 0);
        bucket.hold(80).unwrap();
        assert_eq!(bucket.remaining(), 20);
        bucket.spend(20).unwrap();
        // A minute on, the bucket is full again, and 80 are promised as before.
        bucket.fill(60 * SECOND);
        assert_eq!(bucket.remaining(), 20);
        bucket.spend_held(30);
        assert_eq!(bucket.remaining(), 20);
        bucket.release(50);
        assert_eq!(bucket.remaining(), 70);
        bucket.put_back(1000);
        assert_eq!(bucket.remaining(), 100);
    }

    #[test]
    fn another_limit_keeps_what_was_spent() {
        let mut bucket = Bucket::full(100, 0);
        bucket.spend(40).unwrap();
        bucket.set_limit(1000, 0);
        assert_eq!(bucket.remaining(), 960);
        bucket.set_limit(30, 0);
        assert_eq!(bucket.remaining(), 0);
        bucket.fill(60 * SECOND);
        assert_eq!(bucket.remaining(), 30);
    }

    proptest! {
        /// Whatever is asked for and whenever: the spending of any time fits a full bucket and the flow.
        #[test]
        fn nobody_gets_more(
            limit in 1u64..500,
            acts in proptest::collection::vec((0u64..20_000_000_000, 1u64..300, 0u8..4), 1..200),
        ) {
            let mut bucket = Bucket::full(limit, 0);
            let (mut now, mut held) = (0, 0);
            let mut spendings: Vec<(u64, u64)> = Vec::new();
            for (pause, tokens, act) in acts {
                now += pause;
                bucket.fill(now);
                match act {
                    0 if bucket.spend(tokens).is_ok() => spendings.push((now, tokens)),
                    1 if bucket.hold(tokens).is_ok() => held += tokens,
                    2 => {
                        let some = tokens.min(held);
                        bucket.spend_held(some);
                        held -= some;
                        spendings.push((now, some));
                    }
                    3 => {
                        let some = tokens.min(held);
                        bucket.release(some);
                        held -= some;
                    }
                    _ => {}
                }
                let (mut sum, mut worst) = (0u128, 0u128);
                for &(at, tokens) in spendings.iter().rev() {
                    sum += u128::from(tokens);
                    let flow = u128::from(limit) * u128::from(now - at);
                    worst = worst.max((sum * TOKEN).saturating_sub(flow));
                }
                prop_assert!(worst <= u128::from(limit) * TOKEN);
            }
        }
    }
}
