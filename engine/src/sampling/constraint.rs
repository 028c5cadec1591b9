//! Outputs that follow a grammar: which tokens may come next.
//!
//! A [`Grammar`] is compiled for the model's vocabulary on the caller's task. Each choice then walks a copy of its
//! own: a mask before a token is sampled, a step after it. The work is llguidance's; here it is bounded, and held
//! away from the other requests.

mod masks;
mod schema;
mod vocabulary;

use std::{
    fmt, mem,
    sync::{Arc, Mutex, OnceLock, mpsc::Receiver},
    thread,
};

use llguidance::{Matcher, api::TopLevelGrammar, toktrie::SimpleVob};
use serde_json::{Value, json};

pub(crate) use self::masks::Masks;
use self::{masks::Computed, vocabulary::Vocabulary};
use crate::{error::EngineError, handle::lock, text::Tokenizer};

/// What an output must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// A JSON value that this schema allows.
    JsonSchema(Value),
    /// A text that this regular expression matches from end to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// What the rule `start` of this grammar derives, in llguidance's variant of Lark. It may name the model's
    /// special tokens (`<tool_call>`) and hold JSON schemas, which [`Grammar::json`] writes. Reading a text takes
    /// longer than its length alone says: bound what strangers write.
    Lark(String),
}

impl Grammar {
    /// A JSON schema as an expression of a Lark grammar: held to the same rules as [`Grammar::JsonSchema`].
    pub fn json(schema: &Value) -> Result<String, ConstraintError> {
        Ok(format!("%json {}", schema::enforced(schema)?))
    }

    /// What of a JSON schema is enforced where a `format` that is not is a note and no bound, as JSON schema has it.
    pub fn without_notes(schema: &Value) -> Result<Value, ConstraintError> {
        schema::without_notes(schema)
    }
}

/// Why there is no constraint: the caller's fault. One line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// A part of a JSON schema, by its JSON pointer, that is not valid or not enforced.
    #[error("at {at}: {what}")]
    Schema {
        /// `#` for all of it, or such as `#/properties/name`.
        at: String,
        /// What is wrong there, naming the keyword, and what is allowed.
        what: String,
    },
    /// A regular expression, a choice or a grammar that does not compile, or is larger than is allowed.
    #[error("{0}")]
    Grammar(String),
}

/// A grammar compiled for one vocabulary, before the first token. Each choice of a request walks its own copy.
#[derive(Clone)]
pub struct Constraint(Arc<Mutex<Matcher>>);

impl Constraint {
    /// A copy that shares nothing with it which could be used up: its texts are told apart at its own cost.
    fn matcher(&self) -> Matcher {
        lock(&self.0).deep_clone()
    }

    /// How many of `tokens` may begin an output, and whether it may end after them: to try a grammar out.
    pub fn allows(&self, tokens: &[u32]) -> (usize, bool) {
        let mut matcher = self.matcher();
        let fits = matcher.try_consume_tokens(tokens).unwrap_or(0);
        (fits, fits == tokens.len() && matcher.is_accepting().unwrap_or(false))
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

/// Compiles grammars. The vocabulary's trie is made for the first of them.
#[derive(Default)]
pub(crate) struct Constraints(OnceLock<Result<Vocabulary, String>>);

impl fmt::Debug for Constraints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraints")
    }
}

impl Constraints {
    pub(crate) fn compile(
        &self,
        tokenizer: &Tokenizer,
        grammar: &Grammar,
    ) -> Result<Constraint, ConstraintError> {
        let made = || on_a_deep_stack(|| Vocabulary::new(tokenizer));
        let vocabulary = self.0.get_or_init(made).as_ref().map_err(|why| {
            ConstraintError::Grammar(format!("this model's vocabulary cannot be constrained: {why}"))
        })?;
        let json = match grammar {
            Grammar::JsonObject => Some(json!({"type": "object"})),
            Grammar::JsonSchema(schema) => Some(schema.clone()),
            _ => None,
        };
        let top = match grammar {
            Grammar::JsonObject | Grammar::JsonSchema(_) => {
                TopLevelGrammar::from_json_schema(schema::enforced(json.as_ref().unwrap_or(&Value::Null))?)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(bounded(regex)?),
            Grammar::Choice(texts) => TopLevelGrammar::from_lark(one_of(texts)?),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let compiled = on_a_deep_stack(|| {
            let mut matcher = Matcher::new(Ok(vocabulary.compile(top)?));
            // The matcher keeps it, so that no copy computes it again.
            matcher.compute_mask().map_err(|_| reason(&matcher).to_owned())?;
            Ok(matcher)
        });
        match (compiled, json) {
            (Ok(matcher), _) => Ok(Constraint(Arc::new(Mutex::new(matcher)))),
            (Err(words), Some(schema)) => Err(schema::explained(&schema, &words)),
            (Err(words), None) => Err(ConstraintError::Grammar(words)),
        }
    }
}

/// Longest text of a regular expression or of all choices together.
const TEXT: usize = 64 << 10;
/// Compiling goes as deep as what is compiled is nested, and a stack that ends ends the process. Only what is
/// used of it is taken.
const STACK: usize = 256 << 20;

fn bounded(text: &str) -> Result<&str, ConstraintError> {
    let most = || ConstraintError::Grammar(format!("longer than {TEXT} bytes"));
    if text.len() > TEXT { Err(most()) } else { Ok(text) }
}

/// Runs what may go deep, and may panic on a grammar nobody has thought of.
fn on_a_deep_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    thread::scope(|scope| {
        let compiler = thread::Builder::new().name("m40llm-grammar".into()).stack_size(STACK);
        match compiler.spawn_scoped(scope, || work().map_err(|words| in_a_line(&words))) {
            Ok(running) => running.join().unwrap_or_else(|_| Err("it cannot be compiled".into())),
            Err(error) => Err(format!("no thread to compile it on: {error}")),
        }
    })
}

/// Texts of which one is to be written, as a Lark grammar.
fn one_of(texts: &[String]) -> Result<String, ConstraintError> {
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        let what = "the choices must be one text at least, and none of them empty";
        return Err(ConstraintError::Grammar(what.into()));
    }
    let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
    let grammar = format!("start: {}", quoted.join(" | "));
    bounded(&grammar)?;
    Ok(grammar)
}

/// The compiler's words in one line: where regular expressions are quoted at length, what is wrong with them.
fn in_a_line(words: &str) -> String {
    let verdict = words.lines().find_map(|line| line.trim().strip_prefix("error: "));
    let line = verdict.or_else(|| words.lines().next()).unwrap_or_default();
    match line.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into(),
    }
}

/// The tokens that may come next.
pub struct Mask(SimpleVob);

impl Mask {
    /// Takes the logits of all other tokens away.
    pub fn apply(&self, row: &mut [f32]) {
        for (logits, &word) in row.chunks_mut(32).zip(self.0.as_slice()) {
            if word == u32::MAX {
                continue;
            }
            for (bit, logit) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let known = self.0.as_slice().len() * 32;
        if let Some(rest) = row.get_mut(known..) {
            rest.fill(f32::NEG_INFINITY);
        }
    }
}

/// One choice's way through its grammar.
pub(crate) enum Walk {
    /// Before its first token: it holds nothing of its own while it waits for its turn.
    Start(Constraint),
    /// After a token.
    At(Box<Matcher>),
    /// The mask of what may come next is being computed.
    Beside(Receiver<Computed>),
    Ready(Box<Matcher>, Mask),
    /// It has ended or failed.
    Over,
}

impl Walk {
    /// Has the mask of what may come next computed beside the caller, for a step that will ask for it.
    pub(crate) fn prepare(&mut self, masks: &mut Masks) {
        *self = match mem::replace(self, Self::Over) {
            Self::Start(constraint) => Self::Beside(masks.compute(move || constraint.matcher())),
            Self::At(matcher) => Self::Beside(masks.compute(move || *matcher)),
            other => other,
        };
    }

    /// What may come next, which has been prepared. Waits for it where it is still being computed.
    pub(crate) fn mask(&mut self) -> Result<&Mask, EngineError> {
        if let Self::Beside(receiver) = self {
            let (matcher, mask) = receiver.recv().map_err(|_| broken())?;
            *self = Self::Ready(Box::new(matcher), mask?);
        }
        match self {
            Self::Ready(_, mask) => Ok(mask),
            _ => Err(broken()),
        }
    }

    /// Goes on with `token`, one of the mask's. True when nothing may follow it.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, EngineError> {
        let Self::Ready(mut matcher, _) = mem::replace(self, Self::Over) else { return Err(broken()) };
        matcher.consume_token(token).map_err(|_| failure(&matcher))?;
        if matcher.is_stopped() {
            return Ok(true);
        }
        *self = Self::At(matcher);
        Ok(false)
    }
}

fn broken() -> EngineError {
    EngineError::Constraint("its state is lost")
}

/// What ended a walk.
fn failure(matcher: &Matcher) -> EngineError {
    EngineError::Constraint(reason(matcher))
}

/// Why no token can follow. It tells nothing of the output or the grammar, as it may be logged.
fn reason(matcher: &Matcher) -> &'static str {
    // A matcher that has failed keeps its error's words, which begin with whose they are, and no more.
    match matcher.get_error() {
        Some(words) if words.contains("lexer error") => {
            "it takes more time or memory to tell its texts apart than a request is allowed"
        }
        Some(words) if words.contains("parser error") || words.contains("Parser Error") => {
            "it is more ambiguous than a request is allowed"
        }
        _ => "no text satisfies it",
    }
}
