//! Server-sent events, cancellation and draining over a real model.

use std::time::{Duration, Instant};

use axum::http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::support::{engine, get, post, request, served, state};

fn chat(fields: &Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Write the word naïve and a ☕ emoji."}],
        "max_tokens": 16, "temperature": 0, "stream": true
    });
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn chunks_have_openais_shape() {
    let answer = post(&served(), "/v1/chat/completions", &chat(&json!({"n": 2}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    assert_eq!(answer.header("cache-control"), "no-cache");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    let chunks = answer.events(true);
    for chunk in &chunks {
        for key in ["id", "created", "model", "system_fingerprint"] {
            assert_eq!(chunk[key], chunks[0][key]);
        }
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
        assert!(chunk.get("usage").is_none());
    }
    for index in 0..2 {
        let mine: Vec<&Value> =
            chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index).collect();
        let (first, rest) = mine.split_first().unwrap();
        assert_eq!(first["delta"], json!({"role": "assistant", "content": ""}));
        let (last, middle) = rest.split_last().unwrap();
        assert_eq!(last["delta"], json!({}));
        assert!(["stop", "length"].contains(&last["finish_reason"].as_str().unwrap()));
        for choice in middle {
            assert!(choice["finish_reason"].is_null() && choice["delta"].get("role").is_none());
            assert!(choice["delta"]["content"].is_string());
        }
    }
}

#[tokio::test]
async fn answers_say_when_their_first_token_was_expected_and_waiting_can_be_bounded() {
    let app = served();
    for fields in [json!({}), json!({"stream": false, "max_wait_ms": 3_600_000})] {
        let answer = post(&app, "/v1/chat/completions", &chat(&fields)).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let expected: u64 = answer.header("x-m40-predicted-ttft-ms").parse().unwrap();
        assert!(expected < 3_600_000, "{expected}");
        assert!(answer.header("x-m40-queue-position").parse::<usize>().is_ok());
    }
    // By now the speed is known, and nothing is that fast.
    let prompt = "word ".repeat(400);
    for (path, body) in [
        (
            "/v1/chat/completions",
            chat(&json!({"messages": [{"role": "user", "content": prompt}], "max_wait_ms": 0})),
        ),
        ("/v1/completions", json!({"prompt": prompt, "max_wait_ms": 0})),
        ("/generate", json!({"prompt": prompt, "max_wait_ms": 0})),
    ] {
        let answer = post(&app, path, &body).await;
        assert_eq!((answer.status.as_u16(), &answer.error()["code"]), (503, &json!("overloaded")), "{path}");
        assert!(answer.error()["message"].as_str().unwrap().contains("max_wait_ms"), "{path}");
        let seconds: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=60).contains(&seconds));
    }
    let answer = post(&app, "/generate", &json!({"prompt": "x", "max_wait_ms": -1})).await;
    assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!("max_wait_ms")));
}

#[tokio::test]
async fn streamed_text_is_the_whole_text() {
    let app = served();
    for fields in [json!({}), json!({"temperature": 1, "seed": 5}), json!({"stop": ["a", "the"]})] {
        let streamed = post(&app, "/v1/chat/completions", &chat(&fields)).await.events(true);
        let text: String =
            streamed.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
        let mut body = chat(&fields);
        body["stream"] = json!(false);
        let whole = post(&app, "/v1/chat/completions", &body).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], text);
        assert!(!text.contains('\u{FFFD}'));
        let reason = streamed.last().unwrap()["choices"][0]["finish_reason"].clone();
        assert_eq!(whole["choices"][0]["finish_reason"], reason);
    }
}

#[tokio::test]
async fn usage_comes_when_asked_for() {
    let app = served();
    let fields = json!({"n": 2, "stream_options": {"include_usage": true}});
    let chunks = post(&app, "/v1/chat/completions", &chat(&fields)).await.events(true);
    let (last, rest) = chunks.split_last().unwrap();
    assert!(rest.iter().all(|c| c.get("usage").is_some_and(Value::is_null)));
    assert_eq!(last["choices"], json!([]));
    let mut body = chat(&json!({"n": 2, "stream": false}));
    body.as_object_mut().unwrap().remove("stream_options");
    let whole = post(&app, "/v1/chat/completions", &body).await.json();
    for count in ["prompt_tokens", "completion_tokens", "total_tokens"] {
        assert_eq!(last["usage"][count], whole["usage"][count], "{count}");
    }
    assert!(last["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
}

#[tokio::test]
async fn chunks_carry_all_logprobs() {
    let app = served();
    let fields = json!({"logprobs": true, "top_logprobs": 1, "stop": ["zzz"]});
    let chunks = post(&app, "/v1/chat/completions", &chat(&fields)).await.events(true);
    let streamed: Vec<Value> = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array().cloned())
        .flatten()
        .collect();
    let mut body = chat(&fields);
    body["stream"] = json!(false);
    let whole = post(&app, "/v1/chat/completions", &body).await.json();
    let whole = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let tokens = |list: &[Value]| list.iter().map(|t| t["token"].clone()).collect::<Vec<_>>();
    assert_eq!(tokens(&streamed), tokens(whole));
}

/// Text that may begin a stop string is held back, and the tokens of it with it.
#[tokio::test]
async fn tokens_come_with_the_chunk_that_releases_them() {
    let app = served();
    let ask = |fields: Value| {
        let app = app.clone();
        async move { post(&app, "/v1/chat/completions", &chat(&fields)).await }
    };
    let whole = ask(json!({"stream": false, "logprobs": true})).await.json();
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let lengths: Vec<usize> = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token["bytes"].as_array().unwrap().len())
        .collect();
    // The end of one word and what follows it, which nothing ever completes.
    let stops: Vec<String> = text
        .char_indices()
        .step_by(5)
        .map(|(i, _)| format!("{}@@", text[i..].chars().take(4).collect::<String>()))
        .take(8)
        .collect();
    let chunks = ask(json!({"logprobs": true, "stop": stops})).await.events(true);
    let (mut said, mut tokens, mut longest) = (0, 0, 0);
    for chunk in &chunks {
        let choice = &chunk["choices"][0];
        let new = choice["delta"]["content"].as_str().unwrap_or_default();
        said += new.len();
        tokens += choice["logprobs"]["content"].as_array().map_or(0, Vec::len);
        longest = longest.max(choice["logprobs"]["content"].as_array().map_or(0, Vec::len));
        if new.is_empty() {
            continue;
        }
        // All that are said whole, and no other.
        let mut end = 0;
        let whole = lengths
            .iter()
            .take_while(|&&length| {
                end += length;
                end <= said
            })
            .count();
        assert_eq!(tokens, whole, "{said} bytes: {chunk}");
    }
    assert_eq!(said, text.len());
    assert!(longest > 1, "nothing was held back: {stops:?}");
}

#[tokio::test]
async fn completions_stream_pieces_with_offsets() {
    let app = served();
    let mut body = json!({
        "prompt": "Genève is", "max_tokens": 6, "temperature": 0, "echo": true, "logprobs": 1, "stream": true,
        "stream_options": {"include_usage": true}
    });
    let pieces = post(&app, "/v1/completions", &body).await.events(true);
    assert!(pieces.iter().all(|p| p["object"] == "text_completion"));
    assert!(pieces.last().unwrap()["usage"]["total_tokens"].is_u64());
    let list = |name: &str| -> Vec<Value> {
        let lists = pieces.iter().filter_map(|p| p["choices"][0]["logprobs"][name].as_array());
        lists.flatten().cloned().collect()
    };
    let text: String = pieces.iter().filter_map(|p| p["choices"][0]["text"].as_str()).collect();
    body["stream"] = json!(false);
    body.as_object_mut().unwrap().remove("stream_options");
    let whole = post(&app, "/v1/completions", &body).await.json();
    assert_eq!(whole["choices"][0]["text"], text);
    for name in ["tokens", "text_offset"] {
        assert_eq!(whole["choices"][0]["logprobs"][name], json!(list(name)), "{name}");
    }
}

#[tokio::test]
async fn a_request_that_fails_at_once_has_its_status() {
    for fields in [json!({"max_tokens": 5000}), json!({"temperature": 9})] {
        let answer = post(&served(), "/v1/chat/completions", &chat(&fields)).await;
        assert_eq!(answer.status, 400);
        assert_eq!(answer.error()["type"], "invalid_request_error");
    }
}

/// Waits until `done`, at most ten seconds.
async fn eventually(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(10), "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// One test for all that looks at the shared engine's load, so that they do not see one another's.
#[tokio::test]
async fn clients_that_go_away_free_their_place() {
    let app = served();
    let long = chat(&json!({"max_tokens": 900, "logit_bias": {"2": -100, "0": -100}}));
    let headers = [("content-type", "application/json")];
    let send = |body: &Value| {
        app.clone().oneshot(request(Method::POST, "/v1/chat/completions", &headers, body.to_string()))
    };
    // A stream that is read a little and then dropped.
    let response = send(&long).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    let before = engine().stats().generated_tokens;
    drop(body);
    // A whole answer that nobody waits for.
    let mut whole = long.clone();
    whole["stream"] = json!(false);
    assert!(
        tokio::time::timeout(Duration::from_millis(300), send(&whole)).await.is_err(),
        "it should take longer"
    );
    // Neither is finished: 900 tokens each take longer than this test may.
    eventually("cancelled work goes on", || engine().stats().running == 0 || !engine().is_busy()).await;
    let after = engine().stats().generated_tokens;
    println!("{} tokens after the clients went", after - before);
}

#[tokio::test]
async fn a_draining_server_takes_no_new_work() {
    // Its own state over the shared engine would drain the engine of all tests, so without one.
    let state = m40llm::AppState::loading(m40llm::ServerConfig::new("m", 0));
    state.drain();
    state.idle().await;
    assert_eq!(get(&m40llm::app(state), "/health").await.status, 503);
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let mut config = state().config().clone();
    config.keep_alive = Duration::from_millis(1);
    let quiet = m40llm::AppState::loading(config);
    quiet.set_engine(engine().clone());
    let body =
        chat(&json!({"messages": [{"role": "user", "content": "word ".repeat(600)}], "max_tokens": 4}));
    let answer = post(&m40llm::app(quiet), "/v1/chat/completions", &body).await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains(": keep-alive\n\n"), "a long prompt takes longer than a millisecond");
    assert!(answer.body.starts_with("data: "), "the role comes first");
    answer.events(true);
}
