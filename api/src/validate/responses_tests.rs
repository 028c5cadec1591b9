use serde_json::{Value, json};

use super::*;

fn converted(body: Value) -> Result<(ChatRequest, Asked, Names), ApiError> {
    convert(serde_json::from_value(body).unwrap())
}

/// The conversation as a template's messages would name it.
fn messages(input: &Value) -> Value {
    let (chat, ..) = converted(json!({"input": input})).unwrap();
    let one = |message: &ChatMessage| {
        let content = match &message.content {
            None => Value::Null,
            Some(Content::Text(text)) => json!(text),
            Some(Content::Parts(parts)) => parts.iter().map(|part| part.text.clone()).collect(),
        };
        let calls = message
            .tool_calls
            .iter()
            .flatten()
            .map(|call| json!([call.id, call.function.name, call.function.arguments]));
        json!([
            message.role,
            content,
            calls.collect::<Vec<_>>(),
            message.reasoning_content,
            message.tool_call_id
        ])
    };
    chat.messages.iter().map(one).collect()
}

fn param<T>(result: Result<T, ApiError>) -> String {
    let Err(error) = result else { panic!("it was taken") };
    error.body().error.param.unwrap()
}

fn fault(fields: &Value) -> String {
    let mut body = json!({"input": "x"});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    param(converted(body))
}

#[test]
fn a_string_is_what_the_user_says() {
    assert_eq!(messages(&json!("hello")), json!([["user", "hello", [], null, null]]));
    let (chat, asked, _) = converted(json!({"input": "hello", "instructions": "be brief"})).unwrap();
    assert_eq!(chat.messages.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(), ["system", "user"]);
    assert_eq!(asked.instructions.as_deref(), Some("be brief"));
}

#[test]
fn items_become_turns() {
    let items = json!([
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "id": "fc_2", "call_id": "call_2", "name": "g", "arguments": "{\"x\":1}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "one"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "?"},
        {"type": "function_call", "call_id": "call_3", "name": "f", "arguments": "{}"},
    ]);
    assert_eq!(
        messages(&items),
        json!([
            ["developer", "d", [], null, null],
            ["user", ["a", "b"], [], null, null],
            ["assistant", ["c"], [["call_1", "f", "{}"], ["call_2", "g", "{\"x\":1}"]], "hm", null],
            ["tool", "one", [], null, "call_1"],
            ["tool", ["two"], [], null, "call_2"],
            ["assistant", null, [["call_3", "f", "{}"]], null, null],
        ])
    );
}

#[test]
fn faults_name_this_requests_fields() {
    for (fields, expected) in [
        (json!({"input": []}), "input"),
        (json!({"input": [{"role": "king", "content": "x"}]}), "input[0].role"),
        (json!({"input": [{"content": "x"}]}), "input[0].role"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
            "input[0].content[0]",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
            "input[0].content[0].text",
        ),
        (json!({"input": [{"type": "item_reference", "id": "msg_1"}]}), "input[0].type"),
        (json!({"input": [{"type": "web_search_call"}]}), "input[0].type"),
        (json!({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}), "input[0].call_id"),
        (json!({"input": [{"type": "function_call_output", "call_id": "c"}]}), "input[0].output"),
        (json!({"include": ["everything"]}), "include[0]"),
        (json!({"tools": [{"type": "function", "name": "f"}, {"type": "web_search"}]}), "tools[1].type"),
        (json!({"tools": ["f"]}), "tools[0].type"),
        (json!({"text": {"format": {"schema": {}}}}), "text.format.type"),
        (json!({"text": {"format": "json"}}), "text.format"),
    ] {
        assert_eq!(fault(&fields), expected, "{fields}");
    }
}

#[test]
fn what_would_be_stored_is_refused() {
    let check = |fields: &Value| {
        let mut body = json!({"input": "x"});
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        refuse_what_is_stored(&serde_json::from_value(body).unwrap())
    };
    assert!(check(&json!({"store": true, "truncation": "disabled", "background": false})).is_ok());
    assert!(check(&json!({"previous_response_id": null, "conversation": null, "prompt": null})).is_ok());
    for (fields, expected) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": {"id": "conv_1"}}), "conversation"),
        (json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
        (json!({"background": true}), "background"),
        (json!({"truncation": "auto"}), "truncation"),
    ] {
        assert_eq!(param(check(&fields)), expected);
    }
}

#[test]
fn functions_lie_a_level_deeper_in_chat() {
    let body = json!({
        "input": "x",
        "tools": [
            {"type": "function", "name": "f", "description": null, "parameters": {"type": "object"}, "strict": true},
            {"type": "function", "name": "g"},
        ],
        "tool_choice": {"type": "function", "name": "f"},
    });
    let (chat, asked, _) = converted(body.clone()).unwrap();
    let f = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": true}});
    assert_eq!(chat.tools.unwrap()[0], f);
    assert_eq!(chat.tool_choice.unwrap(), json!({"type": "function", "function": {"name": "f"}}));
    assert_eq!(json!(asked.tools), body["tools"], "repeated as they came");

    let choice =
        json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]});
    let g = json!({"type": "function", "function": {"name": "g"}});
    let expected = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [g]}});
    assert_eq!(tool_choice(&choice), expected);
    assert_eq!(tool_choice(&json!("required")), "required");
}

#[test]
fn formats_lie_a_level_deeper_in_chat() {
    let schema = json!({"type": "json_schema", "name": "n", "strict": true, "schema": {"type": "object"}});
    assert_eq!(
        format(&schema).unwrap(),
        json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": {"type": "object"}}})
    );
    assert_eq!(format(&json!({"type": "text"})).unwrap(), json!({"type": "text"}));
}

#[test]
fn other_fields_go_along() {
    let body = json!({
        "input": "x", "max_output_tokens": 5.0, "temperature": 0.5, "top_p": 0.9, "top_logprobs": 2, "stream": true,
        "metadata": {"a": "b"}, "seed": 7, "reasoning": {"effort": "none"}, "text": {"verbosity": "low"},
    });
    let (chat, asked, _) = converted(body).unwrap();
    assert_eq!((chat.max_completion_tokens, chat.seed, chat.stream), (Some(5), Some(7), Some(true)));
    assert_eq!((chat.logprobs, chat.top_logprobs), (Some(true), Some(2)));
    assert_eq!(chat.chat_template_kwargs.unwrap()["enable_thinking"], false);
    let asked = serde_json::to_value(&asked).unwrap();
    assert_eq!(asked["text"], json!({"format": {"type": "text"}, "verbosity": "low"}));
    assert_eq!((&asked["metadata"], &asked["tool_choice"]), (&json!({"a": "b"}), &json!("auto")));
    assert_eq!((&asked["max_output_tokens"], &asked["store"]), (&json!(5), &json!(false)));

    let (chat, ..) = converted(json!({"input": "x", "include": ["message.output_text.logprobs"]})).unwrap();
    assert_eq!((chat.logprobs, chat.top_logprobs), (Some(true), None));
    let (chat, ..) = converted(json!({"input": "x", "top_logprobs": 0})).unwrap();
    assert_eq!(chat.logprobs, None);
}
