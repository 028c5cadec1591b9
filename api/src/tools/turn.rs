//! A choice as its events come: the pieces of its text, and the tokens that made them.

use m40llm_engine::{FinishReason, TokenOut};

use super::{Piece, Reader, Reading, thoughts::Thoughts};

/// One choice under way.
#[derive(Debug)]
pub(crate) struct Turn {
    reader: Reader,
    /// Tokens of text that the reader holds back.
    held: Vec<TokenOut>,
    thoughts: Thoughts,
}

impl Turn {
    pub(crate) fn new(reading: &Reading) -> Self {
        Self { reader: reading.reader(), held: Vec::new(), thoughts: Thoughts::default() }
    }

    /// What an event's text and tokens settle: pieces, and the tokens of the text among them. The tokens of
    /// calls and of reasoning go with neither.
    pub(crate) fn push(&mut self, text: &str, tokens: Vec<TokenOut>) -> (Vec<Piece>, Vec<TokenOut>) {
        let pieces = self.reader.push(text);
        self.thoughts.note(tokens.len(), &pieces);
        // A token without text of its own may be part of a character or of a stop string to come.
        let silent = text.is_empty() && self.reader.is_in_text();
        self.held.extend(tokens);
        self.release(pieces, silent)
    }

    /// The rest, at the end.
    pub(crate) fn finish(&mut self) -> (Vec<Piece>, Vec<TokenOut>) {
        let pieces = self.reader.finish();
        self.release(pieces, false)
    }

    /// Whether it ended in a call that is whole; then that is why it ended.
    pub(crate) fn called(&self) -> bool {
        self.reader.called()
    }

    /// Tokens of thoughts; none of a model that never thinks.
    pub(crate) fn reasoning_tokens(&self) -> Option<usize> {
        self.reader.may_think().then(|| self.thoughts.tokens())
    }

    fn release(&mut self, pieces: Vec<Piece>, silent: bool) -> (Vec<Piece>, Vec<TokenOut>) {
        if silent || pieces.iter().any(|piece| matches!(piece, Piece::Text(_))) {
            return (pieces, std::mem::take(&mut self.held));
        }
        if !self.reader.holds() {
            self.held.clear();
        }
        (pieces, Vec::new())
    }
}

/// A finished choice.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) text: String,
    pub(crate) reasoning: String,
    pub(crate) calls: Vec<Call>,
    /// The text's tokens.
    pub(crate) tokens: Vec<TokenOut>,
    /// Why the engine ended it.
    pub(crate) reason: FinishReason,
    /// It ended in a call that is whole.
    pub(crate) called: bool,
}

/// A call that a model made.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) id: String,
    pub(crate) name: String,
    /// JSON as the model wrote it; cut off when the output was.
    pub(crate) arguments: String,
}

impl Default for Said {
    /// Nothing yet.
    fn default() -> Self {
        Self {
            text: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            tokens: Vec::new(),
            reason: FinishReason::Stop,
            called: false,
        }
    }
}

impl Said {
    /// Adds what an event has settled.
    pub(crate) fn take(&mut self, (pieces, tokens): (Vec<Piece>, Vec<TokenOut>)) {
        self.tokens.extend(tokens);
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.text.push_str(&text),
                Piece::Reasoning(text) => self.reasoning.push_str(&text),
                Piece::Call { id, name, .. } => self.calls.push(Call { id, name, arguments: String::new() }),
                Piece::Arguments { index, text } => {
                    if let Some(call) = self.calls.get_mut(index) {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
    }
}
