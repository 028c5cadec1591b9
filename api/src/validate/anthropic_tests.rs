use serde_json::{Value, json};

use super::*;

fn converted(body: &Value) -> Result<(ChatRequest, Names), ApiError> {
    convert(serde_json::from_value(body.clone()).unwrap())
}

/// The messages: role, text parts, calls, thoughts, the call that is answered.
fn messages(body: &Value) -> Value {
    let (chat, _) = converted(body).unwrap();
    let one = |message: &ChatMessage| {
        let content = match &message.content {
            None => Value::Null,
            Some(Content::Text(text)) => json!(text),
            Some(Content::Parts(parts)) => parts.iter().map(|part| part.text.clone()).collect(),
        };
        let calls = message.tool_calls.iter().flatten();
        let calls = calls.map(|call| json!([call.id, call.function.name, call.function.arguments]));
        let calls: Vec<_> = calls.collect();
        json!([message.role, content, calls, message.reasoning_content, message.tool_call_id])
    };
    chat.messages.iter().map(one).collect()
}

fn fault(fields: &Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    let Err(error) = converted(&body) else { panic!("{body} was taken") };
    error.body().error.param.unwrap()
}

#[test]
fn blocks_become_turns() {
    let body = json!({
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "?"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"z": 1, "a": 2}},
                {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "one"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": true,
                 "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}]},
                {"type": "text", "text": "go on"},
            ]},
        ],
    });
    assert_eq!(
        messages(&body),
        json!([
            ["system", ["s"], [], null, null],
            ["user", ["a", "b"], [], null, null],
            ["assistant", ["c"], [["toolu_1", "f", {"z": 1, "a": 2}], ["toolu_2", "g", {}]], "hm", null],
            ["tool", "one", [], null, "toolu_1"],
            ["tool", "t\nwo", [], null, "toolu_2"],
            ["user", ["go on"], [], null, null],
        ])
    );
}

#[test]
fn faults_name_this_requests_fields() {
    let content = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
    for (fields, expected) in [
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "king", "content": "x"}]}), "messages[0].role"),
        (
            json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}),
            "messages",
        ),
        (content(json!({"type": "image", "source": {"type": "base64"}})), "messages[0].content[0]"),
        (content(json!({"type": "text"})), "messages[0].content[0].text"),
        (
            content(json!({"type": "tool_use", "id": "a", "name": "f", "input": {}})),
            "messages[0].content[0].type",
        ),
        (content(json!({"type": "tool_result"})), "messages[0].content[0].tool_use_id"),
        (
            content(json!({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]})),
            "messages[0].content[0].content[0]",
        ),
        (json!({"system": [{"type": "image"}]}), "system[0]"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools[0].type"),
        (json!({"tools": [{"name": "f"}]}), "tools[0].input_schema"),
        (json!({"tool_choice": {"type": "some"}}), "tool_choice.type"),
        (json!({"tool_choice": {"type": "tool"}}), "tool_choice.name"),
        (json!({"output_config": {"format": {"type": "text"}}}), "output_config.format.type"),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format.schema"),
    ] {
        assert_eq!(fault(&fields), expected, "{fields}");
    }
}

#[test]
fn tools_and_their_choice() {
    let ask = |choice: Value| {
        let body = json!({
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": null}],
            "tool_choice": choice,
        });
        converted(&body).unwrap().0
    };
    let tool = json!({"type": "function", "function": {
        "name": "f", "description": "d", "parameters": {"type": "object"}
    }});
    assert_eq!(ask(json!(null)).tools.unwrap(), [tool]);
    for (choice, expected) in [
        (json!({"type": "auto"}), json!("auto")),
        (json!({"type": "any"}), json!("required")),
        (json!({"type": "none"}), json!("none")),
        (json!({"type": "tool", "name": "f"}), json!({"type": "function", "function": {"name": "f"}})),
    ] {
        assert_eq!(ask(choice).tool_choice.unwrap(), expected);
    }
}

#[test]
fn other_fields_go_along() {
    let body = json!({
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 5.0, "temperature": 0.5, "top_k": 3,
        "stop_sequences": ["a", "b"], "thinking": {"type": "disabled"}, "metadata": {"user_id": "u"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    });
    let (chat, _) = converted(&body).unwrap();
    assert_eq!((chat.max_tokens, chat.top_k), (Some(5), Some(3)));
    assert_eq!(chat.stop.unwrap().0, ["a", "b"]);
    assert_eq!(chat.chat_template_kwargs.unwrap()["enable_thinking"], false);
    assert_eq!(chat.response_format.unwrap().r#type, "json_schema");
    let body = json!({"messages": [{"role": "user", "content": "x"}], "thinking": {"type": "adaptive"}});
    assert!(converted(&body).unwrap().0.chat_template_kwargs.is_none());
}
