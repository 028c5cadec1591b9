//! Names the server answers to, and the headers of every response.

use axum::{Router, body::Body, http::Method};
use m40llm::{AppState, ServerConfig};

use crate::support::{Answer, get, loading, post_text, request, send};

/// As `run` has it on a loopback address without keys.
fn keyless() -> Router {
    let mut config = ServerConfig::new("m", 0);
    config.local_host = Some("box.lan".to_owned());
    m40llm::app(AppState::loading(config))
}

async fn named(app: &Router, host: &str) -> Answer {
    send(app, request(Method::GET, "/docs", &[("host", host)], Body::empty())).await
}

#[tokio::test]
async fn without_keys_only_this_machines_names_are_served() {
    let app = keyless();
    for host in ["localhost:58439", "127.0.0.1:58439", "[::1]:58439", "m40.localhost", "BOX.LAN:58439"] {
        assert_eq!(named(&app, host).await.status, 200, "{host}");
    }
    for host in ["evil.example:58439", "127.0.0.1.evil.example", "192.168.1.7:58439"] {
        let answer = named(&app, host).await;
        assert_eq!(answer.status, 403, "{host}");
        let error = answer.error();
        assert_eq!(
            (&error["type"], &error["code"]),
            (&"permission_error".into(), &"host_not_allowed".into())
        );
        let message = error["message"].as_str().unwrap();
        let name = host.split(':').next().unwrap();
        assert!(message.contains(name) && message.contains("--no-auth"), "{message}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
        assert_ne!(answer.header("x-request-id"), "");
    }
    let post = [("host", "evil.example"), ("content-type", "application/json")];
    assert_eq!(send(&app, request(Method::POST, "/generate", &post, "{}")).await.status, 403);
    let preflight =
        [("host", "evil.example"), ("origin", "http://localhost"), ("access-control-request-method", "POST")];
    assert_eq!(
        send(&app, request(Method::OPTIONS, "/generate", &preflight, Body::empty())).await.status,
        403
    );
}

#[tokio::test]
async fn elsewhere_every_name_is_served() {
    assert_eq!(named(&loading(), "api.example").await.status, 200);
}

#[tokio::test]
async fn every_response_carries_security_headers() {
    for path in ["/health", "/docs", "/docs/swagger-ui.css", "/v1/models", "/nothing", "/openapi.json"] {
        let answer = get(&loading(), path).await;
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(answer.header("referrer-policy"), "no-referrer", "{path}");
        assert_eq!(answer.header("x-frame-options"), "DENY", "{path}");
        let policy = answer.header("content-security-policy");
        assert!(
            policy.contains("frame-ancestors 'none'") && policy.starts_with("default-src 'none'"),
            "{path}"
        );
        assert_eq!(policy.contains("script-src 'self'"), path.starts_with("/docs"), "{path}");
        assert!(!policy.contains("script-src 'self' 'unsafe"), "{policy}");
        let cached = if path == "/docs/swagger-ui.css" { "private, max-age=3600" } else { "no-store" };
        assert_eq!(answer.header("cache-control"), cached, "{path}");
        assert_eq!(answer.header("strict-transport-security"), "", "only over TLS");
    }
}

/// Schemas and templates' values keep their form, so their depth is the parser's: 128.
#[tokio::test]
async fn nesting_has_a_limit() {
    for (depth, wrong) in [(100, false), (127, true), (100_000, true), (1_000_000, true)] {
        let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let body = format!("{{\"messages\":[],\"tools\":[{deep}]}}");
        let answer = post_text(&loading(), "/v1/chat/completions", body).await;
        assert!(!wrong || answer.status == 400, "{depth}: {answer:?}");
        let error = answer.error();
        let message = error["message"].as_str().unwrap();
        assert_eq!(message.contains("recursion limit exceeded"), wrong, "{depth}: {message}");
        // What no field takes is passed over without recursion.
        let body = format!("{{\"messages\":[],\"unknown\":{deep}}}");
        let answer = post_text(&loading(), "/v1/chat/completions", body).await;
        assert!(!answer.body.contains("recursion"), "{depth}: {answer:?}");
    }
}
