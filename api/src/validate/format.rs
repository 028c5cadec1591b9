//! What the answer must be, from the fields that say so.

use m40llm_engine::Grammar;
use serde_json::Value as Json;

use super::Form;
use crate::{
    error::{ApiError, shorten},
    openai::{
        chat::ChatRequest,
        completions::CompletionRequest,
        format::{ResponseFormat, StructuredOutputs},
    },
};

/// The fields that ask for a shape, as they came. At most one may.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Formats<'a> {
    response_format: Option<&'a ResponseFormat>,
    regex: Option<&'a String>,
    choice: Option<&'a Vec<String>>,
    grammar: Option<&'a String>,
    structured_outputs: Option<&'a StructuredOutputs>,
    guided_json: Option<&'a Json>,
    guided_regex: Option<&'a String>,
    guided_choice: Option<&'a Vec<String>>,
    guided_grammar: Option<&'a String>,
}

macro_rules! formats_of {
    ($request:ty) => {
        impl<'a> From<&'a $request> for Formats<'a> {
            fn from(request: &'a $request) -> Self {
                Self {
                    response_format: request.response_format.as_ref(),
                    regex: request.regex.as_ref(),
                    choice: request.choice.as_ref(),
                    grammar: request.grammar.as_ref(),
                    structured_outputs: request.structured_outputs.as_ref(),
                    guided_json: request.guided_json.as_ref(),
                    guided_regex: request.guided_regex.as_ref(),
                    guided_choice: request.guided_choice.as_ref(),
                    guided_grammar: request.guided_grammar.as_ref(),
                }
            }
        }
    };
}
formats_of!(ChatRequest);
formats_of!(CompletionRequest);

/// Longest grammar that a request may write, in bytes.
const MAX_GRAMMAR: usize = 64 << 10;

/// A shape that was asked for.
pub(super) struct Answer {
    pub(super) grammar: Grammar,
    /// The field that asked for it.
    pub(super) param: &'static str,
}

impl Answer {
    /// It, alone.
    pub(super) fn form(self) -> Form {
        Form::new(self.grammar, self.param)
    }
}

impl Formats<'_> {
    /// The grammar, if a field asks for one.
    pub(super) fn answer(&self) -> Result<Option<Answer>, ApiError> {
        Ok(self.grammar()?.map(|(param, grammar)| Answer { grammar, param }))
    }

    fn grammar(&self) -> Result<Option<(&'static str, Grammar)>, ApiError> {
        let mut asked = Vec::new();
        asked.extend(self.response_format.map(response_format).transpose()?.flatten());
        asked.extend(self.fields().into_iter().flatten());
        for (param, schema) in [
            ("structured_outputs.json", self.structured_outputs.and_then(|outputs| outputs.json.as_ref())),
            ("guided_json", self.guided_json),
        ] {
            if let Some(schema) = schema {
                asked.push((param, Grammar::JsonSchema(unquoted(param, schema)?)));
            }
        }
        if let [(first, _), (second, _), ..] = asked[..] {
            return Err(ApiError::invalid(
                second,
                format!("an output has one shape, and {first} asks for one too"),
            ));
        }
        match asked.pop() {
            Some((param, Grammar::Lark(text))) if text.len() > MAX_GRAMMAR => {
                Err(ApiError::invalid(param, format!("longer than {MAX_GRAMMAR} bytes")))
            }
            asked => Ok(asked),
        }
    }

    /// The fields whose values need no reading.
    fn fields(&self) -> [Option<(&'static str, Grammar)>; 10] {
        let none = StructuredOutputs::default();
        let nested = self.structured_outputs.unwrap_or(&none);
        let regex = |param, text: Option<&String>| text.map(|text| (param, Grammar::Regex(text.clone())));
        let choice =
            |param, texts: Option<&Vec<String>>| texts.map(|all| (param, Grammar::Choice(all.clone())));
        let lark = |param, text: Option<&String>| text.map(|text| (param, Grammar::Lark(text.clone())));
        let object = nested.json_object.filter(|&wanted| wanted);
        [
            regex("regex", self.regex),
            choice("choice", self.choice),
            lark("grammar", self.grammar),
            regex("structured_outputs.regex", nested.regex.as_ref()),
            choice("structured_outputs.choice", nested.choice.as_ref()),
            lark("structured_outputs.grammar", nested.grammar.as_ref()),
            object.map(|_| ("structured_outputs.json_object", Grammar::JsonObject)),
            regex("guided_regex", self.guided_regex),
            choice("guided_choice", self.guided_choice),
            lark("guided_grammar", self.guided_grammar),
        ]
    }
}

fn response_format(format: &ResponseFormat) -> Result<Option<(&'static str, Grammar)>, ApiError> {
    const SCHEMA: &str = "response_format.json_schema.schema";
    match format.r#type.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(("response_format", Grammar::JsonObject))),
        "json_schema" => {
            let missing = |param| ApiError::invalid(param, "it is missing; `json_schema` needs it");
            let format = format.json_schema.as_ref().ok_or_else(|| missing("response_format.json_schema"))?;
            let name = format.name.as_ref().ok_or_else(|| missing("response_format.json_schema.name"))?;
            let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if !(1..=64).contains(&name.len()) || !name.chars().all(known) {
                let what = format!("{:?} is not 1 to 64 letters, digits, `_` and `-`", shorten(name));
                return Err(ApiError::invalid("response_format.json_schema.name", what));
            }
            let schema = format.schema.as_ref().ok_or_else(|| missing(SCHEMA))?;
            if !schema.is_object() {
                return Err(ApiError::invalid(SCHEMA, "it must be an object"));
            }
            Ok(Some((SCHEMA, Grammar::JsonSchema(schema.clone()))))
        }
        kind => Err(ApiError::invalid(
            "response_format.type",
            format!("{:?} is unknown; it must be text, json_object or json_schema", shorten(kind)),
        )),
    }
}

/// A schema that may have been written into a string.
fn unquoted(param: &'static str, schema: &Json) -> Result<Json, ApiError> {
    match schema {
        Json::String(text) => serde_json::from_str(text)
            .map_err(|why| ApiError::invalid(param, format!("the string is not JSON: {why}"))),
        schema => Ok(schema.clone()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[expect(clippy::needless_pass_by_value, reason = "called with json! in place")]
    fn asked(body: Json) -> Result<Option<(&'static str, Grammar)>, String> {
        let mut whole = json!({"messages": []});
        whole.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let request: ChatRequest = serde_json::from_value(whole).unwrap();
        let formats = Formats::from(&request);
        formats.grammar().map_err(|error| error.body().error.param.unwrap_or_default())
    }

    #[test]
    fn each_field_asks_for_its_grammar() {
        assert_eq!(asked(json!({})), Ok(None));
        assert_eq!(asked(json!({"response_format": {"type": "text"}, "regex": null})), Ok(None));
        let schema = json!({"type": "array"});
        let by_schema = Grammar::JsonSchema(schema.clone());
        for (body, param, grammar) in [
            (json!({"response_format": {"type": "json_object"}}), "response_format", Grammar::JsonObject),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a-1", "schema": schema, "strict": true}}}),
                "response_format.json_schema.schema",
                by_schema.clone(),
            ),
            (json!({"regex": "a+"}), "regex", Grammar::Regex("a+".into())),
            (
                json!({"choice": ["a"], "response_format": {"type": "text"}}),
                "choice",
                Grammar::Choice(vec!["a".into()]),
            ),
            (json!({"grammar": "start: \"a\""}), "grammar", Grammar::Lark("start: \"a\"".into())),
            (json!({"structured_outputs": {"json": schema}}), "structured_outputs.json", by_schema.clone()),
            (
                json!({"structured_outputs": {"json_object": true}}),
                "structured_outputs.json_object",
                Grammar::JsonObject,
            ),
            (json!({"guided_json": schema.to_string()}), "guided_json", by_schema),
            (json!({"guided_choice": ["a"]}), "guided_choice", Grammar::Choice(vec!["a".into()])),
        ] {
            assert_eq!(asked(body), Ok(Some((param, grammar))));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let json_schema =
            |format: Json| json!({"response_format": {"type": "json_schema", "json_schema": format}});
        for (body, param) in [
            (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (json_schema(json!({"schema": {}})), "response_format.json_schema.name"),
            (json_schema(json!({"name": "a b", "schema": {}})), "response_format.json_schema.name"),
            (json_schema(json!({"name": "", "schema": {}})), "response_format.json_schema.name"),
            (json_schema(json!({"name": "a"})), "response_format.json_schema.schema"),
            (json_schema(json!({"name": "a", "schema": "{}"})), "response_format.json_schema.schema"),
            (json!({"regex": "a", "choice": ["a"]}), "choice"),
            (json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}), "guided_regex"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"grammar": "x".repeat(MAX_GRAMMAR + 1)}), "grammar"),
        ] {
            assert_eq!(asked(body), Err(param.into()));
        }
    }
}
