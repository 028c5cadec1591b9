//! Messages and tools as chat templates see them.

use m40llm_engine::text::ChatTemplate;
use serde_json::{Map, Value as Json, json};

use crate::{
    error::{ApiError, shorten},
    openai::chat::{ChatMessage, Content, ContentPart, ToolCall},
    tools::{Family, rewrite},
};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// The prompt that `template` makes of a conversation, ending where the assistant begins to speak.
pub(crate) fn render(
    messages: Vec<ChatMessage>,
    tools: Option<&[Json]>,
    kwargs: Option<&Map<String, Json>>,
    template: &ChatTemplate,
) -> Result<String, ApiError> {
    let messages = to_template(messages, template.knows_developer())?;
    let (messages, tools) = match Family::of(template) {
        Family::Generic => (rewrite(messages, tools), None),
        Family::Hermes | Family::Llama => (messages, tools),
    };
    template.render(&messages, tools, true, kwargs).map_err(|e| ApiError::template(e, "messages"))
}

/// The messages in the template's terms.
fn to_template(messages: Vec<ChatMessage>, knows_developer: bool) -> Result<Vec<Json>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "it must hold at least one message"));
    }
    messages.into_iter().enumerate().map(|(i, message)| one(i, message, knows_developer)).collect()
}

fn one(i: usize, message: ChatMessage, knows_developer: bool) -> Result<Json, ApiError> {
    let role = match message.role.as_str() {
        "developer" if !knows_developer => "system",
        "function" => "tool",
        role if ROLES.contains(&role) => role,
        role => {
            return Err(ApiError::invalid(
                format!("messages[{i}].role"),
                format!("{:?} is unknown; it must be one of {}", shorten(role), ROLES.join(", ")),
            ));
        }
    };
    let mut out = Map::new();
    out.insert("role".into(), role.into());
    // Templates print the content; an empty string is as good as none to them, and prints as nothing.
    let content = match message.content {
        None => String::new(),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => join(i, parts)?,
    };
    out.insert("content".into(), content.into());
    for (key, value) in [
        ("name", message.name),
        ("reasoning_content", message.reasoning_content),
        ("tool_call_id", message.tool_call_id),
    ] {
        if let Some(value) = value {
            out.insert(key.into(), value.into());
        }
    }
    let calls = message.tool_calls.unwrap_or_default();
    if !calls.is_empty() {
        out.insert("tool_calls".into(), calls.into_iter().map(call).collect());
    }
    Ok(out.into())
}

/// The texts of a message's parts, a line each, as llama-server joins them.
fn join(i: usize, parts: Vec<ContentPart>) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (j, part) in parts.into_iter().enumerate() {
        let param = || format!("messages[{i}].content[{j}]");
        match (part.r#type.as_str(), part.text, part.refusal) {
            ("text", Some(text), _) | ("refusal", _, Some(text)) => texts.push(text),
            ("text", None, _) => {
                return Err(ApiError::invalid(format!("{}.text", param()), "this field is required"));
            }
            (kind, ..) => {
                return Err(ApiError::invalid(
                    param(),
                    format!("parts of type {:?} are not supported; only `text` is", shorten(kind)),
                ));
            }
        }
    }
    Ok(texts.join("\n"))
}

/// A call with its arguments parsed, the order of their keys kept: templates print them as JSON.
fn call(call: ToolCall) -> Json {
    let arguments = match call.function.arguments {
        Some(Json::String(text)) => serde_json::from_str(&text).unwrap_or(Json::String(text)),
        Some(Json::Null) | None => json!({}),
        Some(other) => other,
    };
    let mut out = Map::new();
    if let Some(id) = call.id {
        out.insert("id".into(), id.into());
    }
    out.insert("type".into(), "function".into());
    out.insert("function".into(), json!({"name": call.function.name, "arguments": arguments}));
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(messages: Json, developer: bool) -> Result<Json, ApiError> {
        to_template(serde_json::from_value(messages).unwrap(), developer).map(Json::Array)
    }

    fn param(result: Result<Json, ApiError>) -> String {
        result.unwrap_err().body().error.param.unwrap()
    }

    #[test]
    fn content_is_a_string() {
        let messages = json!([
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": []},
            {"role": "assistant"},
        ]);
        assert_eq!(
            convert(messages, false).unwrap(),
            json!([
                {"role": "system", "content": "d"},
                {"role": "user", "content": "a\nb"},
                {"role": "assistant", "content": ""},
                {"role": "assistant", "content": ""},
            ])
        );
        assert_eq!(convert(json!([{"role": "developer"}]), true).unwrap()[0]["role"], "developer");
    }

    #[test]
    fn arguments_are_parsed_in_order() {
        let messages = json!([{"role": "assistant", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"z\": 1, \"a\": 2}"}},
            {"function": {"name": "g", "arguments": {"x": []}}},
            {"function": {"name": "h", "arguments": "not json"}},
            {"function": {"name": "i"}},
        ]}]);
        let converted = convert(messages, false).unwrap();
        let calls = &converted[0]["tool_calls"];
        assert_eq!(serde_json::to_string(&calls[0]["function"]["arguments"]).unwrap(), r#"{"z":1,"a":2}"#);
        assert_eq!(calls[0]["id"], "call_1");
        assert_eq!(calls[1]["function"]["arguments"], json!({"x": []}));
        assert_eq!(calls[2]["function"]["arguments"], "not json");
        assert_eq!(calls[3]["function"]["arguments"], json!({}));
    }

    #[test]
    fn errors_name_the_place() {
        assert_eq!(param(convert(json!([]), false)), "messages");
        assert_eq!(param(convert(json!([{"role": "user"}, {"role": "king"}]), false)), "messages[1].role");
        let image = json!([{"role": "user", "content": [
            {"type": "text", "text": "what is this"},
            {"type": "image_url", "image_url": {"url": "data:"}},
        ]}]);
        assert_eq!(param(convert(image, false)), "messages[0].content[1]");
        let empty = json!([{"role": "user", "content": [{"type": "text"}]}]);
        assert_eq!(param(convert(empty, false)), "messages[0].content[0].text");
    }
}
