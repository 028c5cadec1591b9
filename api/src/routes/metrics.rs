//! `GET /metrics`.

use axum::{extract::State, response::IntoResponse};

use super::ReadFailures;
use crate::{
    app::{AppState, Health},
    observe::{Gauges, METRICS_TYPE},
};

/// Counters and gauges for Prometheus.
#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics", tag = "Operation",
    responses(
        (status = 200, description = "The Prometheus text format: requests by route and status, how they \
            ended and why they were refused, tokens, sequences running and waiting, KV cache blocks, kernel launches and \
            waits for the device, times in the queue, to the first token and between tokens.",
            body = String, content_type = "text/plain",
            example = "m40llm_requests_total{route=\"/health\",method=\"GET\",status=\"200\"} 1\n"),
        ReadFailures,
    ),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn metrics(State(state): State<AppState>) -> impl IntoResponse {
    let stats = state.model().map(|model| model.engine.stats()).unwrap_or_default();
    let ready = state.health() == Health::Ok;
    ([METRICS_TYPE], state.metrics().render(&Gauges { stats, ready }))
}
