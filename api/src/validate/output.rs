//! What an output may be and how it is read: from the tools, the answer's format, and the model's ways.

use m40llm_engine::{
    Constraint, Engine, Grammar,
    text::{ChatTemplate, Tokenizer},
};
use serde_json::json;

use super::tools::{Function, Tools};
use crate::{
    error::ApiError,
    tools::{Calling, Calls, Family, Mark, Reading, THINK, Thinks},
};

/// For the choices of a request.
pub(super) struct Output {
    pub(super) constraint: Option<Constraint>,
    /// Control tokens that are markers, and so printed.
    pub(super) printed: Vec<u32>,
    pub(super) reading: Reading,
}

impl Output {
    /// `prompt` is the rendered one; `answer` what an output without calls must be.
    pub(super) fn new(
        engine: &Engine,
        template: &ChatTemplate,
        prompt: &str,
        tools: &Tools,
        answer: Option<&Grammar>,
    ) -> Result<Self, ApiError> {
        let tokenizer = engine.tokenizer();
        let json = match answer {
            Some(Grammar::JsonObject) => Some(json!({"type": "object"})),
            Some(Grammar::JsonSchema(schema)) => Some(schema.clone()),
            _ => None,
        };
        if answer.is_some() && json.is_none() {
            return Self::of_grammar(engine, tools, answer);
        }
        let thinks = thinks(template, prompt);
        let format = Family::of(template).format();
        let mut output =
            Self { constraint: None, printed: Vec::new(), reading: Reading { calls: None, thinks } };
        if !tools.functions.is_empty() {
            output.print(tokenizer, format.open);
            output.reading.calls = Some(Calls {
                format,
                names: tools.functions.iter().map(|function| function.name.clone()).collect(),
                marker_is_text: output.printed.is_empty(),
            });
        }
        if thinks.is_some() {
            output.print(tokenizer, THINK.0);
            output.print(tokenizer, THINK.1);
        }
        if tools.functions.is_empty() && json.is_none() {
            return Ok(output);
        }
        let functions = tools
            .functions
            .iter()
            .map(|function| Ok((function.name.as_str(), arguments(function, tools.must, engine)?)));
        let answer = json.as_ref().map(Grammar::json).transpose();
        let calling = Calling {
            tokenizer,
            format,
            functions: functions.collect::<Result<_, ApiError>>()?,
            must: tools.must,
            several: tools.several,
            thinks,
            answer: answer.map_err(|e| ApiError::invalid("response_format", e))?,
        };
        let param = if tools.functions.is_empty() { "response_format" } else { "tools" };
        let constraint = engine.constrain(&Grammar::Lark(calling.lark()));
        output.constraint = Some(constraint.map_err(|e| ApiError::invalid(param, e))?);
        Ok(output)
    }

    /// An answer that is not JSON stands alone.
    fn of_grammar(engine: &Engine, tools: &Tools, answer: Option<&Grammar>) -> Result<Self, ApiError> {
        if !tools.functions.is_empty() {
            let what = "together with an output that follows a grammar they cannot be called; use `none`";
            return Err(ApiError::invalid("tool_choice", what));
        }
        let constraint = answer.map(|grammar| engine.constrain(grammar)).transpose();
        let constraint = constraint.map_err(|e| ApiError::invalid("response_format", e))?;
        Ok(Self { constraint, printed: Vec::new(), reading: Reading::default() })
    }

    /// A marker that is a control token must be printed to be seen.
    fn print(&mut self, tokenizer: &Tokenizer, marker: &'static str) {
        if let Mark::Token(id) = Mark::of(marker, tokenizer)
            && tokenizer.is_control(id)
        {
            self.printed.push(id);
        }
    }
}

/// Whether the model thinks before it answers, and whether the prompt has begun that.
fn thinks(template: &ChatTemplate, prompt: &str) -> Option<Thinks> {
    if !template.mentions(THINK.1) || prompt.trim_end().ends_with(THINK.1) {
        None
    } else if prompt.trim_end().ends_with(THINK.0) {
        Some(Thinks::Already)
    } else {
        Some(Thinks::Maybe)
    }
}

/// A function's arguments as an expression of the grammar. A schema that cannot be enforced is refused where the
/// call must be made or is strict; elsewhere it was a hint, and the arguments are any object.
fn arguments(function: &Function, must: bool, engine: &Engine) -> Result<String, ApiError> {
    let schema = Grammar::JsonSchema(function.parameters.clone());
    let any = || Grammar::json(&json!({"type": "object"}));
    let expression = match engine.constrain(&schema) {
        Ok(_) => Grammar::json(&function.parameters),
        Err(error) if must || function.strict => Err(error),
        Err(_) => any(),
    };
    expression.map_err(|e| ApiError::invalid(format!("tools[{}].function.parameters", function.place), e))
}
