//! Tools for models whose chat template knows none: the system message tells what they are and how to call them,
//! and earlier calls and answers become text, all as Qwen's template would have it.

use serde_json::{Map, Value as Json, json};

use super::{family::Format, hermes};

pub(super) const FORMAT: Format = hermes::FORMAT;

/// Rewrites a conversation (in the template's terms) so that a template without tools can say it.
pub(crate) fn rewrite(messages: Vec<Json>, tools: Option<&[Json]>) -> Vec<Json> {
    let mut out: Vec<Json> = Vec::with_capacity(messages.len() + 1);
    let mut answers = false;
    for mut message in messages {
        let is_answer = message["role"] == "tool";
        if is_answer {
            let text = format!("<tool_response>\n{}\n</tool_response>", content(&message));
            match out.last_mut().filter(|_| answers) {
                // Answers to several calls are one message of the user's.
                Some(last) => {
                    if let Json::String(all) = &mut last["content"] {
                        all.push('\n');
                        all.push_str(&text);
                    }
                }
                None => out.push(json!({"role": "user", "content": text})),
            }
        } else {
            if let Some(calls) = message.as_object_mut().and_then(|m| m.shift_remove("tool_calls")) {
                message["content"] = with_calls(content(&message), &calls).into();
            }
            out.push(message);
        }
        answers = is_answer;
    }
    if let Some(tools) = tools {
        describe(&mut out, tools);
    }
    out
}

fn content(message: &Json) -> &str {
    message["content"].as_str().unwrap_or_default()
}

fn with_calls(text: &str, calls: &Json) -> String {
    let calls = calls.as_array().into_iter().flatten().map(|call| {
        let function = &call["function"];
        let (name, arguments) = (&function["name"], spaced(&function["arguments"]));
        format!("{}\n{{\"name\": {name}, \"arguments\": {arguments}}}\n{}", FORMAT.open, FORMAT.close)
    });
    let text = (!text.is_empty()).then(|| text.to_owned());
    text.into_iter().chain(calls).collect::<Vec<_>>().join("\n")
}

/// Puts the definitions behind what the system message says.
fn describe(messages: &mut Vec<Json>, tools: &[Json]) {
    let listed: Vec<String> = tools.iter().map(spaced).collect();
    let text = format!(
        "You may call one or more functions to help the user. Here they are, each with a JSON schema of its \
         arguments:\n<tools>\n{}\n</tools>\n\nTo call a function, write a JSON object with its name and its \
         arguments between <tool_call> and </tool_call>, like this:\n<tool_call>\n\
         {{\"name\": <name>, \"arguments\": <object>}}\n</tool_call>\nIf no function helps, answer without one.",
        listed.join("\n")
    );
    match messages.first_mut().filter(|first| first["role"] == "system") {
        Some(first) if content(first).is_empty() => first["content"] = text.into(),
        Some(first) => first["content"] = format!("{}\n\n{text}", content(first)).into(),
        None => messages.insert(0, json!({"role": "system", "content": text})),
    }
}

/// JSON with a space after commas and colons, as Python and so the models' training data write it.
fn spaced(value: &Json) -> String {
    match value {
        Json::Array(items) => {
            format!("[{}]", items.iter().map(spaced).collect::<Vec<_>>().join(", "))
        }
        Json::Object(map) => spaced_object(map),
        other => other.to_string(),
    }
}

fn spaced_object(map: &Map<String, Json>) -> String {
    let entries = map.iter().map(|(key, value)| format!("{}: {}", json!(key), spaced(value)));
    format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_answers_become_text() {
        let call =
            |name: &str| json!({"type": "function", "function": {"name": name, "arguments": {"a": [1, 2]}}});
        let messages = vec![
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "so", "tool_calls": [call("f"), call("g")]}),
            json!({"role": "tool", "content": "1", "tool_call_id": "x"}),
            json!({"role": "tool", "content": "2"}),
            json!({"role": "user", "content": "and"}),
        ];
        let text = |name| {
            format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"a\": [1, 2]}}}}\n</tool_call>")
        };
        assert_eq!(
            Json::from(rewrite(messages, None)),
            json!([
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": format!("so\n{}\n{}", text("f"), text("g"))},
                {"role": "user", "content":
                    "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"},
                {"role": "user", "content": "and"},
            ])
        );
    }

    #[test]
    fn tools_are_told_behind_the_system_message() {
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": []}}})];
        let told = rewrite(vec![json!({"role": "system", "content": "Be brief."})], Some(&tools));
        let text = content(&told[0]);
        assert!(text.starts_with("Be brief.\n\nYou may call"), "{text}");
        let listed = r#"{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": []}}}"#;
        assert!(text.contains(&format!("<tools>\n{listed}\n</tools>")), "{text}");
        let told = rewrite(vec![json!({"role": "user", "content": "hi"})], Some(&tools));
        assert_eq!((told.len(), &told[0]["role"]), (2, &json!("system")));
    }
}
