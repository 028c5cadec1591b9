//! What is charged, and when.

use std::time::Duration;

use axum::{
    body::Body,
    http::{Method, Request, StatusCode},
};
use http_body_util::BodyExt as _;
use m40llm::auth::Scope;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::{Guarded, chat};
use crate::{
    source::Pace,
    support::{MODEL, request},
};

/// Sums of a key's rows under `/v1/usage`.
async fn used(server: &Guarded, key: &str) -> [u64; 3] {
    let usage = server.get("/v1/usage", key).await.json();
    let sum =
        |field: &str| usage["data"].as_array().unwrap().iter().map(|row| row[field].as_u64().unwrap()).sum();
    [sum("requests"), sum("prompt_tokens"), sum("completion_tokens")]
}

#[tokio::test]
async fn an_answer_that_has_come_is_on_the_account() {
    let server = Guarded::new();
    let (key, text) = server.key(&[Scope::Inference, Scope::Admin]).await;
    let (_, idle) = server.key(&[Scope::Inference]).await;
    let mut expected = [0; 3];
    let mut stream = chat(7);
    stream["stream"] = json!(true);
    stream["stream_options"] = json!({"include_usage": true});
    let mut twice = chat(3);
    twice["n"] = json!(2);
    for (path, body) in [
        ("/v1/chat/completions", chat(4)),
        ("/v1/chat/completions", stream),
        ("/v1/chat/completions", twice),
        ("/v1/completions", json!({"prompt": ["ab", "cde"], "max_tokens": 2, "n": 2})),
        ("/v1/completions", json!({"prompt": "ab", "max_tokens": 0})),
        ("/generate", json!({"prompt": "hello", "max_tokens": 5})),
        ("/generate", json!({"prompt": "hello", "max_tokens": 5, "stream": true})),
        ("/v1/responses", json!({"input": "hello", "max_output_tokens": 5})),
        ("/v1/responses", json!({"input": "hello", "max_output_tokens": 5, "stream": true})),
        ("/v1/messages", json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5})),
        (
            "/v1/messages",
            json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "stream": true}),
        ),
    ] {
        let answer = server.post(path, &text, &body).await;
        assert_eq!(answer.status, StatusCode::OK, "{path} {body}: {answer:?}");
        let usage = match answer.header("content-type") {
            "application/json" => answer.json()["usage"].clone(),
            _ if answer.body.starts_with("event: ") => {
                let events = answer.named_events();
                let usage = events.iter().rev().find_map(|e| e.get("usage").or(e["response"].get("usage")));
                usage.unwrap().clone()
            }
            sse if sse.starts_with("text/event-stream") => {
                answer.events(true).last().unwrap()["usage"].clone()
            }
            _ => serde_json::from_str::<Value>(answer.body.lines().last().unwrap()).unwrap()["usage"].clone(),
        };
        expected[0] += 1;
        let count = |names: [&str; 2]| names.iter().find_map(|name| usage[*name].as_u64()).unwrap();
        expected[1] += count(["prompt_tokens", "input_tokens"]);
        expected[2] += count(["completion_tokens", "output_tokens"]);
        assert_eq!(used(&server, &text).await, expected, "{path} {body}");
    }
    // What is refused before the engine is asked costs nothing.
    let refused =
        server.post("/v1/completions", &text, &json!({"prompt": "a", "max_tokens": 1_000_000})).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert_eq!(used(&server, &text).await, expected);
    assert_eq!(used(&server, &idle).await, [0; 3], "another's account");

    let all = server.get("/admin/usage", &text).await.json();
    assert_eq!(all["data"].as_array().unwrap().len(), 1);
    let row = &all["data"][0];
    assert_eq!((&row["id"], &row["model"], &row["requests"]), (&json!(key.id), &json!(MODEL), &json!(11)));
    assert_eq!(row["day"].as_str().unwrap().len(), 10);
    assert!(row["device_seconds"].is_number());
    let later = server.get("/admin/usage?since=2999-01-01", &text).await.json();
    assert_eq!(later["data"], json!([]));
    let bad = server.get("/v1/usage?until=tomorrow", &text).await;
    assert_eq!((bad.status, &bad.error()["param"]), (StatusCode::BAD_REQUEST, &json!("until")));
}

#[tokio::test]
async fn a_client_that_goes_is_charged_for_what_was_generated() {
    let server = Guarded::with(Pace { step: Duration::from_millis(5), ..Pace::default() }, |gate| gate);
    let (_, key) = server.key(&[Scope::Inference]).await;
    let body = json!({"prompt": "hello", "max_tokens": 2000, "stream": true});
    let bearer = format!("Bearer {key}");
    let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
    let asked: Request<Body> = request(Method::POST, "/v1/completions", &headers, body.to_string());
    let mut stream = server.app.clone().oneshot(asked).await.unwrap().into_body();
    let mut seen = 0;
    while seen < 10 {
        let frame = stream.frame().await.unwrap().unwrap().into_data().unwrap();
        seen += String::from_utf8_lossy(&frame).matches("\"text\":\"t").count() as u64;
    }
    drop(stream);
    let mut charged = used(&server, &key).await;
    for _ in 0..100 {
        if charged[0] > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        charged = used(&server, &key).await;
    }
    let [requests, prompt, completion] = charged;
    assert_eq!((requests, prompt), (1, 5));
    assert!((seen..seen + 20).contains(&completion), "{seen} seen, {completion} charged");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(used(&server, &key).await, charged, "and no more");
}

#[tokio::test]
async fn an_answer_that_cannot_be_charged_is_withheld() {
    let server = Guarded::new();
    let (_, key) = server.key(&[Scope::Inference]).await;
    assert_eq!(server.post("/v1/chat/completions", &key, &chat(3)).await.status, StatusCode::OK);
    let database = rusqlite::Connection::open(server.dir.path().join("keys.sqlite3")).unwrap();
    database.execute_batch("DROP TABLE usage").unwrap();
    let whole = server.post("/v1/chat/completions", &key, &chat(3)).await;
    assert_eq!(
        (whole.status, &whole.error()["type"]),
        (StatusCode::INTERNAL_SERVER_ERROR, &json!("server_error"))
    );
    assert!(!whole.body.contains("t0"), "{whole:?}");
    let mut streamed = chat(3);
    streamed["stream"] = json!(true);
    let stream = server.post("/v1/chat/completions", &key, &streamed).await;
    let events = stream.events(false);
    assert_eq!(events.last().unwrap()["error"]["type"], "server_error", "{stream:?}");
    assert!(!stream.body.contains("[DONE]"), "{stream:?}");
}
