//! Keys: who may call, for what, how much, and what was used.
//!
//! A key is `sk-m40-` and a signed token. The way of a request's key: [`token`] (signature, dates) → the
//! [`key`]'s record (revoked? which limits?) → an `Identity` that handlers see → a `Ticket` that counts what
//! the request uses and settles it in the [`ledger`] before the last bytes go out.
//!
//! | module | holds |
//! | --- | --- |
//! | [`key`] | what a key is: scopes, limits, dates |
//! | [`secret`] | the secrets that sign, and their file |
//! | [`token`] | a key's text: made and checked |
//! | [`ledger`] | SQLite: keys, revocations, usage |
//! | [`vault`] | one state directory: secrets and ledger together |
//! | [`view`] | keys and accounts as JSON |
//! | `store` | the vault of a running server: one writer thread, keys in memory |
//! | `middleware` | who asks, and whether they may |
//! | `failures` | who guesses keys |
//! | `limits` | what a key may use, and has used of it |
//! | `ticket` | what one request uses |
//!
//! Neither a key nor its signature is ever stored or logged: the ledger knows a key by its id (`jti`).

#[cfg(feature = "server")]
pub(crate) mod failures;
pub mod key;
pub mod ledger;
#[cfg(feature = "server")]
pub(crate) mod limits;
#[cfg(feature = "server")]
pub mod middleware;
pub mod secret;
#[cfg(feature = "server")]
pub mod store;
#[cfg(feature = "server")]
pub(crate) mod ticket;
pub mod token;
pub mod vault;
pub mod view;

use std::{
    fmt::Write as _,
    time::{SystemTime, UNIX_EPOCH},
};

pub use key::{DefaultLimits, Key, KeyLimits, NewKey, Priority, Scope, Status};
#[cfg(feature = "server")]
pub use middleware::{Gate, Identity};
pub use secret::SigningSecret;
#[cfg(feature = "server")]
pub use store::Store;
pub use vault::Vault;

/// What went wrong with keys or their store. Names the file or the id, never a secret.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuthError {
    /// A file or directory of the state directory.
    #[error("{0}")]
    State(String),
    /// The signing secret.
    #[error("{0}")]
    Secret(String),
    /// SQLite.
    #[error("the key store failed: {0}")]
    Database(String),
    /// No such key.
    #[error("there is no key {0:?}: `m40llm keys list` shows the ids")]
    UnknownKey(String),
    /// The key to make is not one that may be.
    #[error("{0}")]
    Invalid(String),
}

impl From<rusqlite::Error> for AuthError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.to_string())
    }
}

/// Unix seconds now.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The UTC day of a moment, `2026-01-31`.
pub fn day(unix: u64) -> String {
    // Days of the proleptic Gregorian calendar, counted in eras of 400 years that begin on 1 March 0000.
    let days = unix / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// A moment, `2026-01-31T12:00:00Z`.
pub fn utc(unix: u64) -> String {
    let second = unix % 86_400;
    format!("{}T{:02}:{:02}:{:02}Z", day(unix), second / 3600, second / 60 % 60, second % 60)
}

/// `length` random bytes from the operating system, in hex.
pub(crate) fn random_hex(length: usize) -> Result<String, AuthError> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes)
        .map_err(|e| AuthError::Secret(format!("the system gives no random numbers: {e}")))?;
    Ok(bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_the_calendars() {
        for (unix, expected) in [
            (0, "1970-01-01"),
            (86_399, "1970-01-01"),
            (86_400, "1970-01-02"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_709_164_800, "2024-02-29"),
            (1_735_689_599, "2024-12-31"),
            (1_735_689_600, "2025-01-01"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(day(unix), expected, "{unix}");
        }
        assert_eq!(utc(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn random_numbers_differ() {
        let (a, b) = (random_hex(16).unwrap(), random_hex(16).unwrap());
        assert!(a.len() == 32 && a != b && a.bytes().all(|c| c.is_ascii_hexdigit()));
    }
}
