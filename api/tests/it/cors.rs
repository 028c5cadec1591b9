//! Which pages' scripts may call, and what they may read.

use axum::{Router, body::Body, http::Method};
use m40llm::{AppState, ServerConfig};

use crate::support::{Answer, loading, request, send};

async fn preflight(app: &Router, origin: &str, path: &str) -> Answer {
    let headers = [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type,x-stainless-os"),
    ];
    send(app, request(Method::OPTIONS, path, &headers, Body::empty())).await
}

fn configured(origins: &[&str]) -> Router {
    let mut config = ServerConfig::new("m", 0);
    config.cors_origins = origins.iter().map(ToString::to_string).collect();
    m40llm::app(AppState::loading(config))
}

#[tokio::test]
async fn loopback_pages_may_call_with_any_header() {
    for origin in ["http://localhost:3000", "http://127.0.0.1:58439", "http://[::1]:8080"] {
        for path in ["/v1/chat/completions", "/v1/models", "/generate"] {
            let answer = preflight(&loading(), origin, path).await;
            assert_eq!(answer.status, 200);
            assert_eq!(answer.header("access-control-allow-origin"), origin);
            for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
                assert!(answer.header("access-control-allow-methods").contains(method));
            }
            assert_eq!(answer.header("access-control-allow-private-network"), "", "nobody asked");
            assert_eq!(
                answer.header("access-control-allow-headers"),
                "authorization,content-type,x-stainless-os"
            );
        }
    }
}

#[tokio::test]
async fn other_pages_may_not() {
    for origin in ["https://example.com", "null", "http://localhost.example.com"] {
        let answer = preflight(&loading(), origin, "/v1/models").await;
        assert_eq!(answer.header("access-control-allow-origin"), "", "{origin}");
    }
}

#[tokio::test]
async fn configured_origins_replace_the_default() {
    let app = configured(&["https://app.example"]);
    let answer = preflight(&app, "https://app.example", "/v1/models").await;
    assert_eq!(answer.header("access-control-allow-origin"), "https://app.example");
    let answer = preflight(&app, "http://localhost:3000", "/v1/models").await;
    assert_eq!(answer.header("access-control-allow-origin"), "");
    let answer = preflight(&configured(&["*"]), "https://any.example", "/v1/models").await;
    assert_eq!(answer.header("access-control-allow-origin"), "*");
}

#[tokio::test]
async fn ids_and_limits_are_exposed_on_errors_too() {
    let headers = [("origin", "http://localhost:1")];
    for path in ["/health", "/nothing", "/v1/chat/completions"] {
        let answer = send(&loading(), request(Method::GET, path, &headers, Body::empty())).await;
        assert_eq!(answer.header("access-control-allow-origin"), "http://localhost:1", "{path}");
        let exposed = answer.header("access-control-expose-headers");
        for name in [
            "x-request-id",
            "request-id",
            "openai-processing-ms",
            "x-should-retry",
            "x-ratelimit-limit-requests",
            "x-ratelimit-remaining-requests",
            "x-ratelimit-reset-requests",
            "x-ratelimit-limit-tokens",
            "x-ratelimit-remaining-tokens",
            "x-ratelimit-reset-tokens",
            "retry-after",
            "retry-after-ms",
            "x-m40-predicted-ttft-ms",
            "x-m40-queue-position",
        ] {
            assert!(exposed.split(',').any(|e| e.trim() == name), "{name} in {exposed}");
        }
    }
}

/// Browsers ask before a page of the Internet calls a server that is not there.
#[tokio::test]
async fn allowed_pages_may_call_from_the_internet() {
    let headers = [
        ("origin", "https://app.example"),
        ("access-control-request-method", "POST"),
        ("access-control-request-private-network", "true"),
    ];
    let ask =
        |app| async move { send(&app, request(Method::OPTIONS, "/generate", &headers, Body::empty())).await };
    let answer = ask(configured(&["https://app.example"])).await;
    assert_eq!(answer.header("access-control-allow-private-network"), "true");
    assert_eq!(answer.header("access-control-allow-origin"), "https://app.example");
    assert_eq!(ask(loading()).await.header("access-control-allow-origin"), "");
}
