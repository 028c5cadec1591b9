//! What one request uses, from its admission to its settlement.
//!
//! A ticket is opened before the engine is asked, told of the sequences that were submitted, and settled once:
//! by [`Ticket::finish`], which returns when the use is on the disk, or by being dropped, when a client has
//! gone or the work has failed. Either way what was computed until then is what counts.

use std::sync::Arc;

use m40llm_engine::{GenerateRequest, Meter};

use super::{
    AuthError, Identity, Key, Store,
    ledger::{Amounts, UsageRecord},
    store::gone,
};
use crate::{app::AppState, error::ApiError};

/// What a request asks for, as far as limits are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Tokens of all its prompts, each once.
    pub(crate) prompt_tokens: usize,
    /// Sequences to generate.
    pub(crate) sequences: usize,
    /// Most tokens of all sequences together; absent when one has no bound but the context.
    pub(crate) max_tokens: Option<usize>,
    /// The longest prompt with its output, as far as it is bounded.
    pub(crate) context: usize,
}

impl Demand {
    /// Of `requests`, of which each `per_prompt` share a prompt.
    pub(crate) fn of(requests: &[GenerateRequest], per_prompt: usize) -> Self {
        let bounds = requests.iter().map(|r| r.max_tokens);
        Self {
            prompt_tokens: requests.iter().step_by(per_prompt.max(1)).map(|r| r.prompt.len()).sum(),
            sequences: requests.len(),
            max_tokens: bounds.sum(),
            context: requests.iter().map(|r| r.prompt.len() + r.max_tokens.unwrap_or(0)).max().unwrap_or(0),
        }
    }
}

/// A request's account.
pub(crate) struct Ticket {
    /// Whose; absent without a key, and once it is settled.
    account: Option<Account>,
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
    /// Admits a request, or says why not.
    pub(crate) fn open(state: &AppState, identity: &Identity, _demand: Demand) -> Result<Self, ApiError> {
        let account = state.gate().store().zip(identity.key()).map(|(store, key)| Account {
            store: store.clone(),
            key: Arc::clone(key),
            model: state.config().model_id.clone(),
        });
        Ok(Self { account, meters: Vec::new(), per_prompt: 1 })
    }

    /// The engine has taken the request. Before this a ticket that is dropped costs nothing.
    pub(crate) fn start(&mut self, meters: Vec<Arc<Meter>>, per_prompt: usize) {
        (self.meters, self.per_prompt) = (meters, per_prompt.max(1));
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
        let Account { store, key, model } = self.account.take()?;
        if self.meters.is_empty() {
            return None;
        }
        Some(store.record(UsageRecord::today(&key.id, &model, self.used())))
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
        let requests = [request(5, Some(3)), request(5, Some(3)), request(7, Some(4)), request(7, Some(4))];
        let demand = Demand { prompt_tokens: 12, sequences: 4, max_tokens: Some(14), context: 11 };
        assert_eq!(Demand::of(&requests, 2), demand);
        let open = [request(5, Some(3)), request(6, None)];
        let demand = Demand { prompt_tokens: 11, sequences: 2, max_tokens: None, context: 8 };
        assert_eq!(Demand::of(&open, 1), demand);
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
        let mut ticket = Ticket { account: None, meters: Vec::new(), per_prompt: 1 };
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
