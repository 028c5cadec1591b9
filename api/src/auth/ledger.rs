//! The SQLite file: keys, revocations, usage. Used by the command line and by a running server at the same
//! time, so every change is one transaction and waits for the other's.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rusqlite::{Connection, ErrorCode, OptionalExtension as _, Row, TransactionBehavior, params};

use super::{AuthError, Key, KeyLimits, Scope, day, now};

/// The database in the state directory.
pub const FILE: &str = "keys.sqlite3";

/// How long one process waits for another's transaction.
const BUSY: Duration = Duration::from_secs(5);

/// Each brings the schema from the version of its index to the next; what is here never changes again.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE keys (
        id TEXT NOT NULL PRIMARY KEY,
        name TEXT NOT NULL,
        scopes TEXT NOT NULL,
        created INTEGER NOT NULL,
        expires INTEGER,
        revoked INTEGER,
        rpm INTEGER,
        tpm INTEGER,
        concurrency INTEGER,
        models TEXT NOT NULL,
        max_context INTEGER,
        priority TEXT NOT NULL
    ) STRICT;
    CREATE TABLE usage (
        key TEXT NOT NULL REFERENCES keys (id),
        day TEXT NOT NULL,
        model TEXT NOT NULL,
        requests INTEGER NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        device_micros INTEGER NOT NULL,
        PRIMARY KEY (key, day, model)
    ) STRICT, WITHOUT ROWID;
    -- Grows with every change of a key, so that a server need not read them all to know.
    CREATE TABLE revision (n INTEGER NOT NULL) STRICT;
    INSERT INTO revision VALUES (0);
    CREATE TRIGGER keys_made AFTER INSERT ON keys BEGIN UPDATE revision SET n = n + 1; END;
    CREATE TRIGGER keys_changed AFTER UPDATE ON keys BEGIN UPDATE revision SET n = n + 1; END;
    CREATE TRIGGER keys_gone AFTER DELETE ON keys BEGIN UPDATE revision SET n = n + 1; END;
"];

/// What was used: of one request, or of many together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Requests.
    pub requests: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Of these, taken from a cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Time on the device, in microseconds: of each step the part that the request's tokens had in it.
    pub device_micros: u64,
}

impl std::ops::AddAssign for Amounts {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.device_micros += other.device_micros;
    }
}

/// One request's use, or a row of the account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRecord {
    /// The key's id.
    pub key: String,
    /// The UTC day, `2026-01-31`.
    pub day: String,
    /// The model's id.
    pub model: String,
    /// How much.
    pub amounts: Amounts,
}

/// Which usage to read.
#[derive(Debug, Clone, Default)]
pub struct UsageFilter {
    /// Of this key only.
    pub key: Option<String>,
    /// From this day on.
    pub since: Option<String>,
    /// Up to this day, inclusive.
    pub until: Option<String>,
}

/// An open database.
#[derive(Debug)]
pub struct Ledger {
    connection: Connection,
}

/// Makes the directory where there is none, for its owner only.
pub(crate) fn prepare_dir(dir: &Path) -> Result<(), AuthError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| {
        AuthError::State(format!(
            "cannot make the state directory {}: {e}; choose another --state-dir",
            dir.display()
        ))
    })
}

impl Ledger {
    /// Opens the database of a state directory; makes it, and brings an older one up to date.
    pub fn open(dir: &Path) -> Result<Self, AuthError> {
        prepare_dir(dir)?;
        let path = dir.join(FILE);
        private(&path).map_err(|e| {
            AuthError::State(format!("cannot open {}: {e}; choose another --state-dir", path.display()))
        })?;
        let named = |e: rusqlite::Error| AuthError::Database(format!("{}: {e}", path.display()));
        let connection = Connection::open(&path).map_err(named)?;
        connection.busy_timeout(BUSY).map_err(named)?;
        write_ahead(&connection).map_err(named)?;
        // A commit is on the disk before it is told: nothing a client was told is lost with the power.
        connection.pragma_update(None, "synchronous", "FULL").map_err(named)?;
        connection.pragma_update(None, "foreign_keys", true).map_err(named)?;
        let mut ledger = Self { connection };
        ledger.migrate(&path)?;
        Ok(ledger)
    }

    fn migrate(&mut self, path: &Path) -> Result<(), AuthError> {
        let version_of = |connection: &Connection| {
            connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        };
        let known = MIGRATIONS.len() as i64;
        // Who opens a database of today waits for no writer.
        if version_of(&self.connection)? == known {
            return Ok(());
        }
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = version_of(&transaction)?;
        if !(0..=known).contains(&version) {
            return Err(AuthError::Database(format!(
                "{} has version {version} and this m40llm knows {known}: run the newer m40llm that made it",
                path.display()
            )));
        }
        for migration in &MIGRATIONS[version as usize..] {
            transaction.execute_batch(migration)?;
        }
        transaction.pragma_update(None, "user_version", known)?;
        Ok(transaction.commit()?)
    }

    /// Runs `work` while no other process changes anything in the state directory.
    pub(crate) fn exclusively<T>(
        &mut self,
        work: impl FnOnce(&Connection) -> Result<T, AuthError>,
    ) -> Result<T, AuthError> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let done = work(&transaction)?;
        transaction.commit()?;
        Ok(done)
    }

    /// Takes a key in.
    pub(crate) fn insert(connection: &Connection, key: &Key) -> Result<(), AuthError> {
        let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.name()).collect();
        let models = serde_json::to_string(&key.limits.models).unwrap_or_else(|_| "[]".to_owned());
        connection.execute(
            "INSERT INTO keys (id, name, scopes, created, expires, rpm, tpm, concurrency, models, max_context, \
             priority) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
            params![
                key.id,
                key.name,
                scopes.join(" "),
                key.created as i64,
                key.expires.map(|t| t as i64),
                key.limits.rpm,
                key.limits.tpm,
                key.limits.concurrency,
                models,
                key.limits.max_context,
                key.limits.priority.name(),
            ],
        )?;
        Ok(())
    }

    /// Takes a key back. One that was revoked before stays as it is.
    pub fn revoke(&mut self, id: &str) -> Result<Key, AuthError> {
        self.exclusively(|connection| {
            connection.execute(
                "UPDATE keys SET revoked = ?2 WHERE id = ?1 AND revoked IS NULL",
                params![id, now() as i64],
            )?;
            let key = connection.query_row("SELECT * FROM keys WHERE id = ?1", [id], key_of).optional()?;
            key.ok_or_else(|| AuthError::UnknownKey(id.to_owned()))
        })
    }

    /// All keys in the order in which they were made.
    pub fn keys(&self) -> Result<Vec<Key>, AuthError> {
        let mut statement = self.connection.prepare_cached("SELECT * FROM keys ORDER BY created, rowid")?;
        Ok(statement.query_map([], key_of)?.collect::<Result<_, _>>()?)
    }

    /// A number that grows with every change of the keys.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn revision(&self) -> Result<i64, AuthError> {
        Ok(self.connection.prepare_cached("SELECT n FROM revision")?.query_row([], |row| row.get(0))?)
    }

    /// Adds to the accounts, all of it or nothing, and returns once it is on the disk.
    pub fn record<'a>(
        &mut self,
        records: impl IntoIterator<Item = &'a UsageRecord>,
    ) -> Result<(), AuthError> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        {
            let mut add = transaction.prepare_cached(
                "INSERT INTO usage (key, day, model, requests, prompt_tokens, cached_tokens, completion_tokens, \
                 device_micros) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) \
                 ON CONFLICT DO UPDATE SET \
                 requests = requests + excluded.requests, \
                 prompt_tokens = prompt_tokens + excluded.prompt_tokens, \
                 cached_tokens = cached_tokens + excluded.cached_tokens, \
                 completion_tokens = completion_tokens + excluded.completion_tokens, \
                 device_micros = device_micros + excluded.device_micros",
            )?;
            for UsageRecord { key, day, model, amounts } in records {
                add.execute(params![
                    key,
                    day,
                    model,
                    amounts.requests as i64,
                    amounts.prompt_tokens as i64,
                    amounts.cached_tokens as i64,
                    amounts.completion_tokens as i64,
                    amounts.device_micros as i64,
                ])?;
            }
        }
        Ok(transaction.commit()?)
    }

    /// The accounts by key, day and model, in this order.
    pub fn usage(&self, filter: &UsageFilter) -> Result<Vec<UsageRecord>, AuthError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT key, day, model, requests, prompt_tokens, cached_tokens, completion_tokens, device_micros \
             FROM usage WHERE (?1 IS NULL OR key = ?1) AND (?2 IS NULL OR day >= ?2) AND (?3 IS NULL OR day <= ?3) \
             ORDER BY key, day, model",
        )?;
        let rows = statement.query_map(params![filter.key, filter.since, filter.until], |row| {
            let count = |i: usize| row.get::<_, i64>(i).map(|n| n as u64);
            Ok(UsageRecord {
                key: row.get(0)?,
                day: row.get(1)?,
                model: row.get(2)?,
                amounts: Amounts {
                    requests: count(3)?,
                    prompt_tokens: count(4)?,
                    cached_tokens: count(5)?,
                    completion_tokens: count(6)?,
                    device_micros: count(7)?,
                },
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

impl UsageRecord {
    /// One request's use, today.
    pub fn today(key: &str, model: &str, amounts: Amounts) -> Self {
        Self { key: key.to_owned(), day: day(now()), model: model.to_owned(), amounts }
    }
}

/// Makes the file for its owner only before SQLite sees it: what SQLite puts beside it takes its mode. One that
/// others could read is closed.
fn private(path: &Path) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    for suffix in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        let file = PathBuf::from(name);
        match fs::metadata(&file) {
            Ok(metadata) if metadata.permissions().mode() & 0o077 != 0 => {
                fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            }
            // A checkpoint by another process may take them away at any time.
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Readers and the writer do not wait for one another. Switching the mode on does not wait by itself for
/// another process that is doing the same.
fn write_ahead(connection: &Connection) -> rusqlite::Result<()> {
    let until = Instant::now() + BUSY;
    loop {
        match connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0)) {
            Ok(mode) if mode.eq_ignore_ascii_case("wal") => return Ok(()),
            Ok(_) => return Err(rusqlite::Error::InvalidQuery),
            Err(e) if e.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => return Err(e),
        }
    }
}

fn key_of(row: &Row<'_>) -> rusqlite::Result<Key> {
    let text = |name: &str| row.get::<_, String>(name);
    let time = |name: &str| row.get::<_, Option<i64>>(name).map(|t| t.map(|t| t as u64));
    let broken = |what: &str| {
        rusqlite::Error::FromSqlConversionFailure(
            0,
            rusqlite::types::Type::Text,
            format!("a key's {what} cannot be read").into(),
        )
    };
    // A scope of a later version is none that this one could grant.
    let scopes: Vec<Scope> = text("scopes")?.split(' ').filter_map(|scope| scope.parse().ok()).collect();
    Ok(Key {
        id: row.get("id")?,
        name: row.get("name")?,
        scopes,
        created: time("created")?.unwrap_or_default(),
        expires: time("expires")?,
        revoked: time("revoked")?,
        limits: KeyLimits {
            rpm: row.get("rpm")?,
            tpm: row.get("tpm")?,
            concurrency: row.get("concurrency")?,
            models: serde_json::from_str(&text("models")?).map_err(|_| broken("models"))?,
            max_context: row.get("max_context")?,
            priority: text("priority")?.parse().map_err(|_| broken("priority"))?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Priority;

    fn key(id: &str) -> Key {
        Key {
            id: id.into(),
            name: "n".into(),
            scopes: vec![Scope::Inference, Scope::Admin],
            created: 7,
            expires: Some(9),
            revoked: None,
            limits: KeyLimits {
                rpm: Some(1),
                tpm: Some(u32::MAX),
                concurrency: Some(3),
                models: vec!["a b".into(), "c\"d".into()],
                max_context: Some(4),
                priority: Priority::High,
            },
        }
    }

    fn insert(ledger: &mut Ledger, key: &Key) {
        ledger.exclusively(|c| Ledger::insert(c, key)).unwrap();
    }

    fn used(requests: u64) -> Amounts {
        Amounts { requests, prompt_tokens: 10, cached_tokens: 2, completion_tokens: 5, device_micros: 1500 }
    }

    #[test]
    fn keys_come_back_as_they_were_and_revocations_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        let before = ledger.revision().unwrap();
        insert(&mut ledger, &key("key_b"));
        insert(&mut ledger, &Key { expires: None, limits: KeyLimits::default(), ..key("key_a") });
        assert_eq!(ledger.keys().unwrap()[0], key("key_b"));
        assert_eq!(ledger.keys().unwrap()[1].limits, KeyLimits::default());
        assert_eq!(ledger.revision().unwrap(), before + 2);

        let revoked = ledger.revoke("key_b").unwrap().revoked.unwrap();
        assert_eq!(ledger.revoke("key_b").unwrap().revoked, Some(revoked), "once is for ever");
        assert_eq!(ledger.revision().unwrap(), before + 3);
        assert!(matches!(ledger.revoke("key_c"), Err(AuthError::UnknownKey(id)) if id == "key_c"));
        drop(ledger);
        assert_eq!(Ledger::open(dir.path()).unwrap().keys().unwrap()[0].revoked, Some(revoked));
    }

    #[test]
    fn usage_adds_up_by_key_day_and_model() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        insert(&mut ledger, &key("key_a"));
        let record = |day: &str, model: &str| UsageRecord {
            key: "key_a".into(),
            day: day.into(),
            model: model.into(),
            amounts: used(1),
        };
        ledger
            .record(&[record("2026-01-01", "m"), record("2026-01-01", "m"), record("2026-01-02", "m")])
            .unwrap();
        ledger.record(&[record("2026-01-01", "other")]).unwrap();
        let all = ledger.usage(&UsageFilter::default()).unwrap();
        assert_eq!(all.len(), 3);
        let mut twice = used(1);
        twice += used(1);
        assert_eq!((all[0].model.as_str(), all[0].amounts), ("m", twice));
        let since = UsageFilter { since: Some("2026-01-02".into()), ..UsageFilter::default() };
        assert_eq!(ledger.usage(&since).unwrap().len(), 1);
        let until = UsageFilter { until: Some("2026-01-01".into()), ..UsageFilter::default() };
        assert_eq!(ledger.usage(&until).unwrap().len(), 2);
        let nobody = UsageFilter { key: Some("key_x".into()), ..UsageFilter::default() };
        assert!(ledger.usage(&nobody).unwrap().is_empty());
        assert!(
            ledger
                .record(&[record("2026-01-03", "m"), UsageRecord { key: "key_x".into(), ..record("d", "m") }])
                .is_err()
        );
        assert_eq!(ledger.usage(&UsageFilter::default()).unwrap().len(), 3, "all of it or nothing");
    }

    #[test]
    fn every_file_is_private_whatever_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let mut ledger = Ledger::open(&state).unwrap();
        insert(&mut ledger, &key("key_a"));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&state), mode(&dir.path().join("a"))), (0o700, 0o700));
        let files = || fs::read_dir(&state).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
        assert_eq!(files().len(), 3, "{:?}", files());
        for file in files() {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
            fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        let _again = Ledger::open(&state).unwrap();
        for file in files() {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    }

    #[test]
    fn a_later_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        ledger.connection.pragma_update(None, "user_version", 99).unwrap();
        drop(ledger);
        let error = Ledger::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("version 99") && error.contains(FILE), "{error}");
    }

    #[test]
    fn many_processes_may_begin_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::thread::scope(|scope| {
            for i in 0..8 {
                let state = &state;
                scope.spawn(move || insert(&mut Ledger::open(state).unwrap(), &key(&format!("key_{i}"))));
            }
        });
        assert_eq!(Ledger::open(&state).unwrap().keys().unwrap().len(), 8);
    }
}
