//! Keys made, listed and revoked over HTTP, and the secret that signs them.

use axum::http::{Method, StatusCode};
use m40llm::{AppState, ServerConfig, auth::Scope};
use serde_json::json;

use super::{Guarded, part, refused};
use crate::support::{MODEL, get};

#[tokio::test]
async fn keys_are_managed_over_http() {
    let server = Guarded::new();
    let (admin, root) = server.key(&[Scope::Admin]).await;
    let body = json!({"name": "ci", "scopes": ["metrics", "inference"], "expires": "30d", "rpm": 60.0, "tpm": null,
        "models": [MODEL], "priority": "low", "unknown": 1});
    let made = server.post("/admin/keys", &root, &body).await;
    assert_eq!(made.status, StatusCode::CREATED, "{made:?}");
    assert_eq!(made.header("cache-control"), "no-store");
    let made = made.json();
    let (id, key) = (made["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned());
    assert_eq!(made["scopes"], json!(["inference", "metrics"]));
    assert_eq!(made["expires_at"], made["created_at"].as_u64().unwrap() + 30 * 86_400);
    assert_eq!((&made["rpm"], &made["tpm"], &made["priority"]), (&json!(60), &json!(null), &json!("low")));
    assert_eq!(server.get("/v1/models", &key).await.status, StatusCode::OK);

    let listed = server.get("/admin/keys", &root).await;
    assert!(!listed.body.contains("sk-m40-") && !listed.body.contains("eyJ"), "{}", listed.body);
    let listed = listed.json();
    assert_eq!(listed["object"], "list");
    let ids: Vec<_> =
        listed["data"].as_array().unwrap().iter().map(|key| key["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [admin.id.as_str(), &id]);

    let path = format!("/admin/keys/{id}");
    let revoked = server.call(Method::DELETE, &path, &root, None).await;
    assert_eq!((revoked.status, &revoked.json()["revoked"]), (StatusCode::OK, &json!(true)));
    refused(&server.get("/v1/models", &key).await, "revoked");
    assert_eq!(server.call(Method::DELETE, &path, &root, None).await.status, StatusCode::OK, "again");
    let unknown = server.call(Method::DELETE, "/admin/keys/key_x", &root, None).await;
    assert_eq!(
        (unknown.status, &unknown.error()["type"]),
        (StatusCode::NOT_FOUND, &json!("invalid_request_error"))
    );

    for (body, param) in [
        (json!({}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "x".repeat(101)}), "name"),
        (json!({"name": "x", "scopes": ["root"]}), "scopes[0]"),
        (json!({"name": "x", "expires": "30"}), "expires"),
        (json!({"name": "x", "expires": "0s"}), "expires"),
        (json!({"name": "x", "rpm": 0}), "rpm"),
        (json!({"name": "x", "tpm": -1}), "tpm"),
        (json!({"name": "x", "concurrency": 1.5}), "concurrency"),
        (json!({"name": "x", "max_context": 4_294_967_296_u64}), "max_context"),
        (json!({"name": "x", "models": ["a", ""]}), "models[1]"),
        (json!({"name": "x", "priority": "urgent"}), "priority"),
    ] {
        let answer = server.post("/admin/keys", &root, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer.error()["param"], param, "{body}: {answer:?}");
    }
    assert_eq!(server.get("/admin/keys", &root).await.json()["data"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_secret_is_rotated_over_http() {
    let server = Guarded::new();
    let (_, old) = server.key(&[Scope::Admin, Scope::Inference]).await;
    let rotated = server.post("/admin/rotate-secret", &old, &json!({})).await;
    assert_eq!((rotated.status, rotated.json()), (StatusCode::OK, json!({"valid_secrets": 2})));
    let (_, new) = server.key(&[Scope::Inference]).await;
    assert_ne!(part(&old, 0)["kid"], part(&new, 0)["kid"]);
    for key in [&old, &new] {
        assert_eq!(server.get("/v1/models", key).await.status, StatusCode::OK);
    }
    let (_, root) = server.key(&[Scope::Admin]).await;
    let dropped = server.call(Method::POST, "/admin/drop-old-secrets", &root, None).await;
    assert_eq!(dropped.json(), json!({"valid_secrets": 1}));
    refused(&server.get("/v1/models", &old).await, "of a dropped secret");
    assert_eq!(server.get("/v1/models", &new).await.status, StatusCode::OK);
    let dropped = server.post("/admin/rotate-secret", &root, &json!({"drop_old": true})).await;
    assert_eq!(dropped.json(), json!({"valid_secrets": 1}));
    for key in [&old, &new] {
        refused(&server.get("/v1/models", key).await, "of a dropped secret");
    }
}

#[tokio::test]
async fn a_server_without_keys_has_none_to_manage() {
    let app = m40llm::app(AppState::loading(ServerConfig::new(MODEL, 1_700_000_000)));
    let answer = get(&app, "/admin/keys").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert!(answer.error()["message"].as_str().unwrap().contains("--no-auth"), "{answer:?}");
}
