//! What an output must be, once all else of a request is right: compiling it takes longer than all that.

use m40llm_engine::{Constraint, Engine, Grammar};

use super::Names;
use crate::error::ApiError;

/// A grammar to compile, and whom to blame when it does not.
pub(crate) struct Form {
    grammar: Grammar,
    /// The field that asked for it.
    param: String,
    /// What it is made of, by the fields: which of them it was is only asked then.
    parts: Vec<(String, Grammar)>,
}

impl Form {
    pub(super) fn new(grammar: Grammar, param: impl Into<String>) -> Self {
        Self { grammar, param: param.into(), parts: Vec::new() }
    }

    pub(super) fn of_parts(mut self, parts: Vec<(String, Grammar)>) -> Self {
        self.parts = parts;
        self
    }

    /// The same in the words of the request that the one at fault was made of.
    pub(super) fn renamed(mut self, names: &Names) -> Self {
        self.param = names.of(&self.param);
        for (param, _) in &mut self.parts {
            *param = names.of(param);
        }
        self
    }

    /// Takes long.
    pub(crate) fn compile(&self, engine: &Engine) -> Result<Constraint, ApiError> {
        engine.constrain(&self.grammar).map_err(|why| {
            let mut compiled = self.parts.iter().map(|(param, part)| (param, engine.constrain(part)));
            match compiled.find_map(|(param, part)| Some((param, part.err()?))) {
                Some((param, why)) => ApiError::invalid(param, why),
                None => ApiError::invalid(&self.param, why),
            }
        })
    }
}
