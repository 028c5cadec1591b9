//! What an output with calls must be, as a Lark grammar.
//!
//! Where a call must be made the output is calls and nothing else. Where one may be, it is free text up to a call's
//! marker, or up to `{"name": "f", "arguments": ` as its beginning; from there on it is a call of that function.

use std::fmt::{self, Write as _};

use m40llm_engine::text::Tokenizer;
use serde_json::Value as Json;

use super::{Format, THINK, Thinks};

/// What the grammar is made of.
pub(crate) struct Calling<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) format: &'static Format,
    /// Functions with their arguments, as expressions of the grammar.
    pub(crate) functions: Vec<(&'a str, String)>,
    pub(crate) must: bool,
    pub(crate) several: bool,
    pub(crate) thinks: Option<Thinks>,
    /// What the output must be where it is no call, if that matters; an expression too.
    pub(crate) answer: Option<String>,
}

/// A marker: a token of its own, or text like other text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Token(u32),
    Text(&'static str),
}

impl Mark {
    pub(crate) fn of(text: &'static str, tokenizer: &Tokenizer) -> Self {
        match tokenizer.encode(text, false, true)[..] {
            [id] if tokenizer.is_named(id) => Self::Token(id),
            _ => Self::Text(text),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(id) => write!(f, "<[{id}]>"),
            Self::Text(text) => f.write_str(&quoted(text)),
        }
    }
}

/// As a literal, which Lark writes as JSON does.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

impl Calling<'_> {
    /// The grammar.
    pub(crate) fn lark(&self) -> String {
        let rest = if self.must || self.answer.is_some() { self.bounded() } else { self.free() };
        let mut out = String::new();
        match self.thinks {
            Some(Thinks::Already) => {
                let _ = writeln!(out, "start: thoughts SPACE? rest\nrest: {rest}");
            }
            Some(Thinks::Maybe) => {
                let open = Mark::of(THINK.0, self.tokenizer);
                let _ = writeln!(out, "start: ({open} thoughts SPACE?)? rest\nrest: {rest}");
            }
            None => {
                let _ = writeln!(out, "start: {rest}");
            }
        }
        self.rules(&mut out);
        out
    }

    /// Calls only, or the answer.
    fn bounded(&self) -> String {
        let call = if self.format.bare { "body" } else { "call" };
        let calls = match (self.functions.is_empty(), self.several && self.format.several) {
            (true, _) => None,
            (_, true) => Some(format!(r#"{call} ("\n" {call})*"#)),
            (_, false) => Some(call.to_owned()),
        };
        let answer = self.answer.as_ref().filter(|_| !self.must).map(|_| "answer".to_owned());
        calls.into_iter().chain(answer).collect::<Vec<_>>().join(" | ")
    }

    /// Text, and calls if the model likes.
    fn free(&self) -> String {
        let calls = if self.several && self.format.several { "told* TEXT" } else { "TEXT | told" };
        format!("bare | {calls}")
    }

    fn rules(&self, out: &mut String) {
        let format = self.format;
        let (open, close) = (Mark::of(format.open, self.tokenizer), Mark::of(format.close, self.tokenizer));
        let space = if format.space.is_empty() { String::new() } else { quoted(format.space) };
        let close = if format.close.is_empty() { String::new() } else { close.to_string() };
        let each = |name: &str| {
            let all = (0..self.functions.len()).map(|i| format!("{name}{i} args{i} \"}}\""));
            all.collect::<Vec<_>>().join(" | ")
        };
        if !self.functions.is_empty() {
            let _ = writeln!(out, "call: {open} {space} body {space} {close}");
            let _ = writeln!(out, "body: {}", each("head"));
            let _ = writeln!(out, "bare: {}", each("bare"));
            let _ = writeln!(out, "told: until_open {space} body {space} {close}");
            until(out, "until_open", open, format.open);
        }
        for (i, (name, arguments)) in self.functions.iter().enumerate() {
            let head = quoted(&format!(r#"{{"name": "{name}", "{}": "#, format.arguments));
            let _ = writeln!(out, "head{i}: {head}\nbare{i}[lazy]: {head}\nargs{i}: {arguments}");
        }
        if let Some(answer) = &self.answer {
            let _ = writeln!(out, "answer: {answer}");
        }
        if self.thinks.is_some() {
            until(out, "thoughts", Mark::of(THINK.1, self.tokenizer), THINK.1);
        }
        out.push_str("SPACE: /[ \\n]{1,4}/\nTEXT: /(?s:.*)/\n");
    }
}

/// A rule for text that ends with the first `mark`, spelt out or not. As it is lazy, what follows the mark follows
/// the grammar, and is not text any more.
fn until(out: &mut String, name: &str, mark: Mark, spelt: &str) {
    let token = if let Mark::Token(_) = mark { format!("TEXT {mark} | ") } else { String::new() };
    let _ = writeln!(out, "{name}: {token}{name}_spelt\n{name}_spelt[lazy]: TEXT {}", quoted(spelt));
}
