//! The gateway as a library, for the binary and the tests.
//!
//! The way of a request: `routes` (handler) → [`validate`] (fields, template, tokens) → the engine →
//! [`stream`] (or one JSON body) → the client. Every failure is an [`error::ApiError`].
//!
//! | module | holds |
//! | --- | --- |
//! | [`app`] | state, router, layers, serving |
//! | `routes` | one file a resource |
//! | [`auth`] | keys: made, checked, accounted for |
//! | [`openai`], [`anthropic`] | wire types, nothing else |
//! | [`validate`] | wire types to engine requests; every 400 with its `param` |
//! | `logprobs` | token log-probabilities in both of OpenAI's shapes |
//! | [`stream`] | engine events to one answer, server-sent events or NDJSON |
//! | [`error`] | the one error and its HTTP form |
//! | [`observe`] | request ids, logs, metrics |
//! | [`transport`] | connections: TLS, time limits, security headers |
//! | [`version`] | which build this is |

#![forbid(unsafe_code)]

#[cfg(feature = "server")]
pub mod anthropic;
#[cfg(feature = "server")]
pub mod app;
pub mod auth;
#[cfg(feature = "server")]
pub mod error;
#[cfg(feature = "server")]
mod logprobs;
#[cfg(feature = "server")]
pub mod observe;
#[cfg(feature = "server")]
pub mod openai;
#[cfg(feature = "server")]
mod routes;
#[cfg(feature = "server")]
pub mod stream;
#[cfg(feature = "server")]
mod tools;
#[cfg(feature = "server")]
pub mod transport;
#[cfg(feature = "server")]
pub mod validate;
pub mod version;

#[cfg(feature = "server")]
pub use app::{AppState, ServerConfig, app, openapi, serve};

/// The largest request body taken.
#[cfg(feature = "server")]
pub const MAX_BODY_BYTES: usize = 8 << 20;
