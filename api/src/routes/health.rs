//! `GET /health`.

use axum::{
    Json,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    app::{AppState, Health},
    error::Shaped,
};

/// Whether requests would be served.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct HealthStatus {
    /// `ok`, `loading`, `draining` or `failed`.
    #[schema(example = "ok")]
    status: &'static str,
}

/// Ask whether a request would be served.
#[utoipa::path(
    get, path = "/health", operation_id = "health", tag = "Operation",
    responses(
        (status = 200, description = "Yes: `ok`.", body = HealthStatus, example = json!({"status": "ok"})),
        (status = 503, description = "Not now: `loading` before the model is there, `draining` while the last \
            requests are finished, `failed` when the engine has stopped.",
            body = HealthStatus, example = json!({"status": "loading"})),
    ),
    security(()),
)]
pub(super) async fn health(State(state): State<AppState>) -> Response {
    let status = match state.health() {
        Health::Ok => return Json(HealthStatus { status: "ok" }).into_response(),
        Health::Loading => "loading",
        Health::Draining => "draining",
        Health::Failed => "failed",
    };
    let mut response = (StatusCode::SERVICE_UNAVAILABLE, Json(HealthStatus { status })).into_response();
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
    response.extensions_mut().insert(Shaped);
    response
}
