//! What can go wrong, in the caller's words.

use std::{any::Any, time::Duration};

use crate::{gguf::GgufError, text::TextError};

/// A failure to load or to run a model.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EngineError {
    /// The file is not a usable GGUF.
    #[error("{0}")]
    Gguf(#[from] GgufError),
    /// Tokenizer or template metadata is not usable, or a template failed.
    #[error("{0}")]
    Text(#[from] TextError),
    /// Metadata and tensors do not make a model this engine runs. Names the key or the tensor.
    #[error("{0}")]
    Model(String),
    /// The backend failed in a step; the next one may work. Names the call and what to do.
    #[error("{0}")]
    Backend(String),
    /// The device is gone or its context broken: no further step can work. Names the call and what to do.
    #[error("the device has failed: {0}")]
    DeviceLost(String),
    /// No device like the one asked for can be used. Names what is there; the caller knows what was asked.
    #[error("{0}")]
    Device(String),
    /// The configuration asks for what cannot be had.
    #[error("{0}")]
    Config(String),
    /// A request's grammar could not be followed any further. It tells nothing of the output.
    #[error("the output's constraint has failed: {0}")]
    Constraint(&'static str),
    /// The engine was told to end before its requests were done.
    #[error("the server is shutting down")]
    Ended,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// `--max-queue` requests are waiting already.
    #[error("the queue is full ({0} requests are waiting)")]
    QueueFull(usize),
    /// The first token is predicted to come later than the request would wait.
    #[error(
        "the first token is expected in {} ms, later than the {} ms that the request would wait",
        predicted.as_millis(),
        most.as_millis()
    )]
    WouldWait {
        /// Until the first token.
        predicted: Duration,
        /// What the request allows.
        most: Duration,
    },
    /// The engine is finishing its last requests.
    #[error("the server is shutting down")]
    Draining,
    /// The prompt, with `max_tokens` when given, does not fit the context.
    #[error("{requested} tokens were asked for ({prompt} in the prompt), the context holds {limit}")]
    ContextLength {
        /// Tokens in the prompt.
        prompt: usize,
        /// Prompt and `max_tokens` together.
        requested: usize,
        /// The served context length.
        limit: usize,
    },
    /// A prompt token id is outside the vocabulary, or the prompt is empty.
    #[error("{0}")]
    InvalidPrompt(String),
    /// The worker has ended.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

/// What a caught panic said.
pub(crate) fn panic_words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown cause")
}

/// What a caught panic said, where many may read it: a message that was put together at run time may hold
/// the text of somebody's request.
pub(crate) fn public_panic_words(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().unwrap_or("a panic, whose place is on stderr")
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn only_literal_words_are_public() {
        let private = "a prompt";
        let put_together = catch_unwind(|| panic!("not a boundary of {private}")).unwrap_err();
        assert_eq!(panic_words(&*put_together), "not a boundary of a prompt");
        assert!(!public_panic_words(&*put_together).contains(private));
        let literal = catch_unwind(|| panic!("on purpose")).unwrap_err();
        assert_eq!(public_panic_words(&*literal), "on purpose");
    }
}
