//! What calls return, the last error, and the wall that no panic passes.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::error::{EngineError, SubmitError, panic_words};

/// What a call returns. m40llm_last_error has the details of all but M40LLM_STATUS_OK.
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// A pointer is NULL or misaligned, a handle unknown or freed, a value not among those allowed, a text
    /// not UTF-8.
    InvalidArgument = 1,
    /// The buffer is too small. What it must hold was stored; nothing else was.
    BufferTooSmall = 2,
    /// The file cannot be read, or is no model that this library runs.
    Model = 3,
    /// The options ask for what cannot be had here: memory, a device.
    Config = 4,
    /// The history, with max_tokens, is longer than the context.
    ContextLength = 5,
    /// The session is decoding, or too many requests are waiting: try again later.
    Busy = 6,
    /// A callback or m40llm_session_cancel ended the decode. The session can go on.
    Cancelled = 7,
    /// The model failed on this request.
    Backend = 8,
    /// The model has stopped for good, such as by a fault of its device: end the process and start again.
    Stopped = 9,
    /// A bug in this library; the call had no effect that can be relied on.
    Internal = 10,
}

/// Why a call does not return [`Status::Ok`].
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: Status,
    message: String,
}

impl Failure {
    pub(super) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Status::InvalidArgument, message)
    }

    /// Says first what the failure is about.
    pub(super) fn about(mut self, subject: &str) -> Self {
        self.message = format!("{subject}: {}", self.message);
        self
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let status = match error {
            EngineError::Gguf(_) | EngineError::Text(_) | EngineError::Model(_) => Status::Model,
            EngineError::Backend(_) | EngineError::Constraint(_) => Status::Backend,
            EngineError::DeviceLost(_) | EngineError::Ended => Status::Stopped,
            EngineError::Device(_) | EngineError::Config(_) => Status::Config,
        };
        Self::new(status, error.to_string())
    }
}

impl From<SubmitError> for Failure {
    fn from(error: SubmitError) -> Self {
        let status = match error {
            SubmitError::QueueFull(_) | SubmitError::WouldWait { .. } => Status::Busy,
            SubmitError::ContextLength { .. } => Status::ContextLength,
            SubmitError::InvalidPrompt(_) => Status::InvalidArgument,
            SubmitError::Draining | SubmitError::Stopped(_) => Status::Stopped,
        };
        Self::new(status, error.to_string())
    }
}

/// Runs a call's work. Failures and panics become a status and the thread's last error.
pub(super) fn guard(work: impl FnOnce() -> Result<(), Failure>) -> Status {
    let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(Failure::new(Status::Internal, format!("m40llm panicked: {}", panic_words(&*panic))))
    });
    match outcome {
        Ok(()) => Status::Ok,
        Err(failure) => {
            remember(failure.message);
            failure.status
        }
    }
}

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
}

fn remember(message: String) {
    let mut bytes = message.into_bytes();
    bytes.retain(|&b| b != 0);
    let message = CString::new(bytes).ok();
    // A thread that is ending has no place for it any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
}

/// Why the last call that failed on this thread did: one line of UTF-8, never NULL, "" if none failed.
/// Valid until the next m40llm call on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn m40llm_last_error() -> *const c_char {
    let last = || LAST_ERROR.try_with(|last| last.borrow().as_ref().map(|message| message.as_ptr()));
    catch_unwind(last).ok().and_then(Result::ok).flatten().unwrap_or(c"".as_ptr())
}

/// The library's version, such as "0.1.0". Static.
#[unsafe(no_mangle)]
pub extern "C" fn m40llm_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("a version without NUL"),
        };
    VERSION.as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: the pointer is never null and valid until this thread's next call.
        unsafe { CStr::from_ptr(m40llm_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn panics_become_a_status() {
        assert_eq!(guard(|| panic!("on {}", "purpose")), Status::Internal);
        assert_eq!(last_error(), "m40llm panicked: on purpose");
        assert_eq!(guard(|| std::panic::panic_any(7)), Status::Internal);
        assert_eq!(last_error(), "m40llm panicked: unknown cause");
    }

    #[test]
    fn errors_are_a_threads_own() {
        assert_eq!(guard(|| Err(Failure::invalid("a\0b"))), Status::InvalidArgument);
        assert_eq!(std::thread::spawn(last_error).join().unwrap(), "");
        assert_eq!(guard(|| Ok(())), Status::Ok);
        assert_eq!(last_error(), "ab", "success leaves it");
    }
}
