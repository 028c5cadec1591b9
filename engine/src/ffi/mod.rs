//! The C interface: `m40llm_*` symbols of the shared library, declared in `include/m40llm.h`.
//!
//! The header is generated from this module (`make header`); the comments on what it exports are its
//! documentation, so they speak to C programmers. `docs/c-api.md` shows how the calls go together.
//!
//! | module | holds |
//! | --- | --- |
//! | `types` | structs and constants that both sides read |
//! | `model`, `session` | the exported functions, one file a handle |
//! | `status` | what calls return, the last error, and the wall that no panic passes |
//! | `handles` | handles as keys of a table, so that a freed one is an error and not a crash |
//! | `memory` | the only reads and writes through a caller's pointers |
// Every exported function is unsafe for one reason: its pointers. What they must be is said once, at the
// head of the header, and `memory` relies on nothing else.
#![allow(clippy::missing_safety_doc, reason = "the rules for all pointers stand at the head of the header")]
#![allow(clippy::doc_markdown, reason = "the comments are C's too, which has no use for backticks")]

mod handles;
mod memory;
mod model;
mod session;
mod status;
mod types;

pub use model::{
    ModelHandle, m40llm_detokenize, m40llm_model_free, m40llm_model_info, m40llm_model_open, m40llm_tokenize,
};
pub use session::{
    SessionHandle, TokenCallback, m40llm_session_add_text, m40llm_session_add_tokens, m40llm_session_cancel,
    m40llm_session_decode, m40llm_session_free, m40llm_session_new, m40llm_session_tokens,
    m40llm_session_truncate,
};
pub use status::{Status, m40llm_last_error, m40llm_version};
pub use types::*;
