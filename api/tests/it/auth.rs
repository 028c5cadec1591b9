//! Keys at the gate: who gets in, what they may do there, and what is charged for it. Over a token source.

mod accounts;
mod managed;

use std::{convert::Infallible, future::pending, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{Method, StatusCode},
};
use futures_util::stream;
use m40llm::{
    AppState, ServerConfig,
    auth::{Gate, Key, NewKey, Scope, Store, now, vault::VaultConfig},
};
use m40llm_engine::EngineConfig;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    source::{self, Pace},
    support::{Answer, MODEL, get, request, send},
};

/// A server that asks for keys, as soon as it has one.
pub(crate) struct Guarded {
    pub(crate) dir: TempDir,
    pub(crate) store: Store,
    pub(crate) app: Router,
}

impl Guarded {
    pub(crate) fn new() -> Self {
        Self::with(Pace::default(), |gate| gate)
    }

    fn with(pace: Pace, set: impl FnOnce(Gate) -> Gate) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = VaultConfig { dir: dir.path().to_owned(), signing_secret: None };
        let store = Store::open(&config).unwrap();
        let gate = set(Gate::guarded(store.clone(), false));
        let state = AppState::guarded(ServerConfig::new(MODEL, 1_700_000_000), gate);
        state.set_engine(source::engine(&EngineConfig::default(), pace));
        Self { dir, store, app: m40llm::app(state) }
    }

    /// A new key with these scopes, which counts at once.
    pub(crate) async fn key(&self, scopes: &[Scope]) -> (Key, String) {
        let new = NewKey { name: "test".into(), scopes: scopes.to_vec(), ..NewKey::default() };
        self.store.with(|vault| vault.create(new)).await.unwrap()
    }

    async fn call(&self, method: Method, path: &str, key: &str, body: Option<&Value>) -> Answer {
        let bearer = format!("Bearer {key}");
        let mut headers = vec![("authorization", bearer.as_str())];
        let body = body.map(|body| {
            headers.push(("content-type", "application/json"));
            body.to_string()
        });
        send(&self.app, request(method, path, &headers, body.unwrap_or_default())).await
    }

    async fn get(&self, path: &str, key: &str) -> Answer {
        self.call(Method::GET, path, key, None).await
    }

    async fn post(&self, path: &str, key: &str, body: &Value) -> Answer {
        self.call(Method::POST, path, key, Some(body)).await
    }
}

/// Refused for its key, in the contract's words, and with nothing of the key in them.
fn refused(answer: &Answer, what: &str) {
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{what}: {answer:?}");
    let error = answer.error();
    assert_eq!(error["type"], "invalid_request_error", "{what}");
    assert_eq!(error["code"], "invalid_api_key", "{what}");
    assert_eq!(answer.header("www-authenticate"), "Bearer", "{what}");
    assert_eq!(answer.header("x-should-retry"), "false", "{what}");
    assert!(!answer.body.contains("eyJ"), "{what}: {}", answer.body);
}

fn chat(tokens: usize) -> Value {
    json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens})
}

#[tokio::test]
async fn every_route_asks_for_a_key_once_there_is_one() {
    let server = Guarded::new();
    let document = serde_json::to_value(m40llm::openapi()).unwrap();
    let mut routes: Vec<(Method, String)> = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            routes.push((method.to_uppercase().parse().unwrap(), path.replace("{id}", "x")));
        }
    }
    assert!(routes.len() > 15, "{routes:?}");
    routes.extend([(Method::GET, "/nothing".into()), (Method::PUT, "/v1/models".into())]);
    routes.push((Method::GET, "/v1/models/owner/name".into()));

    // Without a key in the store requests need none, but nobody manages keys from outside.
    assert_eq!(get(&server.app, "/v1/models").await.status, StatusCode::OK);
    assert_eq!(get(&server.app, "/metrics").await.status, StatusCode::OK);
    assert_eq!(get(&server.app, "/v1/usage").await.json()["data"], json!([]));
    refused(&get(&server.app, "/admin/keys").await, "no key to manage keys with");

    server.key(&[Scope::Metrics]).await;
    for (method, path) in &routes {
        let answer = send(&server.app, request(method.clone(), path, &[], Body::empty())).await;
        match path.as_str() {
            "/health" | "/" | "/docs" | "/openapi.json" => {
                assert_eq!(answer.status, StatusCode::OK, "{path}");
            }
            _ => refused(&answer, &format!("{method} {path}")),
        }
    }
    assert_eq!(get(&server.app, "/docs/swagger-ui.css").await.status, StatusCode::OK);
}

#[tokio::test]
async fn documentation_may_be_private() {
    let dir = tempfile::tempdir().unwrap();
    let config = VaultConfig { dir: dir.path().to_owned(), signing_secret: None };
    let store = Store::open(&config).unwrap();
    let state =
        AppState::guarded(ServerConfig::new(MODEL, 1_700_000_000), Gate::guarded(store.clone(), true));
    let app = m40llm::app(state);
    assert_eq!(get(&app, "/docs").await.status, StatusCode::OK, "there is no key yet");
    store.with(|vault| vault.create(NewKey { name: "a".into(), ..NewKey::default() })).await.unwrap();
    for path in ["/", "/docs", "/docs/", "/docs/swagger-ui.css", "/openapi.json"] {
        refused(&get(&app, path).await, path);
    }
    assert_eq!(
        get(&app, "/health").await.status,
        StatusCode::SERVICE_UNAVAILABLE,
        "loading, and no key asked"
    );
}

#[tokio::test]
async fn scopes_open_their_routes_and_no_others() {
    let server = Guarded::new();
    let routes = [
        (Scope::Inference, "/v1/models"),
        (Scope::Inference, "/v1/usage"),
        (Scope::Metrics, "/metrics"),
        (Scope::Admin, "/admin/keys"),
        (Scope::Admin, "/admin/usage"),
    ];
    for scope in Scope::ALL {
        let (_, key) = server.key(&[scope]).await;
        for (needed, path) in routes {
            let answer = server.get(path, &key).await;
            if needed == scope {
                assert_eq!(answer.status, StatusCode::OK, "{path} with {scope}: {answer:?}");
            } else {
                assert_eq!(answer.status, StatusCode::FORBIDDEN, "{path} with {scope}");
                let error = answer.error();
                assert_eq!(
                    (&error["type"], &error["code"]),
                    (&json!("permission_error"), &json!("insufficient_scope"))
                );
                assert!(error["message"].as_str().unwrap().contains(needed.name()), "{error}");
            }
        }
    }
    let (_, all) = server.key(&Scope::ALL).await;
    for (_, path) in routes {
        assert_eq!(server.get(path, &all).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn either_header_carries_the_key_and_both_the_same() {
    let server = Guarded::new();
    let (_, key) = server.key(&[Scope::Inference]).await;
    let (_, other) = server.key(&[Scope::Inference]).await;
    let (bearer, foreign) = (format!("Bearer {key}"), format!("Bearer {other}"));
    let get = async |headers: &[(&str, &str)]| {
        send(&server.app, request(Method::GET, "/v1/models", headers, Body::empty())).await
    };
    for headers in [
        &[("x-api-key", key.as_str())][..],
        &[("authorization", &bearer)],
        &[("authorization", &bearer.replace("Bearer", "bEARER "))],
        &[("authorization", &bearer), ("x-api-key", &key)],
    ] {
        assert_eq!(get(headers).await.status, StatusCode::OK, "{headers:?}");
    }
    for headers in [
        &[][..],
        &[("authorization", "Bearer")],
        &[("authorization", "Bearer ")],
        &[("authorization", key.as_str())],
        &[("authorization", "Basic dXNlcjpwYXNz")],
        // Whoever stands before the server may have checked the other of two.
        &[("authorization", &foreign), ("x-api-key", &key)],
        &[("authorization", &bearer), ("authorization", &bearer)],
        &[("authorization", &bearer), ("authorization", "Bearer x")],
        &[("x-api-key", &key), ("x-api-key", &other)],
        &[("authorization", &format!("{bearer}, {foreign}"))],
        &[("authorization", "Basic dXNlcjpwYXNz"), ("x-api-key", &key)],
        &[("proxy-authorization", &bearer)],
        &[("cookie", &format!("authorization={key}; x-api-key={key}"))],
        &[("api-key", &key)],
    ] {
        refused(&get(headers).await, &format!("{headers:?}"));
    }
}

#[tokio::test]
async fn a_key_in_the_url_is_never_looked_at() {
    let server = Guarded::new();
    let (_, key) = server.key(&[Scope::Inference]).await;
    for name in ["api_key", "api-key", "key", "access_token", "token", "authorization", "x-api-key"] {
        refused(&get(&server.app, &format!("/v1/models?{name}={key}")).await, name);
        refused(&get(&server.app, &format!("/v1/models?{name}=Bearer%20{key}")).await, name);
    }
}

/// A token made by whoever knows `secret`: header and claims as they come.
fn forge(header: &Value, claims: &Value, secret: &str) -> String {
    let signing = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    let message = format!("{}.{}", base64url(&header.to_string()), base64url(&claims.to_string()));
    let signature =
        jsonwebtoken::crypto::sign(message.as_bytes(), &signing, jsonwebtoken::Algorithm::HS256).unwrap();
    format!("sk-m40-{message}.{signature}")
}

fn base64url(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let bits =
            chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for i in 0..=chunk.len() {
            out.push(char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]));
        }
    }
    out
}

/// The opposite, for what this server signs.
fn part(token: &str, i: usize) -> Value {
    let segment = token.strip_prefix("sk-m40-").unwrap().split('.').nth(i).unwrap();
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'-' => 62,
        _ => 63,
    };
    let mut bytes = Vec::new();
    for chunk in segment.as_bytes().chunks(4) {
        let bits =
            chunk.iter().fold(0_u32, |bits, c| bits << 6 | u32::from(digit(*c))) << (6 * (4 - chunk.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..chunk.len()]);
    }
    serde_json::from_slice(&bytes).unwrap()
}

#[tokio::test]
async fn forged_keys_are_refused() {
    let server = Guarded::with(Pace::default(), |gate| gate.with_failures_per_10s(1000));
    let (key, text) = server.key(&[Scope::Inference]).await;
    let secret = std::fs::read_to_string(server.dir.path().join("signing-secrets")).unwrap();
    let secret = secret.trim();
    let (header, claims) = (part(&text, 0), part(&text, 1));
    assert_eq!(
        (&header["alg"], &claims["jti"], &claims["scope"]),
        (&json!("HS256"), &json!(key.id), &json!("inference"))
    );
    let with = |of: &Value, name: &str, value: Value| {
        let mut changed = of.clone();
        changed[name] = value;
        changed
    };
    let without = |of: &Value, name: &str| {
        let mut changed = of.clone();
        changed.as_object_mut().unwrap().remove(name);
        changed
    };
    // The forger's tools work: with the right secret and nothing changed it is a key.
    assert_eq!(server.get("/v1/models", &forge(&header, &claims, secret)).await.status, StatusCode::OK);

    let mut forged: Vec<(String, String)> = Vec::new();
    for alg in
        ["none", "None", "NONE", "nOnE", "HS384", "HS512", "RS256", "PS256", "ES256", "EdDSA", "", "HS256 "]
    {
        let text = forge(&with(&header, "alg", json!(alg)), &claims, secret);
        let (unsigned, _) = text.rsplit_once('.').unwrap();
        forged.push((format!("{alg}, unsigned"), format!("{unsigned}.")));
        forged.push((format!("{alg}, cut"), unsigned.to_owned()));
        forged.push((format!("{alg}, signed by HMAC-SHA-256"), text));
    }
    for algorithm in [jsonwebtoken::Algorithm::HS384, jsonwebtoken::Algorithm::HS512] {
        let own = jsonwebtoken::Header {
            kid: header["kid"].as_str().map(str::to_owned),
            ..jsonwebtoken::Header::new(algorithm)
        };
        let signing = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        let token = jsonwebtoken::encode(&own, &claims, &signing).unwrap();
        forged.push((format!("{algorithm:?} with the same secret"), format!("sk-m40-{token}")));
    }
    let other = "f".repeat(64);
    forged.push(("another secret".into(), forge(&header, &claims, &other)));
    forged.push(("an empty secret".into(), forge(&header, &claims, "")));
    forged.push(("the kid as the secret".into(), forge(&header, &claims, header["kid"].as_str().unwrap())));
    for kid in
        [json!("nobody"), json!(""), json!("../../dev/null"), json!("' OR 1=1 --"), json!(5), json!(null)]
    {
        forged.push((format!("kid {kid}"), forge(&with(&header, "kid", kid), &claims, secret)));
    }
    forged.push(("no kid".into(), forge(&without(&header, "kid"), &claims, secret)));
    let jwk = json!({"kty": "oct", "k": base64url(&other), "alg": "HS256"});
    forged.push(("a key in the header".into(), forge(&with(&header, "jwk", jwk), &claims, &other)));
    let jku = json!("https://evil.example/keys");
    forged.push(("a key elsewhere".into(), forge(&with(&header, "jku", jku), &claims, &other)));
    for (name, value) in [
        ("exp", json!(now() - 1)),
        ("exp", json!(now())),
        ("exp", json!(0)),
        ("exp", json!(-5)),
        ("exp", json!("tomorrow")),
        ("nbf", json!(now() + 60)),
        ("nbf", json!("later")),
        ("jti", json!("key_000000000000000000000000")),
        ("jti", json!(null)),
        ("jti", json!([key.id])),
    ] {
        forged.push((format!("{name} {value}"), forge(&header, &with(&claims, name, value), secret)));
    }
    for name in ["jti", "sub", "scope", "iat"] {
        forged.push((format!("no {name}"), forge(&header, &without(&claims, name), secret)));
    }
    // Claims changed under the old signature.
    let segments: Vec<&str> = text.split('.').collect();
    for (name, value) in
        [("scope", json!("inference metrics admin")), ("exp", json!(u64::MAX)), ("sub", json!("root"))]
    {
        let changed = base64url(&with(&claims, name, value).to_string());
        forged.push((format!("{name} tampered with"), format!("{}.{changed}.{}", segments[0], segments[2])));
    }
    forged.push(("no prefix".into(), text.replace("sk-m40-", "")));
    forged.push(("two prefixes".into(), format!("sk-m40-{text}")));
    forged.push(("a fourth part".into(), format!("{text}.{}", segments[2])));
    forged.push(("nothing after the prefix".into(), "sk-m40-".into()));
    forged.push(("dots".into(), "sk-m40-..".into()));
    forged.push(("long".into(), format!("sk-m40-{}", "A".repeat(20_000))));
    for (what, text) in &forged {
        for path in ["/v1/models", "/metrics", "/admin/keys"] {
            refused(&server.get(path, text).await, what);
        }
    }
    assert_eq!(server.get("/v1/models", &text).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_signed_token_has_no_more_scopes_than_its_record() {
    let server = Guarded::new();
    let (_, text) = server.key(&[Scope::Inference]).await;
    let secret = std::fs::read_to_string(server.dir.path().join("signing-secrets")).unwrap();
    let mut claims = part(&text, 1);
    claims["scope"] = json!("inference metrics admin");
    let escalated = forge(&part(&text, 0), &claims, secret.trim());
    assert_eq!(server.get("/admin/keys", &escalated).await.status, StatusCode::FORBIDDEN);
    assert_eq!(server.get("/metrics", &escalated).await.status, StatusCode::FORBIDDEN);
    claims["scope"] = json!("");
    refused(&server.get("/v1/models", &forge(&part(&text, 0), &claims, secret.trim())).await, "no scope");
}

#[tokio::test]
async fn revoked_and_expired_keys_are_told_so() {
    let server = Guarded::new();
    let (key, text) = server.key(&[Scope::Inference]).await;
    let short = NewKey { name: "short".into(), lifetime: Some(1), ..NewKey::default() };
    let (_, short) = server.store.with(|vault| vault.create(short)).await.unwrap();
    assert_eq!(server.get("/v1/models", &short).await.status, StatusCode::OK);
    server.store.with(move |vault| vault.revoke(&key.id)).await.unwrap();
    let answer = server.get("/v1/models", &text).await;
    refused(&answer, "revoked");
    assert!(answer.body.contains("revoked"), "{}", answer.body);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let answer = server.get("/v1/models", &short).await;
    refused(&answer, "expired");
    assert!(answer.body.contains("expired"), "{}", answer.body);
}

#[tokio::test]
async fn who_guesses_keys_has_to_wait_and_others_have_not() {
    let server = Guarded::new();
    let (_, key) = server.key(&[Scope::Inference, Scope::Metrics]).await;
    for i in 0..100 {
        refused(&server.get("/v1/models", &format!("sk-m40-{i}")).await, "a guess");
    }
    for _ in 0..3 {
        let answer = server.get("/v1/models", "sk-m40-x").await;
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
        let error = answer.error();
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
        );
        let seconds: u64 = answer.header("retry-after").parse().unwrap();
        let milliseconds: u64 = answer.header("retry-after-ms").parse().unwrap();
        assert!((1..=10).contains(&seconds) && milliseconds.div_ceil(1000) == seconds, "{answer:?}");
        assert_eq!(answer.header("x-should-retry"), "", "a retry may help");
    }
    // From the same address.
    assert_eq!(server.get("/v1/models", &key).await.status, StatusCode::OK);
    let metrics = server.get("/metrics", &key).await.body;
    assert!(metrics.contains("m40llm_refused_total{reason=\"invalid_key\"} 100\n"), "{metrics}");
    assert!(metrics.contains("m40llm_refused_total{reason=\"failed_authentications\"} 3\n"), "{metrics}");
}

#[tokio::test]
async fn a_refusal_waits_for_no_body() {
    let server = Guarded::with(Pace::default(), |gate| gate.with_failures_per_10s(1));
    server.key(&[Scope::Inference]).await;
    for status in [StatusCode::UNAUTHORIZED, StatusCode::TOO_MANY_REQUESTS] {
        let endless = Body::from_stream(stream::once(pending::<Result<Bytes, Infallible>>()));
        let headers = [("content-type", "application/json"), ("x-api-key", "sk-m40-x")];
        let asked = send(&server.app, request(Method::POST, "/v1/completions", &headers, endless));
        let answer = tokio::time::timeout(Duration::from_secs(5), asked).await.expect("an answer");
        assert_eq!(answer.status, status);
    }
}

#[tokio::test]
async fn browsers_see_why_they_are_refused_and_ask_for_free() {
    let server = Guarded::new();
    server.key(&[Scope::Inference]).await;
    let headers = [
        ("origin", "http://localhost:3000"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    let preflight = request(Method::OPTIONS, "/v1/chat/completions", &headers, Body::empty());
    let answer = send(&server.app, preflight).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("access-control-allow-origin"), "http://localhost:3000");
    let answer = send(&server.app, request(Method::GET, "/v1/models", &headers[..1], Body::empty())).await;
    refused(&answer, "no key");
    assert_eq!(answer.header("access-control-allow-origin"), "http://localhost:3000");
}
