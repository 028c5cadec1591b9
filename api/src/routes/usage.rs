//! `GET /v1/usage`: what the caller's key used.

use axum::{
    Json,
    extract::{RawQuery, State},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::QueryFailures;
use crate::{
    app::AppState,
    auth::{
        Identity,
        ledger::UsageFilter,
        view::{DailyUsage, a_day},
    },
    error::ApiError,
};

/// The caller's accounts.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OwnUsage {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// The key's id; null when the request carried none.
    #[schema(required)]
    id: Option<String>,
    /// By day and model; empty without a key, as nobody's use is not kept.
    data: Vec<DailyUsage>,
}

/// What the caller's key used, by day and model.
///
/// Requests that run are not in it yet; those whose answer has come are.
#[utoipa::path(
    get, path = "/v1/usage", operation_id = "usage", tag = "Native",
    params(
        ("since" = Option<String>, Query, description = "From this UTC day on.", example = "2026-01-01"),
        ("until" = Option<String>, Query, description = "Up to this UTC day, inclusive."),
    ),
    responses((status = 200, description = "The accounts.", body = OwnUsage), QueryFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn own(
    State(state): State<AppState>,
    identity: Identity,
    RawQuery(query): RawQuery,
) -> Result<Json<OwnUsage>, ApiError> {
    let (since, until) = days(query.as_deref().unwrap_or_default())?;
    let id = identity.key_id().map(str::to_owned);
    let data = match (state.gate().store(), &id) {
        (Some(store), Some(_)) => {
            let filter = UsageFilter { key: id.clone(), since, until };
            let records = store.read(move |ledger| ledger.usage(&filter)).await;
            records.map_err(|e| ApiError::auth(&e))?.iter().map(DailyUsage::from).collect()
        }
        _ => Vec::new(),
    };
    Ok(Json(OwnUsage { object: "list", id, data }))
}

/// `since` and `until` of a query string. A day needs no escapes, so none are looked for.
pub(super) fn days(query: &str) -> Result<(Option<String>, Option<String>), ApiError> {
    let day = |name: &str| {
        let mut values = query.split('&').filter_map(|pair| pair.split_once('=')).filter(|(k, _)| *k == name);
        let value = values.next().map(|(_, value)| value).filter(|value| !value.is_empty());
        value.map(|day| a_day(day).map_err(|allowed| ApiError::invalid(name, allowed))).transpose()
    };
    Ok((day("since")?, day("until")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_of_a_query() {
        let (since, until) = days("x=1&until=2026-02-01&since=2026-01-01").unwrap();
        assert_eq!((since.as_deref(), until.as_deref()), (Some("2026-01-01"), Some("2026-02-01")));
        assert_eq!(days("").unwrap(), (None, None));
        assert_eq!(days("since=&until").unwrap(), (None, None));
        let error = days("since=yesterday").unwrap_err().body().error;
        assert_eq!(error.param.as_deref(), Some("since"));
    }
}
