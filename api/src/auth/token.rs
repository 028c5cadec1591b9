//! A key's text: `sk-m40-` and a JSON Web Token.
//!
//! The algorithm is HMAC-SHA-256 and nothing else, whatever a token's header says; the comparison of
//! signatures is the library's, in constant time. Dates are checked here, without leeway: it is one clock
//! that writes and reads them.

use std::sync::LazyLock;

use jsonwebtoken::{Algorithm, Header, Validation, decode, decode_header, encode};
use serde::{Deserialize, Serialize};

use super::{AuthError, Key, Scope, secret::Secrets};

/// What every key begins with.
pub const PREFIX: &str = "sk-m40-";

/// The longest text looked at; a key with the longest name is shorter.
pub const MAX_BYTES: usize = 2048;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The key's id.
    pub jti: String,
    /// The key's name.
    pub sub: String,
    /// Its scopes, separated by spaces.
    pub scope: String,
    /// Unix seconds at which it was made.
    pub iat: u64,
    /// Unix seconds from which it is no longer valid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exp: Option<u64>,
    /// Unix seconds before which it is not valid yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
}

impl Claims {
    /// True when the token names the scope.
    pub fn has(&self, scope: Scope) -> bool {
        self.scope.split(' ').any(|name| name == scope.name())
    }
}

/// Why a text is no valid key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not made by this server, or changed since.
    Invalid,
    /// Its time is over.
    Expired,
    /// Its time has not come.
    NotYetValid,
}

/// The text of a key, signed by the current secret.
pub fn sign(key: &Key, secrets: &Secrets) -> Result<String, AuthError> {
    let secret = secrets.current();
    let header = Header { kid: Some(secret.kid.clone()), ..Header::new(Algorithm::HS256) };
    let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.name()).collect();
    let claims = Claims {
        jti: key.id.clone(),
        sub: key.name.clone(),
        scope: scopes.join(" "),
        iat: key.created,
        exp: key.expires,
        nbf: None,
    };
    let token = encode(&header, &claims, &secret.encoding)
        .map_err(|e| AuthError::Secret(format!("the key cannot be signed: {e}")))?;
    Ok(format!("{PREFIX}{token}"))
}

/// One algorithm; dates are ours to check.
static PINNED: LazyLock<Validation> = LazyLock::new(|| {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.required_spec_claims.clear();
    (validation.validate_exp, validation.validate_aud) = (false, false);
    validation
});

/// What a key says, when it was made here and `now` is within its time.
pub fn verify(text: &str, secrets: &Secrets, now: u64) -> Result<Claims, Refusal> {
    if text.len() > MAX_BYTES {
        return Err(Refusal::Invalid);
    }
    let token = text.strip_prefix(PREFIX).ok_or(Refusal::Invalid)?;
    let header = decode_header(token).map_err(|_| Refusal::Invalid)?;
    let secret = header.kid.as_deref().and_then(|kid| secrets.find(kid)).ok_or(Refusal::Invalid)?;
    let claims = decode::<Claims>(token, &secret.decoding, &PINNED).map_err(|_| Refusal::Invalid)?.claims;
    if claims.exp.is_some_and(|exp| exp <= now) {
        return Err(Refusal::Expired);
    }
    if claims.nbf.is_some_and(|nbf| nbf > now) {
        return Err(Refusal::NotYetValid);
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{KeyLimits, SigningSecret};

    fn secrets(letter: &str) -> Secrets {
        Secrets::given(&SigningSecret::new(&letter.repeat(40)).unwrap()).unwrap()
    }

    fn key() -> Key {
        Key {
            id: "key_1".into(),
            name: "Ünï".into(),
            scopes: vec![Scope::Inference, Scope::Metrics],
            created: 100,
            expires: Some(200),
            revoked: None,
            limits: KeyLimits::default(),
        }
    }

    /// A token whose header and claims are the caller's, signed with `algorithm` and the secret of `letter`.
    fn forged(header: &Header, claims: &Claims, letter: &str) -> String {
        let secret = jsonwebtoken::EncodingKey::from_secret(letter.repeat(40).as_bytes());
        format!("{PREFIX}{}", encode(header, claims, &secret).unwrap())
    }

    #[test]
    fn a_key_says_what_was_signed_until_it_expires() {
        let secrets = secrets("a");
        let text = sign(&key(), &secrets).unwrap();
        let claims = verify(&text, &secrets, 199).unwrap();
        assert_eq!((claims.jti.as_str(), claims.sub.as_str(), claims.iat), ("key_1", "Ünï", 100));
        assert!(claims.has(Scope::Inference) && claims.has(Scope::Metrics) && !claims.has(Scope::Admin));
        assert_eq!(verify(&text, &secrets, 200), Err(Refusal::Expired));
        let unlimited = sign(&Key { expires: None, ..key() }, &secrets).unwrap();
        assert!(verify(&unlimited, &secrets, u64::MAX).is_ok());
    }

    #[test]
    fn the_longest_key_fits() {
        let long = Key { name: "\u{10ffff}".repeat(100), scopes: Scope::ALL.to_vec(), ..key() };
        assert!(crate::auth::key::name(&long.name).is_ok());
        let text = sign(&long, &secrets("a")).unwrap();
        assert!(text.len() <= MAX_BYTES, "{}", text.len());
        assert!(verify(&text, &secrets("a"), 150).is_ok());
    }

    #[test]
    fn only_our_algorithm_and_secret_pass() {
        let ours = secrets("a");
        let claims = verify(&sign(&key(), &ours).unwrap(), &ours, 150).unwrap();
        let header = |algorithm, kid: &str| Header { kid: Some(kid.into()), ..Header::new(algorithm) };
        let kid = ours.current().kid.clone();
        assert!(verify(&forged(&header(Algorithm::HS256, &kid), &claims, "a"), &ours, 150).is_ok());
        for (what, text) in [
            ("HS384", forged(&header(Algorithm::HS384, &kid), &claims, "a")),
            ("HS512", forged(&header(Algorithm::HS512, &kid), &claims, "a")),
            ("another secret", forged(&header(Algorithm::HS256, &kid), &claims, "b")),
            ("another kid", forged(&header(Algorithm::HS256, "nobody"), &claims, "a")),
            ("no kid", forged(&Header::new(Algorithm::HS256), &claims, "a")),
        ] {
            assert_eq!(verify(&text, &ours, 150), Err(Refusal::Invalid), "{what}");
        }
    }

    #[test]
    fn a_token_whose_time_has_not_come_is_refused() {
        let ours = secrets("a");
        let header = Header { kid: Some(ours.current().kid.clone()), ..Header::new(Algorithm::HS256) };
        let mut claims = verify(&sign(&key(), &ours).unwrap(), &ours, 150).unwrap();
        claims.nbf = Some(151);
        let text = forged(&header, &claims, "a");
        assert_eq!(verify(&text, &ours, 150), Err(Refusal::NotYetValid));
        assert!(verify(&text, &ours, 151).is_ok());
    }

    #[test]
    fn every_changed_character_breaks_the_key() {
        let ours = secrets("a");
        let text = sign(&key(), &ours).unwrap();
        for at in 0..text.len() {
            let other = if &text[at..=at] == "A" { "B" } else { "A" };
            let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            assert!(verify(&changed, &ours, 150).is_err(), "position {at}: {changed}");
            assert!(verify(&text[..at], &ours, 150).is_err(), "cut at {at}");
        }
        assert!(verify(&format!("{text}="), &ours, 150).is_err());
        assert!(verify(&format!("{text}."), &ours, 150).is_err());
        assert!(verify(&format!("{PREFIX}{}", "A".repeat(MAX_BYTES)), &ours, 150).is_err());
    }

    #[test]
    fn old_secrets_stay_valid_after_a_rotation() {
        let old = "o".repeat(40);
        let both =
            Secrets::given(&SigningSecret::new(&format!("{} {old}", "n".repeat(40))).unwrap()).unwrap();
        let text = sign(&key(), &secrets("o")).unwrap();
        assert!(verify(&text, &both, 150).is_ok());
        assert!(verify(&text, &secrets("n"), 150).is_err());
        assert!(verify(&sign(&key(), &both).unwrap(), &secrets("n"), 150).is_ok());
    }
}
