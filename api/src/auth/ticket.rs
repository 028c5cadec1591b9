//! What one request uses, from its admission to its settlement.
//!
//! A ticket is opened before the engine is asked, told of the sequences that were submitted, and settled once:
//! by [`Ticket::finish`], which returns when the use is on the disk, or by being dropped, when a client has
//! gone or the work has failed. Either way what was computed until then is what counts.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, LazyLock},
};

use m40llm_engine::{CallerId, GenerateRequest, Meter, SubmitError};

use super::{
    AuthError, Identity, Key, Priority, Store,
    ledger::{Amounts, UsageRecord},
    limits::{Entry, OPEN_OUTPUT, Output, Refused},
    store::gone,
};
use crate::{app::AppState, error::ApiError, observe::Refusal as Reason};

/// Who asks for work: let in by its limits, and counted.
#[derive(Debug)]
pub(crate) struct Caller {
    identity: Identity,
    /// Absent where nothing is limited.
    entry: Option<Entry>,
}

impl Caller {
    /// Counts a request, or says which limit refuses it.
    pub(crate) fn enter(state: &AppState, identity: Option<&Identity>) -> Result<Self, ApiError> {
        // The layer that identifies is around every route; a handler called without it serves nobody's key.
        let identity = identity.cloned().unwrap_or(Identity::Open { peer: None });
        let model = &state.config().model_id;
        if !identity.may_use(model) {
            state.metrics().count_refused(Reason::ModelNotAllowed);
            return Err(ApiError::model_not_allowed(model));
        }
        let account = identity.key().and_then(|key| state.accounts().of(key));
        let entry = account.map(|account| account.enter()).transpose();
        Ok(Self { entry: entry.map_err(|refused| limited(state, &refused))?, identity })
    }
}

impl Identity {
    /// Who this is to the engine, which is fair between callers and keeps their prompts apart, and the weight beside
    /// others. Without a key it is the address.
    pub(crate) fn caller(&self) -> (CallerId, u32) {
        // Keyed at random: nobody can make an id that is another one's number.
        static NUMBERS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        match self {
            Self::Key(key) => {
                let weight = match key.limits.priority {
                    Priority::Low => 1,
                    Priority::Normal => 4,
                    Priority::High => 16,
                };
                (CallerId(NUMBERS.hash_one(key.id.as_str())), weight)
            }
            Self::Open { peer } => (CallerId(NUMBERS.hash_one(peer)), 4),
        }
    }
}

/// What a limit that is reached tells, counted.
fn limited(state: &AppState, refused: &Refused) -> ApiError {
    state.metrics().count_refused(refused.reason());
    ApiError::limited(refused)
}

/// How a request's sequences belong together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape<'a> {
    /// Sequences that share a prompt: so many follow one another.
    pub(crate) per_prompt: usize,
    /// The field that prompts come from.
    pub(crate) param: &'a str,
    /// The longest prompt with its output that the model takes.
    pub(crate) most: usize,
}

/// Refuses what is longer than the key's context, and bounds what is not bounded by the request. Returns the
/// tokens of all prompts and the output that is asked for.
fn measure(
    requests: &mut [GenerateRequest],
    max_context: Option<u32>,
    shape: &Shape<'_>,
) -> Result<(usize, Output), SubmitError> {
    let limit = max_context.map_or(shape.most, |most| shape.most.min(most as usize));
    let (mut prompts, mut expected, mut bounded) = (0, 0, true);
    let sequences = requests.len();
    for (i, request) in requests.iter_mut().enumerate() {
        let prompt = request.prompt.len();
        let requested = prompt.saturating_add(request.max_tokens.unwrap_or(1));
        if requested > limit {
            return Err(SubmitError::ContextLength { prompt, requested, limit });
        }
        if i % shape.per_prompt.max(1) == 0 {
            prompts += prompt;
        }
        bounded &= request.max_tokens.is_some();
        let room = limit - prompt;
        expected += request.max_tokens.unwrap_or(room.min(OPEN_OUTPUT as usize));
        request.max_tokens.get_or_insert(room);
    }
    let (sequences, expected) = (sequences as u64, expected as u64);
    Ok((prompts, if bounded { Output::Bounded(expected) } else { Output::Open { sequences, expected } }))
}

/// A request's account.
pub(crate) struct Ticket {
    /// Whose; absent without a key, and once it is settled.
    account: Option<Account>,
    /// What its limits know of it.
    entry: Option<Entry>,
    /// Of each sequence; empty until the engine has taken them.
    meters: Vec<Arc<Meter>>,
    per_prompt: usize,
}

struct Account {
    store: Store,
    key: Arc<Key>,
    model: String,
}

impl Ticket {
    /// Admits a request's sequences, which from then on ask before each token where tokens are limited; or says
    /// why not.
    pub(crate) fn open(
        state: &AppState,
        caller: Caller,
        requests: &mut [GenerateRequest],
        shape: &Shape<'_>,
    ) -> Result<Self, ApiError> {
        let Caller { identity, mut entry } = caller;
        let max_context = identity.limits().and_then(|limits| limits.max_context);
        let (prompts, output) = measure(requests, max_context, shape).map_err(|e| {
            if max_context.is_some_and(|most| (most as usize) < shape.most) {
                state.metrics().count_refused(Reason::ContextNotAllowed);
            }
            ApiError::submit(e, shape.param)
        })?;
        let (caller, weight) = identity.caller();
        for request in requests.iter_mut() {
            (request.caller, request.weight) = (caller, weight);
        }
        if let Some(entry) = &mut entry {
            let allowance = entry.reserve(prompts as u64, output).map_err(|refused| {
                entry.forgive();
                limited(state, &refused)
            })?;
            for request in requests {
                request.allowance.clone_from(&allowance);
            }
        }
        let account = state.gate().store().zip(identity.key()).map(|(store, key)| Account {
            store: store.clone(),
            key: Arc::clone(key),
            model: state.config().model_id.clone(),
        });
        Ok(Self { account, entry, meters: Vec::new(), per_prompt: 1 })
    }

    /// The engine has not taken the request: it does not count.
    pub(crate) fn forgive(&mut self) {
        if let Some(entry) = &mut self.entry {
            entry.forgive();
        }
    }

    /// The engine has taken the request. Before this a ticket that is dropped costs nothing.
    pub(crate) fn start(&mut self, meters: Vec<Arc<Meter>>, per_prompt: usize) {
        (self.meters, self.per_prompt) = (meters, per_prompt.max(1));
    }

    /// The engine has taken one more of its sequences, which shares its prompt with no other.
    pub(crate) fn add(&mut self, meter: Arc<Meter>) {
        self.meters.push(meter);
    }

    /// What sequence `i` uses.
    pub(crate) fn meter(&self, i: usize) -> Option<Arc<Meter>> {
        self.meters.get(i).cloned()
    }

    /// What is used by now. Sequences that share a prompt are charged for it once.
    pub(crate) fn used(&self) -> Amounts {
        let mut used = Amounts { requests: 1, ..Amounts::default() };
        for (i, meter) in self.meters.iter().enumerate() {
            let usage = meter.usage();
            if i % self.per_prompt == 0 {
                used.prompt_tokens += usage.prompt_tokens as u64;
                used.cached_tokens += usage.cached_tokens as u64;
            }
            used.completion_tokens += usage.completion_tokens as u64;
            used.device_micros += meter.device_time().as_micros() as u64;
        }
        used
    }

    /// Settles the account; returns once it is on the disk, which an answer's last bytes wait for.
    pub(crate) async fn finish(&mut self) -> Result<(), ApiError> {
        let Some(receipt) = self.settle() else { return Ok(()) };
        let recorded = receipt.await.unwrap_or_else(|_| Err(gone()));
        recorded.map_err(|error: AuthError| {
            tracing::error!("an answer is withheld, as its use cannot be recorded: {error}");
            ApiError::internal("The server could not record what this request used.")
        })
    }

    /// Sends the use on its way, the first time.
    fn settle(&mut self) -> Option<super::store::Receipt> {
        let used = self.used();
        if let Some(entry) = &mut self.entry {
            entry.settle(used.prompt_tokens);
        }
        let Account { store, key, model } = self.account.take()?;
        if self.meters.is_empty() {
            return None;
        }
        Some(store.record(UsageRecord::today(&key.id, &model, used)))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Nobody waits for this receipt: the client has gone, or has been told of a failure.
        drop(self.settle());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(prompt: usize, max_tokens: Option<usize>) -> GenerateRequest {
        GenerateRequest { prompt: vec![1; prompt], max_tokens, ..GenerateRequest::default() }
    }

    #[test]
    fn a_shared_prompt_is_asked_for_once() {
        let shape = |per_prompt| Shape { per_prompt, param: "prompt", most: 1000 };
        let mut requests =
            [request(5, Some(3)), request(5, Some(3)), request(7, Some(4)), request(7, Some(4))];
        assert_eq!(measure(&mut requests, None, &shape(2)), Ok((12, Output::Bounded(14))));
        let mut open = [request(5, Some(3)), request(900, None), request(6, None)];
        let expected = 3 + 100 + 256;
        assert_eq!(measure(&mut open, None, &shape(1)), Ok((911, Output::Open { sequences: 3, expected })));
        assert_eq!(open.map(|r| r.max_tokens), [Some(3), Some(100), Some(994)]);
    }

    #[test]
    fn the_shorter_context_counts() {
        let shape = Shape { per_prompt: 1, param: "prompt", most: 100 };
        let long = |prompt, requested, limit| Err(SubmitError::ContextLength { prompt, requested, limit });
        let check = |prompt, max_tokens, key| measure(&mut [request(prompt, max_tokens)], key, &shape);
        assert_eq!(check(90, Some(11), None), long(90, 101, 100));
        assert_eq!(check(100, None, Some(1000)), long(100, 101, 100));
        assert_eq!(check(45, Some(6), Some(50)), long(45, 51, 50));
        let mut fits = [request(45, None)];
        let output = Output::Open { sequences: 1, expected: 5 };
        assert_eq!(measure(&mut fits, Some(50), &shape), Ok((45, output)));
        assert_eq!(fits[0].max_tokens, Some(5), "the key's context ends it");
    }

    #[test]
    fn a_shared_prompt_is_charged_once() {
        let meters: Vec<_> = (0..4).map(|_| Arc::new(Meter::default())).collect();
        for meter in &meters {
            meter.prompt(10);
            meter.cached(4);
            meter.generated(3);
            meter.spend(std::time::Duration::from_micros(7));
        }
        let mut ticket = Ticket { account: None, entry: None, meters: Vec::new(), per_prompt: 1 };
        ticket.start(meters, 2);
        let used = Amounts {
            requests: 1,
            prompt_tokens: 20,
            cached_tokens: 8,
            completion_tokens: 12,
            device_micros: 28,
        };
        assert_eq!(ticket.used(), used);
    }
}
