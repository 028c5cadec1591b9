//! What clients write in more than one way, tried on every field that the OpenAPI document has.

use serde_json::{Value, json};

use crate::support::{post, served};

/// A request that is answered, and where its fields are tried.
struct Base {
    path: &'static str,
    body: Value,
    /// Only what lies below; empty: all.
    below: &'static str,
}

/// Together they have every object that may stand in a request. What takes a grammar, which takes time to compile,
/// is tried for the sake of the grammar's fields only.
fn bases() -> Vec<Base> {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let function = json!({"name": "f", "description": "d", "parameters": schema, "strict": false});
    let tools = json!([{"type": "function", "function": function}]);
    let conversation = json!([
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]);
    let items = json!([
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]);
    let turns = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]},
    ]);
    let flat =
        json!([{"type": "function", "name": "f", "description": "d", "parameters": schema, "strict": false}]);
    let custom = json!([{"name": "f", "description": "d", "input_schema": schema}]);
    let greedy = |path: &'static str, below: &'static str, fields: Value| {
        let mut body = json!({"temperature": 0});
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        Base { path, body, below }
    };
    let hi = json!([{"role": "user", "content": "Hi"}]);
    vec![
        greedy(
            "/v1/chat/completions",
            "",
            json!({"messages": conversation, "max_tokens": 2, "stream": true, "stream_options": {"include_usage": false},
                "tools": tools, "tool_choice": "none", "response_format": {"type": "text"}}),
        ),
        greedy(
            "/v1/chat/completions",
            "/response_format",
            json!({"messages": hi, "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {
                "name": "n", "schema": schema, "strict": true, "description": "d"}}}),
        ),
        greedy("/v1/chat/completions", "/tools", json!({"messages": hi, "max_tokens": 2, "tools": tools})),
        greedy("/v1/completions", "", json!({"prompt": "Hi", "max_tokens": 2})),
        greedy(
            "/v1/completions",
            "/structured_outputs",
            json!({"prompt": "Hi", "max_tokens": 2, "structured_outputs": {"regex": "[a-z]+"}}),
        ),
        greedy("/v1/embeddings", "", json!({"input": "Hi"})),
        greedy("/generate", "", json!({"prompt": "Hi", "max_tokens": 2})),
        greedy(
            "/v1/responses",
            "",
            json!({"input": items, "max_output_tokens": 2, "tools": flat, "tool_choice": "none",
                "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"}}),
        ),
        greedy(
            "/v1/messages",
            "",
            json!({"messages": turns, "max_tokens": 2, "tools": custom, "tool_choice": {"type": "none"},
                "thinking": {"type": "disabled"}, "output_config": {}}),
        ),
        greedy("/v1/messages/count_tokens", "", json!({"messages": turns, "tools": custom})),
        greedy("/tokenize", "", json!({"content": "Hi"})),
        greedy("/apply-template", "", json!({"messages": conversation, "tools": tools})),
    ]
}

/// Optional fields that the document leaves out: older names, and what is refused.
fn hidden(path: &str) -> &'static [&'static str] {
    match path {
        "/v1/chat/completions" => {
            &["guided_json", "guided_regex", "guided_choice", "guided_grammar", "functions", "function_call"]
        }
        "/v1/completions" => &["guided_json", "guided_regex", "guided_choice", "guided_grammar"],
        "/v1/responses" => &["previous_response_id", "conversation", "prompt"],
        _ => &[],
    }
}

fn document() -> Value {
    serde_json::to_value(m40llm::openapi()).unwrap()
}

/// The schema of the bodies that `path` takes.
fn body_schema<'d>(document: &'d Value, path: &str) -> &'d Value {
    &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
}

/// Visits every property that an object within `instance` has or may have: its pointer, its schema, and whether it
/// may be absent.
fn walk<'d>(
    document: &'d Value,
    schema: &'d Value,
    instance: &Value,
    at: &str,
    visit: &mut impl FnMut(String, &'d Value, bool),
) {
    if let Some(reference) = schema["$ref"].as_str() {
        return walk(document, document.pointer(&reference[1..]).unwrap(), instance, at, visit);
    }
    for kind in ["oneOf", "anyOf", "allOf"] {
        for variant in schema[kind].as_array().into_iter().flatten() {
            walk(document, variant, instance, at, visit);
        }
    }
    match instance {
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                walk(document, &schema["items"], item, &format!("{at}/{i}"), visit);
            }
        }
        Value::Object(object) => {
            let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
            for (name, property) in schema["properties"].as_object().into_iter().flatten() {
                let pointer = format!("{at}/{name}");
                if let Some(value) = object.get(name) {
                    walk(document, property, value, &pointer, visit);
                }
                visit(pointer, property, !required.iter().any(|r| r == name));
            }
        }
        _ => {}
    }
}

/// The object that a pointer's last name is in, and that name.
fn place<'v, 'p>(body: &'v mut Value, pointer: &'p str) -> (&'v mut serde_json::Map<String, Value>, &'p str) {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    (body.pointer_mut(parent).unwrap().as_object_mut().unwrap(), name)
}

fn with(body: &Value, pointer: &str, value: Value) -> Value {
    let mut body = body.clone();
    let (object, name) = place(&mut body, pointer);
    object.insert(name.into(), value);
    body
}

fn without(body: &Value, pointer: &str) -> Value {
    let mut body = body.clone();
    let (object, name) = place(&mut body, pointer);
    object.shift_remove(name);
    body
}

/// Status and body, without what is another's each time and what a cache has saved.
async fn said(path: &str, body: &Value) -> (u16, String) {
    let answer = post(&served(), path, body).await;
    let status = answer.status.as_u16();
    let mut events: Vec<Value> = if answer.header("content-type").starts_with("text/event-stream") {
        answer.events(true)
    } else {
        vec![answer.json()]
    };
    let mut gone = vec!["id", "created", "created_at", "completed_at", "cached_tokens"];
    if path == "/v1/messages" {
        // What a cache had is no input there.
        gone.extend(["input_tokens", "cache_read_input_tokens"]);
    }
    if path == "/v1/responses" {
        // The answer repeats them as they came.
        gone.push("tools");
    }
    for event in &mut events {
        strip(event, &gone);
    }
    (status, json!(events).to_string())
}

fn strip(value: &mut Value, gone: &[&str]) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !gone.contains(&key.as_str()));
            object.values_mut().for_each(|value| strip(value, gone));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| strip(value, gone)),
        _ => {}
    }
}

#[tokio::test]
async fn an_explicit_null_is_the_same_as_an_absent_field() {
    let document = document();
    let (mut tried, mut wrong) = (0, Vec::new());
    for Base { path, body, below } in bases() {
        let plain = said(path, &body).await;
        assert_eq!(plain.0, 200, "{path}: {}", plain.1);
        let mut optional: Vec<String> = hidden(path).iter().map(|name| format!("/{name}")).collect();
        walk(&document, body_schema(&document, path), &body, "", &mut |pointer, _, may_be_absent| {
            if may_be_absent && !optional.contains(&pointer) {
                optional.push(pointer);
            }
        });
        optional.retain(|pointer| pointer.starts_with(below));
        for pointer in optional {
            let absent = match body.pointer(&pointer) {
                None => plain.clone(),
                Some(_) => said(path, &without(&body, &pointer)).await,
            };
            let null = said(path, &with(&body, &pointer, Value::Null)).await;
            // Without a temperature each answer is drawn anew, and only that there is one can be compared.
            let drawn = pointer == "/temperature" && null.0 == absent.0;
            if null != absent && !drawn {
                wrong.push(format!("{path} {pointer}: {null:?} and not {absent:?}"));
            }
            tried += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 150, "only {tried} fields");
}

#[tokio::test]
async fn integral_floats_pass_for_integers() {
    let document = document();
    let (mut tried, mut wrong) = (0, Vec::new());
    for Base { path, body, below } in bases() {
        let mut integers: Vec<(String, i64)> = Vec::new();
        walk(&document, body_schema(&document, path), &body, "", &mut |pointer, schema, _| {
            let is_integer = match &schema["type"] {
                Value::Array(kinds) => kinds.iter().any(|kind| kind == "integer"),
                kind => kind == "integer",
            };
            if is_integer && pointer.starts_with(below) {
                let value = match pointer.as_str() {
                    // A vector has the model's own length, and no answer is there in a millisecond.
                    "/dimensions" => 576,
                    "/max_wait_ms" => 3_600_000,
                    _ => schema["minimum"].as_i64().unwrap_or(1).max(1),
                };
                integers.push((pointer, value));
            }
        });
        // So that log-probabilities may have alternatives.
        let is_chat = path == "/v1/chat/completions";
        let body = if is_chat { with(&body, "/logprobs", true.into()) } else { body };
        for (pointer, value) in integers {
            let exact = said(path, &with(&body, &pointer, value.into())).await;
            let float = said(path, &with(&body, &pointer, f64::from(value as u32).into())).await;
            if float != exact || exact.0 != 200 {
                wrong.push(format!("{path} {pointer}: {float:?} and not {exact:?}"));
            }
            tried += 1;
        }
    }
    for (path, exact, float) in [
        (
            "/v1/completions",
            json!({"prompt": [1, 2], "max_tokens": 1}),
            json!({"prompt": [1.0, 2], "max_tokens": 1}),
        ),
        ("/v1/embeddings", json!({"input": [[1], [2, 3]]}), json!({"input": [[1.0], [2, 3.0]]})),
        ("/detokenize", json!({"tokens": [1, 2]}), json!({"tokens": [1.0, 2.0]})),
    ] {
        let zero = || Value::from(0);
        let exact = said(path, &with(&exact, "/temperature", zero())).await;
        let float = said(path, &with(&float, "/temperature", zero())).await;
        assert_eq!((exact.0, &float), (200, &exact), "{path}");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried >= 20, "only {tried} fields");
}
