//! The gateway over a token source: what a test may count on.

use std::time::Duration;

use axum::{Router, http::Method};
use http_body_util::BodyExt as _;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::{Engine, EngineConfig};
use serde_json::json;
use tower::ServiceExt as _;

use crate::{
    source::{self, Pace},
    support::{MODEL, post, request},
};

fn over(pace: Pace) -> Router {
    served(pace, Duration::from_secs(15)).0
}

fn served(pace: Pace, keep_alive: Duration) -> (Router, Engine) {
    let state = AppState::loading(ServerConfig { keep_alive, ..ServerConfig::new(MODEL, 1_700_000_000) });
    let engine = source::engine(&EngineConfig { ctx_size: Some(64), ..EngineConfig::default() }, pace);
    state.set_engine(engine.clone());
    (m40llm::app(state), engine)
}

#[tokio::test]
async fn a_source_gives_what_was_asked_for() {
    let app = over(Pace::default());
    let body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3});
    let answer = post(&app, "/v1/chat/completions", &body).await.json();
    assert_eq!(answer["choices"][0]["message"]["content"], "t0 t1 t2 ");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(6), &json!(3)));

    let body = json!({"prompt": "hello", "max_tokens": 4, "stream": true});
    let events = post(&app, "/v1/completions", &body).await.events(true);
    let text: String = events.iter().filter_map(|e| e["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "t0 t1 t2 t3 ");
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_are_shared_in_turn() {
    // One token every two milliseconds, for two requests of five.
    let app = over(Pace { step: Duration::from_millis(2), batch: 1, ..Pace::default() });
    let body = json!({"prompt": "a", "max_tokens": 5});
    let started = std::time::Instant::now();
    let (one, two) = tokio::join!(post(&app, "/v1/completions", &body), post(&app, "/v1/completions", &body));
    assert!(started.elapsed() >= Duration::from_millis(18), "{:?}", started.elapsed());
    assert_eq!(one.json()["choices"][0]["text"], "t0 t1 t2 t3 t4 ");
    assert_eq!(two.json()["choices"][0]["text"], "t0 t1 t2 t3 t4 ");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_ready_go_out_together() {
    let (app, engine) = served(Pace::default(), Duration::from_secs(15));
    let body = json!({"prompt": "a", "max_tokens": 40, "stream": true}).to_string();
    let request = request(Method::POST, "/v1/completions", &[("content-type", "application/json")], body);
    let mut body = app.oneshot(request).await.unwrap().into_body();
    while engine.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let text = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let text = str::from_utf8(&text).unwrap();
    assert!(["t0 ", "t39 ", "\"length\""].iter().all(|part| text.contains(part)), "{text}");
    let end = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(end, "data: [DONE]\n\n");
    assert!(body.frame().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_silent_has_no_comments() {
    // Longer than the pause in all, but not between two tokens.
    let pace = Pace { step: Duration::from_millis(100), ..Pace::default() };
    let (app, _) = served(pace, Duration::from_secs(1));
    let body = json!({"prompt": "a", "max_tokens": 25, "stream": true});
    let answer = post(&app, "/v1/completions", &body).await;
    assert!(!answer.body.contains("keep-alive"), "{}", answer.body);
    assert_eq!(answer.events(true).len(), 26);
}
