//! Error bodies, ids and health on every path; no model needed.

use axum::{body::Body, http::Method};
use m40llm::{AppState, MAX_BODY_BYTES, ServerConfig};
use serde_json::json;

use crate::support::{MODEL, get, loading, post, post_text, request, send};

const POSTS: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/generate",
    "/tokenize",
    "/detokenize",
    "/apply-template",
];

#[tokio::test]
async fn unknown_routes_are_404() {
    for path in ["//", "/v1", "/v1/nothing", "/docs/nothing.js", "/v1/chat/completions/x", "/%ff"] {
        let answer = get(&loading(), path).await;
        assert_eq!(answer.status, 404, "{path}");
        let error = answer.error();
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(answer.header("x-should-retry"), "false");
        assert!(answer.header("x-request-id").starts_with("req_"));
    }
}

#[tokio::test]
async fn wrong_methods_are_405_with_allow() {
    for path in POSTS {
        let answer = get(&loading(), path).await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, "POST"), "{path}");
        assert_eq!(answer.error()["type"], "invalid_request_error");
    }
    for path in ["/v1/models", "/v1/models/x", "/health", "/metrics", "/", "/docs", "/openapi.json"] {
        let answer = post(&loading(), path, &json!({})).await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, "GET,HEAD"), "{path}");
        assert_eq!(answer.error()["type"], "invalid_request_error");
    }
}

#[tokio::test]
async fn bodies_that_are_no_json_are_400() {
    for path in POSTS {
        for body in ["", "{", "nonsense", "[1, 2]", "{} {}", "{\"a\": \"\u{1}\"}"] {
            let answer = post_text(&loading(), path, body.to_owned()).await;
            assert_eq!(answer.status, 400, "{path} {body:?}: {}", answer.body);
            assert_eq!(answer.error()["type"], "invalid_request_error");
        }
    }
}

#[tokio::test]
async fn fields_at_fault_are_named() {
    for (path, body, param) in [
        ("/v1/chat/completions", json!({}), "messages"),
        ("/v1/chat/completions", json!({"messages": [{"role": 1}]}), "messages[0].role"),
        ("/v1/completions", json!({"max_tokens": 1}), "prompt"),
        ("/v1/completions", json!({"prompt": ["a", 1]}), "prompt[1]"),
        ("/v1/responses", json!({}), "input"),
        ("/v1/responses", json!({"input": [{"role": "user", "content": 1}]}), "input[0].content"),
        ("/v1/messages", json!({"max_tokens": 1}), "messages"),
        (
            "/v1/messages",
            json!({"messages": [{"role": "user", "content": [{}]}]}),
            "messages[0].content[0].type",
        ),
        ("/v1/messages/count_tokens", json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        ("/generate", json!({"prompt": "a", "max_tokens": "many"}), "max_tokens"),
        ("/tokenize", json!({"content": 1}), "content"),
        ("/detokenize", json!({"tokens": [1, -1]}), "tokens[1]"),
        ("/apply-template", json!({"messages": {}}), "messages"),
    ] {
        let answer = post(&loading(), path, &body).await;
        let error = answer.error();
        assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{path} {body}");
        assert!(error["message"].as_str().unwrap().starts_with(param));
    }
}

#[tokio::test]
async fn wrong_content_types_are_415() {
    for path in POSTS {
        for headers in [
            vec![],
            vec![("content-type", "text/plain")],
            vec![("content-type", "application/json"), ("content-encoding", "gzip")],
        ] {
            let answer = send(&loading(), request(Method::POST, path, &headers, "{}")).await;
            assert_eq!(answer.status, 415, "{path} {headers:?}");
            assert_eq!(answer.error()["type"], "invalid_request_error");
        }
    }
}

#[tokio::test]
async fn large_bodies_are_413() {
    let json = ("content-type", "application/json");
    for path in POSTS {
        // Told from the length alone: the body itself would be fine.
        let length = (MAX_BODY_BYTES + 1).to_string();
        let claimed = request(Method::POST, path, &[json, ("content-length", &length)], "{}");
        let answer = send(&loading(), claimed).await;
        assert_eq!(answer.status, 413, "{path}");
        assert_eq!(answer.error()["type"], "invalid_request_error");
    }
    // Without a length: read up to the limit.
    let chunks = (0..9).map(|_| Ok::<_, std::convert::Infallible>(vec![b' '; 1 << 20]));
    let chunked = Body::from_stream(futures_util::stream::iter(chunks));
    let answer = send(&loading(), request(Method::POST, "/tokenize", &[json], chunked)).await;
    assert_eq!(answer.status, 413);
    answer.error();
    // At the limit it is read whole.
    let mut body = b"{\"content\":\"\"}".to_vec();
    body.resize(MAX_BODY_BYTES, b' ');
    let answer = send(&loading(), request(Method::POST, "/tokenize", &[json], body)).await;
    assert_eq!(answer.status, 503);
}

#[tokio::test]
async fn other_models_are_404() {
    let other = "gpt-4o";
    for (path, body) in [
        ("/v1/chat/completions", json!({"model": other, "messages": [{"role": "user", "content": "x"}]})),
        ("/v1/completions", json!({"model": other, "prompt": "x"})),
        ("/v1/responses", json!({"model": other, "input": "x"})),
        ("/v1/messages", json!({"model": other, "messages": [], "max_tokens": 1})),
        ("/v1/messages/count_tokens", json!({"model": other, "messages": []})),
    ] {
        let answer = post(&loading(), path, &body).await;
        assert_eq!(answer.status, 404);
        assert_eq!(answer.error()["code"], "model_not_found");
    }
    for path in ["/v1/models/gpt-4o", "/v1/models/owner/gpt-4o", "/v1/models/owner%2Fgpt-4o"] {
        let answer = get(&loading(), path).await;
        assert_eq!(
            (answer.status.as_u16(), &answer.error()["code"]),
            (404, &json!("model_not_found")),
            "{path}"
        );
    }
}

#[tokio::test]
async fn while_loading_work_is_503_and_the_rest_is_there() {
    let app = loading();
    let health = get(&app, "/health").await;
    assert_eq!((health.status.as_u16(), health.json()), (503, json!({"status": "loading"})));
    for (path, body) in [
        ("/v1/chat/completions", json!({"model": MODEL, "messages": [{"role": "user", "content": "x"}]})),
        ("/v1/completions", json!({"model": "", "prompt": "x"})),
        ("/v1/responses", json!({"input": "x"})),
        ("/v1/messages", json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1})),
        ("/v1/messages/count_tokens", json!({"messages": [{"role": "user", "content": "x"}]})),
        ("/generate", json!({"prompt": "x"})),
        ("/tokenize", json!({"content": "x"})),
        ("/detokenize", json!({"tokens": [1]})),
        ("/apply-template", json!({"messages": [{"role": "user", "content": "x"}]})),
    ] {
        let answer = post(&app, path, &body).await;
        let error = answer.error();
        assert_eq!(
            (answer.status.as_u16(), &error["type"], &error["code"]),
            (503, &json!("server_error"), &json!("overloaded"))
        );
        let seconds: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=60).contains(&seconds));
        assert_eq!(answer.header("x-should-retry"), "", "a retry helps");
    }
    assert_eq!(get(&app, "/v1/models").await.status, 503);
    for path in
        ["/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-initializer.js", "/openapi.json", "/metrics"]
    {
        assert_eq!(get(&app, path).await.status, 200, "{path}");
    }
}

#[tokio::test]
async fn a_draining_server_says_so() {
    let state = AppState::loading(ServerConfig::new(MODEL, 0));
    let app = m40llm::app(state.clone());
    state.drain();
    let health = get(&app, "/health").await;
    assert_eq!((health.status.as_u16(), health.json()), (503, json!({"status": "draining"})));
    let answer = post(&app, "/generate", &json!({"prompt": "x"})).await;
    assert_eq!((answer.status.as_u16(), &answer.error()["code"]), (503, &json!("overloaded")));
    assert!(!answer.header("retry-after").is_empty());
}

#[tokio::test]
async fn ids_are_on_every_response() {
    let app = loading();
    let own = request(Method::GET, "/health", &[("x-request-id", "my-id.1")], Body::empty());
    let answer = send(&app, own).await;
    assert_eq!(answer.header("x-request-id"), "my-id.1");
    assert!(answer.header("openai-processing-ms").parse::<u64>().is_ok());
    let insane = request(Method::GET, "/nothing", &[("x-request-id", "a b\"c")], Body::empty());
    assert!(send(&app, insane).await.header("x-request-id").starts_with("req_"));
    let first = get(&app, "/health").await;
    assert_ne!(first.header("x-request-id"), get(&app, "/health").await.header("x-request-id"));
}

#[tokio::test]
async fn requests_are_counted() {
    let app = loading();
    get(&app, "/nothing").await;
    get(&app, "/v1/models/some-other").await;
    let metrics = get(&app, "/metrics").await;
    assert_eq!(metrics.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    for line in [
        "m40llm_requests_total{route=\"unmatched\",method=\"GET\",status=\"404\"} 1",
        "m40llm_requests_total{route=\"/v1/models/{id}\",method=\"GET\",status=\"404\"} 1",
        "m40llm_generated_tokens_total 0",
    ] {
        assert!(metrics.body.lines().any(|l| l == line), "{line} is missing:\n{}", metrics.body);
    }
}

#[tokio::test]
async fn head_answers_where_get_does() {
    let answer = send(&loading(), request(Method::HEAD, "/docs", &[], Body::empty())).await;
    assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, ""));
}
