//! Sessions: a history of tokens that decodes go on from.

use std::{
    ffi::{c_char, c_int, c_void},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, TryLockError},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use super::{
    handles::{MODELS, SESSIONS},
    memory::{self, Buffer},
    model::{ModelHandle, check_ids},
    status::{Failure, Status, guard},
    types::{M40LLM_FINISH_CANCELLED, M40LLM_NO_TOKEN, Outcome, SessionOptions, finish, text_flags},
};
use crate::{
    handle::{Engine, Generation, lock},
    request::{Event, GenerateRequest, TokenOut},
};

/// A conversation: a history of tokens and a way to choose further ones. Any thread may use it, one at a
/// time: a call made while another one works with it returns M40LLM_STATUS_BUSY, but for
/// m40llm_session_cancel and m40llm_session_free, which may come at any time.
#[derive(Debug)]
pub struct SessionHandle(());

/// Told what is generated, on the thread that decodes. A return other than 0 cancels the decode.
///
/// text is UTF-8 of length bytes, and a NUL after them; it never ends within a character, and is valid
/// during the call only. It may be empty, for tokens that stand for part of a character or for none, and
/// token is M40LLM_NO_TOKEN for text whose token is settled later. The callback may call every function,
/// must not jump out (longjmp, C++ exceptions), and holds up nobody but this decode.
pub type TokenCallback = Option<
    unsafe extern "C" fn(token: u32, text: *const c_char, length: usize, user_data: *mut c_void) -> c_int,
>;

/// What a session's handle stands for.
pub(super) struct Session {
    engine: Engine,
    /// What every decode asks for, but its prompt and length.
    request: GenerateRequest,
    /// Locked while a decode runs.
    history: Mutex<Vec<u32>>,
    interrupt: Mutex<Interrupt>,
}

/// How the decode that runs now is stopped.
#[derive(Default)]
struct Interrupt {
    /// The thread that decodes, if one does.
    thread: Option<Thread>,
    /// This decode was cancelled.
    cancelled: bool,
    /// The handle was freed: every decode is cancelled.
    freed: bool,
}

impl Session {
    fn history(&self) -> Result<MutexGuard<'_, Vec<u32>>, Failure> {
        match self.history.try_lock() {
            Ok(history) => Ok(history),
            // Whole tokens are pushed one by one: what a panic leaves is a history.
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(Failure::new(Status::Busy, "the session is decoding")),
        }
    }

    fn cancel(&self) {
        let interrupt = &mut *lock(&self.interrupt);
        if let Some(thread) = &interrupt.thread {
            interrupt.cancelled = true;
            thread.unpark();
        }
    }

    fn is_cancelled(&self) -> bool {
        let interrupt = lock(&self.interrupt);
        interrupt.cancelled || interrupt.freed
    }

    /// Runs one request from the history as it is. `deliver` says false to cancel.
    fn decode(
        &self,
        max_tokens: usize,
        mut deliver: impl FnMut(u32, &str) -> bool,
    ) -> Result<Outcome, Failure> {
        let mut history = self.history()?;
        let mut outcome = Outcome {
            size: size_of::<Outcome>(),
            finish: M40LLM_FINISH_CANCELLED,
            reserved: 0,
            prompt_tokens: history.len() as u64,
            cached_tokens: 0,
            completion_tokens: 0,
        };
        let mut generation = self.engine.submit(GenerateRequest {
            prompt: history.clone(),
            max_tokens: (max_tokens > 0).then_some(max_tokens),
            ..self.request.clone()
        })?;
        lock(&self.interrupt).thread = Some(thread::current());
        let _ended = Ended(self);
        while let Some(event) = self.next(&mut generation) {
            match event {
                Some(Event::Text { text, tokens }) => {
                    let (before, last) = split(&tokens);
                    for &TokenOut { id, .. } in before {
                        history.push(id);
                        outcome.completion_tokens += 1;
                        if !deliver(id, "") {
                            return Ok(outcome);
                        }
                    }
                    history.extend(last);
                    outcome.completion_tokens += u64::from(last.is_some());
                    if !deliver(last.unwrap_or(M40LLM_NO_TOKEN), &text) {
                        return Ok(outcome);
                    }
                }
                Some(Event::Prompt(_) | Event::Embedding(_)) => {}
                Some(Event::Done { reason, usage, .. }) => {
                    outcome.finish = finish(reason);
                    outcome.prompt_tokens = usage.prompt_tokens as u64;
                    outcome.cached_tokens = usage.cached_tokens as u64;
                    outcome.completion_tokens = usage.completion_tokens as u64;
                    return Ok(outcome);
                }
                Some(Event::Failed(error)) => return Err(error.into()),
                None => {
                    let words = self.engine.failure().unwrap_or_else(|| "its thread is gone".into());
                    return Err(Failure::new(Status::Stopped, format!("the model has stopped: {words}")));
                }
            }
        }
        Ok(outcome)
    }

    /// The next event, or at once `None` when the decode is cancelled.
    #[expect(clippy::option_option, reason = "the outer says whether it goes on, the inner is the channel's")]
    fn next(&self, generation: &mut Generation) -> Option<Option<Event>> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut event = pin!(generation.next());
        loop {
            if self.is_cancelled() {
                return None;
            }
            if let Poll::Ready(event) = event.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Some(event);
            }
            thread::park();
        }
    }
}

/// The last token with the event's text, those before it without.
fn split(tokens: &[TokenOut]) -> (&[TokenOut], Option<u32>) {
    tokens.split_last().map_or((&[], None), |(last, before)| (before, Some(last.id)))
}

/// Nothing is left to cancel.
struct Ended<'a>(&'a Session);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let interrupt = &mut *lock(&self.0.interrupt);
        (interrupt.thread, interrupt.cancelled) = (None, false);
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Makes a session with an empty history and stores its handle, to be freed with m40llm_session_free.
/// Sessions of one model run together, in one batch. options may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_new(
    model: *const ModelHandle,
    options: *const SessionOptions,
    session: *mut *mut SessionHandle,
) -> Status {
    guard(|| {
        memory::require(session, "session")?;
        let engine = MODELS.get(model)?.engine.clone();
        // SAFETY: the head of the header asks for a struct of the size it says …
        let options: SessionOptions = unsafe { memory::read_options(options, "options") }?;
        // SAFETY: … and for its strings.
        let request = unsafe { options.to_request() }?;
        let made = Session { engine, request, history: Mutex::default(), interrupt: Mutex::default() };
        // SAFETY: likewise, a place for a handle.
        unsafe { memory::store(session, SESSIONS.insert(made), "session") }
    })
}

/// Appends a text of length bytes to the history; flags as for m40llm_tokenize.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_add_text(
    session: *mut SessionHandle,
    text: *const c_char,
    length: usize,
    flags: u32,
) -> Status {
    guard(|| {
        let session = SESSIONS.get(session)?;
        let (add_special, parse_special) = text_flags(flags)?;
        // SAFETY: the head of the header asks for `length` bytes.
        let text = unsafe { memory::text(text, length, "text") }?;
        let mut history = session.history()?;
        history.extend(session.engine.tokenizer().encode(text, add_special, parse_special));
        Ok(())
    })
}

/// Appends count token ids to the history.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_add_tokens(
    session: *mut SessionHandle,
    tokens: *const u32,
    count: usize,
) -> Status {
    guard(|| {
        let session = SESSIONS.get(session)?;
        // SAFETY: the head of the header asks for `count` ids.
        let ids = unsafe { memory::array(tokens, count, "tokens") }?;
        check_ids(&session.engine, ids)?;
        session.history()?.extend_from_slice(ids);
        Ok(())
    })
}

/// Generates at most max_tokens tokens (0: what the context leaves) after the history, tells the callback of
/// each, and appends them to the history. Returns when it is done: M40LLM_STATUS_OK, or
/// M40LLM_STATUS_CANCELLED when it was cancelled. In both cases it fills outcome, whose size the caller has
/// set. callback and outcome may be NULL.
///
/// A history holds what the callback was told: not the end-of-generation token, and after a cancel not
/// what it was not told. So the next turn's text begins with what ends a turn.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_decode(
    session: *mut SessionHandle,
    max_tokens: usize,
    callback: TokenCallback,
    user_data: *mut c_void,
    outcome: *mut Outcome,
) -> Status {
    guard(|| {
        let session = SESSIONS.get(session)?;
        if !outcome.is_null() {
            // SAFETY: the head of the header asks for a struct of the size it says.
            unsafe { memory::callers_size(outcome, "outcome") }?;
        }
        // The text with its NUL; kept, so that a token costs no allocation.
        let mut buffer = Vec::new();
        let ran = session.decode(max_tokens, |token, text| {
            let Some(callback) = callback else { return true };
            buffer.clear();
            buffer.extend_from_slice(text.as_bytes());
            buffer.push(0);
            // SAFETY: likewise, a function of this type that returns; the text lives until it has.
            unsafe { callback(token, buffer.as_ptr().cast::<c_char>(), text.len(), user_data) == 0 }
        })?;
        if !outcome.is_null() {
            // SAFETY: likewise, a struct of the size it says.
            unsafe { memory::write_struct(outcome, &ran, "outcome") }?;
        }
        if ran.finish == M40LLM_FINISH_CANCELLED {
            return Err(Failure::new(Status::Cancelled, "the decode was cancelled"));
        }
        Ok(())
    })
}

/// Cancels the decode that runs now: it returns M40LLM_STATUS_CANCELLED at once, or after the callback that
/// runs now. Without one, nothing happens. From any thread, and from a callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_cancel(session: *mut SessionHandle) -> Status {
    guard(|| {
        SESSIONS.get(session)?.cancel();
        Ok(())
    })
}

/// The history. Stores in count how many tokens it has; when they are more than capacity, that is all it
/// does, and the call returns M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, tokens may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_tokens(
    session: *const SessionHandle,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Status {
    guard(|| {
        let session = SESSIONS.get(session)?;
        let history = session.history()?;
        let buffer = Buffer { start: tokens, capacity, count, names: ["tokens", "count"] };
        // SAFETY: the head of the header asks for room for `capacity` ids and for a count.
        unsafe { memory::fill(&buffer, &history, None) }
    })
}

/// Forgets all but the first count tokens of the history: 0 begins anew, fewer than there are takes a turn
/// back. More than there are is an error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_truncate(session: *mut SessionHandle, count: usize) -> Status {
    guard(|| {
        let session = SESSIONS.get(session)?;
        let mut history = session.history()?;
        if count > history.len() {
            return Err(Failure::invalid(format!("count is {count}, the history has {}", history.len())));
        }
        history.truncate(count);
        Ok(())
    })
}

/// Frees a session's handle, and cancels its decode if one runs. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_session_free(session: *mut SessionHandle) -> Status {
    guard(|| {
        if let Some(session) = SESSIONS.remove(session)? {
            lock(&session.interrupt).freed = true;
            session.cancel();
        }
        Ok(())
    })
}
