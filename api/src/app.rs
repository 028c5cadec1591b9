//! State, router and layers: everything between a listener and the handlers.

use std::{
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    http::{HeaderName, HeaderValue, Method, header},
    middleware,
    response::{IntoResponse, Response},
};
use m40llm_engine::{
    Engine,
    text::{ChatTemplate, PromptFormat, TextError},
};
use tokio::{net::TcpListener, sync::SetOnce};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, AllowPrivateNetwork, CorsLayer, ExposeHeaders},
};

use crate::{
    auth::{DefaultLimits, Gate, limits::Accounts, middleware::guard},
    error::{ApiError, RETRY_AFTER_MS, shape_rejections},
    observe::{self, Metrics},
    routes,
    stream::{PREDICTED_TTFT, QUEUE_POSITION},
    transport::{self, Limits, guard, tls::Tls},
};

pub use crate::routes::openapi;

/// How the server presents itself.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// What requests put into `model`: the alias, else the file's stem.
    pub model_id: String,
    /// Unix seconds of the model file, the same at every start.
    pub created: u64,
    /// How prompts of `/generate` and chats are rendered, unless a request says otherwise.
    pub prompt_format: PromptFormat,
    /// Origins of pages whose scripts may call: exact ones such as `https://app.example`, or `*`.
    /// Empty: pages served from loopback addresses only.
    pub cors_origins: Vec<String>,
    /// Most sequences one request may ask for; the engine's queue holds so many.
    pub max_queue: usize,
    /// How long response headers wait for the first token, and how often a silent stream says that it
    /// lives.
    pub keep_alive: Duration,
    /// Whether [`serve`] ends when the engine has failed, so that a supervisor starts the process again.
    /// Without, requests are refused and `/health` says `failed` until somebody does.
    pub exit_on_failure: bool,
    /// How long running requests may go on once the server is told to end.
    pub drain_timeout: Duration,
    /// The host of the server's own address, where requests may only name that or this machine: without
    /// keys, on a loopback address, such a name is all that keeps other sites' pages out. `None`: any.
    pub local_host: Option<String>,
    /// What connections may take.
    pub limits: Limits,
    /// Certificate and key; without, plain HTTP.
    pub tls: Option<Tls>,
}

impl ServerConfig {
    /// The defaults for a model.
    pub fn new(model_id: impl Into<String>, created: u64) -> Self {
        Self {
            model_id: model_id.into(),
            created,
            prompt_format: PromptFormat::Auto,
            cors_origins: Vec::new(),
            max_queue: 256,
            keep_alive: Duration::from_secs(15),
            exit_on_failure: true,
            drain_timeout: Duration::from_secs(30),
            local_host: None,
            limits: Limits::default(),
            tls: None,
        }
    }
}

/// What all handlers share. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

struct Inner {
    config: ServerConfig,
    gate: Gate,
    accounts: Accounts,
    model: SetOnce<Arc<Model>>,
    draining: AtomicBool,
    metrics: Metrics,
}

/// Whether requests would be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Yes.
    Ok,
    /// The model is not there yet.
    Loading,
    /// The last requests are being finished.
    Draining,
    /// The engine has stopped.
    Failed,
}

impl AppState {
    /// A server without its model yet: it answers `/health` and the documentation, and asks the others
    /// to come again.
    pub fn loading(config: ServerConfig) -> Self {
        Self::guarded(config, Gate::open())
    }

    /// As [`AppState::loading`], with a gate that may ask for keys.
    pub fn guarded(config: ServerConfig, gate: Gate) -> Self {
        Self(Arc::new(Inner {
            config,
            gate,
            accounts: Accounts::default(),
            model: SetOnce::new(),
            draining: AtomicBool::new(false),
            metrics: Metrics::default(),
        }))
    }

    /// Begins to serve. Chat templates are chosen here, once. A second engine is ignored.
    pub fn set_engine(&self, engine: Engine) {
        let model = Model::new(engine, self.0.config.prompt_format);
        let _ = self.0.model.set(Arc::new(model));
    }

    /// Refuses new work from now on; what was taken is finished.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::SeqCst);
        if let Some(model) = self.0.model.get() {
            model.engine.drain();
        }
    }

    /// Ends what is unfinished with an error.
    fn end(&self) {
        if let Some(model) = self.0.model.get() {
            model.engine.end();
        }
    }

    /// Returns when no submitted work is unfinished.
    pub async fn idle(&self) {
        while self
            .0
            .model
            .get()
            .is_some_and(|model| model.engine.is_busy() && model.engine.failure().is_none())
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Returns the engine's last words when it has failed, and not before.
    async fn failed(&self) -> String {
        self.0.model.wait().await.engine.failed().await
    }

    fn failure(&self) -> Option<String> {
        self.0.model.get().and_then(|model| model.engine.failure())
    }

    /// Whether requests would be served.
    pub fn health(&self) -> Health {
        match self.0.model.get() {
            _ if self.failure().is_some() => Health::Failed,
            _ if self.0.draining.load(Ordering::SeqCst) => Health::Draining,
            None => Health::Loading,
            Some(_) => Health::Ok,
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ServerConfig {
        &self.0.config
    }

    /// What stands before the routes.
    pub(crate) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    /// What keys may use that have no limits of their own; counts from the next request on.
    pub fn set_default_limits(&self, defaults: DefaultLimits) {
        self.0.accounts.set_defaults(defaults);
    }

    /// What keys have used of what they may.
    pub(crate) fn accounts(&self) -> &Accounts {
        &self.0.accounts
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// The model, or 503 while it loads.
    pub(crate) fn model(&self) -> Result<Arc<Model>, ApiError> {
        self.0
            .model
            .get()
            .cloned()
            .ok_or_else(|| ApiError::overloaded("The model is still loading; try again later."))
    }

    /// The model for new work: 503 while loading or draining, 404 when `asked` is another model.
    pub(crate) fn admit(&self, asked: Option<&str>) -> Result<Arc<Model>, ApiError> {
        if self.health() == Health::Draining {
            return Err(ApiError::overloaded("The server is shutting down; try again later."));
        }
        self.check_model(asked)?;
        self.model()
    }

    /// 404 unless `asked` is the served model, empty or absent.
    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            Some(name) if !name.is_empty() && name != self.0.config.model_id => {
                Err(ApiError::model_not_found(name, &self.0.config.model_id))
            }
            _ => Ok(()),
        }
    }
}

/// The loaded model with what the gateway derives from it once.
pub(crate) struct Model {
    /// The engine.
    pub(crate) engine: Engine,
    /// `system_fingerprint`.
    pub(crate) fingerprint: String,
    templates: [Result<Option<ChatTemplate>, TextError>; 4],
}

/// The formats that need a template, in the order of `Model::templates`.
const TEMPLATED: [PromptFormat; 4] =
    [PromptFormat::Auto, PromptFormat::Template, PromptFormat::Llama3Chat, PromptFormat::QwenChat];

impl Model {
    fn new(engine: Engine, prompt_format: PromptFormat) -> Self {
        let templates =
            TEMPLATED.map(|format| ChatTemplate::choose(format, engine.metadata(), engine.tokenizer()));
        let info = engine.info();
        // What a seed's text depends on: the build, the model, the backend with what it keeps of keys and values, and how
        // a chat becomes a prompt.
        let fingerprint = fingerprint(&format!(
            "{}|{:?}|{}|{}|{}|{:x}|{}|{}|{prompt_format:?}",
            env!("CARGO_PKG_VERSION"),
            info.name,
            info.architecture,
            info.quantization,
            info.parameters,
            info.digest,
            info.backend,
            info.kv_bytes / info.kv_tokens.max(1) as u64,
        ));
        Self { engine, fingerprint, templates }
    }

    /// The template of `format`; `None` for raw.
    pub(crate) fn template(&self, format: PromptFormat) -> Result<Option<&ChatTemplate>, TextError> {
        match TEMPLATED.iter().position(|f| *f == format) {
            Some(i) => self.templates[i].as_ref().map(Option::as_ref).map_err(TextError::clone),
            None => Ok(None),
        }
    }

    /// The template for messages, or a 400 that says why there is none.
    pub(crate) fn chat_template(&self, format: PromptFormat) -> Result<&ChatTemplate, ApiError> {
        self.template(format).map_err(|e| ApiError::invalid("messages", e))?.ok_or_else(|| {
            ApiError::invalid(
                "messages",
                "this server runs with the prompt format `raw`; use /v1/completions",
            )
        })
    }
}

/// Ten hex digits of FNV-1a (64 bits), which stays the same over compilers and hosts.
fn fingerprint(text: &str) -> String {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("fp_{:010x}", hash >> 24)
}

/// All routes with their layers.
pub fn app(state: AppState) -> Router {
    layered(routes::router(), state)
}

fn layered(router: Router<AppState>, state: AppState) -> Router {
    // The last layer is the outermost: ids and counts see every response, also those of CORS.
    router
        .layer(middleware::from_fn_with_state(state.clone(), guard))
        .layer(middleware::from_fn(shape_rejections))
        .layer(CatchPanicLayer::custom(|_| panicked()))
        .layer(cors(&state.config().cors_origins))
        .layer(middleware::from_fn_with_state(state.clone(), guard::guard))
        .layer(middleware::from_fn(routes::messages::frame))
        .layer(middleware::from_fn_with_state(state.clone(), observe::track))
        .with_state(state)
}

/// The panic's own message went to stderr by the panic hook; clients need not see it.
fn panicked() -> Response {
    ApiError::internal("The server failed on this request.").into_response()
}

/// Scripts of allowed pages may call with any header and read ids and limits.
fn cors(origins: &[String]) -> CorsLayer {
    let allowed = if origins.iter().any(|o| o == "*") {
        AllowOrigin::any()
    } else if origins.is_empty() {
        AllowOrigin::predicate(|origin, _| is_loopback(origin))
    } else {
        AllowOrigin::list(origins.iter().filter_map(|o| HeaderValue::from_str(o.trim_end_matches('/')).ok()))
    };
    let mut exposed = vec![
        HeaderName::from_static("x-request-id"),
        HeaderName::from_static("request-id"),
        HeaderName::from_static("openai-processing-ms"),
        HeaderName::from_static("x-should-retry"),
        header::RETRY_AFTER,
        RETRY_AFTER_MS,
        PREDICTED_TTFT,
        QUEUE_POSITION,
    ];
    for kind in ["requests", "tokens"] {
        for what in ["limit", "remaining", "reset"] {
            exposed.extend(HeaderName::try_from(format!("x-ratelimit-{what}-{kind}")));
        }
    }
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(ExposeHeaders::list(exposed))
        // An allowed page may be on the Internet and this server not: browsers that ask are told so.
        .allow_private_network(AllowPrivateNetwork::yes())
        .max_age(Duration::from_secs(600))
}

/// True for the origin of a page that this machine serves itself.
fn is_loopback(origin: &HeaderValue) -> bool {
    let Some(authority) = origin.to_str().ok().and_then(|o| o.split_once("://")) else { return false };
    let (scheme, authority) = authority;
    if !matches!(scheme, "http" | "https") {
        return false;
    }
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => {
            if port.parse::<u16>().is_err() {
                return false;
            }
            host
        }
        _ => authority,
    };
    guard::is_loopback(host)
}

/// Serves until `shutdown` is ready, then refuses new work, finishes what was taken while `/health` says
/// `draining`, and returns.
///
/// An engine that fails has told every request so. When the configuration says so, the server then ends:
/// what it has to say is delivered, and the failure returned.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let end = async {
        tokio::select! {
            () = shutdown => {}
            words = state.failed(), if state.config().exit_on_failure => {
                tracing::error!("{words}: ending, once the answers are delivered");
            }
        }
        state.drain();
        if tokio::time::timeout(state.config().drain_timeout, state.idle()).await.is_err() {
            tracing::warn!("drain-timeout is over: ending the requests that still run");
            state.end();
            state.idle().await;
        }
    };
    let ServerConfig { limits, tls, .. } = state.config();
    transport::serve(listener, app(state.clone()), limits.clone(), tls.clone(), end).await?;
    if let Some(store) = state.gate().store()
        && let Err(error) = store.flush().await
    {
        tracing::error!("the last accounts may be missing: {error}");
    }
    match state.failure() {
        Some(words) => Err(io::Error::other(words)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn only_loopback_pages_are_loopback() {
        for yes in [
            "http://localhost",
            "http://localhost:3000",
            "https://app.localhost:1",
            "http://127.0.0.1:8080",
            "http://127.9.9.9",
            "http://[::1]:5173",
            "http://[::1]",
        ] {
            assert!(is_loopback(&HeaderValue::from_static(yes)), "{yes}");
        }
        for no in [
            "null",
            "https://example.com",
            "http://localhost.example.com",
            "http://127.0.0.1.example.com",
            "http://10.0.0.1",
            "http://[::2]",
            "file://localhost",
            "http://localhost:80@example.com",
            "localhost",
        ] {
            assert!(!is_loopback(&HeaderValue::from_static(no)), "{no}");
        }
    }

    #[tokio::test]
    async fn panics_are_500_with_our_body() {
        async fn panicking() -> &'static str {
            panic!("on purpose")
        }
        let router = Router::new().route("/panic", axum::routing::get(panicking));
        let app = layered(router, AppState::loading(ServerConfig::new("m", 0)));
        let request = axum::extract::Request::get("/panic").body(axum::body::Body::empty()).unwrap();
        let response = app.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 500);
        assert!(response.headers().contains_key("x-request-id"));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&body["error"]["type"], &body["error"]["code"]), (&"server_error".into(), &().into()));
        assert!(!body.to_string().contains("on purpose"), "{body}");
    }

    #[test]
    fn fingerprints_are_stable() {
        let a = fingerprint("a");
        assert_eq!(a, "fp_af63dc4c86");
        assert_ne!(a, fingerprint("b"));
    }
}
