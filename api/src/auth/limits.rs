//! What keys may use: requests a minute, tokens a minute, requests at once.
//!
//! Each key has an [`Account`]. A request **enters** it before its body is read: that takes a place among the
//! concurrent ones and one request of the minute's. When its prompt is known, it **reserves** tokens: the
//! prompt's are spent at once, those of the output are held. The engine **draws** the output's tokens one by
//! one ([`Allowance`]): from what is held first, then, when nobody said `max_tokens`, from the bucket, and
//! where that is empty the sequence pauses until it has filled again. When the request ends, in whatever way,
//! it is **settled**: what was held and not drawn, and what of the prompt was not computed, is free again.
//!
//! The buckets are our own (see [`Bucket`]). GCRA, as in the crate `governor`, keeps one time and no level:
//! what has been taken cannot be given back or held, which settling needs.
//!
//! A limit counts since the server's start: it is kept in memory, and full when the server starts again.

mod bucket;
mod headers;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use axum::http::HeaderMap;
use m40llm_engine::Allowance;

use self::{bucket::Bucket, headers::duration};
use super::{DefaultLimits, Key};
use crate::observe::Refusal as Reason;

/// What a sequence reserves for its output when nobody said how long it may get.
pub(crate) const OPEN_OUTPUT: u64 = 256;

/// Counts nanoseconds.
#[derive(Debug, Clone)]
enum Clock {
    /// Since a moment.
    Real(Instant),
    /// By hand.
    #[cfg(test)]
    Hand(Arc<std::sync::atomic::AtomicU64>),
}

impl Clock {
    fn now(&self) -> u64 {
        match self {
            Self::Real(start) => start.elapsed().as_nanos() as u64,
            #[cfg(test)]
            Self::Hand(now) => now.load(std::sync::atomic::Ordering::SeqCst),
        }
    }
}

/// The accounts of all keys.
#[derive(Debug)]
pub(crate) struct Accounts {
    clock: Clock,
    defaults: RwLock<DefaultLimits>,
    /// By the key's id; as many as there are keys at most.
    by_key: Mutex<HashMap<String, Arc<Account>>>,
}

impl Default for Accounts {
    fn default() -> Self {
        Self { clock: Clock::Real(Instant::now()), defaults: RwLock::default(), by_key: Mutex::default() }
    }
}

impl Accounts {
    /// Other defaults from now on; each account takes them over when it is asked next.
    pub(crate) fn set_defaults(&self, defaults: DefaultLimits) {
        *self.defaults.write().unwrap_or_else(PoisonError::into_inner) = defaults;
    }

    /// The key's account, by the limits that it has now; `None` when it never had any.
    pub(crate) fn of(&self, key: &Key) -> Option<Arc<Account>> {
        let defaults = *self.defaults.read().unwrap_or_else(PoisonError::into_inner);
        let limits = defaults.under(&key.limits);
        let mut accounts = lock(&self.by_key);
        if let Some(account) = accounts.get(&key.id) {
            account.update(&limits);
            return Some(Arc::clone(account));
        }
        if limits == DefaultLimits::default() {
            return None;
        }
        let account = Arc::new(Account::new(self.clock.clone(), &limits));
        accounts.insert(key.id.clone(), Arc::clone(&account));
        Some(account)
    }
}

/// Why a request is not served (now).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Too many requests this minute.
    Requests {
        /// A minute's.
        limit: u64,
        /// Until there is one.
        wait: Duration,
    },
    /// Too many tokens this minute.
    Tokens {
        /// A minute's.
        limit: u64,
        /// Of these, free now.
        remaining: u64,
        /// What was asked for.
        requested: u64,
        /// Until there are as many.
        wait: Duration,
    },
    /// More tokens than a whole minute's: waiting would not help.
    TooLarge {
        /// A minute's.
        limit: u64,
        /// What was asked for.
        requested: u64,
    },
    /// Too many requests at once.
    Concurrent {
        /// So many may.
        limit: u32,
    },
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requests { limit, wait } => write!(
                f,
                "Rate limit reached for this key on requests per min (RPM): Limit {limit}. Please try again in {}.",
                duration(*wait)
            ),
            Self::Tokens { limit, remaining, requested, wait } => write!(
                f,
                "Rate limit reached for this key on tokens per min (TPM): Limit {limit}, Remaining {remaining}, \
                 Requested {requested}. Please try again in {}.",
                duration(*wait)
            ),
            Self::TooLarge { limit, requested } => write!(
                f,
                "Request too large for this key on tokens per min (TPM): Limit {limit}, Requested {requested}. Shorten \
                 the prompt or lower max_tokens; waiting does not help."
            ),
            Self::Concurrent { limit } => write!(
                f,
                "Rate limit reached for this key on concurrent requests: Limit {limit}. Please try again when one of \
                 them has ended."
            ),
        }
    }
}

impl Refused {
    /// Its name in metrics.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Requests { .. } => Reason::RequestsPerMinute,
            Self::Tokens { .. } | Self::TooLarge { .. } => Reason::TokensPerMinute,
            Self::Concurrent { .. } => Reason::ConcurrentRequests,
        }
    }

    /// After how long another try makes sense; `None`: never.
    pub(crate) fn wait(&self) -> Option<Duration> {
        match *self {
            Self::Requests { wait, .. } | Self::Tokens { wait, .. } => Some(wait),
            Self::TooLarge { .. } => None,
            // Nobody knows when the others end.
            Self::Concurrent { .. } => Some(Duration::from_secs(1)),
        }
    }
}

/// What one key has used and may use.
#[derive(Debug)]
pub(crate) struct Account {
    clock: Clock,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrency: Option<u32>,
    /// Requests under way.
    running: u32,
}

impl Account {
    fn new(clock: Clock, limits: &DefaultLimits) -> Self {
        let state = State { requests: None, tokens: None, concurrency: None, running: 0 };
        let account = Self { clock, state: Mutex::new(state) };
        account.update(limits);
        account
    }

    /// Takes the key's limits over, which may have been changed.
    fn update(&self, limits: &DefaultLimits) {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let State { requests, tokens, concurrency, .. } = &mut *state;
        for (bucket, limit) in [(requests, limits.rpm), (tokens, limits.tpm)] {
            match (bucket.as_mut(), limit.map(u64::from)) {
                (Some(bucket), Some(limit)) if bucket.limit() == limit => {}
                (Some(bucket), Some(limit)) => bucket.set_limit(limit, now),
                (_, limit) => *bucket = limit.map(|limit| Bucket::full(limit, now)),
            }
        }
        *concurrency = limits.concurrency;
    }

    /// The state as of now.
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let State { requests, tokens, .. } = &mut *state;
        for bucket in [requests, tokens].into_iter().flatten() {
            bucket.fill(now);
        }
        state
    }

    /// Counts a request, which is under way until the entry is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Entry, Refused> {
        let mut state = self.state();
        if let Some(limit) = state.concurrency.filter(|&limit| state.running >= limit) {
            return Err(Refused::Concurrent { limit });
        }
        if let Some(requests) = &mut state.requests {
            let limit = requests.limit();
            requests
                .spend(1)
                .map_err(|wait| Refused::Requests { limit, wait: Duration::from_nanos(wait) })?;
        }
        state.running += 1;
        Ok(Entry { account: Arc::clone(self), ration: None })
    }

    /// Writes the account's standing into a response's headers.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        let state = self.state();
        headers::write(state.requests.as_ref(), state.tokens.as_ref(), headers);
    }
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Entry {
    account: Arc<Account>,
    ration: Option<Arc<Ration>>,
}

/// The output that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// At most so many tokens.
    Bounded(u64),
    /// Nobody said how many.
    Open {
        /// The sequences.
        sequences: u64,
        /// What they are expected to take at first.
        expected: u64,
    },
}

impl Entry {
    /// Reserves tokens, where they are limited: the prompt's and the output's. What comes back is asked before
    /// each token of the output.
    pub(crate) fn reserve(
        &mut self,
        prompt: u64,
        output: Output,
    ) -> Result<Option<Arc<dyn Allowance>>, Refused> {
        let mut state = self.account.state();
        let Some(tokens) = &mut state.tokens else { return Ok(None) };
        let limit = tokens.limit();
        let (least, requested) = match output {
            Output::Bounded(output) => (prompt + output, prompt + output),
            Output::Open { sequences, expected } => (prompt + sequences, (prompt + expected).min(limit)),
        };
        if least > limit {
            return Err(Refused::TooLarge { limit, requested: least });
        }
        let remaining = tokens.remaining();
        tokens.hold(requested).map_err(|wait| Refused::Tokens {
            limit,
            remaining,
            requested,
            wait: Duration::from_nanos(wait),
        })?;
        tokens.spend_held(prompt);
        drop(state);
        let kept = Kept { prompt, held: requested - prompt, settled: false };
        let ration = Arc::new(Ration { account: Arc::clone(&self.account), kept: Mutex::new(kept) });
        self.ration = Some(Arc::clone(&ration));
        Ok(Some(ration))
    }

    /// The request has ended, and so many tokens of its prompt have been computed. What it reserved and did
    /// not use is free; the second call changes nothing.
    pub(crate) fn settle(&mut self, prompt: u64) {
        if let Some(ration) = self.ration.take() {
            ration.settle(prompt);
        }
    }

    /// The request was refused by another limit, or by the engine: it does not count.
    pub(crate) fn forgive(&mut self) {
        if let Some(requests) = &mut self.account.state().requests {
            requests.put_back(1);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Without a settlement nothing was computed.
        self.settle(0);
        lock(&self.account.state).running -= 1;
    }
}

/// The tokens of one request.
#[derive(Debug)]
struct Ration {
    account: Arc<Account>,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    /// Tokens of the prompt, spent.
    prompt: u64,
    /// Tokens held for the output.
    held: u64,
    /// Nothing more may be drawn.
    settled: bool,
}

impl Ration {
    fn settle(&self, prompt: u64) {
        let mut kept = lock(&self.kept);
        kept.settled = true;
        if let Some(tokens) = &mut self.account.state().tokens {
            tokens.release(std::mem::take(&mut kept.held));
            tokens.put_back(kept.prompt.saturating_sub(prompt));
        }
    }
}

impl Allowance for Ration {
    fn draw(&self) -> Result<(), Duration> {
        let mut kept = lock(&self.kept);
        if kept.settled {
            // Its request is gone, as the engine is about to notice.
            return Err(Duration::from_secs(1));
        }
        let mut state = self.account.state();
        let Some(tokens) = &mut state.tokens else { return Ok(()) };
        if kept.held > 0 {
            kept.held -= 1;
            tokens.spend_held(1);
            return Ok(());
        }
        tokens.spend(1).map_err(Duration::from_nanos)
    }

    fn give_back(&self) {
        // To the bucket, also where it came from what was held: the request is gone.
        if let Some(tokens) = &mut self.account.state().tokens {
            tokens.put_back(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
