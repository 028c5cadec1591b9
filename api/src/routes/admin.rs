//! `/admin/…`: what `m40llm keys` does, for keys of the scope `admin`.

use std::collections::BTreeMap;

use axum::{
    Json,
    extract::{Path, RawQuery, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::{
    IntoResponses, ToSchema,
    openapi::{ContentBuilder, Ref, RefOr, Response as ResponseDocument, ResponseBuilder},
};

use super::{body::JsonBody, failures, usage::days};
use crate::{
    app::AppState,
    auth::{
        KeyLimits, NewKey, Priority, Scope, Store, Vault, key,
        ledger::{Ledger, UsageFilter, UsageRecord},
        now,
        view::{CreatedKey, DailyUsage, KeyInfo},
    },
    error::{ApiError, ErrorBody},
    openai::{int, object_only},
};

/// What a route of the management may answer beside success.
struct AdminFailures;

impl IntoResponses for AdminFailures {
    fn responses() -> Responses {
        management(&[400, 401, 403, 429, 500])
    }
}

/// As [`AdminFailures`], of a route that takes a body.
struct AdminBodyFailures;

impl IntoResponses for AdminBodyFailures {
    fn responses() -> Responses {
        management(&[400, 401, 403, 408, 413, 415, 429, 500])
    }
}

/// Responses by status.
type Responses = BTreeMap<String, RefOr<ResponseDocument>>;

/// The failures of these statuses, and the one of a server without keys.
fn management(statuses: &[u16]) -> Responses {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
    let response = ResponseBuilder::new()
        .description("There is no such key, or the server runs with `--no-auth` and has none to manage.")
        .content("application/json", body);
    let mut all = failures(statuses);
    all.insert("404".to_owned(), response.build().into());
    all
}

/// The keys and accounts, where the server has any.
fn store(state: &AppState) -> Result<&Store, ApiError> {
    state.gate().store().ok_or_else(|| {
        let message = "This server runs with --no-auth: it has no keys to manage.";
        ApiError::request(StatusCode::NOT_FOUND, message)
    })
}

/// All keys.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// In the order in which they were made.
    data: Vec<KeyInfo>,
}

/// List all keys, also those that are revoked or expired.
#[utoipa::path(
    get, path = "/admin/keys", operation_id = "listKeys", tag = "Administration",
    responses((status = 200, description = "The keys.", body = KeyList), AdminFailures),
    security(("ApiKey" = [])),
)]
pub(super) async fn list(State(state): State<AppState>) -> Result<Json<KeyList>, ApiError> {
    let keys = store(&state)?.read(Ledger::keys).await.map_err(|e| ApiError::auth(&e))?;
    let now = now();
    Ok(Json(KeyList { object: "list", data: keys.iter().map(|key| KeyInfo::of(key, now)).collect() }))
}

/// A key to make. A `null` is the same as an absent field; unknown fields are ignored.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"name": "ci", "scopes": ["inference"], "expires": "30d", "rpm": 60}))]
pub(super) struct CreateKey {
    /// What you call it; 1 to 100 characters.
    name: String,
    /// What it may do; `["inference"]` when absent or empty.
    scopes: Option<Vec<Scope>>,
    /// For how long it is valid, such as `90s`, `15m`, `12h` or `30d`; for ever when absent.
    #[schema(example = "30d")]
    expires: Option<String>,
    /// Most requests a minute.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    rpm: Option<i64>,
    /// Most tokens a minute, of prompts and output together.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    tpm: Option<i64>,
    /// Most requests at the same time.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    concurrency: Option<i64>,
    /// Ids of the models it may use; all when absent or empty.
    models: Option<Vec<String>>,
    /// Longest prompt and output together, in tokens.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1)]
    max_context: Option<i64>,
    /// Its place in the queue; `normal` when absent.
    priority: Option<Priority>,
}
object_only!(CreateKey);

impl CreateKey {
    fn check(self) -> Result<NewKey, ApiError> {
        let limit = |name: &str, value: Option<i64>| {
            let checked = value.map(|n| u32::try_from(n).ok().filter(|&n| n > 0).ok_or(n)).transpose();
            checked.map_err(|n| {
                let allowed =
                    format!("{n} is out of range; it must be a whole number from 1 to {}", u32::MAX);
                ApiError::invalid(name, allowed)
            })
        };
        let models = self.models.unwrap_or_default();
        if let Some(i) = models.iter().position(|m| m.is_empty() || m.chars().any(char::is_control)) {
            return Err(ApiError::invalid(format!("models[{i}]"), "it must be a model's id"));
        }
        Ok(NewKey {
            name: key::name(&self.name).map_err(|e| ApiError::invalid("name", e))?,
            scopes: self.scopes.unwrap_or_default(),
            lifetime: self
                .expires
                .map(|time| key::lifetime(&time).map_err(|e| ApiError::invalid("expires", e)))
                .transpose()?,
            limits: KeyLimits {
                rpm: limit("rpm", self.rpm)?,
                tpm: limit("tpm", self.tpm)?,
                concurrency: limit("concurrency", self.concurrency)?,
                models,
                max_context: limit("max_context", self.max_context)?,
                priority: self.priority.unwrap_or_default(),
            },
        })
    }
}

/// Make a key.
///
/// The answer holds the key itself, this once: it is kept nowhere.
#[utoipa::path(
    post, path = "/admin/keys", operation_id = "createKey", tag = "Administration",
    request_body = CreateKey,
    responses((status = 201, description = "The key.", body = CreatedKey), AdminBodyFailures),
    security(("ApiKey" = [])),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    JsonBody { value, .. }: JsonBody<CreateKey>,
) -> Result<Response, ApiError> {
    let new = value.check()?;
    let made = store(&state)?.with(move |vault| vault.create(new)).await;
    let (key, text) = made.map_err(|e| ApiError::auth(&e))?;
    tracing::info!(key = key.id, "a key was made over HTTP");
    let created = CreatedKey { key: text, info: KeyInfo::of(&key, now()) };
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

/// Take a key back, for ever.
///
/// Requests with it are refused from now on; those that run are finished.
#[utoipa::path(
    delete, path = "/admin/keys/{id}", operation_id = "revokeKey", tag = "Administration",
    params(("id" = String, Path, description = "The key's id.", example = "key_0123456789abcdef01234567")),
    responses(
        (status = 200, description = "The key, revoked.", body = KeyInfo),
        AdminFailures,
    ),
    security(("ApiKey" = [])),
)]
pub(super) async fn revoke(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> Result<Json<KeyInfo>, ApiError> {
    let revoked = store(&state)?.with(move |vault| vault.revoke(&id)).await;
    let key = revoked.map_err(|e| ApiError::auth(&e))?;
    tracing::info!(key = key.id, "a key was revoked over HTTP");
    Ok(Json(KeyInfo::of(&key, now())))
}

/// What a key used of a model on a day.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyUsage {
    /// The key's id.
    id: String,
    #[serde(flatten)]
    usage: DailyUsage,
}

impl From<&UsageRecord> for KeyUsage {
    fn from(record: &UsageRecord) -> Self {
        Self { id: record.key.clone(), usage: record.into() }
    }
}

/// The accounts.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct UsageList {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    /// By key, day and model.
    data: Vec<KeyUsage>,
}

/// What every key used, by day and model.
#[utoipa::path(
    get, path = "/admin/usage", operation_id = "usageOfKeys", tag = "Administration",
    params(
        ("since" = Option<String>, Query, description = "From this UTC day on.", example = "2026-01-01"),
        ("until" = Option<String>, Query, description = "Up to this UTC day, inclusive."),
    ),
    responses((status = 200, description = "The accounts.", body = UsageList), AdminFailures),
    security(("ApiKey" = [])),
)]
pub(super) async fn usage(
    State(state): State<AppState>,
    RawQuery(query): RawQuery,
) -> Result<Json<UsageList>, ApiError> {
    let (since, until) = days(query.as_deref().unwrap_or_default())?;
    let filter = UsageFilter { key: None, since, until };
    let records = store(&state)?.read(move |ledger| ledger.usage(&filter)).await;
    let records = records.map_err(|e| ApiError::auth(&e))?;
    Ok(Json(UsageList { object: "list", data: records.iter().map(KeyUsage::from).collect() }))
}

/// How the secret changes.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"drop_old": false}))]
pub(super) struct RotateSecret {
    /// All keys made before are no longer valid, the caller's own among them; false when absent.
    drop_old: Option<bool>,
}
object_only!(RotateSecret);

/// The secrets after a change.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Rotated {
    /// How many are valid, the new one included.
    #[schema(example = 2)]
    valid_secrets: usize,
}

/// Sign keys with a new secret from now on.
#[utoipa::path(
    post, path = "/admin/rotate-secret", operation_id = "rotateSecret", tag = "Administration",
    request_body = RotateSecret,
    responses(
        (status = 200, description = "Done.", body = Rotated),
        (status = 409, description = "The secret comes from the server's environment.", body = ErrorBody),
        AdminBodyFailures,
    ),
    security(("ApiKey" = [])),
)]
pub(super) async fn rotate_secret(
    State(state): State<AppState>,
    JsonBody { value, .. }: JsonBody<RotateSecret>,
) -> Result<Json<Rotated>, ApiError> {
    let drop_old = value.drop_old.unwrap_or(false);
    let rotated = store(&state)?.with(move |vault| vault.rotate(drop_old)).await;
    let valid_secrets = rotated.map_err(|e| ApiError::auth(&e))?;
    tracing::info!(valid_secrets, "the signing secret was rotated over HTTP");
    Ok(Json(Rotated { valid_secrets }))
}

/// End a rotation: keys that the newest secret has not signed are no longer valid.
#[utoipa::path(
    post, path = "/admin/drop-old-secrets", operation_id = "dropOldSecrets", tag = "Administration",
    responses(
        (status = 200, description = "Done.", body = Rotated),
        (status = 409, description = "The secret comes from the server's environment.", body = ErrorBody),
        AdminFailures,
    ),
    security(("ApiKey" = [])),
)]
pub(super) async fn drop_old_secrets(State(state): State<AppState>) -> Result<Json<Rotated>, ApiError> {
    let dropped = store(&state)?.with(Vault::drop_old_secrets).await;
    let valid_secrets = dropped.map_err(|e| ApiError::auth(&e))?;
    tracing::info!("older signing secrets were dropped over HTTP");
    Ok(Json(Rotated { valid_secrets }))
}
