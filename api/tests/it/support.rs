//! Requests without sockets, and one engine for all tests that need a model.

use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode},
};
use http_body_util::BodyExt as _;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::{Engine, EngineConfig};
use serde_json::Value;
use tower::ServiceExt as _;

/// The id that the tests' server gives its model.
pub(crate) const MODEL: &str = "test-model";

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("not JSON ({e}): {}", self.body))
    }

    /// A header's text, empty when it is absent.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |v| v.to_str().unwrap())
    }

    /// The error of the contract's shape, with nothing else in the body but Anthropic's frame on its routes.
    pub(crate) fn error(&self) -> Value {
        let mut body = self.json();
        if self.headers.contains_key("request-id") {
            assert_eq!(self.header("request-id"), self.header("x-request-id"));
            assert_eq!(body.as_object_mut().unwrap().remove("type"), Some("error".into()), "{body}");
        }
        let object = body.as_object().unwrap();
        assert_eq!(object.keys().collect::<Vec<_>>(), ["error"], "{body}");
        let error = body["error"].clone();
        let mut keys: Vec<_> = error.as_object().unwrap().keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"], "{body}");
        assert!(!error["message"].as_str().unwrap().is_empty());
        assert!(error["code"].is_null() || error["code"].is_string(), "{body}");
        assert_eq!(self.header("content-type"), "application/json");
        self.check_retries();
        error
    }

    /// What the SDKs look at before they try again: never where it cannot help, and after how long where it may.
    fn check_retries(&self) {
        let (status, retry) = (self.status.as_u16(), self.header("x-should-retry"));
        match status {
            429 | 503 if retry.is_empty() => {
                let seconds: u64 = self.header("retry-after").parse().expect("Retry-After");
                assert!((1..=60).contains(&seconds), "{seconds}");
            }
            // What the SDKs would do by themselves.
            408 | 409 | 500 => assert!(["", "false"].contains(&retry), "{status}: {retry}"),
            _ => assert_eq!(retry, "false", "{status}: {}", self.body),
        }
    }

    /// The JSON objects of a stream whose events have names: the `type` of each. Comments and pings are passed over.
    pub(crate) fn named_events(&self) -> Vec<Value> {
        let one = |event: &str| {
            let (name, data) = event.strip_prefix("event: ").and_then(|e| e.split_once("\ndata: ")).unwrap();
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], name);
            data
        };
        assert!(self.body.ends_with("\n\n"), "{}", self.body);
        let events = self.body.split_terminator("\n\n").filter(|event| !event.starts_with(':'));
        events.map(one).filter(|event| event["type"] != "ping").collect()
    }

    /// The JSON objects of a stream of server-sent events, which must end with `[DONE]` when `done`.
    pub(crate) fn events(&self, done: bool) -> Vec<Value> {
        let mut events: Vec<&str> = self
            .body
            .split_terminator("\n\n")
            .filter(|event| !event.starts_with(':'))
            .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("no data: {event:?}")))
            .collect();
        if done {
            assert_eq!(events.pop(), Some("[DONE]"));
        }
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// Sends a request to `app`.
pub(crate) async fn send(app: &Router, request: Request<Body>) -> Answer {
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer { status: parts.status, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() }
}

/// A request with these headers and this body.
pub(crate) fn request(
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Body>,
) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(body.into()).unwrap()
}

/// `GET path`.
pub(crate) async fn get(app: &Router, path: &str) -> Answer {
    send(app, request(Method::GET, path, &[], Body::empty())).await
}

/// `POST path` with a JSON body.
pub(crate) async fn post(app: &Router, path: &str, body: &Value) -> Answer {
    post_text(app, path, body.to_string()).await
}

/// `POST path` with a body that claims to be JSON.
pub(crate) async fn post_text(app: &Router, path: &str, body: String) -> Answer {
    send(app, request(Method::POST, path, &[("content-type", "application/json")], body)).await
}

/// A server whose model never comes.
pub(crate) fn loading() -> Router {
    m40llm::app(AppState::loading(ServerConfig::new(MODEL, 1_700_000_000)))
}

/// The model of code, which `scripts/fetch-model.sh qwen2.5-coder-0.5b` fetches.
pub(crate) fn coder() -> Router {
    static LOADED: LazyLock<Engine> = LazyLock::new(|| {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
        assert!(
            path.exists(),
            "{} is missing: run scripts/fetch-model.sh qwen2.5-coder-0.5b",
            path.display()
        );
        let config =
            EngineConfig { ctx_size: Some(1024), max_batch: 4, max_queue: 16, ..EngineConfig::default() };
        Engine::load(&path, &config, |_| {}).unwrap()
    });
    let state = AppState::loading(ServerConfig::new(MODEL, 1_700_000_000));
    state.set_engine(LOADED.clone());
    m40llm::app(state)
}

/// The demo model, which `scripts/fetch-model.sh smollm2` fetches.
pub(crate) fn model_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/smollm2-135m-instruct-q4_1.gguf")
}

static LOADED: LazyLock<Engine> = LazyLock::new(|| {
    let path = model_path();
    assert!(path.exists(), "{} is missing: run scripts/fetch-model.sh smollm2", path.display());
    let config =
        EngineConfig { ctx_size: Some(1024), max_batch: 8, max_queue: 64, ..EngineConfig::default() };
    Engine::load(&path, &config, |_| {}).unwrap()
});

/// The one engine of all tests.
pub(crate) fn engine() -> &'static Engine {
    &LOADED
}

/// A server's state over the one engine; each test has its own.
pub(crate) fn state() -> AppState {
    let mut config = ServerConfig::new(MODEL, 1_700_000_000);
    config.max_queue = 64;
    config.keep_alive = Duration::from_secs(15);
    let state = AppState::loading(config);
    state.set_engine(LOADED.clone());
    state
}

/// A server over the one engine.
pub(crate) fn served() -> Router {
    m40llm::app(state())
}
