//! Outputs that follow a grammar: which tokens may come next.
//!
//! A [`Grammar`] is compiled for the model's vocabulary on the caller's task. Each choice then walks a copy of its
//! own: a mask before a token is sampled, a step after it. The work is llguidance's; here it is bounded, and held
//! away from the other requests.

mod schema;
mod vocabulary;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, OnceLock},
};

use llguidance::{Matcher, api::StopReason, api::TopLevelGrammar, toktrie::SimpleVob};
use serde_json::{Value, json};

use self::vocabulary::Vocabulary;
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
    /// special tokens (`<tool_call>`) and hold JSON schemas, which [`Grammar::json`] writes.
    Lark(String),
}

impl Grammar {
    /// A JSON schema as an expression of a Lark grammar: held to the same rules as [`Grammar::JsonSchema`].
    pub fn json(schema: &Value) -> Result<String, ConstraintError> {
        Ok(format!("%json {}", schema::enforced(schema)?))
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

/// A grammar compiled for one vocabulary. Each choice of a request walks its own copy.
#[derive(Clone)]
pub struct Constraint(Arc<Compiled>);

struct Compiled {
    /// As it was before the first token.
    matcher: Mutex<Matcher>,
    first: Mask,
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
        let made = || guarded(|| Vocabulary::new(tokenizer));
        let vocabulary = self.0.get_or_init(made).as_ref().map_err(|why| {
            ConstraintError::Grammar(format!("this model's vocabulary cannot be constrained: {why}"))
        })?;
        let top = match grammar {
            Grammar::JsonObject => {
                TopLevelGrammar::from_json_schema(schema::enforced(&json!({"type": "object"}))?)
            }
            Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema::enforced(schema)?),
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Choice(texts) => TopLevelGrammar::from_lark(one_of(texts)?),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let compiled = guarded(|| {
            let mut matcher = Matcher::new(Ok(vocabulary.compile(top)?));
            let first = matcher.compute_mask().map_err(|error| error.to_string())?;
            Ok(Compiled { matcher: Mutex::new(matcher), first: Mask(first) })
        });
        compiled.map(|compiled| Constraint(Arc::new(compiled))).map_err(ConstraintError::Grammar)
    }
}

/// Texts of which one is to be written, as a Lark grammar.
fn one_of(texts: &[String]) -> Result<String, ConstraintError> {
    if texts.is_empty() || texts.iter().any(String::is_empty) {
        let what = "the choices must be one text at least, and none of them empty";
        return Err(ConstraintError::Grammar(what.into()));
    }
    let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
    Ok(format!("start: {}", quoted.join(" | ")))
}

/// Runs what may panic on a grammar nobody has thought of.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err("it cannot be compiled".into()))
        .map_err(|why| why.lines().next().unwrap_or_default().to_owned())
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
pub(crate) struct Walk {
    constraint: Constraint,
    /// None before the first token.
    state: Option<(Matcher, Option<Mask>)>,
}

impl Walk {
    pub(crate) fn new(constraint: Constraint) -> Self {
        Self { constraint, state: None }
    }

    /// What may come next.
    pub(crate) fn mask(&mut self) -> Result<&Mask, EngineError> {
        let Some((matcher, mask)) = &mut self.state else { return Ok(&self.constraint.0.first) };
        if mask.is_none() {
            let computed = guarded(|| matcher.compute_mask().map_err(|error| error.to_string()));
            *mask = Some(Mask(computed.map_err(|_| failure(matcher))?));
        }
        mask.as_ref().ok_or_else(|| failure(matcher))
    }

    /// Goes on with `token`, one of the mask's. True when nothing may follow it.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool, EngineError> {
        let (matcher, mask) =
            self.state.get_or_insert_with(|| (lock(&self.constraint.0.matcher).deep_clone(), None));
        *mask = None;
        guarded(|| matcher.consume_token(token).map_err(|error| error.to_string()))
            .map_err(|_| failure(matcher))?;
        Ok(matcher.is_stopped())
    }
}

/// What ended a walk. It tells nothing of the output or the grammar, as it may be logged.
fn failure(matcher: &Matcher) -> EngineError {
    let why = match matcher.stop_reason() {
        StopReason::LexerTooComplex => {
            "its texts take more memory or time to tell apart than one request is allowed"
        }
        StopReason::ParserTooComplex => "it is more ambiguous than one request is allowed",
        _ => "no token follows it any further",
    };
    EngineError::Constraint(why)
}
