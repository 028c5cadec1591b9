//! `/v1/messages` and `/v1/messages/count_tokens`: whole answers and events, over scripts and a real model.

use std::time::Duration;

use axum::http::Method;
use serde_json::{Value, json};

use crate::{
    scripted::{End, paced, says},
    support::{MODEL, get, loading, post, request, send, served},
};

const PATH: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

fn with(fields: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn whole(app: &axum::Router, fields: &Value) -> Value {
    let answer = post(app, PATH, &with(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("request-id"), answer.header("x-request-id"));
    answer.json()
}

async fn streamed(app: &axum::Router, fields: &Value) -> Vec<Value> {
    let mut body = with(fields);
    body["stream"] = true.into();
    let answer = post(app, PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    assert!(!answer.body.contains("[DONE]"));
    answer.named_events()
}

/// The message that events add up to.
fn assembled(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    assert_eq!((&events[0]["type"], &message["content"]), (&json!("message_start"), &json!([])));
    let (mut arguments, mut open) = (String::new(), None);
    for event in &events[1..] {
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!((open, index), (None, message["content"].as_array().unwrap().len()));
                open = Some(index);
                message["content"].as_array_mut().unwrap().push(event["content_block"].clone());
            }
            "content_block_delta" => {
                assert_eq!(open, Some(index));
                let (delta, block) = (&event["delta"], &mut message["content"][index]);
                let field = match delta["type"].as_str().unwrap() {
                    "text_delta" => "text",
                    "thinking_delta" => "thinking",
                    "input_json_delta" => {
                        arguments += delta["partial_json"].as_str().unwrap();
                        continue;
                    }
                    other => panic!("{other}"),
                };
                block[field] =
                    format!("{}{}", block[field].as_str().unwrap(), delta[field].as_str().unwrap()).into();
            }
            "content_block_stop" => {
                assert_eq!(open.take(), Some(index));
                if let Ok(input) = serde_json::from_str::<Value>(&std::mem::take(&mut arguments)) {
                    message["content"][index]["input"] = input;
                }
            }
            "message_delta" => {
                for field in ["stop_reason", "stop_sequence"] {
                    message[field] = event["delta"][field].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => assert_eq!(event, events.last().unwrap()),
            other => panic!("{other}"),
        }
    }
    message
}

/// A message without what differs between two of the same request.
fn comparable(message: &Value) -> Value {
    let mut message = message.clone();
    message["id"] = Value::Null;
    for field in ["input_tokens", "cache_read_input_tokens"] {
        message["usage"][field] = Value::Null;
    }
    for block in message["content"].as_array_mut().unwrap() {
        if block["type"] == "tool_use" {
            block["id"] = Value::Null;
        }
    }
    message
}

const CALLS: &[&str] = &[
    "Let me",
    " see.",
    "\n<tool_call>",
    "\n{\"name\": \"weather\", \"arguments\": ",
    "{\"city\":",
    " \"Paris\"}",
    "}\n</tool_call>",
    "\n<tool_call>\n{\"name\": \"time\", \"arguments\": {}}\n</tool_call>",
];

fn tools() -> Value {
    let object = json!({"type": "object", "properties": {}});
    json!([{"name": "weather", "description": "d", "input_schema": {"type": "object"}}, {"name": "time", "input_schema": object}])
}

#[tokio::test]
async fn an_answer_is_complete() {
    let app = says(&["Hi", " there"], End::Stop(None));
    let answer =
        whole(&app, &json!({"model": MODEL, "system": "be brief", "metadata": {"user_id": "u"}})).await;
    let id = answer["id"].as_str().unwrap();
    assert!(id.starts_with("msg_"));
    assert_eq!(
        answer,
        json!({
            "id": id, "type": "message", "role": "assistant", "model": MODEL,
            "content": [{"type": "text", "text": "Hi there"}],
            "stop_reason": "end_turn", "stop_sequence": null,
            "usage": {
                "input_tokens": "be brief\nhello\n".len() - 4, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4, "output_tokens": 3, "output_tokens_details": {"thinking_tokens": 0},
            },
        })
    );
}

#[tokio::test]
async fn events_add_up_to_the_whole_answer() {
    for (tokens, end, reason, stop) in [
        (&["Hi", " there"][..], End::Stop(None), "end_turn", None),
        (&["Hi", " there"], End::Length, "max_tokens", None),
        (&["Hi"], End::Stop(Some(1)), "stop_sequence", Some("END")),
        (CALLS, End::Stop(None), "tool_use", None),
        (&CALLS[..5], End::Length, "max_tokens", None),
        (&[], End::Stop(None), "end_turn", None),
    ] {
        let app = says(tokens, end);
        let asked = json!({"tools": tools(), "stop_sequences": ["STOP", "END"]});
        let (answer, events) = (whole(&app, &asked).await, streamed(&app, &asked).await);
        assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!(reason), &json!(stop)));
        assert_eq!(comparable(&assembled(&events)), comparable(&answer), "{tokens:?}");
        assert_eq!(events[0]["message"]["stop_reason"], Value::Null);
        let types: Vec<_> = events.iter().rev().take(2).map(|e| e["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["message_stop", "message_delta"]);
    }
}

#[tokio::test]
async fn calls_are_blocks_with_parsed_input() {
    let answer = whole(&says(CALLS, End::Stop(None)), &json!({"tools": tools()})).await;
    let content = answer["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0], json!({"type": "text", "text": "Let me see."}));
    assert_eq!((&content[1]["name"], &content[1]["input"]), (&json!("weather"), &json!({"city": "Paris"})));
    assert!(content[1]["id"].as_str().unwrap().starts_with("toolu_"));
    assert_ne!(content[1]["id"], content[2]["id"]);
    let cut = whole(&says(&CALLS[..5], End::Length), &json!({"tools": tools()})).await;
    assert_eq!((&cut["content"][1]["input"], &cut["stop_reason"]), (&json!({}), &json!("max_tokens")));
}

#[tokio::test]
async fn counts_are_those_of_the_request() {
    let app = says(&["x"], End::Stop(None));
    for fields in [
        json!({}),
        json!({"system": [{"type": "text", "text": "be brief"}]}),
        json!({"tools": tools()}),
        json!({"tools": tools(), "tool_choice": {"type": "none"}}),
        json!({"messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "time", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "noon"}]},
        ]}),
    ] {
        let counted = post(&app, COUNT, &with(&fields)).await;
        assert_eq!(counted.status, 200, "{}", counted.body);
        assert_eq!(counted.header("request-id"), counted.header("x-request-id"));
        let usage = &whole(&app, &fields).await["usage"];
        let used =
            usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
        assert_eq!(counted.json(), json!({"input_tokens": used}), "{fields}");
        let mut without = with(&fields);
        without.as_object_mut().unwrap().remove("max_tokens");
        assert_eq!(post(&app, COUNT, &without).await.json(), counted.json());
    }
}

#[tokio::test]
async fn errors_are_in_anthropics_frame_whoever_makes_them() {
    let app = says(&["x"], End::Stop(None));
    for (fields, param) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"stop_sequences": vec!["x"; 17]}), "stop_sequences"),
        (json!({"messages": []}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
            "messages[0].content[0]",
        ),
        (json!({"tools": [{"name": "no good", "input_schema": {}}]}), "tools[0].name"),
        (json!({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}), "tools[0].input_schema"),
        (json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "g"}}), "tool_choice.name"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"messages": [{"role": "user", "content": "x".repeat(5000)}]}), "messages"),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"contains": 1}}}}),
            "output_config.format.schema",
        ),
    ] {
        let answer = post(&app, PATH, &with(&fields)).await;
        assert!(answer.headers.contains_key("request-id"));
        let error = answer.error();
        assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{error}");
    }
    for path in [PATH, COUNT] {
        let wrong = [
            get(&app, path).await,
            post(&loading(), path, &with(&json!({}))).await,
            send(&app, request(Method::POST, path, &[("content-type", "text/plain")], "{}")).await,
        ];
        for (answer, status) in wrong.iter().zip([405, 503, 415]) {
            assert_eq!(answer.status, status);
            assert!(answer.headers.contains_key("request-id"), "{path} {status}");
            answer.error();
        }
    }
    assert!(!get(&app, "/v1/nothing").await.headers.contains_key("request-id"));
}

#[tokio::test]
async fn a_failure_in_the_midst_is_an_event() {
    let events = streamed(&says(&["Hi"], End::Failure), &json!({})).await;
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("server_error")));
    let answer = post(&says(&[], End::Failure), PATH, &with(&json!({"stream": true}))).await;
    assert_eq!((answer.status.as_u16(), &answer.error()["type"]), (500, &json!("server_error")));
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_filled_with_pings() {
    let app = paced(&["a", "b"], End::Stop(None), Duration::from_millis(250), Duration::from_millis(50));
    let answer = post(&app, PATH, &with(&json!({"stream": true}))).await;
    assert!(answer.body.contains("\n\nevent: ping\ndata: {\"type\":\"ping\"}\n\n"), "{}", answer.body);
    assert_eq!(assembled(&answer.named_events())["content"][0]["text"], "ab");
}

#[tokio::test]
async fn a_models_answer_has_the_shape_and_the_call_that_were_asked_for() {
    let app = served();
    let schema = json!({
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": false,
    });
    let fits = |value: &Value| value["city"] == "Paris" || value["city"] == "Rome";
    let mut fields = json!({"temperature": 1.5, "seed": 3, "max_tokens": 60});
    fields["output_config"] = json!({"format": {"type": "json_schema", "schema": schema}});
    let answer = whole(&app, &fields).await;
    assert_eq!(answer["stop_reason"], "end_turn");
    assert!(fits(&serde_json::from_str(answer["content"][0]["text"].as_str().unwrap()).unwrap()), "{answer}");

    let mut fields = json!({"temperature": 1.5, "seed": 3, "max_tokens": 60});
    fields["tools"] = json!([{"name": "plan", "input_schema": schema}]);
    for choice in
        [json!({"type": "any", "disable_parallel_tool_use": true}), json!({"type": "tool", "name": "plan"})]
    {
        fields["tool_choice"] = choice;
        let answer = whole(&app, &fields).await;
        assert_eq!(
            (answer["content"].as_array().unwrap().len(), &answer["stop_reason"]),
            (1, &json!("tool_use"))
        );
        assert!(fits(&answer["content"][0]["input"]), "{answer}");
        assert_eq!(comparable(&assembled(&streamed(&app, &fields).await)), comparable(&answer));
    }
}

#[tokio::test]
async fn a_model_answers_as_in_chat_and_tells_its_stop_sequence() {
    let app = served();
    let question = json!([{"role": "user", "content": "Say hello in French."}]);
    let chat = json!({"messages": question, "max_tokens": 12, "temperature": 0});
    let chat = post(&app, "/v1/chat/completions", &chat).await.json();
    let text = chat["choices"][0]["message"]["content"].as_str().unwrap();
    let asked = json!({"messages": question, "max_tokens": 12, "temperature": 0});
    let answer = whole(&app, &asked).await;
    assert_eq!(answer["content"], json!([{"type": "text", "text": text}]));
    assert_eq!(comparable(&assembled(&streamed(&app, &asked).await)), comparable(&answer));

    let stop: String = text.chars().skip(5).take(4).collect();
    let mut asked = asked;
    asked["stop_sequences"] = json!(["never in there", stop]);
    let cut = whole(&app, &asked).await;
    assert_eq!((&cut["stop_reason"], &cut["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(cut["content"][0]["text"], text[..text.find(&stop).unwrap()]);
}
