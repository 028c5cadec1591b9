//! JSON bodies, with errors that name the field.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody as _},
    extract::{FromRequest, Request},
    http::{HeaderMap, StatusCode, header},
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use m40llm_engine::GenerateRequest;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use crate::{
    MAX_BODY_BYTES,
    app::{AppState, Model},
    auth::ticket::Caller,
    error::{ApiError, shorten},
    transport,
    validate::Form,
};

/// A request's JSON body.
pub(crate) struct JsonBody<T> {
    /// What it says.
    pub(crate) value: T,
    /// How long it was.
    pub(crate) bytes: usize,
}

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        if content_length(&parts.headers).is_some_and(|length| length > MAX_BODY_BYTES as u64) {
            discard(&parts.headers, body);
            return Err(ApiError::too_large());
        }
        if let Err(error) = check_type(&parts.headers) {
            discard(&parts.headers, body);
            return Err(error);
        }
        let bytes = match Limited::new(body, MAX_BODY_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => return Err(ApiError::too_large()),
            Err(error) if transport::is_stalled(&*error) => return Err(ApiError::body_timeout()),
            Err(_) => {
                return Err(ApiError::request(StatusCode::BAD_REQUEST, "The body broke off before its end."));
            }
        };
        Ok(Self { value: parse(&bytes)?, bytes: bytes.len() })
    }
}

/// A JSON body that asks for work: its caller's limits count it before a byte of it is read.
pub(crate) struct Work<T> {
    /// Who asks.
    pub(crate) caller: Caller,
    /// What for.
    pub(crate) value: T,
    /// How long the body was.
    pub(crate) bytes: usize,
}

impl<T: DeserializeOwned> FromRequest<AppState> for Work<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let caller = match Caller::enter(state, request.extensions().get()) {
            Ok(caller) => caller,
            Err(refusal) => {
                abandon(request);
                return Err(refusal);
            }
        };
        let JsonBody { value, bytes } = JsonBody::from_request(request, state).await?;
        Ok(Self { caller, value, bytes })
    }
}

/// The answer to a request whose route or method there is not; its body is left unread otherwise.
pub(crate) fn refuse(status: StatusCode, request: Request) -> StatusCode {
    abandon(request);
    status
}

/// A request that is answered without a look at its body.
pub(crate) fn abandon(request: Request) {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body);
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Most clients read the answer only after they have sent everything, and a connection closed before
/// that looks like a broken server; one that they keep and use again fails their next request. So what
/// still comes is thrown away, within bounds; clients that asked first (`Expect: 100-continue`) send
/// nothing.
fn discard(headers: &HeaderMap, body: Body) {
    if headers.contains_key(header::EXPECT) || body.is_end_stream() {
        return;
    }
    tokio::spawn(tokio::time::timeout(Duration::from_secs(10), async move {
        let mut body = Limited::new(body, 16 * MAX_BODY_BYTES);
        while let Some(Ok(_)) = body.frame().await {}
    }));
}

/// JSON only. A missing type is refused too: pages of other sites could send such bodies without asking.
fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refuse = |message: String| Err(ApiError::request(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
    let given = headers.get(header::CONTENT_TYPE).map_or("", |v| v.to_str().unwrap_or("?"));
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let json =
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"));
    if !json {
        let given = if given.is_empty() { "missing".to_owned() } else { format!("{:?}", shorten(given)) };
        return refuse(format!("The Content-Type is {given}; it must be application/json."));
    }
    match headers.get(header::CONTENT_ENCODING).map(|v| v.to_str().unwrap_or("?")) {
        None | Some("" | "identity") => Ok(()),
        Some(other) => {
            refuse(format!("The Content-Encoding {:?} is not supported; send plain JSON.", shorten(other)))
        }
    }
}

/// The body's value, or a 400 with the path of the field at fault.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // Checked here, as the parser passes over what it ignores.
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        ApiError::request(
            StatusCode::BAD_REQUEST,
            format!("The body is not valid JSON: byte {at} is not UTF-8."),
        )
    })?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    deserializer.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    if !error.is_data() {
        return ApiError::request(StatusCode::BAD_REQUEST, format!("The body is not valid JSON: {message}."));
    }
    // The place in the text helps nobody who never saw the text.
    let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    let path = if path == "." { "" } else { path };
    let quoted = |prefix| message.strip_prefix(prefix).and_then(|rest: &str| rest.strip_suffix('`'));
    let inside = |field: &str| if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
    if let Some(field) = quoted("missing field `") {
        return ApiError::invalid(inside(field), "this field is required");
    }
    if let Some(field) = quoted("duplicate field `") {
        return ApiError::invalid(inside(field), "this field came twice");
    }
    let message = shorten(message).replace("expected a sequence", "expected an array");
    if path.is_empty() {
        ApiError::request(StatusCode::BAD_REQUEST, format!("The body must be a JSON object: {message}."))
    } else {
        ApiError::invalid(path, message)
    }
}

/// Bodies longer than this are worked on beside the async threads.
const LARGE: usize = 64 << 10;

/// Places for such work, one for each core: more at once would take longer all together, each with its memory.
static PLACES: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(cores())));

/// Places for compiling grammars, which takes longest: of their own, so that costly ones hold up no long prompt, and
/// fewer than there are cores, so that a flood of them leaves some to the model.
static COMPILERS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(cores().div_ceil(2))));

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Runs `work` here, or on a blocking thread when the body was large.
pub(crate) async fn beside<T: Send + 'static>(bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> T {
    if bytes <= LARGE { work() } else { placed(&PLACES, work).await }
}

/// Compiles what the outputs of `requests` must be, once all else of them is right. `param` is the field that their
/// prompt comes from.
pub(crate) async fn constrain(
    form: Option<Form>,
    model: &Arc<Model>,
    requests: &mut [GenerateRequest],
    param: &str,
) -> Result<(), ApiError> {
    let Some(form) = form else { return Ok(()) };
    for request in &*requests {
        model.engine.check(request).map_err(|error| ApiError::submit(error, param))?;
    }
    let compiler = Arc::clone(model);
    let constraint = placed(&COMPILERS, move || form.compile(&compiler.engine)).await?;
    for request in requests {
        request.constraint = Some(constraint.clone());
    }
    Ok(())
}

/// Runs `work` on a blocking thread, in one of `places`. Who goes away while waiting for one has left the line; work that
/// has begun keeps its place to its end.
async fn placed<T: Send + 'static>(places: &Arc<Semaphore>, work: impl FnOnce() -> T + Send + 'static) -> T {
    let place = Arc::clone(places).acquire_owned().await;
    let work = move || {
        let _place = place;
        work()
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        // Not cancelled, for nobody does that: it panicked, and the layer that catches panics is above.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;
    use crate::openai::{
        chat::{ChatRequest, Content},
        completions::{CompletionRequest, Prompt},
    };

    fn fault<T: DeserializeOwned>(json: &str) -> (Option<String>, String) {
        let Err(error) = parse::<T>(json.as_bytes()) else { panic!("{json} was taken") };
        assert_eq!(error.status(), StatusCode::BAD_REQUEST);
        let error = error.body().error;
        (error.param, error.message)
    }

    #[test]
    fn paths_are_params() {
        let chat = |json: &str| fault::<ChatRequest>(json).0;
        let ok = r#""messages":[{"role":"user","content":"x"}]"#;
        assert_eq!(chat("{}").as_deref(), Some("messages"));
        assert_eq!(chat(r#"{"messages":"x"}"#).as_deref(), Some("messages"));
        assert_eq!(chat(r#"{"messages":[{"content":"x"}]}"#).as_deref(), Some("messages[0].role"));
        assert_eq!(
            chat(r#"{"messages":[{"role":"user","content":5}]}"#).as_deref(),
            Some("messages[0].content")
        );
        assert_eq!(
            chat(r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":7}]}]}"#)
                .as_deref(),
            Some("messages[0].content[1].type")
        );
        assert_eq!(chat(r#"{"messages":[["user","x"]]}"#).as_deref(), Some("messages[0]"));
        assert_eq!(chat(&format!(r#"{{{ok},"temperature":"hot"}}"#)).as_deref(), Some("temperature"));
        assert_eq!(chat(&format!(r#"{{{ok},"n":1.5}}"#)).as_deref(), Some("n"));
        assert_eq!(chat(&format!(r#"{{{ok},"stop":[1]}}"#)).as_deref(), Some("stop[0]"));
        assert_eq!(chat(&format!(r#"{{{ok},"stream":"yes"}}"#)).as_deref(), Some("stream"));
        assert_eq!(chat(&format!(r#"{{{ok},"logit_bias":{{"5":"x"}}}}"#)).as_deref(), Some("logit_bias.5"));
        assert_eq!(chat(&format!(r#"{{{ok},"n":1,"n":2}}"#)).as_deref(), Some("n"));
    }

    #[test]
    fn messages_say_what_is_allowed() {
        let (_, message) = fault::<ChatRequest>(r#"{"messages":[],"temperature":"hot"}"#);
        assert!(message.starts_with("temperature: ") && message.contains("a number"), "{message}");
        assert!(!message.contains("line"), "{message}");
        let (param, message) = fault::<ChatRequest>(r#"{"messages":"#);
        assert!(param.is_none() && message.contains("not valid JSON"), "{message}");
        for body in ["[]", "5", "\"x\"", "null", "[[]]"] {
            let (param, message) = fault::<ChatRequest>(body);
            assert!(param.is_none() && message.contains("must be a JSON object"), "{message}");
        }
        assert!(fault::<ChatRequest>(r#"{"messages":[]} x"#).1.contains("not valid JSON"));
        assert!(parse::<ChatRequest>(b"{\"messages\":[],\"user\":\"\xff\"}").is_err());
        assert!(parse::<ChatRequest>("[".repeat(100_000).as_bytes()).is_err());
    }

    #[test]
    fn null_and_unknown_fields_pass() {
        let request: ChatRequest = parse(
            br#"{"model":null,"messages":[{"role":"assistant","content":null,"tool_calls":null,"refusal":null,"x":1}],
            "max_tokens":5.0,"max_completion_tokens":6,"stop":null,"stream":null,"stream_options":null,
            "logit_bias":null,"logprobs":null,"tools":null,"tool_choice":null,"response_format":null,"seed":null,
            "user":"u","store":true,"metadata":{},"service_tier":"auto","prediction":null,"verbosity":"low",
            "safety_identifier":"s","prompt_cache_key":"k","parallel_tool_calls":true,"n":null,"top_p":null}"#,
        )
        .unwrap();
        assert_eq!((request.max_tokens, request.max_completion_tokens), (Some(5), Some(6)));
        assert!(request.messages[0].content.is_none() && request.stop.is_none());
        let parts: ChatRequest =
            parse(br#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}],"stop":"x"}"#)
                .unwrap();
        assert!(matches!(&parts.messages[0].content, Some(Content::Parts(parts)) if parts.len() == 1));
        assert_eq!(parts.stop.unwrap().0, ["x"]);
    }

    #[test]
    fn prompts_have_four_forms() {
        let prompt = |json: &str| {
            parse::<CompletionRequest>(format!("{{\"prompt\":{json}}}").as_bytes()).unwrap().prompt
        };
        assert_eq!(prompt("\"a\""), Prompt::Texts(vec!["a".into()]));
        assert_eq!(prompt(r#"["a","b"]"#), Prompt::Texts(vec!["a".into(), "b".into()]));
        assert_eq!(prompt("[1,2.0]"), Prompt::Tokens(vec![vec![1, 2]]));
        assert_eq!(prompt("[[1],[2,3]]"), Prompt::Tokens(vec![vec![1], vec![2, 3]]));
        let param = |json: &str| fault::<CompletionRequest>(&format!("{{\"prompt\":{json}}}")).0.unwrap();
        assert_eq!(param("[1,\"a\"]"), "prompt[1]");
        assert_eq!(param("[\"a\",1]"), "prompt[1]");
        assert_eq!(param("[[1],[-1]]"), "prompt[1][0]");
        assert_eq!(param("[1.5]"), "prompt[0]");
        assert_eq!(param("[-1]"), "prompt[0]");
        assert_eq!(param("[4294967296]"), "prompt[0]");
        assert_eq!(param("{}"), "prompt");
        assert_eq!(param("null"), "prompt");
        assert_eq!(fault::<CompletionRequest>("{}").0.as_deref(), Some("prompt"));
    }

    #[test]
    fn only_json_is_taken() {
        let check = |value: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(value));
            }
            check_type(&headers).is_ok()
        };
        assert!(check(Some("application/json")) && check(Some("Application/JSON; charset=utf-8")));
        assert!(check(Some("application/problem+json")));
        assert!(
            !check(None) && !check(Some("text/plain")) && !check(Some("application/x-www-form-urlencoded"))
        );
    }
}
