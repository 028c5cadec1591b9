//! `/v1/responses`: whole answers and events, over scripts and a real model.

use std::time::Duration;

use axum::http::Method;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::{
    scripted::{End, paced, says},
    support::{Answer, MODEL, post, request, served},
};

const PATH: &str = "/v1/responses";

fn with(fields: &Value) -> Value {
    let mut body = json!({"input": "hello"});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn whole(app: &axum::Router, fields: &Value) -> Value {
    let answer = post(app, PATH, &with(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

async fn streamed(app: &axum::Router, fields: &Value) -> Vec<Value> {
    let mut body = with(fields);
    body["stream"] = true.into();
    let answer = post(app, PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    assert!(!answer.body.contains("[DONE]"));
    numbered(&answer)
}

/// The events, numbered from 0.
fn numbered(answer: &Answer) -> Vec<Value> {
    let events = answer.named_events();
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i, "{event}");
    }
    events
}

/// An answer without what differs between two of the same request.
fn comparable(answer: &Value) -> Value {
    let mut answer = answer.clone();
    for field in ["id", "created_at", "completed_at"] {
        answer[field] = Value::Null;
    }
    answer["usage"]["input_tokens_details"]["cached_tokens"] = Value::Null;
    for item in answer["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    answer
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
    json!([
        {"type": "function", "name": "weather", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
        {"type": "function", "name": "time", "description": "now", "parameters": null, "strict": null},
    ])
}

#[tokio::test]
async fn an_answer_is_complete() {
    let app = says(&["Hi", " there"], End::Stop(None));
    let asked = json!({
        "model": MODEL, "instructions": "be brief", "metadata": {"a": "b"}, "store": true, "temperature": 0.5,
        "truncation": "disabled", "reasoning": {"effort": "low"}, "user": "u", "include": [],
    });
    let answer = whole(&app, &asked).await;
    let prompt = "be brief\nhello\n".len();
    let (id, item) = (answer["id"].as_str().unwrap(), answer["output"][0]["id"].as_str().unwrap());
    assert!(id.starts_with("resp_") && item.starts_with("msg_"), "{answer}");
    let created = answer["created_at"].as_u64().unwrap();
    assert!(created > 1_700_000_000 && answer["completed_at"].as_u64().unwrap() >= created);
    assert_eq!(
        answer,
        json!({
            "id": id, "object": "response", "created_at": created, "completed_at": answer["completed_at"],
            "status": "completed", "error": null, "incomplete_details": null, "model": MODEL,
            "output": [{
                "type": "message", "id": item, "status": "completed", "role": "assistant",
                "content": [{"type": "output_text", "text": "Hi there", "annotations": [], "logprobs": []}],
            }],
            "usage": {
                "input_tokens": prompt, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
                "output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + 3,
            },
            "background": false, "previous_response_id": null, "store": false, "instructions": "be brief",
            "max_output_tokens": null, "max_tool_calls": null, "metadata": {"a": "b"}, "parallel_tool_calls": true,
            "prompt_cache_key": null, "reasoning": {"effort": "low", "summary": null}, "safety_identifier": null,
            "service_tier": "default", "temperature": 0.5,
            "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [],
            "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "user": "u",
        })
    );
}

#[tokio::test]
async fn events_come_in_order_and_add_up_to_the_whole_answer() {
    for (tokens, end) in [
        (&["Hi", " there"][..], End::Stop(None)),
        (CALLS, End::Stop(None)),
        (&CALLS[..5], End::Length),
        (&[], End::Stop(None)),
    ] {
        let app = says(tokens, end);
        let asked = json!({"tools": tools()});
        let (expected, events) = (whole(&app, &asked).await, streamed(&app, &asked).await);
        assert_eq!(events[0]["type"], "response.created");
        assert_eq!(events[1]["type"], "response.in_progress");
        for event in &events[..2] {
            let response = &event["response"];
            assert_eq!((&response["status"], &response["output"]), (&json!("in_progress"), &json!([])));
            assert!(response["usage"].is_null());
        }
        let last = events.last().unwrap();
        assert_eq!(last["type"], format!("response.{}", expected["status"].as_str().unwrap()));
        assert_eq!(comparable(&last["response"]), comparable(&expected));
        assert_eq!(last["response"]["id"], events[0]["response"]["id"]);
        // What was added, grown and done is what there is in the end.
        for (i, item) in last["response"]["output"].as_array().unwrap().iter().enumerate() {
            let own = |kind: &str| {
                let of_kind =
                    move |e: &&Value| e["output_index"] == i && e["type"].as_str().unwrap().ends_with(kind);
                events.iter().filter(of_kind).collect::<Vec<_>>()
            };
            let deltas: String = own(".delta").iter().map(|e| e["delta"].as_str().unwrap()).collect();
            let done = own("output_item.done");
            assert_eq!((own("output_item.added").len(), done.len()), (1, 1));
            assert_eq!(&done[0]["item"], item);
            let text =
                if item["type"] == "message" { &item["content"][0]["text"] } else { &item["arguments"] };
            assert_eq!(text.as_str().unwrap(), deltas);
        }
    }
}

#[tokio::test]
async fn calls_are_items() {
    let answer = whole(&says(CALLS, End::Stop(None)), &json!({"tools": tools()})).await;
    let output = answer["output"].as_array().unwrap();
    assert_eq!((output.len(), &answer["status"]), (3, &json!("completed")));
    assert_eq!(output[0]["content"][0]["text"], "Let me see.");
    assert_eq!((&output[1]["type"], &output[1]["name"]), (&json!("function_call"), &json!("weather")));
    assert_eq!(output[1]["arguments"], "{\"city\": \"Paris\"}");
    assert_eq!((&output[2]["name"], &output[2]["arguments"]), (&json!("time"), &json!("{}")));
    assert!(output[1]["id"].as_str().unwrap().starts_with("fc_"));
    assert!(output[1]["call_id"].as_str().unwrap().starts_with("call_"));
    assert_eq!((&answer["tools"], &answer["tool_choice"]), (&tools(), &json!("auto")));

    let cut = whole(&says(&CALLS[..5], End::Length), &json!({"tools": tools()})).await;
    assert_eq!((&cut["status"], &cut["completed_at"]), (&json!("incomplete"), &Value::Null));
    assert_eq!(cut["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(
        (&cut["output"][1]["status"], &cut["output"][1]["arguments"]),
        (&json!("incomplete"), &json!("{\"city\":"))
    );
}

#[tokio::test]
async fn logprobs_go_with_their_text() {
    let app = says(&["a", "b"], End::Stop(None));
    for asked in
        [json!({"top_logprobs": 2}), json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2})]
    {
        let answer = whole(&app, &asked).await;
        let logprobs = &answer["output"][0]["content"][0]["logprobs"];
        assert_eq!(logprobs[1]["token"], "b");
        assert_eq!(logprobs[1]["top_logprobs"].as_array().unwrap().len(), 2);
        let events = streamed(&app, &asked).await;
        let deltas = events.iter().filter(|e| e["type"] == "response.output_text.delta");
        let joined: Vec<Value> = deltas.flat_map(|e| e["logprobs"].as_array().unwrap().clone()).collect();
        assert_eq!(&json!(joined), logprobs);
    }
    let without = whole(&app, &json!({})).await;
    assert_eq!(without["output"][0]["content"][0]["logprobs"], json!([]));
}

/// OpenAI's SDKs raise on an event with `error` in it, and on no other.
#[tokio::test]
async fn a_failure_in_the_midst_is_one_event() {
    let app = says(&["Hi"], End::Failure);
    let answer = post(&app, PATH, &with(&json!({"stream": true}))).await;
    assert_eq!(answer.status, 200);
    let events = numbered(&answer);
    let [.., delta, error] = &events[..] else { panic!("{events:?}") };
    assert_eq!((&delta["type"], &delta["delta"]), (&json!("response.output_text.delta"), &json!("Hi")));
    assert_eq!((&error["type"], &error["error"]["type"]), (&json!("error"), &json!("server_error")));
    assert!(error["message"].as_str().unwrap().contains("on purpose"));
    assert_eq!((&error["message"], &error["code"]), (&error["error"]["message"], &error["error"]["code"]));
    assert!(error.as_object().unwrap().contains_key("code") && error["param"].is_null());

    let first = says(&[], End::Failure);
    for stream in [false, true] {
        let answer = post(&first, PATH, &with(&json!({"stream": stream}))).await;
        assert_eq!((answer.status.as_u16(), &answer.error()["type"]), (500, &json!("server_error")));
    }
}

/// What agents that keep their conversation write of their own.
#[tokio::test]
async fn items_are_as_lenient_as_messages() {
    let app = says(&["x"], End::Stop(None));
    let call = |arguments: Value| {
        let mut call = json!({"type": "function_call", "call_id": "c", "name": "time"});
        if !arguments.is_null() {
            call["arguments"] = arguments;
        }
        json!([{"role": "user", "content": "hi"}, call, {"type": "function_call_output", "call_id": "c", "output": "1"}])
    };
    let mut counts = Vec::new();
    for (text, object) in [(json!("{\"b\":1,\"a\":2}"), json!({"b": 1, "a": 2})), (json!("{}"), json!(null))]
    {
        let of = |input| {
            let app = app.clone();
            async move {
                whole(&app, &json!({"input": input, "tools": tools()})).await["usage"]["input_tokens"].clone()
            }
        };
        let (written, meant) = (of(call(text)).await, of(call(object)).await);
        assert_eq!(written, meant);
        counts.push(written);
    }
    assert_ne!(counts[0], counts[1], "arguments are told");
    for assistant in [json!({"role": "assistant"}), json!({"role": "assistant", "content": null})] {
        let input = json!([{"role": "user", "content": "hi"}, assistant, {"role": "user", "content": "so"}]);
        let answer = whole(&app, &json!({"input": input})).await;
        assert_eq!(answer["usage"]["input_tokens"], "hi\n\nso\n".len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_filled_and_going_away_ends_the_work() {
    let app = paced(&["a", "b"], End::Stop(None), Duration::from_millis(250), Duration::from_millis(50));
    let answer = post(&app, PATH, &with(&json!({"stream": true}))).await;
    assert!(answer.body.contains("\n\n: keep-alive\n\n"), "{}", answer.body);
    assert_eq!(numbered(&answer).last().unwrap()["type"], "response.completed");

    let state = crate::support::state();
    let app = m40llm::app(state.clone());
    let headers = [("content-type", "application/json")];
    let body = json!({"input": "Write a very long story.", "stream": true, "temperature": 0, "max_output_tokens": 900});
    let mut stream =
        app.oneshot(request(Method::POST, PATH, &headers, body.to_string())).await.unwrap().into_body();
    stream.frame().await.unwrap().unwrap();
    drop(stream);
    tokio::time::timeout(Duration::from_secs(20), state.idle()).await.expect("the work goes on");
}

#[tokio::test]
async fn faults_name_this_requests_fields() {
    let app = says(&["x"], End::Stop(None));
    let long = "x".repeat(5000);
    for (fields, param) in [
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_logprobs": 21}), "top_logprobs"),
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"background": true}), "background"),
        (json!({"text": {"format": {"type": "yaml"}}}), "text.format.type"),
        (json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), "text.format.schema"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"contains": 1}}}}),
            "text.format.schema",
        ),
        (json!({"tools": [{"type": "function", "name": "no good"}]}), "tools[0].name"),
        (
            json!({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}),
            "tools[0].parameters",
        ),
        (json!({"tools": tools(), "tool_choice": "any"}), "tool_choice"),
        (json!({"tools": tools(), "tool_choice": {"type": "function", "name": "g"}}), "tool_choice.name"),
        (
            json!({"tools": tools(), "tool_choice": {
                "type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]}}),
            "tool_choice.tools[0].name",
        ),
        (json!({"metadata": {"a": 1}}), "metadata.a"),
        (json!({"input": long}), "input"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}), "input[0].content[0]"),
    ] {
        let answer = post(&app, PATH, &with(&fields)).await;
        let error = answer.error();
        assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with(param) || error["code"] == "context_length_exceeded", "{error}");
        assert!(!message.contains("messages") && !message.contains("function.name"), "{error}");
    }
}

#[tokio::test]
async fn a_models_answer_has_the_shape_and_the_call_that_were_asked_for() {
    let app = served();
    let properties =
        json!({"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}});
    let schema = json!({
        "type": "object", "properties": properties, "required": ["city", "days"], "additionalProperties": false
    });
    let check = |text: &Value| {
        let value: Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
        assert!(value["city"] == "Paris" || value["city"] == "Rome", "{value}");
        assert!((1..=9).contains(&value["days"].as_i64().unwrap()), "{value}");
    };
    let limits = json!({"temperature": 1.5, "seed": 3, "max_output_tokens": 60});
    let mut fields = limits.clone();
    fields["text"] =
        json!({"format": {"type": "json_schema", "name": "trip", "strict": true, "schema": schema}});
    let answer = whole(&app, &fields).await;
    assert_eq!(answer["status"], "completed");
    check(&answer["output"][0]["content"][0]["text"]);
    assert_eq!(answer["text"]["format"], fields["text"]["format"]);

    let mut fields = limits;
    fields["tools"] = json!([{"type": "function", "name": "plan", "parameters": schema}]);
    for choice in [json!("required"), json!({"type": "function", "name": "plan"})] {
        fields["tool_choice"] = choice;
        fields["parallel_tool_calls"] = false.into();
        let answer = whole(&app, &fields).await;
        let calls: Vec<&Value> = answer["output"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|item| item["type"] == "function_call")
            .collect();
        assert_eq!((calls.len(), &calls[0]["name"]), (1, &json!("plan")));
        check(&calls[0]["arguments"]);
        let events = streamed(&app, &fields).await;
        assert_eq!(comparable(&events.last().unwrap()["response"]), comparable(&answer));
    }
}

#[tokio::test]
async fn a_model_answers_as_in_chat() {
    let app = served();
    let question = "Say hello in French.";
    let chat =
        json!({"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0});
    let chat = post(&app, "/v1/chat/completions", &chat).await.json();
    let fields = json!({"input": question, "max_output_tokens": 12, "temperature": 0});
    let answer = whole(&app, &fields).await;
    assert_eq!(answer["output"][0]["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    assert_eq!(answer["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(answer["usage"]["output_tokens"], chat["usage"]["completion_tokens"]);
    let events = streamed(&app, &fields).await;
    assert_eq!(comparable(&events.last().unwrap()["response"]), comparable(&answer));
    let answer = post(&app, PATH, &with(&fields)).await;
    assert!(answer.header("x-m40-predicted-ttft-ms").parse::<u64>().is_ok());
}
