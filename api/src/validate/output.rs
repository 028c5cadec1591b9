//! What an output may be and how it is read: from the tools, the answer's format, and the model's ways.

use m40llm_engine::{
    Constraint, ConstraintError, Engine, Grammar,
    text::{ChatTemplate, Tokenizer},
};
use serde_json::json;

use super::{
    format::Answer,
    tools::{Function, Tools},
};
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
        answer: Option<&Answer>,
    ) -> Result<Self, ApiError> {
        let tokenizer = engine.tokenizer();
        let json = match answer.map(|answer| &answer.grammar) {
            Some(Grammar::JsonObject) => Some(json!({"type": "object"})),
            Some(Grammar::JsonSchema(schema)) => Some(schema.clone()),
            _ => None,
        };
        if let Some(answer) = answer.filter(|_| json.is_none()) {
            return Self::of_grammar(tools, answer);
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
        if tools.functions.is_empty() && (json.is_none() || thinks.is_none()) {
            output.constraint = answer.map(|answer| answer.constraint.clone());
            return Ok(output);
        }
        let param = answer.map_or("tools", |answer| answer.param);
        let json = json.as_ref().map(Grammar::json).transpose();
        let mut calling = Calling {
            tokenizer,
            format,
            functions: arguments(tools, |_| Ok(()))?,
            must: tools.must,
            several: tools.several,
            thinks,
            answer: json.map_err(|e| ApiError::invalid(param, e))?,
        };
        let mut constraint = engine.constrain(&Grammar::Lark(calling.lark()));
        if constraint.is_err() {
            // Which of the schemas it was is only asked then.
            calling.functions = arguments(tools, |schema| engine.constrain(schema).map(drop))?;
            constraint = engine.constrain(&Grammar::Lark(calling.lark()));
        }
        output.constraint = Some(constraint.map_err(|e| ApiError::invalid(param, e))?);
        Ok(output)
    }

    /// An answer that is not JSON stands alone.
    fn of_grammar(tools: &Tools, answer: &Answer) -> Result<Self, ApiError> {
        if !tools.functions.is_empty() {
            let what = "together with an output that follows a grammar they cannot be called; use `none`";
            return Err(ApiError::invalid("tool_choice", what));
        }
        let constraint = Some(answer.constraint.clone());
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

/// The functions with their arguments as expressions of the grammar. A schema that cannot be enforced, which `check`
/// may find too, is refused where the call must be made or is strict; elsewhere it was a hint, and the arguments
/// are any object.
fn arguments(
    tools: &Tools,
    check: impl Fn(&Grammar) -> Result<(), ConstraintError>,
) -> Result<Vec<(&str, String)>, ApiError> {
    let expression = |function: &Function| {
        let schema = &function.parameters;
        let held = Grammar::json(schema)
            .and_then(|expression| check(&Grammar::JsonSchema(schema.clone())).map(|()| expression));
        match held {
            Err(_) if !tools.must && !function.strict => Grammar::json(&json!({"type": "object"})),
            held => held,
        }
    };
    let named = tools.functions.iter().map(|function| {
        let param = || format!("tools[{}].function.parameters", function.place);
        let expression = expression(function).map_err(|why| ApiError::invalid(param(), why))?;
        Ok((function.name.as_str(), expression))
    });
    named.collect()
}
