//! The gateway's tests against `app()`, without sockets unless a test is about them.

mod cli;
#[cfg(feature = "cuda")]
mod device_selection;
#[path = "../../../engine/tests/it/support/mod.rs"]
#[allow(dead_code, reason = "the engine's tests use the rest of it")]
mod gguf_files;
mod keys;
mod malformed;
#[cfg(feature = "server")]
mod structured;
#[cfg(feature = "server")]
mod support;

#[cfg(feature = "server")]
mod abandoned;
#[cfg(feature = "server")]
mod auth;
#[cfg(feature = "server")]
mod chat;
#[cfg(feature = "server")]
mod compatibility;
#[cfg(feature = "server")]
mod completions;
#[cfg(feature = "server")]
mod contract;
#[cfg(feature = "server")]
mod cors;
#[cfg(feature = "server")]
mod document;
#[cfg(feature = "server")]
mod embeddings;
#[cfg(feature = "server")]
mod failure;
#[cfg(feature = "server")]
mod faulty;
#[cfg(feature = "server")]
mod fingerprint;
#[cfg(feature = "server")]
mod fuzz;
#[cfg(feature = "server")]
mod guard;
#[cfg(feature = "server")]
mod guarded;
#[cfg(feature = "server")]
mod infill;
#[cfg(feature = "server")]
mod lenient;
#[cfg(feature = "server")]
mod limits;
#[cfg(feature = "server")]
mod listening;
#[cfg(feature = "server")]
mod messages;
#[cfg(feature = "server")]
mod metrics;
#[cfg(feature = "server")]
mod native;
#[cfg(feature = "server")]
mod operations;
#[cfg(feature = "server")]
mod paced;
#[cfg(feature = "server")]
mod page;
#[cfg(feature = "server")]
mod pull;
#[cfg(feature = "server")]
mod responses;
#[cfg(feature = "server")]
mod scripted;
#[cfg(feature = "server")]
mod sockets;
#[cfg(feature = "server")]
mod source;
#[cfg(feature = "server")]
mod streams;
#[cfg(feature = "server")]
mod tls;
#[cfg(feature = "server")]
mod tools;
#[cfg(feature = "server")]
mod wire;
