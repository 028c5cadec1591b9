//! The vault of a running server: one thread writes, everybody reads keys from memory.
//!
//! What is waiting when the writer comes round is one transaction, so that a hundred requests that end
//! together cost one flush of the disk; nobody waits for others to come. Between its writes, and at least
//! every [`POLL`], the thread looks whether the command line has changed keys or secrets.

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    AuthError, Key, Vault,
    ledger::{Ledger, UsageRecord},
    secret::Secrets,
    token::{self, Claims, Refusal},
    vault::VaultConfig,
};

/// How often the thread looks for changes by other processes: they count within a second.
const POLL: Duration = Duration::from_millis(200);

/// Most records in one transaction; what is more waits for the next.
const BATCH: usize = 4096;

/// Resolves once the record is on the disk.
pub type Receipt = oneshot::Receiver<Result<(), AuthError>>;

/// Tells whoever waits.
type Tell = Box<dyn FnOnce() + Send>;

enum Command {
    Record(UsageRecord, oneshot::Sender<Result<(), AuthError>>),
    Work(Box<dyn FnOnce(&mut Vault) -> Tell + Send>),
}

/// What requests are checked against.
struct View {
    keys: HashMap<String, Arc<Key>>,
    secrets: Arc<Secrets>,
}

/// A server's keys and accounts. Cheap to clone.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    commands: Sender<Command>,
    view: Arc<RwLock<Arc<View>>>,
    dir: PathBuf,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("dir", &self.0.dir).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the state directory and starts the writer, which ends with the last clone.
    pub fn open(config: &VaultConfig) -> Result<Self, AuthError> {
        let mut vault = Vault::open(config)?;
        // Before the keys: a change in between is seen in the next round.
        let revision = vault.ledger().revision()?;
        let view = Arc::new(RwLock::new(Arc::new(View::of(&vault)?)));
        let (commands, inbox) = channel();
        let mut writer = Writer { vault, inbox, view: Arc::clone(&view), revision };
        std::thread::Builder::new()
            .name("m40llm-accounts".into())
            .spawn(move || writer.run())
            .map_err(|e| AuthError::State(format!("cannot start the thread of the key store: {e}")))?;
        Ok(Self(Arc::new(Inner { commands, view, dir: config.dir.clone() })))
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a key was ever made. A revoked one counts: taking the last key back must not open the door.
    pub fn has_keys(&self) -> bool {
        !self.view().keys.is_empty()
    }

    /// The key's record, also of one that is revoked or expired.
    pub fn key(&self, id: &str) -> Option<Arc<Key>> {
        self.view().keys.get(id).cloned()
    }

    /// What the text of a key says, with the key's record: `None` when there is none (any more).
    pub(crate) fn verify(&self, text: &str, now: u64) -> Result<(Claims, Option<Arc<Key>>), Refusal> {
        let view = self.view();
        let claims = token::verify(text, &view.secrets, now)?;
        let key = view.keys.get(&claims.jti).cloned();
        Ok((claims, key))
    }

    /// Adds to the accounts. It is on its way when this returns, and on the disk when the receipt resolves.
    pub fn record(&self, record: UsageRecord) -> Receipt {
        let (done, receipt) = oneshot::channel();
        // A thread that is gone drops the sender, which the receipt tells.
        let _ = self.0.commands.send(Command::Record(record, done));
        receipt
    }

    /// Runs `work` on the writer's vault, between its transactions; what it changes is seen at once.
    pub async fn with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Vault) -> Result<T, AuthError> + Send + 'static,
    ) -> Result<T, AuthError> {
        let (done, result) = oneshot::channel();
        let work = move |vault: &mut Vault| -> Tell {
            let result = work(vault);
            Box::new(move || drop(done.send(result)))
        };
        let _ = self.0.commands.send(Command::Work(Box::new(work)));
        result.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Reads on a connection of its own, beside the writer.
    pub async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Ledger) -> Result<T, AuthError> + Send + 'static,
    ) -> Result<T, AuthError> {
        let dir = self.0.dir.clone();
        let read = tokio::task::spawn_blocking(move || work(&Ledger::open(&dir)?));
        read.await.unwrap_or_else(|e| Err(AuthError::Database(e.to_string())))
    }

    /// Returns once everything that was recorded before is on the disk.
    pub async fn flush(&self) -> Result<(), AuthError> {
        self.with(|_| Ok(())).await
    }
}

/// The writer is gone: it panicked.
pub(crate) fn gone() -> AuthError {
    AuthError::Database("its thread has ended".into())
}

impl View {
    fn of(vault: &Vault) -> Result<Self, AuthError> {
        let keys = vault.keys()?.into_iter().map(|key| (key.id.clone(), Arc::new(key))).collect();
        Ok(Self { keys, secrets: Arc::clone(vault.secrets()) })
    }
}

struct Writer {
    vault: Vault,
    inbox: Receiver<Command>,
    view: Arc<RwLock<Arc<View>>>,
    /// Of the keys that the view was made from.
    revision: i64,
}

impl Writer {
    /// Until the last [`Store`] is gone, and what it said is written.
    fn run(&mut self) {
        let mut looked = Instant::now();
        loop {
            match self.inbox.recv_timeout(POLL.saturating_sub(looked.elapsed())) {
                Ok(command) => self.serve(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if looked.elapsed() >= POLL {
                self.look();
                looked = Instant::now();
            }
        }
    }

    /// One transaction for all records that wait; other work in its turn.
    fn serve(&mut self, first: Command) {
        let (mut batch, mut worked) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Record(record, done) => batch.push((record, done)),
                Command::Work(work) => {
                    self.commit(&mut batch);
                    worked.push(work(&mut self.vault));
                }
            }
            next = (batch.len() < BATCH).then(|| self.inbox.try_recv().ok()).flatten();
        }
        self.commit(&mut batch);
        if !worked.is_empty() {
            // Who is told that a key is made or revoked may count on it.
            self.look();
            for tell in worked {
                tell();
            }
        }
    }

    fn commit(&mut self, batch: &mut Vec<(UsageRecord, oneshot::Sender<Result<(), AuthError>>)>) {
        if batch.is_empty() {
            return;
        }
        let result = self.vault.ledger().record(batch.iter().map(|(record, _)| record));
        if let Err(error) = &result {
            tracing::error!(requests = batch.len(), "usage is not recorded: {error}");
        }
        for (_, done) in batch.drain(..) {
            // Who is gone wants no receipt.
            let _ = done.send(result.clone());
        }
    }

    /// Takes over what has changed. On an error the old view stays, and the next round tries again.
    fn look(&mut self) {
        if let Err(error) = self.try_look() {
            tracing::error!("keys cannot be read, so changes do not count yet: {error}");
        }
    }

    fn try_look(&mut self) -> Result<(), AuthError> {
        self.vault.refresh_secrets()?;
        let stale = !Arc::ptr_eq(self.vault.secrets(), &self.view().secrets);
        // A row of one number, read from memory unless somebody has written.
        let revision = self.vault.ledger().revision()?;
        if stale || revision != self.revision {
            let view = View::of(&self.vault)?;
            if self.view().keys.is_empty() && !view.keys.is_empty() {
                tracing::info!("the first API key exists: requests need one from now on");
            }
            *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(view);
        }
        self.revision = revision;
        Ok(())
    }

    fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{
        NewKey, Status,
        ledger::{Amounts, UsageFilter},
        now,
    };

    fn config() -> (tempfile::TempDir, VaultConfig) {
        let dir = tempfile::tempdir().unwrap();
        let config = VaultConfig { dir: dir.path().to_owned(), signing_secret: None };
        (dir, config)
    }

    fn new(name: &str) -> NewKey {
        NewKey { name: name.into(), ..NewKey::default() }
    }

    /// Waits until `true` for at most the second that changes may take.
    fn within_a_second(check: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(1);
        while !check() {
            assert!(Instant::now() < until, "not within a second");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_others_do_in_the_directory_counts_within_a_second() {
        let (_dir, config) = config();
        let store = Store::open(&config).unwrap();
        assert!(!store.has_keys());
        let mut other = Vault::open(&config).unwrap();
        let (key, text) = other.create(new("a")).unwrap();
        within_a_second(|| store.has_keys());
        assert_eq!(*store.verify(&text, now()).unwrap().1.unwrap(), key);
        other.revoke(&key.id).unwrap();
        within_a_second(|| store.key(&key.id).unwrap().status(now()) == Status::Revoked);
        assert!(store.has_keys(), "a revoked key does not open the door");
        other.rotate(true).unwrap();
        within_a_second(|| store.verify(&text, now()) == Err(Refusal::Invalid));
    }

    #[tokio::test]
    async fn what_the_server_does_counts_at_once() {
        let (_dir, config) = config();
        let store = Store::open(&config).unwrap();
        let (key, text) = store.with(|vault| vault.create(new("a"))).await.unwrap();
        assert!(store.verify(&text, now()).unwrap().1.is_some());
        let id = key.id.clone();
        store.with(move |vault| vault.revoke(&id)).await.unwrap();
        assert!(store.key(&key.id).unwrap().revoked.is_some());
        assert!(store.with(|vault| vault.revoke("key_x")).await.is_err());
    }

    #[tokio::test]
    async fn a_receipt_means_that_others_can_read_it() {
        let (_dir, config) = config();
        let store = Store::open(&config).unwrap();
        let (key, _) = store.with(|vault| vault.create(new("a"))).await.unwrap();
        let used = Amounts { requests: 1, prompt_tokens: 3, ..Amounts::default() };
        let receipts: Vec<_> =
            (0..500).map(|_| store.record(UsageRecord::today(&key.id, "m", used))).collect();
        for receipt in receipts {
            receipt.await.unwrap().unwrap();
        }
        let mut other = Vault::open(&config).unwrap();
        let total: u64 =
            other.ledger().usage(&UsageFilter::default()).unwrap().iter().map(|r| r.amounts.requests).sum();
        assert_eq!(total, 500);
        let read = store.read(|ledger| ledger.usage(&UsageFilter::default())).await.unwrap();
        assert_eq!(read.iter().map(|r| r.amounts.prompt_tokens).sum::<u64>(), 1500);
        // A record that cannot be: nobody's key.
        assert!(store.record(UsageRecord::today("key_x", "m", used)).await.unwrap().is_err());
    }
}
