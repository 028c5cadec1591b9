//! Keys and accounts as JSON, the same on the command line and under `/admin`.

use serde::Serialize;

use super::{
    Key, Priority, Scope, Status,
    ledger::{Amounts, UsageRecord},
};

/// What may be told of a key: never its text.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct KeyInfo {
    /// Its id, the token's `jti`.
    #[cfg_attr(feature = "server", schema(example = "key_0123456789abcdef01234567"))]
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// Whether it opens anything.
    pub status: Status,
    /// True once it was taken back.
    pub revoked: bool,
    /// True once its time is over.
    pub expired: bool,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds; null: never.
    #[cfg_attr(feature = "server", schema(required))]
    pub expires_at: Option<u64>,
    /// Unix seconds; null: not.
    #[cfg_attr(feature = "server", schema(required))]
    pub revoked_at: Option<u64>,
    /// Requests a minute; null: without limit.
    #[cfg_attr(feature = "server", schema(required))]
    pub rpm: Option<u32>,
    /// Tokens a minute; null: without limit.
    #[cfg_attr(feature = "server", schema(required))]
    pub tpm: Option<u32>,
    /// Requests at the same time; null: without limit.
    #[cfg_attr(feature = "server", schema(required))]
    pub concurrency: Option<u32>,
    /// Models it may use; empty: all.
    pub models: Vec<String>,
    /// Longest prompt and output together, in tokens; null: the server's.
    #[cfg_attr(feature = "server", schema(required))]
    pub max_context: Option<u32>,
    /// Its place in the queue.
    pub priority: Priority,
}

impl KeyInfo {
    /// Of `key` at `now`.
    pub fn of(key: &Key, now: u64) -> Self {
        let limits = key.limits.clone();
        Self {
            id: key.id.clone(),
            name: key.name.clone(),
            scopes: key.scopes.clone(),
            status: key.status(now),
            revoked: key.revoked.is_some(),
            expired: key.expires.is_some_and(|expires| expires <= now),
            created_at: key.created,
            expires_at: key.expires,
            revoked_at: key.revoked,
            rpm: limits.rpm,
            tpm: limits.tpm,
            concurrency: limits.concurrency,
            models: limits.models,
            max_context: limits.max_context,
            priority: limits.priority,
        }
    }
}

/// A key that was just made; its text is shown this once.
#[derive(Debug, Serialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct CreatedKey {
    /// The key itself. It is kept nowhere: whoever loses it makes another.
    #[cfg_attr(feature = "server", schema(example = "sk-m40-eyJ0eXAi…"))]
    pub key: String,
    /// What is kept of it.
    #[serde(flatten)]
    pub info: KeyInfo,
}

/// What a key used of a model on a day.
#[derive(Debug, Clone, Serialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct DailyUsage {
    /// The UTC day.
    #[cfg_attr(feature = "server", schema(example = "2026-01-31"))]
    pub day: String,
    /// The model's id.
    pub model: String,
    /// Requests that ended, whether by themselves or by the client's going away.
    pub requests: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Of these, taken from a cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Seconds on the device: of each step the part that the key's tokens had in it.
    pub device_seconds: f64,
}

impl From<&UsageRecord> for DailyUsage {
    fn from(record: &UsageRecord) -> Self {
        let Amounts { requests, prompt_tokens, cached_tokens, completion_tokens, .. } = record.amounts;
        Self {
            day: record.day.clone(),
            model: record.model.clone(),
            requests,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            device_seconds: record.amounts.device_seconds(),
        }
    }
}

impl Amounts {
    /// The time on the device in seconds.
    pub fn device_seconds(&self) -> f64 {
        self.device_micros as f64 / 1e6
    }
}

/// A day such as `2026-01-31`.
pub fn a_day(s: &str) -> Result<String, String> {
    let mut parts = s.split('-');
    let mut number = |digits: usize| {
        let part = parts.next()?;
        let plain = part.len() == digits && part.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| part.parse::<u32>().ok()).flatten()
    };
    let (year, month, day) = (number(4), number(2), number(2));
    let sane = year.is_some()
        && month.is_some_and(|m| (1..=12).contains(&m))
        && day.is_some_and(|d| (1..=31).contains(&d))
        && parts.next().is_none();
    if sane { Ok(s.to_owned()) } else { Err("a UTC day such as 2026-01-31 is allowed".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_ten_characters() {
        assert!(a_day("2026-01-31").is_ok());
        for bad in ["", "2026", "2026-1-31", "2026-13-01", "2026-00-01", "2026-01-32", "2026-01-31-", "today"]
        {
            assert!(a_day(bad).is_err(), "{bad}");
        }
    }
}
