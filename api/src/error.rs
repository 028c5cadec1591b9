//! The one error of the gateway, and the only mapping to HTTP status and body.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use m40llm_engine::{EngineError, SubmitError, text::TextError};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    MAX_BODY_BYTES,
    auth::{AuthError, Scope, limits::Refused},
};

/// The body of every error.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// In words: which field, and what is allowed.
    #[schema(example = "temperature: 3 is out of range; it must be a number from 0 to 2")]
    pub message: String,
    /// `invalid_request_error`, `permission_error`, `rate_limit_error` or `server_error`.
    #[schema(example = "invalid_request_error")]
    pub r#type: &'static str,
    /// The request's field at fault, such as `messages[0].content[1]`.
    #[schema(example = "temperature", required)]
    pub param: Option<String>,
    /// For programs, such as `invalid_api_key`, `context_length_exceeded`, `model_not_found`, `overloaded`.
    #[schema(required)]
    pub code: Option<&'static str>,
}

/// A request that gets no answer but this.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
    /// When another try makes sense.
    retry_after: Option<Duration>,
    /// None does, whatever the status says.
    hopeless: bool,
}

/// Marks responses whose body is settled, for [`shape_rejections`].
#[derive(Clone, Copy)]
pub(crate) struct Shaped;

/// Beside `Retry-After`, and finer; the SDKs prefer it.
pub(crate) const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
/// An error response's code, or its type where it has none: what logs call it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ErrorName(pub(crate) &'static str);

/// `false` keeps the SDKs from trying again.
pub(crate) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(status: StatusCode, r#type: &'static str, message: impl Into<String>) -> Self {
        let detail = ErrorDetail { message: message.into(), r#type, param: None, code: None };
        Self { status, detail, retry_after: None, hopeless: false }
    }

    /// 400: the field `param` is missing, of the wrong type or out of range. The message begins with
    /// its name.
    pub fn invalid(param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let param = param.into();
        let mut error = Self::new(StatusCode::BAD_REQUEST, INVALID, format!("{param}: {message}"));
        error.detail.param = Some(param);
        error
    }

    /// 400 or another client's fault that has no field.
    pub fn request(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, INVALID, message)
    }

    /// 413.
    pub fn too_large() -> Self {
        let message = format!("The body is too large; at most {MAX_BODY_BYTES} bytes are taken.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, message)
    }

    /// 404 for a model that is not the loaded one.
    pub fn model_not_found(asked: &str, served: &str) -> Self {
        let message =
            format!("The model `{}` does not exist here; this server has `{served}`.", shorten(asked));
        let mut error = Self::new(StatusCode::NOT_FOUND, INVALID, message);
        error.detail.param = Some("model".to_owned());
        error.detail.code = Some("model_not_found");
        error
    }

    /// 404 for a model that a key may not use: it is told what it would be told if there were none.
    pub(crate) fn model_not_allowed(asked: &str) -> Self {
        let mut error = Self::model_not_found(asked, "");
        error.detail.message =
            format!("The model `{}` does not exist here, or this key may not use it.", shorten(asked));
        error
    }

    /// 403 for a request that names another machine; see [`crate::transport`].
    pub fn foreign_host(host: &str) -> Self {
        let message = format!(
            "The Host {host:?} is not this machine: without API keys this server answers to localhost and its own \
             address only, so that pages of other sites cannot use it. Create a key (`m40llm keys create`), or let \
             everybody in with --no-auth."
        );
        let mut error = Self::new(StatusCode::FORBIDDEN, "permission_error", message);
        error.detail.code = Some("host_not_allowed");
        error
    }

    /// 408: the body stopped coming; the connection is over.
    pub fn body_timeout() -> Self {
        let message = "The body came too slowly; send it in one go.";
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, message)
    }

    /// 503: try again in a while.
    pub fn overloaded(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, message);
        error.detail.code = Some("overloaded");
        error.retry_after = Some(Duration::from_secs(5));
        error
    }

    /// The same for those who are to come again, but after `wait`.
    #[must_use]
    pub(crate) fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// 401: no key, or none that is valid.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::UNAUTHORIZED, INVALID, message);
        error.detail.code = Some("invalid_api_key");
        error
    }

    /// 401 for the management of keys while there is none.
    pub fn no_admin_key() -> Self {
        Self::unauthorized(
            "Keys are managed with a key of the scope `admin`, and this server has no key yet: make one with \
             `m40llm keys create --name NAME --scope admin`.",
        )
    }

    /// 403: a valid key, for something else.
    pub fn insufficient_scope(needed: Scope, has: &[Scope]) -> Self {
        let has: Vec<_> = has.iter().map(|scope| format!("`{scope}`")).collect();
        let message =
            format!("This route needs a key with the scope `{needed}`; yours has {}.", has.join(", "));
        let mut error = Self::new(StatusCode::FORBIDDEN, "permission_error", message);
        error.detail.code = Some("insufficient_scope");
        error
    }

    /// 429: a limit of the caller's, until `wait` is over.
    pub fn rate_limited(message: impl Into<String>, wait: Duration) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        error.detail.code = Some("rate_limit_exceeded");
        error.retry_after = Some(wait);
        error
    }

    /// 429 for a key that has used up what it may, or asks for more than it ever may.
    pub(crate) fn limited(refused: &Refused) -> Self {
        let mut error = Self::rate_limited(refused.to_string(), Duration::ZERO);
        error.retry_after = refused.wait();
        error.hopeless = error.retry_after.is_none();
        error
    }

    /// The same, which the next try would get too: the SDKs are told not to make one.
    #[must_use]
    pub(crate) fn hopeless(mut self) -> Self {
        self.hopeless = true;
        self
    }

    /// 429 for an address that keeps trying keys.
    pub fn too_many_failures(wait: Duration) -> Self {
        Self::rate_limited("Too many requests without a valid API key came from this address; wait.", wait)
    }

    /// What the management of keys may be told.
    pub fn auth(error: &AuthError) -> Self {
        match error {
            AuthError::UnknownKey(_) => Self::request(StatusCode::NOT_FOUND, format!("{error}.")),
            AuthError::Invalid(_) => Self::request(StatusCode::BAD_REQUEST, format!("{error}.")),
            AuthError::Secret(_) => Self::request(StatusCode::CONFLICT, format!("{error}.")).hopeless(),
            AuthError::State(_) | AuthError::Database(_) => {
                tracing::error!("{error}");
                Self::internal("The key store failed; the server's log says how.")
            }
        }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, message)
    }

    /// What the engine did not take. `param` is the request's prompt field.
    pub fn submit(error: SubmitError, param: &str) -> Self {
        match error {
            SubmitError::WouldWait { predicted, most } => {
                Self::overloaded(format!("max_wait_ms: {error}; try again later"))
                    .retry_after(predicted.saturating_sub(most))
            }
            SubmitError::QueueFull(_) | SubmitError::Draining => {
                Self::overloaded(format!("{error}; try again later"))
            }
            SubmitError::ContextLength { prompt, requested, limit } => {
                let message = format!(
                    "This model's maximum context length is {limit} tokens. However, you requested {requested} tokens \
                     ({prompt} in the {param}, {} in the completion). Shorten the {param} or ask for fewer.",
                    requested.saturating_sub(prompt)
                );
                let mut error = Self::new(StatusCode::BAD_REQUEST, INVALID, message);
                if prompt >= limit {
                    // LangChain and Anthropic's clients look for these words, LiteLLM for those above.
                    error.detail.message.push_str(" The prompt is too long.");
                }
                error.detail.param = Some(param.to_owned());
                error.detail.code = Some("context_length_exceeded");
                error
            }
            SubmitError::InvalidPrompt(why) => Self::invalid(param, why),
            SubmitError::Stopped(_) => Self::internal(error.to_string()),
        }
    }

    /// A template that failed: the messages' fault, or the model's.
    pub fn template(error: TextError, param: &str) -> Self {
        match error {
            TextError::Rejected(_) => Self::invalid(param, error),
            TextError::Metadata(_) | TextError::Template(_) => Self::internal(error.to_string()).hopeless(),
        }
    }

    /// The same about the request that the one at fault was made of: `name` knows what a field is called there.
    #[must_use]
    pub(crate) fn renamed(mut self, name: impl FnOnce(&str) -> String) -> Self {
        if let Some(param) = &mut self.detail.param {
            let other = name(param);
            if let Some(rest) = self.detail.message.strip_prefix(param.as_str()) {
                self.detail.message = format!("{other}{rest}");
            }
            *param = other;
        }
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, for events of a stream.
    pub fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        if matches!(error, EngineError::Ended) {
            return Self::overloaded(format!("{error}; try again later"));
        }
        Self::internal(error.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(wait) = self.retry_after {
            let wait = wait.clamp(Duration::from_secs(1), Duration::from_secs(60));
            let milliseconds = wait.as_nanos().div_ceil(1_000_000) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(milliseconds.div_ceil(1000)));
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(milliseconds));
        }
        if self.hopeless {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::REQUEST_TIMEOUT {
            // What is left of the request would be taken for the next one.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response.extensions_mut().insert(ErrorName(self.detail.code.unwrap_or(self.detail.r#type)));
        response.extensions_mut().insert(Shaped);
        // For whoever puts it into a frame.
        response.extensions_mut().insert(self.detail);
        response
    }
}

/// Gives error responses that others made (axum's 404 and 405, layers, assets) our body. Their headers,
/// `Allow` among them, stay.
pub(crate) async fn shape_rejections(
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let what = format!("{} {}", request.method(), shorten(request.uri().path()));
    let response = next.run(request).await;
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error())
        || response.extensions().get::<Shaped>().is_some()
    {
        return response;
    }
    let error = match status {
        StatusCode::NOT_FOUND => ApiError::request(status, format!("There is no route {what}; see /docs.")),
        StatusCode::METHOD_NOT_ALLOWED => ApiError::request(
            status,
            format!("{what}: this route does not take that method; see the Allow header."),
        ),
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(),
        _ if status.is_client_error() => ApiError::request(status, format!("{what}: {status}")),
        _ => ApiError::new(status, SERVER, format!("{what}: {status}")),
    };
    let mut shaped = error.into_response();
    for (name, value) in response.headers() {
        if name != header::CONTENT_TYPE && name != header::CONTENT_LENGTH {
            shaped.headers_mut().append(name, value.clone());
        }
    }
    shaped
}

/// At most 200 characters of what a client sent, for messages.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn submit_errors_map_to_the_contract() {
        let error = ApiError::submit(
            SubmitError::ContextLength { prompt: 90, requested: 120, limit: 100 },
            "messages",
        );
        assert_eq!(error.status(), StatusCode::BAD_REQUEST);
        assert!(error.detail.message.contains("This model's maximum context length is 100 tokens"));
        assert!(!error.detail.message.contains("prompt is too long"));
        assert_eq!(error.detail.code, Some("context_length_exceeded"));
        assert_eq!(error.detail.param.as_deref(), Some("messages"));

        let error = ApiError::submit(
            SubmitError::ContextLength { prompt: 101, requested: 102, limit: 100 },
            "prompt",
        );
        assert!(error.detail.message.contains("prompt is too long"));

        for error in [SubmitError::QueueFull(3), SubmitError::Draining] {
            let response = ApiError::submit(error, "prompt").into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(response.headers().contains_key(header::RETRY_AFTER));
        }
        assert_eq!(ApiError::submit(SubmitError::Stopped("x".into()), "prompt").status().as_u16(), 500);
        assert_eq!(ApiError::submit(SubmitError::InvalidPrompt("x".into()), "prompt").status().as_u16(), 400);
        assert_eq!(ApiError::template(TextError::Rejected("x".into()), "messages").status().as_u16(), 400);
    }

    #[test]
    fn what_another_try_would_get_too_is_told_the_sdks() {
        let told = |error: ApiError| error.into_response().headers().get(SHOULD_RETRY).cloned();
        let never = Some(HeaderValue::from_static("false"));
        assert_eq!(told(ApiError::template(TextError::Template("x".into()), "messages")), never);
        assert_eq!(told(ApiError::auth(&AuthError::Secret("x".into()))), never);
        let too_large = Refused::TooLarge { limit: 1, requested: 2 };
        assert_eq!(told(ApiError::limited(&too_large)), never);
        for passing in [
            ApiError::limited(&Refused::Concurrent { limit: 1 }),
            ApiError::internal("x"),
            ApiError::overloaded("x"),
            ApiError::body_timeout(),
        ] {
            assert_eq!(told(passing), None);
        }
    }

    #[test]
    fn nobody_is_told_to_wait_longer_than_a_minute_or_not_at_all() {
        for (wait, told) in [(0, "1"), (1, "1"), (1_001, "2"), (59_999, "60"), (86_400_000, "60")] {
            let response = ApiError::overloaded("x").retry_after(Duration::from_millis(wait)).into_response();
            assert_eq!(response.headers()[header::RETRY_AFTER], told, "{wait} ms");
        }
    }

    #[test]
    fn absent_param_and_code_are_null() {
        let body = serde_json::to_value(ApiError::internal("x").body()).unwrap();
        assert_eq!(
            body,
            serde_json::json!({"error": {"message": "x", "type": "server_error", "param": null, "code": null}})
        );
    }

    #[test]
    fn long_input_is_shortened_at_a_character() {
        assert_eq!(shorten("ab"), "ab");
        assert_eq!(shorten(&"é".repeat(300)).chars().count(), 201);
    }
}
