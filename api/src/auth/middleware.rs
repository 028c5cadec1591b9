//! Who asks, and whether they may: before the router's handlers, before a body is read.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderName, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{Key, KeyLimits, Priority, Scope, Status, Store, failures::Failures, now, token::Refusal};
use crate::{
    app::AppState,
    error::ApiError,
    observe::{Refusal as Reason, RequestLog},
    routes::body,
};

/// Failed authentications that an address may have in ten seconds.
pub const FAILURES_PER_10S: u32 = 100;

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Whose request it is. Every handler finds one in the request's extensions, every layer further out in the
/// response's.
#[derive(Debug, Clone)]
pub enum Identity {
    /// A valid key's, with the scope that the route asks for.
    Key(Arc<Key>),
    /// Nobody's, as no key is needed (yet): whoever is at this address.
    Open {
        /// Absent where there is no connection, as in tests.
        peer: Option<IpAddr>,
    },
}

impl Identity {
    /// The key, if any.
    pub fn key(&self) -> Option<&Arc<Key>> {
        match self {
            Self::Key(key) => Some(key),
            Self::Open { .. } => None,
        }
    }

    /// The key's id, for logs.
    pub fn key_id(&self) -> Option<&str> {
        self.key().map(|key| key.id.as_str())
    }

    /// What the key may use; nobody is limited without one.
    pub fn limits(&self) -> Option<&KeyLimits> {
        self.key().map(|key| &key.limits)
    }

    /// Whether it may use a model.
    pub fn may_use(&self, model: &str) -> bool {
        self.limits().is_none_or(|l| l.models.is_empty() || l.models.iter().any(|m| m == model))
    }

    /// The place in the queue.
    pub fn priority(&self) -> Priority {
        self.limits().map_or(Priority::Normal, |limits| limits.priority)
    }
}

impl<S: Sync> FromRequestParts<S> for Identity {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // The layer is around every route; a handler called without it serves nobody's key.
        Ok(parts.extensions.get().cloned().unwrap_or(Self::Open { peer: None }))
    }
}

/// What stands before the routes.
#[derive(Debug)]
pub struct Gate {
    /// Absent: everybody may do everything.
    store: Option<Store>,
    private_docs: bool,
    failures: Failures,
}

impl Gate {
    /// Nobody is asked for a key.
    pub fn open() -> Self {
        Self { store: None, private_docs: false, failures: Failures::new(FAILURES_PER_10S) }
    }

    /// Keys are asked for as soon as the store has one. With `private_docs` the documentation and the page at `/`
    /// need one too.
    pub fn guarded(store: Store, private_docs: bool) -> Self {
        Self { store: Some(store), private_docs, failures: Failures::new(FAILURES_PER_10S) }
    }

    /// As many failed authentications as these are answered by what was wrong; more by 429.
    #[must_use]
    pub fn with_failures_per_10s(self, allowed: u32) -> Self {
        Self { failures: Failures::new(allowed), ..self }
    }

    /// Where keys and accounts are, if anywhere.
    pub fn store(&self) -> Option<&Store> {
        self.store.as_ref()
    }

    /// Whether requests need a key now.
    pub fn asks_for_keys(&self) -> bool {
        self.store.as_ref().is_some_and(Store::has_keys)
    }

    /// The one who asks for `path`, or what they are told, and why for the metrics.
    pub(crate) fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
    ) -> Result<Identity, (Reason, ApiError)> {
        let open = Identity::Open { peer };
        let (Some(store), Some(scope)) = (&self.store, self.needed(path)) else { return Ok(open) };
        if !store.has_keys() {
            // Keys are made by whoever may write the state directory: the first one on the command line.
            if scope == Scope::Admin {
                return Err((Reason::MissingKey, ApiError::no_admin_key()));
            }
            return Ok(open);
        }
        let key = authenticate(store, headers).map_err(|(reason, words)| {
            match self.failures.count(peer, Instant::now()) {
                Ok(()) => (reason, ApiError::unauthorized(words)),
                Err(wait) => (Reason::FailedAuthentications, ApiError::too_many_failures(wait)),
            }
        })?;
        if !key.scopes.contains(&scope) {
            return Err((Reason::InsufficientScope, ApiError::insufficient_scope(scope, &key.scopes)));
        }
        Ok(Identity::Key(key))
    }

    /// The scope that a path asks for. Paths are compared as the router does: byte for byte, so that no other
    /// spelling reaches a handler.
    fn needed(&self, path: &str) -> Option<Scope> {
        let is_docs = matches!(path, "/" | "/docs" | "/openapi.json") || path.starts_with("/docs/");
        match path {
            "/health" => None,
            _ if is_docs && !self.private_docs => None,
            "/metrics" => Some(Scope::Metrics),
            "/admin" => Some(Scope::Admin),
            _ if path.starts_with("/admin/") => Some(Scope::Admin),
            _ => Some(Scope::Inference),
        }
    }
}

const MISSING: &str = "This server asks for an API key: send the header `Authorization: Bearer sk-m40-…`, or \
    `x-api-key: sk-m40-…`. `m40llm keys create` makes one. A key in the URL is never looked at.";
const INVALID: (Reason, &str) = (Reason::InvalidKey, "The API key is not valid.");
const EXPIRED: (Reason, &str) = (Reason::ExpiredKey, "The API key has expired.");

/// The key of a request, or in words why there is none. What is told of a key beyond that it is not valid is
/// told to those who hold one that was signed here.
fn authenticate(store: &Store, headers: &HeaderMap) -> Result<Arc<Key>, (Reason, &'static str)> {
    let text = presented(headers)?;
    let now = now();
    let (claims, key) = store.verify(text, now).map_err(|refusal| match refusal {
        Refusal::Invalid => INVALID,
        Refusal::Expired => EXPIRED,
        Refusal::NotYetValid => (Reason::ExpiredKey, "The API key is not valid yet."),
    })?;
    let key = key.ok_or(INVALID)?;
    match key.status(now) {
        Status::Revoked => Err((Reason::RevokedKey, "The API key has been revoked.")),
        Status::Expired => Err(EXPIRED),
        // The token and the record were made together; a token that says otherwise is none of ours.
        Status::Active if key.scopes.iter().any(|&scope| !claims.has(scope)) => Err(INVALID),
        Status::Active => Ok(key),
    }
}

/// The one text that claims to be a key. Two that differ are refused, as whoever stands between may have read
/// the other one.
fn presented(headers: &HeaderMap) -> Result<&str, (Reason, &'static str)> {
    let refused = |words| (Reason::InvalidKey, words);
    let one = |name: &HeaderName| {
        let mut values = headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (None, _) => Ok(None),
            (Some(value), None) => value.to_str().map(|v| Some(v.trim())).map_err(|_| INVALID),
            (Some(_), Some(_)) => Err(refused("The request carries the key's header twice; send it once.")),
        }
    };
    let bearer = match one(&header::AUTHORIZATION)? {
        None => None,
        Some(value) => match value.split_once(' ') {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim_start()),
            _ => return Err(refused("The Authorization header must be `Bearer` and the API key.")),
        },
    };
    match (bearer, one(&X_API_KEY)?) {
        (None, None) => Err((Reason::MissingKey, MISSING)),
        (Some(key), None) | (None, Some(key)) => Ok(key),
        (Some(a), Some(b)) if a == b => Ok(a),
        (Some(_), Some(_)) => Err(refused("Authorization and x-api-key carry different keys; send one.")),
    }
}

/// The layer around all routes: an [`Identity`], or a refusal without reading the body.
pub(crate) async fn guard(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0.ip());
    match state.gate().admit(request.uri().path(), request.headers(), peer) {
        Ok(identity) => {
            if let (Some(log), Some(id)) = (request.extensions().get::<RequestLog>(), identity.key_id()) {
                log.set_key(id);
            }
            request.extensions_mut().insert(identity.clone());
            let mut response = next.run(request).await;
            if let Some(account) = identity.key().and_then(|key| state.accounts().of(key)) {
                account.write(response.headers_mut());
            }
            response.extensions_mut().insert(identity);
            response
        }
        Err((reason, refusal)) => {
            state.metrics().count_refused(reason);
            body::abandon(request);
            refusal.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn one_key_is_presented_once() {
        for (pairs, key) in [
            (&[("authorization", "Bearer k")][..], "k"),
            (&[("authorization", "bearer   k ")], "k"),
            (&[("x-api-key", "k")], "k"),
            (&[("x-api-key", "k"), ("authorization", "BEARER k")], "k"),
        ] {
            assert_eq!(presented(&headers(pairs)), Ok(key), "{pairs:?}");
        }
        for pairs in [
            &[][..],
            &[("authorization", "k")],
            &[("authorization", "Basic k")],
            &[("authorization", "Basic k"), ("x-api-key", "k")],
            &[("authorization", "Bearer k"), ("authorization", "Bearer k")],
            &[("authorization", "Bearer a"), ("x-api-key", "b")],
            &[("x-api-key", "a"), ("x-api-key", "b")],
        ] {
            assert!(presented(&headers(pairs)).is_err(), "{pairs:?}");
        }
        let mut odd = HeaderMap::new();
        odd.insert("x-api-key", HeaderValue::from_bytes(b"\xff").unwrap());
        assert_eq!(presented(&odd), Err(INVALID));
    }

    #[test]
    fn each_path_has_one_scope() {
        let gate = Gate::open();
        for path in ["/", "/health", "/docs", "/docs/", "/docs/index.css", "/openapi.json"] {
            assert_eq!(gate.needed(path), None, "{path}");
        }
        for (path, scope) in [
            ("/metrics", Scope::Metrics),
            ("/admin", Scope::Admin),
            ("/admin/keys", Scope::Admin),
            ("/admin/anything", Scope::Admin),
            ("/v1/models", Scope::Inference),
            ("/tokenize", Scope::Inference),
            ("/tokenizer_info", Scope::Inference),
            ("//", Scope::Inference),
            ("/health/", Scope::Inference),
            ("/docsx", Scope::Inference),
            ("/nothing", Scope::Inference),
        ] {
            assert_eq!(gate.needed(path), Some(scope), "{path}");
        }
        let private = Gate { private_docs: true, ..Gate::open() };
        assert_eq!(private.needed("/docs/index.css"), Some(Scope::Inference));
        assert_eq!(private.needed("/"), Some(Scope::Inference));
        assert_eq!(private.needed("/health"), None);
    }
}
