//! What a key is: scopes, limits, dates. Its text is `token`'s business.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::AuthError;

/// What a key may do. No scope implies another: a key that scrapes metrics cannot spend tokens, and one
/// that manages keys does neither unless it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Use the model: every route of `/v1`, `/generate`, the tokenizer's.
    Inference,
    /// Read `/metrics`.
    Metrics,
    /// Manage keys under `/admin`.
    Admin,
}

impl Scope {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Inference, Self::Metrics, Self::Admin];

    /// Its name in tokens, flags and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scope| scope.name() == s);
        found.ok_or_else(|| "allowed are inference, metrics, admin".to_owned())
    }
}

/// Who goes first when requests wait for the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// After the others.
    Low,
    /// In order of arrival.
    #[default]
    Normal,
    /// Before the others.
    High,
}

impl Priority {
    /// Its name in flags and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = [Self::Low, Self::Normal, Self::High].into_iter().find(|p| p.name() == s);
        found.ok_or_else(|| "allowed are low, normal, high".to_owned())
    }
}

/// What a key may use; absent is without limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
pub struct KeyLimits {
    /// Requests a minute.
    pub rpm: Option<u32>,
    /// Tokens a minute, of prompts and output together.
    pub tpm: Option<u32>,
    /// Requests at the same time.
    pub concurrency: Option<u32>,
    /// Ids of the models it may use; empty: all.
    #[serde(default)]
    pub models: Vec<String>,
    /// Longest prompt and output together, in tokens.
    pub max_context: Option<u32>,
    /// Its place in the queue.
    #[serde(default)]
    pub priority: Priority,
}

/// What a key may use that has no limit of its own; absent is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DefaultLimits {
    /// Requests a minute.
    pub rpm: Option<u32>,
    /// Tokens a minute.
    pub tpm: Option<u32>,
    /// Requests at the same time.
    pub concurrency: Option<u32>,
}

impl DefaultLimits {
    /// What a key may use: its own limits first.
    #[must_use]
    pub fn under(self, key: &KeyLimits) -> Self {
        Self {
            rpm: key.rpm.or(self.rpm),
            tpm: key.tpm.or(self.tpm),
            concurrency: key.concurrency.or(self.concurrency),
        }
    }
}

/// A key as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The token's `jti`.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// What it may do, ascending, each once.
    pub scopes: Vec<Scope>,
    /// Unix seconds.
    pub created: u64,
    /// Unix seconds from which it is no longer valid.
    pub expires: Option<u64>,
    /// Unix seconds of its revocation.
    pub revoked: Option<u64>,
    /// What it may use.
    pub limits: KeyLimits,
}

/// Whether a key opens anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "server", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Yes.
    Active,
    /// Its time is over.
    Expired,
    /// It was taken back.
    Revoked,
}

impl Status {
    /// Its name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

impl Key {
    /// Whether it opens anything at `now`.
    pub fn status(&self, now: u64) -> Status {
        if self.revoked.is_some() {
            Status::Revoked
        } else if self.expires.is_some_and(|expires| expires <= now) {
            Status::Expired
        } else {
            Status::Active
        }
    }
}

/// A key to make.
#[derive(Debug, Clone, Default)]
pub struct NewKey {
    /// What its owner calls it.
    pub name: String,
    /// What it may do; none is [`Scope::Inference`].
    pub scopes: Vec<Scope>,
    /// Seconds from now until it is no longer valid.
    pub lifetime: Option<u64>,
    /// What it may use.
    pub limits: KeyLimits,
}

/// Longest name, in characters: it is part of the key's text.
const NAME_CHARS: usize = 100;
/// Longest lifetime: a hundred years.
const MAX_LIFETIME: u64 = 100 * 365 * 86_400;

/// A name that a key may have.
pub fn name(s: &str) -> Result<String, String> {
    let sane = !s.trim().is_empty() && s.chars().count() <= NAME_CHARS && !s.chars().any(char::is_control);
    if sane {
        Ok(s.to_owned())
    } else {
        Err(format!("a name of 1 to {NAME_CHARS} characters, none of them a control character, is allowed"))
    }
}

/// A lifetime such as `90s`, `12h` or `30d`, in seconds.
pub fn lifetime(s: &str) -> Result<u64, String> {
    let parsed = s.char_indices().last().and_then(|(at, unit)| {
        let unit = match unit {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return None,
        };
        let digits = &s[..at];
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| digits.parse::<u64>().ok()?.checked_mul(unit)).flatten()
    });
    parsed
        .filter(|seconds| (1..=MAX_LIFETIME).contains(seconds))
        .ok_or_else(|| "a time such as 90s, 15m, 12h or 30d is allowed, at most 36500d".to_owned())
}

impl NewKey {
    /// Refuses what no key may be, whoever asks; scopes come back sorted, each once.
    pub(crate) fn checked(mut self) -> Result<Self, AuthError> {
        self.name = name(&self.name).map_err(|e| AuthError::Invalid(format!("name: {e}")))?;
        if self.scopes.is_empty() {
            self.scopes.push(Scope::Inference);
        }
        self.scopes.sort_unstable();
        self.scopes.dedup();
        if self.lifetime.is_some_and(|seconds| !(1..=MAX_LIFETIME).contains(&seconds)) {
            return Err(AuthError::Invalid(format!("a lifetime of 1 to {MAX_LIFETIME} seconds is allowed")));
        }
        let limits = &self.limits;
        for (what, limit) in [
            ("rpm", limits.rpm),
            ("tpm", limits.tpm),
            ("concurrency", limits.concurrency),
            ("max_context", limits.max_context),
        ] {
            if limit == Some(0) {
                return Err(AuthError::Invalid(format!(
                    "{what}: at least 1 is allowed; leave it out for none"
                )));
            }
        }
        if limits.models.iter().any(|m| m.is_empty() || m.chars().any(char::is_control)) {
            return Err(AuthError::Invalid("models: an id has a character, and no control character".into()));
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_have_a_unit() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("12h", 43_200), ("30d", 2_592_000)] {
            assert_eq!(lifetime(text), Ok(seconds));
        }
        for bad in
            ["", "30", "d", "0s", "-1d", "1.5h", "1w", "30 d", "+3d", "99999999999999999999s", "36501d", "3é"]
        {
            assert!(lifetime(bad).unwrap_err().contains("90s"), "{bad}");
        }
    }

    #[test]
    fn names_are_short_and_plain() {
        assert!(name("Team Ä, laptop").is_ok() && name(&"é".repeat(100)).is_ok());
        for bad in ["", "  ", "a\nb", "\u{7f}", &"x".repeat(101)] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_is_revoked_before_it_is_expired() {
        let mut key = Key {
            id: "key_1".into(),
            name: "n".into(),
            scopes: vec![Scope::Inference],
            created: 0,
            expires: Some(10),
            revoked: None,
            limits: KeyLimits::default(),
        };
        assert_eq!((key.status(9), key.status(10)), (Status::Active, Status::Expired));
        key.revoked = Some(5);
        assert_eq!(key.status(11), Status::Revoked);
    }

    #[test]
    fn new_keys_are_checked_whoever_asks() {
        let new = || NewKey { name: "n".into(), ..NewKey::default() };
        assert_eq!(new().checked().unwrap().scopes, [Scope::Inference]);
        let scopes = vec![Scope::Admin, Scope::Inference, Scope::Admin];
        let sorted = NewKey { scopes, ..new() }.checked().unwrap().scopes;
        assert_eq!(sorted, [Scope::Inference, Scope::Admin]);
        let zero = KeyLimits { rpm: Some(0), ..KeyLimits::default() };
        assert!(NewKey { limits: zero, ..new() }.checked().unwrap_err().to_string().starts_with("rpm"));
        assert!(NewKey { lifetime: Some(0), ..new() }.checked().is_err());
        assert!(NewKey::default().checked().is_err());
    }
}
