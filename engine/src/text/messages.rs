//! Messages as clients send them, brought into the form that chat templates are written for.

use serde_json::{Map, Value as Json};

/// True when the template knows the role `developer`.
pub(super) fn knows_developer(template: &str) -> bool {
    template.contains("'developer'") || template.contains("\"developer\"")
}

/// The message in the form that `template` (its source) expects; an error says what is wrong with it.
pub(super) fn normalised(message: &Json, template: &str) -> Result<Json, String> {
    let Json::Object(message) = message else { return Err("a message is not an object".to_owned()) };
    let mut message = message.clone();
    if message.get("role").and_then(Json::as_str) == Some("developer") && !knows_developer(template) {
        message.insert("role".to_owned(), "system".into());
    }
    if matches!(message.get("tool_calls"), Some(Json::Null)) || is_empty_list(message.get("tool_calls")) {
        message.shift_remove("tool_calls");
    }
    content(&mut message, template)?;
    for call in message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten() {
        parse_arguments(call);
    }
    Ok(Json::Object(message))
}

fn is_empty_list(value: Option<&Json>) -> bool {
    value.and_then(Json::as_array).is_some_and(Vec::is_empty)
}

fn content(message: &mut Map<String, Json>, template: &str) -> Result<(), String> {
    let text = match message.get("content") {
        None | Some(Json::Null) if message.contains_key("tool_calls") && tests_for_none(template) => {
            Json::Null
        }
        None | Some(Json::Null) => Json::String(String::new()),
        Some(Json::Array(parts)) => Json::String(joined(parts)?),
        Some(_) => return Ok(()),
    };
    message.insert("content".to_owned(), text);
    Ok(())
}

/// Some templates tell a message that calls tools by its content being none; to all others none is a
/// value they were not written for.
fn tests_for_none(template: &str) -> bool {
    let tested = |words: &str| {
        template.match_indices(words).any(|(at, _)| {
            let before = template[..at].trim_end().trim_end_matches(['\'', '"', ']', ')']);
            before.ends_with("content")
        })
    };
    tested(" is none") || tested(" is not none")
}

/// The text of content parts, as one string.
fn joined(parts: &[Json]) -> Result<String, String> {
    let text = |part: &Json| match (part, part.get("text")) {
        (Json::String(text), _) | (_, Some(Json::String(text))) => Ok(text.clone()),
        _ => {
            let kind = part.get("type").and_then(Json::as_str).unwrap_or("unknown");
            Err(format!("content holds a part of type {kind:?}; only text is supported"))
        }
    };
    parts.iter().map(text).collect()
}

/// `arguments` come as a string of JSON and templates print them as JSON: parsed here, in its order.
fn parse_arguments(call: &mut Json) {
    let holder = if call.get("function").is_some() { call.get_mut("function") } else { Some(call) };
    let Some(arguments) = holder.and_then(|holder| holder.get_mut("arguments")) else { return };
    let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Map<String, Json>>(text).ok());
    if let Some(object) = parsed {
        *arguments = Json::Object(object);
    }
}
