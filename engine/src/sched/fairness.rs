//! Who is served next: deficit round robin over callers.
//!
//! Source: Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin (SIGCOMM 1995). Each round a caller
//! may spend a quantum of tokens more; what it does not spend it keeps while it has something to do. What a caller has had
//! while nobody else wanted it is a debt, to a bound: who comes anew goes first until that is made good.

use super::CallerId;

/// What a caller has to be served next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer {
    pub(super) caller: CallerId,
    /// At least 1.
    pub(super) weight: u32,
    /// In tokens.
    pub(super) cost: usize,
}

/// Accounts are kept in such parts of a token: a step's decoding may be worth less than one a sequence.
const UNIT: i64 = 64;

/// The callers' accounts.
#[derive(Debug)]
pub(super) struct RoundRobin {
    /// Paid a round, for a weight of 1.
    quantum: i64,
    /// The largest debt.
    credit: i64,
    /// By caller, ascending.
    accounts: Vec<(CallerId, i64)>,
    /// Whose turn it is, as long as its account holds.
    turn: CallerId,
}

impl RoundRobin {
    /// Of so many tokens a round, and debts of up to so many.
    pub(super) fn new(quantum: usize, credit: usize) -> Self {
        let (quantum, credit) = (quantum.max(1) as i64 * UNIT, credit as i64 * UNIT);
        Self { quantum, credit, accounts: Vec::new(), turn: CallerId::default() }
    }

    /// Whose offer is served, one of `offers`, and charges it. As many rounds are gone as it takes until
    /// somebody can pay.
    pub(super) fn serve(&mut self, offers: impl Iterator<Item = Offer> + Clone) -> Option<CallerId> {
        let caller = self.next(offers.clone())?;
        let cost = offers.into_iter().find(|o| o.caller == caller).map_or(0, |o| o.cost);
        *self.account(caller) -= cost as i64 * UNIT;
        Some(caller)
    }

    /// Charges a caller for what it has without a turn.
    pub(super) fn debit(&mut self, caller: CallerId, tokens: f64) {
        let least = -self.credit;
        let account = self.account(caller);
        *account = (*account - (tokens * UNIT as f64) as i64).max(least);
    }

    /// Whose turn it is; pays nothing.
    pub(super) fn next(&mut self, offers: impl Iterator<Item = Offer> + Clone) -> Option<CallerId> {
        let quantum = self.quantum;
        let income = |offer: &Offer| quantum * i64::from(offer.weight);
        let rounds = offers
            .clone()
            .map(|offer| {
                let missing = offer.cost as i64 * UNIT - *self.account(offer.caller);
                missing.max(0).unsigned_abs().div_ceil(income(&offer).unsigned_abs()) as i64
            })
            .min()?;
        let mut chosen = None;
        for offer in offers {
            let account = self.account(offer.caller);
            *account += rounds * income(&offer);
            let place = (offer.caller < self.turn, offer.caller);
            if *self.account(offer.caller) >= offer.cost as i64 * UNIT
                && chosen.is_none_or(|best| place < best)
            {
                chosen = Some(place);
            }
        }
        self.turn = chosen?.1;
        Some(self.turn)
    }

    /// Closes the account of a caller that has nothing to do: nothing is saved up for later.
    pub(super) fn close(&mut self, caller: CallerId) {
        self.accounts.retain(|&(id, _)| id != caller);
    }

    fn account(&mut self, caller: CallerId) -> &mut i64 {
        let at = match self.accounts.binary_search_by_key(&caller, |&(id, _)| id) {
            Ok(at) => at,
            Err(at) => {
                self.accounts.insert(at, (caller, 0));
                at
            }
        };
        &mut self.accounts[at].1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_with_little_to_do_waits_for_one_turn_of_each_other() {
        let mut turns = RoundRobin::new(100, 0);
        let offer = |caller, cost| Offer { caller: CallerId(caller), weight: 1, cost };
        for _ in 0..10 {
            turns.serve([offer(1, 100)].into_iter());
        }
        let served: Vec<u64> =
            (0..3).map(|_| turns.serve([offer(1, 100), offer(2, 100)].into_iter()).unwrap().0).collect();
        assert!(served.contains(&2), "{served:?}");
        turns.close(CallerId(2));
        assert_eq!(turns.accounts.len(), 1);
        assert!(turns.next(std::iter::empty()).is_none());
    }

    #[test]
    fn who_comes_anew_goes_first_until_a_debt_is_made_good_and_no_longer() {
        let mut turns = RoundRobin::new(10, 100);
        turns.debit(CallerId(1), 5000.0);
        let offers = [1, 2].map(|i| Offer { caller: CallerId(i), weight: 1, cost: 10 });
        let served: Vec<u64> = (0..30).map(|_| turns.serve(offers.into_iter()).unwrap().0).collect();
        assert_eq!(served[..10], [2; 10]);
        assert_eq!(served[10..].iter().filter(|&&i| i == 1).count(), 10);
    }

    proptest! {
        /// Whatever the sizes, what two busy callers get differs by their weights and a bounded rest.
        #[test]
        fn busy_callers_get_their_weights(
            weights in proptest::collection::vec(1u32..5, 2..5),
            costs in proptest::collection::vec(0usize..500, 400..600),
        ) {
            let mut turns = RoundRobin::new(64, 0);
            let mut next: Vec<usize> = (0..weights.len()).map(|i| costs[i]).collect();
            let mut got = vec![0usize; weights.len()];
            for &cost in &costs {
                let offers = weights.iter().zip(&next).zip(0..);
                let offers = offers.map(|((&weight, &cost), i)| Offer { caller: CallerId(i), weight, cost });
                let i = turns.serve(offers).unwrap().0 as usize;
                got[i] += next[i];
                next[i] = cost;
            }
            let rounds: Vec<f64> = got.iter().zip(&weights).map(|(&g, &w)| g as f64 / f64::from(w)).collect();
            let spread = rounds.iter().copied().fold(0.0, f64::max) - rounds.iter().copied().fold(f64::MAX, f64::min);
            prop_assert!(spread <= 2.0 * (64.0 + 500.0), "{got:?} for {weights:?}");
        }
    }
}
