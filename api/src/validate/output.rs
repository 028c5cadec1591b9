//! What an output may be and how it is read: from the tools, the answer's format, and the model's ways.

use m40llm_engine::{
    ConstraintError, Grammar,
    text::{ChatTemplate, Tokenizer},
};
use serde_json::{Value as Json, json};

use super::{
    Form,
    format::Answer,
    tools::{Function, Tools},
};
use crate::{
    error::ApiError,
    tools::{Calling, Calls, Family, Mark, Reading, THINK, Thinks},
};

/// For the choices of a request.
pub(super) struct Output {
    /// What they must be, if that matters.
    pub(super) form: Option<Form>,
    /// Control tokens that are markers, and so printed.
    pub(super) printed: Vec<u32>,
    pub(super) reading: Reading,
}

impl Output {
    /// `prompt` is the rendered one; `answer` what an output without calls must be.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        prompt: &str,
        tools: &Tools,
        answer: Option<Answer>,
    ) -> Result<Self, ApiError> {
        let json = match answer.as_ref().map(|answer| &answer.grammar) {
            Some(Grammar::JsonObject) => Some(json!({"type": "object"})),
            Some(Grammar::JsonSchema(schema)) => Some(schema.clone()),
            _ => None,
        };
        let answer = match answer {
            Some(answer) if json.is_none() => return Self::of_grammar(tools, answer),
            answer => answer,
        };
        let thinks = thinks(template, prompt);
        let format = Family::of(template).format();
        let mut output = Self { form: None, printed: Vec::new(), reading: Reading { calls: None, thinks } };
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
            output.form = answer.map(Answer::form);
            return Ok(output);
        }
        let param = answer.as_ref().map_or("tools", |answer| answer.param);
        let arguments = arguments(tools)?;
        let calling = Calling {
            tokenizer,
            format,
            functions: arguments.iter().map(|(name, a)| (*name, a.expression.clone())).collect(),
            must: tools.must,
            several: tools.several,
            thinks,
            answer: json
                .as_ref()
                .map(Grammar::json)
                .transpose()
                .map_err(|why| ApiError::invalid(param, why))?,
        };
        let form = Form::new(Grammar::Lark(calling.lark()), param);
        let mut parts: Vec<_> = arguments.into_iter().map(|(_, a)| (a.param, a.schema)).collect();
        parts.extend(json.map(|schema| (param.to_owned(), Grammar::JsonSchema(schema))));
        output.form = Some(form.of_parts(parts));
        Ok(output)
    }

    /// An answer that is not JSON stands alone.
    fn of_grammar(tools: &Tools, answer: Answer) -> Result<Self, ApiError> {
        if !tools.functions.is_empty() {
            let what = "together with an output that follows a grammar they cannot be called; use `none`";
            return Err(ApiError::invalid("tool_choice", what));
        }
        Ok(Self { form: Some(answer.form()), printed: Vec::new(), reading: Reading::default() })
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

/// What a function's arguments are held to.
struct Arguments {
    /// In the grammar.
    expression: String,
    /// The same alone, to find out whether it is at fault, and the field that says it.
    schema: Grammar,
    param: String,
}

/// The functions with their arguments. A schema that cannot be enforced is refused, also where no call need be made:
/// whoever calls the function counts on it. Only where it is neither strict nor required are unknown `format`s what
/// JSON schema says that they are, notes.
fn arguments(tools: &Tools) -> Result<Vec<(&str, Arguments)>, ApiError> {
    let held = |function: &Function| -> Result<(Json, String), ConstraintError> {
        let mut schema = function.parameters.clone();
        if !tools.must && !function.strict {
            schema = Grammar::without_notes(&schema)?;
        }
        let expression = Grammar::json(&schema)?;
        Ok((schema, expression))
    };
    let named = tools.functions.iter().map(|function| {
        let param = format!("tools[{}].function.parameters", function.place);
        let (schema, expression) = held(function).map_err(|why| ApiError::invalid(&param, why))?;
        Ok((function.name.as_str(), Arguments { expression, schema: Grammar::JsonSchema(schema), param }))
    });
    named.collect()
}
