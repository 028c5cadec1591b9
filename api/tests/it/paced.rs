//! The gateway over a token source: what a test may count on.

use std::time::Duration;

use axum::Router;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::EngineConfig;
use serde_json::json;

use crate::{
    source::{self, Pace},
    support::{MODEL, post},
};

fn over(pace: Pace) -> Router {
    let state = AppState::loading(ServerConfig::new(MODEL, 1_700_000_000));
    state.set_engine(source::engine(&EngineConfig { ctx_size: Some(64), ..EngineConfig::default() }, pace));
    m40llm::app(state)
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
