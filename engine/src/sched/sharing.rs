//! Whose prompts go on in a step, and how far: the part of a plan after decoding.

use super::{
    BLOCK_TOKENS, BlockPool, Scheduler,
    fairness::Offer,
    pace::{Budget, LEAST},
    prefix::Keys,
    scheduler::QUANTUM,
    sequence::Sequence,
};

impl Scheduler {
    /// Shares out `budget` between the prompts: round robin between callers, and the oldest first
    /// of each caller's. Callers pay for their part of decoding too: it takes the same machine's time.
    pub(super) fn share_out(&mut self, mut budget: Budget) {
        // At most half of what there is to share: prompts of somebody who decodes a lot go on too.
        let half = self.pace.piece(budget.seconds, 0).min(budget.tokens) as f64 / 2.0;
        let worth = self.pace.decode_worth(self.step).min(half) / self.step.decoding.max(1) as f64;
        let Self { running, prompts, offers, pool, keys, pace, .. } = self;
        let least = budget.tokens.saturating_sub(LEAST);
        offers.clear();
        for (at, sequence) in running.iter_mut().enumerate() {
            if !sequence.is_reading() {
                prompts.debit(sequence.caller, worth);
                continue;
            }
            adopt(sequence, pool, keys);
            let &mut Sequence { caller, weight, .. } = sequence;
            let cost = sequence.left().min(QUANTUM);
            if !offers.iter().any(|(offer, _)| offer.caller == caller) {
                offers.push((Offer { caller, weight, cost }, at));
            }
        }
        while budget.tokens > 0 && !offers.is_empty() {
            let is_alone = offers.len() == 1;
            let chosen = if is_alone {
                0
            } else {
                let served = prompts.serve(offers.iter().map(|&(offer, _)| offer));
                offers.iter().position(|(offer, _)| Some(offer.caller) == served).unwrap_or(0)
            };
            let (offer, at) = &mut offers[chosen];
            let sequence = &mut running[*at];
            let (before, left) = (sequence.computed + sequence.grant, sequence.left() - sequence.grant);
            // However little time there is, so many tokens may always join.
            let fits = pace.piece(budget.seconds, before).max(budget.tokens.saturating_sub(least));
            let grant = if is_alone { left } else { offer.cost }.min(budget.tokens).min(fits);
            if grant == 0 {
                return;
            }
            if is_alone {
                prompts.debit(offer.caller, grant as f64);
            }
            sequence.grant += grant;
            budget.tokens -= grant;
            budget.seconds = (budget.seconds - pace.prompt_seconds(grant, before)).max(0.0);
            offer.cost = (left - grant).min(QUANTUM);
            if offer.cost == 0 {
                let mut younger = *at + 1..running.len();
                match younger.find(|&i| running[i].caller == offer.caller && running[i].is_reading()) {
                    Some(next) => (offer.cost, *at) = (running[next].left().min(QUANTUM), next),
                    None => drop(offers.swap_remove(chosen)),
                }
            }
        }
    }
}

/// Takes from the cache what somebody else has computed of a prompt since it was admitted.
fn adopt(sequence: &mut Sequence, pool: &mut BlockPool, keys: &Keys) {
    while sequence.computed.is_multiple_of(BLOCK_TOKENS)
        && sequence.computed / BLOCK_TOKENS < sequence.may_find()
    {
        let at = sequence.computed / BLOCK_TOKENS;
        let Some(block) = pool.find(sequence.key(keys, at)) else { return };
        pool.share(block);
        let own = std::mem::replace(&mut sequence.blocks[at], block);
        pool.release(own, false);
        sequence.found();
    }
}
