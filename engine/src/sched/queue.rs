//! Those that wait for a place, by caller.

use std::collections::VecDeque;

use super::{
    CallerId,
    fairness::{Offer, RoundRobin},
    sequence::{Sequence, SequenceId},
};

/// Tokens a caller may have admitted before it is another one's turn: about a short prompt.
const QUANTUM: usize = 512;

/// A caller with anything to do.
#[derive(Debug)]
struct Caller {
    id: CallerId,
    weight: u32,
    /// By age, oldest first.
    waiting: VecDeque<Sequence>,
    /// Its sequences that have places.
    running: usize,
    /// Its tokens that have places and are not computed yet, as of the last plan.
    reading: usize,
}

/// How much a caller has going on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallerLoad {
    /// Who.
    pub caller: CallerId,
    /// Its weight.
    pub weight: u32,
    /// Its requests without a place.
    pub waiting: usize,
    /// Its sequences with one.
    pub running: usize,
    /// Tokens it waits for: of its prompts, neither computed nor in the cache.
    pub tokens: usize,
}

/// The waiting sequences. A caller's own come in the order of their age.
#[derive(Debug)]
pub(super) struct Queue {
    /// By id, ascending.
    callers: Vec<Caller>,
    turns: RoundRobin,
    waiting: usize,
    /// Waiting sequences that hold blocks.
    holders: usize,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self { callers: Vec::new(), turns: RoundRobin::new(QUANTUM, 0), waiting: 0, holders: 0 }
    }

    /// Sequences without a place, choices that have not parted counted one by one.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting == 0
    }

    /// Puts a sequence where its age among its caller's says.
    pub(super) fn insert(&mut self, sequence: Sequence) {
        self.waiting += 1 + sequence.others.len();
        self.holders += usize::from(!sequence.blocks.is_empty());
        let caller = self.caller(sequence.caller, sequence.weight);
        let at = caller.waiting.partition_point(|s| s.id < sequence.id);
        caller.waiting.insert(at, sequence);
    }

    /// Whose oldest is admitted next.
    pub(super) fn next(&mut self) -> Option<CallerId> {
        self.turns.next(offers(&self.callers))
    }

    /// Who gives a place up for whom when none is free: the one with the most places for its weight for the one
    /// with the fewest, if that still leaves the giver as many.
    pub(super) fn exchange(&self) -> Option<(CallerId, CallerId)> {
        let by_places =
            |a: &&Caller, b: &&Caller| (a.running * b.weight as usize).cmp(&(b.running * a.weight as usize));
        let giver = self.callers.iter().max_by(by_places)?;
        let taker = self.callers.iter().filter(|c| !c.waiting.is_empty()).min_by(by_places)?;
        let fair = (taker.running + 1) * giver.weight as usize
            <= giver.running.checked_sub(1)? * taker.weight as usize;
        fair.then_some((giver.id, taker.id))
    }

    /// A caller's oldest.
    pub(super) fn head(&mut self, caller: CallerId) -> Option<&mut Sequence> {
        let at = self.find(caller).ok()?;
        self.callers[at].waiting.front_mut()
    }

    /// Takes a caller's oldest out, at the cost of what it has to compute.
    pub(super) fn admit(&mut self, caller: CallerId) -> Option<Sequence> {
        let at = self.find(caller).ok()?;
        let offer = offers(&self.callers).filter(|offer| offer.caller == caller);
        self.turns.serve(offer);
        let sequence = self.callers[at].waiting.pop_front()?;
        self.taken(&sequence);
        if self.callers[at].waiting.is_empty() {
            self.turns.close(caller);
        }
        Some(sequence)
    }

    /// The sequence that has this one among its members.
    pub(super) fn of_member(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.callers.iter_mut().flat_map(|c| &mut c.waiting).find(|s| s.members().any(|m| m == id))
    }

    /// Takes a sequence out by its own name.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let (c, at) = (self.callers.iter().enumerate())
            .find_map(|(c, caller)| Some((c, caller.waiting.iter().position(|s| s.id == id)?)))?;
        let sequence = self.callers[c].waiting.remove(at)?;
        self.taken(&sequence);
        if self.callers[c].waiting.is_empty() {
            self.turns.close(self.callers[c].id);
        }
        self.forget_idle(c);
        Some(sequence)
    }

    /// One choice of a waiting sequence is gone.
    pub(super) fn member_gone(&mut self) {
        self.waiting -= 1;
    }

    /// The youngest waiting sequence that holds blocks and is not `except`.
    pub(super) fn youngest_holder(&self, except: Option<SequenceId>) -> Option<SequenceId> {
        if self.holders == 0 {
            return None;
        }
        let holders = self.callers.iter().flat_map(|c| &c.waiting).filter(|s| !s.blocks.is_empty());
        holders.map(|s| s.id).filter(|&id| Some(id) != except).max()
    }

    /// Blocks of waiting sequences other than `except`, by the tables they are in.
    pub(super) fn tables(&self, except: Option<SequenceId>) -> impl Iterator<Item = &[u32]> {
        let callers = if self.holders == 0 { &[][..] } else { &self.callers };
        let all = callers.iter().flat_map(|c| &c.waiting);
        all.filter(move |s| Some(s.id) != except).map(|s| s.blocks.as_slice())
    }

    /// A caller's sequence has got a place.
    pub(super) fn placed(&mut self, caller: CallerId, weight: u32) {
        self.caller(caller, weight).running += 1;
    }

    /// A caller's sequence has lost its place; whether that was its last.
    pub(super) fn displaced(&mut self, caller: CallerId) -> bool {
        let Ok(at) = self.find(caller) else { return true };
        self.callers[at].running -= 1;
        let last = self.callers[at].running == 0;
        self.forget_idle(at);
        last
    }

    /// Notes what the running sequences have to compute, for [`Queue::loads`].
    pub(super) fn note_reading(&mut self, running: &[Sequence]) {
        for caller in &mut self.callers {
            caller.reading = 0;
        }
        for sequence in running.iter().filter(|s| s.is_reading()) {
            if let Ok(at) = self.find(sequence.caller) {
                self.callers[at].reading += sequence.left();
            }
        }
    }

    /// How much each caller has going on.
    pub(super) fn loads(&self) -> impl Iterator<Item = CallerLoad> {
        self.callers.iter().map(|c| CallerLoad {
            caller: c.id,
            weight: c.weight,
            waiting: c.waiting.iter().map(|s| 1 + s.others.len()).sum(),
            running: c.running,
            tokens: c.reading + c.waiting.iter().map(cost).sum::<usize>(),
        })
    }

    fn taken(&mut self, sequence: &Sequence) {
        self.waiting -= 1 + sequence.others.len();
        self.holders -= usize::from(!sequence.blocks.is_empty());
    }

    fn find(&self, caller: CallerId) -> Result<usize, usize> {
        self.callers.binary_search_by_key(&caller, |c| c.id)
    }

    fn caller(&mut self, id: CallerId, weight: u32) -> &mut Caller {
        let at = match self.find(id) {
            Ok(at) => at,
            Err(at) => {
                let new = Caller { id, weight, waiting: VecDeque::new(), running: 0, reading: 0 };
                self.callers.insert(at, new);
                at
            }
        };
        self.callers[at].weight = weight;
        &mut self.callers[at]
    }

    fn forget_idle(&mut self, at: usize) {
        if self.callers[at].waiting.is_empty() && self.callers[at].running == 0 {
            self.callers.remove(at);
        }
    }
}

/// What a sequence has to compute before its next token; one that holds its blocks has paid already.
fn cost(sequence: &Sequence) -> usize {
    if sequence.reached > 0 { 0 } else { sequence.left() }
}

fn offers(callers: &[Caller]) -> impl Iterator<Item = Offer> + Clone {
    callers.iter().filter_map(|c| {
        let head = c.waiting.front()?;
        Some(Offer { caller: c.id, weight: c.weight, cost: cost(head) })
    })
}
