//! A choice's text to pieces, as it comes.

use std::sync::Arc;

use super::{
    Piece,
    call::{self, Head, Scanner},
    family::Format,
};

/// How the outputs of a request are to be read; makes a [`Reader`] for each choice. By default all is text.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    /// How calls are written, and the functions that may be called.
    pub(crate) calls: Option<Calls>,
    /// The model may think first.
    pub(crate) thinks: Option<Thinks>,
}

/// Calls to look out for.
#[derive(Debug, Clone)]
pub(crate) struct Calls {
    /// How they are written.
    pub(crate) format: &'static Format,
    /// Functions that were given.
    pub(crate) names: Arc<[String]>,
    /// The format's marker is ordinary text, and so printed where it begins no call.
    pub(crate) marker_is_text: bool,
}

/// Whether the prompt has begun the model's thoughts already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thinks {
    /// It has: the output begins with them.
    Already,
    /// The output may begin with the marker.
    Maybe,
}

/// What stands around a call that a model writes as a block of code.
const FENCE: &str = "```";

/// What stands around thoughts, in all models that have them.
pub(crate) const THINK: (&str, &str) = ("<think>", "</think>");

impl Reading {
    /// A reader for one choice.
    pub(crate) fn reader(&self) -> Reader {
        let state = match self.thinks {
            Some(Thinks::Already) => State::Thoughts,
            Some(Thinks::Maybe) => State::Start,
            None => State::Text,
        };
        Reader {
            reading: self.clone(),
            state,
            held: String::new(),
            spaces: String::new(),
            skips: false,
            fresh: true,
            calls: 0,
            close: "",
        }
    }
}

/// Tells a choice's text apart. The pieces, joined, do not depend on how the text was cut.
///
/// Text that may begin a marker is held back, and so are spaces that may stand before one: those around calls
/// and thoughts belong to neither. A call has begun, for good, where its arguments do; what only looked like
/// one is text.
#[derive(Debug)]
pub(crate) struct Reader {
    reading: Reading,
    state: State,
    /// What is not certain yet.
    held: String,
    /// What stood before a call's marker, which may turn out to be text.
    spaces: String,
    /// Spaces that come now stand between parts.
    skips: bool,
    /// No text yet, and no call.
    fresh: bool,
    /// Calls so far.
    calls: usize,
    /// What may close the last of them.
    close: &'static str,
}

#[derive(Debug)]
enum State {
    /// Before anything: thoughts may begin.
    Start,
    Thoughts,
    Text,
    /// After a call's marker, or, without one, where the whole output may be a call.
    Head {
        marker: bool,
    },
    Arguments(Scanner),
    /// After a call's arguments: its own closing brace, unless it has come, and the closing marker.
    Tail {
        closed: bool,
    },
}

impl Reader {
    /// Adds text; returns what is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut out = Vec::new();
        while self.step(&mut out) {}
        out
    }

    /// What was held back, at the end of the output. A call whose arguments have not begun is left out.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let rest = std::mem::take(&mut self.held);
        let mut out = Vec::new();
        let open = self.reading.calls.as_ref().map_or("", |calls| calls.format.open);
        match &self.state {
            // The beginning of one more call.
            State::Text if self.calls > 0 && open.starts_with(&rest) => {}
            State::Start | State::Text | State::Head { marker: false } => self.text(&rest, &mut out),
            State::Thoughts => reasoning(rest.trim_end(), &mut out),
            State::Head { marker: true } | State::Arguments(_) | State::Tail { .. } => {}
        }
        out
    }

    /// Whether there were calls, the last of them whole.
    pub(crate) fn called(&self) -> bool {
        self.calls > 0 && !matches!(self.state, State::Arguments(_))
    }

    /// Whether thoughts are looked out for.
    pub(crate) fn may_think(&self) -> bool {
        self.reading.thinks.is_some()
    }

    /// Whether text is held back that may yet become a piece.
    pub(crate) fn holds(&self) -> bool {
        !self.held.is_empty() || matches!(self.state, State::Head { .. })
    }

    /// Whether what comes next is text, as far as is known.
    pub(crate) fn is_in_text(&self) -> bool {
        matches!(self.state, State::Text) && self.held.is_empty()
    }

    /// Settles what it can; false when more must come.
    fn step(&mut self, out: &mut Vec<Piece>) -> bool {
        if self.skips {
            self.drop_spaces();
        }
        match self.state {
            State::Start => self.start(),
            State::Thoughts => self.thoughts(out),
            State::Text => self.next_text(out),
            State::Head { marker } => self.head(marker, out),
            State::Arguments(_) => self.arguments(out),
            State::Tail { closed } => self.tail(closed),
        }
    }

    fn start(&mut self) -> bool {
        let begun = self.held.trim_start();
        if begun.starts_with(THINK.0) {
            self.state = State::Thoughts;
        } else if THINK.0.starts_with(begun) {
            return false;
        } else {
            self.state = State::Text;
        }
        true
    }

    fn thoughts(&mut self, out: &mut Vec<Piece>) -> bool {
        // The first thought has the spaces and the marker before it taken away.
        if self.fresh {
            self.drop_spaces();
            while let Some(rest) = self.held.strip_prefix(THINK.0) {
                self.held = rest.trim_start().to_owned();
            }
            if THINK.0.starts_with(&self.held) {
                return false;
            }
        }
        if let Some(end) = self.held.find(THINK.1) {
            reasoning(self.held[..end].trim_end(), out);
            self.held.drain(..end + THINK.1.len());
            (self.state, self.skips, self.fresh) = (State::Text, true, true);
            return true;
        }
        let certain = certain(&self.held, THINK.1);
        if certain > 0 {
            self.fresh = false;
            reasoning(&self.held[..certain], out);
            self.held.drain(..certain);
        }
        false
    }

    fn next_text(&mut self, out: &mut Vec<Piece>) -> bool {
        let Some(calls) = &self.reading.calls else {
            let rest = std::mem::take(&mut self.held);
            self.text(&rest, out);
            return false;
        };
        let open = calls.format.open;
        if self.fresh {
            let begun = self.held.trim_start();
            if begun.starts_with('{') || begun.starts_with(FENCE) {
                self.state = State::Head { marker: false };
                return true;
            }
            // Nothing yet, or not all of a fence.
            if FENCE.starts_with(begun) {
                return false;
            }
        }
        if let Some(at) = self.held.find(open) {
            let mut before: String = self.held.drain(..at).collect();
            self.held.drain(..open.len());
            self.spaces = before.split_off(before.trim_end().len());
            self.state = State::Head { marker: true };
            self.text(&before, out);
            return true;
        }
        let certain = certain(&self.held, open);
        let text: String = self.held.drain(..certain).collect();
        self.text(&text, out);
        false
    }

    fn head(&mut self, marker: bool, out: &mut Vec<Piece>) -> bool {
        let Some(calls) = &self.reading.calls else { return false };
        let Some(fence) = (if marker { Some(0) } else { fence(&self.held) }) else { return false };
        self.close = if fence > 0 { FENCE } else { calls.format.close };
        let is_tool = |name: &str| calls.names.iter().any(|n| n == name);
        match call::head(&self.held[fence..], is_tool) {
            Head::More => false,
            Head::Not => {
                let mut text = std::mem::take(&mut self.spaces);
                if marker && calls.marker_is_text {
                    text.push_str(calls.format.open);
                }
                // It is not fresh any more, so a brace is not taken for a call again.
                (self.state, self.fresh) = (State::Text, false);
                self.text(&text, out);
                true
            }
            Head::Open { name, at } => {
                self.held.drain(..fence + at);
                self.call(name, out);
                self.state = State::Arguments(Scanner::default());
                true
            }
            Head::Whole { name, arguments, end } => {
                self.held.drain(..fence + end);
                let index = self.call(name, out);
                out.push(Piece::Arguments { index, text: arguments });
                self.state = State::Tail { closed: true };
                true
            }
        }
    }

    fn call(&mut self, name: String, out: &mut Vec<Piece>) -> usize {
        let index = self.calls;
        self.calls += 1;
        (self.fresh, self.skips) = (false, false);
        self.spaces.clear();
        out.push(Piece::Call { index, id: super::new_id(), name });
        index
    }

    fn arguments(&mut self, out: &mut Vec<Piece>) -> bool {
        let State::Arguments(scanner) = &mut self.state else { return false };
        let end = scanner.end(&self.held);
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        if !text.is_empty() {
            out.push(Piece::Arguments { index: self.calls - 1, text });
        }
        if end.is_some() {
            self.state = State::Tail { closed: false };
        }
        end.is_some()
    }

    fn tail(&mut self, closed: bool) -> bool {
        self.drop_spaces();
        if !closed && self.held.is_empty() {
            return false;
        }
        if !closed && self.held.starts_with('}') {
            self.held.drain(..1);
            self.state = State::Tail { closed: true };
            return true;
        }
        if self.held.starts_with(self.close) {
            self.held.drain(..self.close.len());
        } else if self.close.starts_with(&self.held) {
            return false;
        }
        (self.state, self.skips) = (State::Text, true);
        true
    }

    fn drop_spaces(&mut self) {
        let spaces = self.held.len() - self.held.trim_start().len();
        self.held.drain(..spaces);
    }

    /// Text for the user.
    fn text(&mut self, text: &str, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        (self.fresh, self.skips) = (false, false);
        match out.last_mut() {
            Some(Piece::Text(last)) => last.push_str(text),
            _ => out.push(Piece::Text(text.to_owned())),
        }
    }
}

/// How long a code block's beginning is, with which some models open a call that is their whole output; none
/// while it may go on.
fn fence(text: &str) -> Option<usize> {
    let Some(rest) = text.trim_start().strip_prefix(FENCE) else { return Some(0) };
    match rest.strip_prefix("json") {
        Some(rest) => Some(text.len() - rest.len()),
        None if "json".starts_with(rest) => None,
        None => Some(text.len() - rest.len()),
    }
}

fn reasoning(text: &str, out: &mut Vec<Piece>) {
    if !text.is_empty() {
        out.push(Piece::Reasoning(text.to_owned()));
    }
}

/// How much of `text` neither begins `marker` nor is space that may stand before it.
fn certain(text: &str, marker: &str) -> usize {
    let begun = (1..marker.len().min(text.len() + 1)).rev().find(|&n| text.ends_with(&marker[..n]));
    text[..text.len() - begun.unwrap_or(0)].trim_end().len()
}
