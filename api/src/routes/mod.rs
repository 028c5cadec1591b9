//! One file a resource, and the document that describes them all.

mod admin;
pub(crate) mod body;
mod chat;
mod completions;
mod docs;
mod embeddings;
mod generate;
mod health;
pub(crate) mod messages;
mod metrics;
mod models;
mod page;
mod responses;
mod tokens;
mod usage;

use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{Router, http::StatusCode, routing::get};
use utoipa::{
    IntoResponses, OpenApi, ToSchema,
    openapi::{
        ContentBuilder, Ref, RefOr, Response, ResponseBuilder,
        header::HeaderBuilder,
        schema::{ObjectBuilder, Type},
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{app::AppState, error::ErrorBody};

/// The frame of the document; paths and schemas come from the handlers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "m40llm",
        description = "An OpenAI-compatible gateway that runs GGUF models in process.\n\n\
            Every response carries `x-request-id` and `openai-processing-ms`, and those to a key with limits \
            `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`. Every error has the body \
            `{\"error\":{\"message\",\"type\",\"param\",\"code\"}}`; under `/v1/messages` it also says \
            `\"type\":\"error\"`, and the id is in `request-id` too. Bodies are JSON of at most 8 MiB.\n\n\
            On a loopback address without keys no key is needed; otherwise send \
            `Authorization: Bearer sk-m40-…` or `x-api-key: sk-m40-…`. A key has scopes, none of which \
            implies another: `inference`, `metrics` for `/metrics`, `admin` for `/admin`."
    ),
    servers((url = "/", description = "This server")),
    tags(
        (name = "OpenAI", description = "What OpenAI's clients speak."),
        (name = "Anthropic", description = "What Anthropic's clients speak."),
        (name = "Native", description = "This server's own, without OpenAI's conventions."),
        (name = "Operation", description = "For those who run the server."),
        (name = "Administration", description = "Keys and accounts, for keys of the scope `admin`.")
    ),
    components(schemas(ErrorBody))
)]
struct Document;

/// All routes with their documentation.
fn documented() -> OpenApiRouter<AppState> {
    let mut document = Document::openapi();
    let components = document.components.get_or_insert_default();
    components.security_schemes.insert(
        "ApiKey".to_owned(),
        RefOr::T(SecurityScheme::Http(
            HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .bearer_format("sk-m40-…")
                .description(Some("A key made by `m40llm keys create`."))
                .build(),
        )),
    );
    for &(status, name, description, retry) in FAILURES {
        components.responses.insert(name.to_owned(), failure(status, description, retry).into());
    }
    OpenApiRouter::with_openapi(document)
        .routes(routes!(chat::create))
        .routes(routes!(completions::create))
        .routes(routes!(embeddings::create))
        .routes(routes!(responses::create))
        .routes(routes!(messages::create))
        .routes(routes!(messages::count_tokens))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve))
        .routes(routes!(generate::generate))
        .routes(routes!(tokens::tokenize))
        .routes(routes!(tokens::tokenizer_info))
        .routes(routes!(tokens::detokenize))
        .routes(routes!(tokens::apply_template))
        .routes(routes!(health::health))
        .routes(routes!(metrics::metrics))
        .routes(routes!(page::page))
        .routes(routes!(docs::document))
        .routes(routes!(docs::page))
        .routes(routes!(usage::own))
        .routes(routes!(admin::list, admin::create))
        .routes(routes!(admin::revoke))
        .routes(routes!(admin::usage))
        .routes(routes!(admin::rotate_secret))
        .routes(routes!(admin::drop_old_secrets))
}

/// All routes.
pub(crate) fn router() -> Router<AppState> {
    let (router, _) = documented().split_for_parts();
    router
        // Ids with a slash, which clients send as it is.
        .route("/v1/models/{id}/{rest}", get(models::retrieve_with_slash))
        .route("/docs/", get(docs::slash))
        .route("/docs/{file}", get(docs::asset))
        .fallback(async |request| body::refuse(StatusCode::NOT_FOUND, request))
        .method_not_allowed_fallback(async |request| body::refuse(StatusCode::METHOD_NOT_ALLOWED, request))
}

/// The OpenAPI document, as `/openapi.json` and `m40llm openapi` have it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    documented().into_openapi()
}

/// Failures by status, name in the document, description, and whether `Retry-After` comes along.
const FAILURES: &[(u16, &str, &str, bool)] = &[
    (
        400,
        "BadRequest",
        "The body is not JSON, or a field is missing, of the wrong type or out of range; `param` names it. `context_length_exceeded`: the prompt, with `max_tokens` when given, is longer than the context.",
        false,
    ),
    (401, "Unauthorized", "The key is missing or not valid (`invalid_api_key`).", false),
    (
        403,
        "Forbidden",
        "The key lacks the scope (`insufficient_scope`), or no key is needed and the `Host` is not this machine (`host_not_allowed`).",
        false,
    ),
    (
        404,
        "NotFound",
        "`model` names a model that is not loaded, or that the key may not use (`model_not_found`).",
        false,
    ),
    (408, "BodyTimeout", "The body came too slowly; the connection is closed.", false),
    (413, "PayloadTooLarge", "The body is larger than 8 MiB.", false),
    (415, "UnsupportedMediaType", "The body is not `application/json`.", false),
    (
        429,
        "RateLimited",
        "Over the key's requests or tokens per minute, or its requests at once, or too many requests without a valid key from one address (`rate_limit_exceeded`). Without `Retry-After` and with `x-should-retry: false` when the request is larger than a whole minute's tokens.",
        true,
    ),
    (500, "InternalError", "The server failed on this request.", false),
    (
        503,
        "Overloaded",
        "The queue is full, the model is loading, or the server is shutting down (`overloaded`).",
        true,
    ),
];

fn failure(status: u16, description: &str, retry: bool) -> Response {
    let (kind, code) = match status {
        401 => ("invalid_request_error", Some("invalid_api_key")),
        403 => ("permission_error", Some("insufficient_scope")),
        404 => ("invalid_request_error", Some("model_not_found")),
        429 => ("rate_limit_error", Some("rate_limit_exceeded")),
        500 => ("server_error", None),
        503 => ("server_error", Some("overloaded")),
        _ => ("invalid_request_error", None),
    };
    let example =
        serde_json::json!({"error": {"message": description, "type": kind, "param": null, "code": code}});
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(ErrorBody::name())))
        .example(Some(example))
        .build();
    let mut response = ResponseBuilder::new().description(description).content("application/json", content);
    if status == 401 {
        let scheme = ObjectBuilder::new().schema_type(Type::String);
        let header = HeaderBuilder::new().schema(Some(scheme)).description(Some("`Bearer`.")).build();
        response = response.header("WWW-Authenticate", header);
    }
    if retry {
        let seconds = ObjectBuilder::new().schema_type(Type::Integer);
        let header = HeaderBuilder::new()
            .schema(Some(seconds))
            .description(Some("Seconds after which to try again; at most 60."))
            .build();
        response = response.header("Retry-After", header);
        let header = HeaderBuilder::new()
            .schema(Some(ObjectBuilder::new().schema_type(Type::Integer)))
            .description(Some("The same in milliseconds."))
            .build();
        response = response.header("retry-after-ms", header);
    }
    response.build()
}

fn failures(statuses: &[u16]) -> BTreeMap<String, RefOr<Response>> {
    let listed = FAILURES.iter().filter(|(status, ..)| statuses.contains(status));
    listed.map(|(status, name, ..)| (status.to_string(), Ref::from_response_name(*name).into())).collect()
}

/// What a route for new work may answer beside success.
struct WorkFailures;

impl IntoResponses for WorkFailures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        failures(&[400, 401, 403, 404, 408, 413, 415, 429, 500, 503])
    }
}

/// What a route that takes a small body may answer beside success.
struct BodyFailures;

impl IntoResponses for BodyFailures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        failures(&[400, 401, 403, 408, 413, 415, 429, 500, 503])
    }
}

/// What a route that only reads may answer beside success.
struct ReadFailures;

impl IntoResponses for ReadFailures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        failures(&[401, 403, 429, 500])
    }
}

/// What a route that reads what its query asks for may answer beside success.
struct QueryFailures;

impl IntoResponses for QueryFailures {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        failures(&[400, 401, 403, 429, 500])
    }
}

/// Unix seconds now.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A new id, such as `chatcmpl-…`.
fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::new_v4().simple())
}

/// The same in Responses' and Messages' style: `resp_…`.
fn new_item_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// What an answer and all its chunks share.
struct Head {
    id: String,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Head {
    fn new(prefix: &str, state: &AppState, model: &crate::app::Model) -> Self {
        Self {
            id: new_id(prefix),
            created: now(),
            model: state.config().model_id.clone(),
            fingerprint: model.fingerprint.clone(),
        }
    }
}

/// The engine's reason in OpenAI's words.
fn finish_reason(reason: m40llm_engine::FinishReason) -> crate::openai::FinishReason {
    match reason {
        m40llm_engine::FinishReason::Stop => crate::openai::FinishReason::Stop,
        m40llm_engine::FinishReason::Length => crate::openai::FinishReason::Length,
    }
}
