//! From tokens to what a client may see of them.

use crate::{
    request::{Event, TokenOut},
    text::{Detokenizer, StopMatcher, StopOutcome},
};

/// Bytes to final text: whole characters first, then stop strings; tokens go out with their text.
pub(super) struct Output {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// Tokens not yet released, each with the number of output bytes up to its end.
    held: Vec<(usize, TokenOut)>,
    /// Output bytes so far, and how many of them have been let go as text.
    bytes: usize,
    emitted: usize,
    /// The end of the last token released.
    released: usize,
}

impl Output {
    pub(super) fn new(stops: &[String]) -> Self {
        Self {
            detokenizer: Detokenizer::default(),
            stop: StopMatcher::new(stops),
            held: Vec::new(),
            bytes: 0,
            emitted: 0,
            released: 0,
        }
    }

    /// Adds a token; returns the event it settles, if any, and whether a stop string matched.
    pub(super) fn push(&mut self, token: TokenOut, bytes: &[u8]) -> (Option<Event>, bool) {
        self.bytes += bytes.len();
        self.held.push((self.bytes, token));
        let text = self.detokenizer.push(bytes);
        let outcome = self.stop.push(&text);
        self.settle(outcome)
    }

    /// The end of the stream: incomplete characters become U+FFFD, what might have begun a stop string
    /// turns out to be text.
    pub(super) fn flush(&mut self) -> (Option<Event>, bool) {
        let rest = self.detokenizer.finish();
        let outcome = match self.stop.push(&rest) {
            StopOutcome::Text(text) => StopOutcome::Text(text + &self.stop.finish()),
            stopped @ StopOutcome::Stopped(_) => stopped,
        };
        self.settle(outcome)
    }

    /// Which stop string has ended it, if one has.
    pub(super) fn matched(&self) -> Option<usize> {
        self.stop.matched()
    }

    fn settle(&mut self, outcome: StopOutcome) -> (Option<Event>, bool) {
        let (text, stopped) = match outcome {
            StopOutcome::Text(text) => (text, false),
            StopOutcome::Stopped(text) => (text, true),
        };
        self.emitted += text.len();
        // A token is settled with the last of its bytes; on a match, so is the one that the stop string
        // cuts, while those wholly within the stop string belong to no text and go unreported.
        let settled = self.bytes.saturating_sub(self.detokenizer.held() + self.stop.held());
        let mut from = self.released;
        let ready = self
            .held
            .iter()
            .take_while(|(end, _)| {
                let is_ready = if stopped { from < self.emitted } else { *end <= settled };
                from = *end;
                is_ready
            })
            .count();
        if ready > 0 {
            self.released = self.held[ready - 1].0;
        }
        let tokens: Vec<TokenOut> = self.held.drain(..ready).map(|(_, token)| token).collect();
        let event = (!text.is_empty() || !tokens.is_empty()).then_some(Event::Text { text, tokens });
        (event, stopped)
    }
}
