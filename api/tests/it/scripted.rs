//! An engine that says what a test wants, for outputs that no small model would give.

use std::time::Duration;

use axum::Router;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::{Engine, EngineConfig, EngineError, Event, FinishReason, TokenLogprob, TokenOut, Usage};

use crate::support::MODEL;

/// How a script ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    /// As a model's turn does, or by a stop string's number.
    Stop(Option<usize>),
    Length,
    Failure,
}

/// A server whose every answer is these tokens; a prompt's bytes are its tokens, the first four of which are
/// cached. Before the second token it pauses.
pub(crate) fn says(tokens: &'static [&'static str], end: End) -> Router {
    paced(tokens, end, Duration::ZERO, Duration::from_secs(15))
}

/// The same, with a pause of the engine's and the server's patience.
pub(crate) fn paced(
    tokens: &'static [&'static str],
    end: End,
    pause: Duration,
    patience: Duration,
) -> Router {
    let config = ServerConfig { keep_alive: patience, ..ServerConfig::new(MODEL, 1_700_000_000) };
    let state = AppState::loading(config);
    let config = EngineConfig { ctx_size: Some(4096), ..EngineConfig::default() };
    let engine = Engine::from_source(&config, move |inbox| {
        while let Some(job) = inbox.recv() {
            for (i, text) in tokens.iter().enumerate() {
                if i == 1 {
                    std::thread::sleep(pause);
                }
                let logprob = job.request.logprobs.map(|n| TokenLogprob {
                    logprob: Some(-0.5),
                    top: (0..n as u32).map(|id| (97 + id, -0.5 - id as f32)).collect(),
                });
                let id = u32::from(text.as_bytes().first().copied().unwrap_or(b'?'));
                job.send(Event::Text { text: (*text).to_owned(), tokens: vec![TokenOut { id, logprob }] });
            }
            let usage = Usage {
                prompt_tokens: job.request.prompt.len(),
                cached_tokens: 4.min(job.request.prompt.len()),
                completion_tokens: tokens.len() + 1,
            };
            job.send(match end {
                End::Stop(matched) => {
                    Event::Done { reason: FinishReason::Stop, matched, ending: None, usage }
                }
                End::Length => {
                    Event::Done { reason: FinishReason::Length, matched: None, ending: None, usage }
                }
                End::Failure => Event::Failed(EngineError::Backend("on purpose".into())),
            });
        }
    });
    state.set_engine(engine.unwrap());
    m40llm::app(state)
}
