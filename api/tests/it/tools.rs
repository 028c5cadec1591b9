//! Tools and thoughts on the wire: models whose words are scripted, with the chat templates of their families.

mod templates;

use std::{path::Path, time::Duration};

use axum::Router;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::{Engine, EngineConfig, Event, FinishReason, TokenLogprob, TokenOut, Usage};
use serde_json::{Value, json};

use crate::support::{MODEL, post, served};

/// A model that says `words`, so many characters with each token, and then ends its turn.
fn says(template: &str, words: &str, characters: usize) -> Router {
    let words: Vec<char> = words.chars().collect();
    let config = EngineConfig { ctx_size: Some(1 << 16), max_queue: 8, ..EngineConfig::default() };
    let engine = Engine::from_source_with(&config, template, move |inbox| {
        while let Some(job) = inbox.recv() {
            let most = job.request.max_tokens.unwrap_or(usize::MAX);
            let tokens: Vec<String> = words.chunks(characters).map(String::from_iter).collect();
            for text in tokens.iter().take(most) {
                let id = u32::from(text.as_bytes()[0]);
                let logprob = job.request.logprobs.map(|_| TokenLogprob { logprob: Some(-0.5), top: vec![] });
                job.send(Event::Text { text: text.clone(), tokens: vec![TokenOut { id, logprob }] });
            }
            let reason = if tokens.len() > most { FinishReason::Length } else { FinishReason::Stop };
            let prompt_tokens = job.request.prompt.len();
            let completion_tokens = tokens.len().min(most);
            let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens };
            job.send(Event::Done { reason, usage, matched: None, ending: None });
        }
    })
    .unwrap();
    let config =
        ServerConfig { keep_alive: Duration::from_secs(15), ..ServerConfig::new(MODEL, 1_700_000_000) };
    let state = AppState::loading(config);
    state.set_engine(engine);
    m40llm::app(state)
}

/// A family's own chat template, which `scripts/fetch-vocabs.sh` fetches; ChatML as SmolLM2 has it knows no tools.
fn template(family: &str) -> String {
    if family == "chatml" {
        return "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                <|im_start|>assistant\n"
            .into();
    }
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../models/vocabs/templates/{family}.jinja"));
    std::fs::read_to_string(&path)
        .unwrap_or_else(|e| panic!("{}: {e}: run scripts/fetch-vocabs.sh", path.display()))
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "description": "The weather now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

fn ask(fields: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Weather in Paris?"}], "tools": tools()});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn whole(app: &Router, fields: &Value) -> Value {
    let answer = post(app, "/v1/chat/completions", &ask(fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

/// What a stream's chunks come to for each choice: message, finish reason and log-probabilities.
async fn streamed(app: &Router, fields: &Value) -> Vec<(Value, Value, Vec<Value>)> {
    let mut fields = fields.clone();
    fields["stream"] = true.into();
    let answer = post(app, "/v1/chat/completions", &ask(&fields)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut choices: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for chunk in answer.events(true) {
        let choice = &chunk["choices"][0];
        let (index, delta) =
            (choice["index"].as_u64().unwrap() as usize, choice["delta"].as_object().unwrap());
        if delta.contains_key("role") {
            assert_eq!(choice["delta"], json!({"role": "assistant", "content": ""}));
            choices.push((json!({"role": "assistant"}), Value::Null, Vec::new()));
            continue;
        }
        let (message, finish, logprobs) = &mut choices[index];
        assert!(finish.is_null(), "nothing follows the end");
        *finish = choice["finish_reason"].clone();
        assert_eq!(delta.is_empty(), !finish.is_null(), "{chunk}");
        logprobs.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        for key in ["content", "reasoning_content"] {
            if let Some(text) = delta.get(key) {
                append(&mut message[key], text.as_str().unwrap());
            }
        }
        for call in delta.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
            take_call(message, call);
        }
    }
    choices
}

fn append(to: &mut Value, text: &str) {
    *to = format!("{}{text}", to.as_str().unwrap_or_default()).into();
}

fn take_call(message: &mut Value, call: &Value) {
    if message["tool_calls"].is_null() {
        message["tool_calls"] = json!([]);
    }
    let calls = message["tool_calls"].as_array_mut().unwrap();
    let index = call["index"].as_u64().unwrap() as usize;
    if call.get("id").is_some() {
        assert_eq!(index, calls.len());
        assert_eq!((&call["type"], &call["function"]["arguments"]), (&json!("function"), &json!("")));
        let mut call = call.clone();
        call.as_object_mut().unwrap().shift_remove("index");
        calls.push(call);
    } else {
        let function = call["function"].as_object().unwrap();
        assert_eq!((call.as_object().unwrap().len(), function.len()), (2, 1), "{call}");
        append(&mut calls[index]["function"]["arguments"], function["arguments"].as_str().unwrap());
    }
}

/// The message with what only a stream or only a whole answer has taken away, and its calls' ids checked.
fn plain(message: &Value) -> Value {
    let mut message = message.clone();
    let map = message.as_object_mut().unwrap();
    map.shift_remove("refusal");
    if map.get("content").is_none_or(|content| content == "" || content.is_null()) {
        map.shift_remove("content");
    }
    let mut ids = std::collections::HashSet::new();
    for call in map.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let id = call.as_object_mut().unwrap().shift_remove("id").unwrap();
        assert!(id.as_str().unwrap().starts_with("call_") && ids.insert(id.clone()), "{id}");
    }
    message
}

fn call(name: &str, arguments: &str) -> Value {
    json!({"type": "function", "function": {"name": name, "arguments": arguments}})
}

/// (family, what the model says, the message, the finish reason)
fn recorded() -> Vec<(&'static str, String, Value, &'static str)> {
    let paris = "{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Pärïs\"}}";
    let now = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let call_paris = || call("get_weather", "{\"city\": \"Pärïs\"}");
    vec![
        (
            "qwen3",
            format!(
                "<think>\nThe user asks.\n</think>\n\nI look.\n<tool_call>\n{paris}\n</tool_call>\n{now}"
            ),
            json!({"role": "assistant", "content": "I look.", "reasoning_content": "The user asks.",
                "tool_calls": [call_paris(), call("now", "{}")]}),
            "tool_calls",
        ),
        (
            "qwen3",
            "<think>\n\n</think>\n\nIt is <b>sunny</b>.".into(),
            json!({"role": "assistant", "content": "It is <b>sunny</b>."}),
            "stop",
        ),
        (
            "qwen3",
            "<tool_call>\n{\"name\": \"get_wether\", \"arguments\": {}}\n</tool_call>".into(),
            json!({"role": "assistant",
                "content": "<tool_call>\n{\"name\": \"get_wether\", \"arguments\": {}}\n</tool_call>"}),
            "stop",
        ),
        (
            "llama-3.1",
            format!("<|python_tag|>{}", paris.replace("arguments", "parameters")),
            json!({"role": "assistant", "tool_calls": [call_paris()]}),
            "tool_calls",
        ),
        (
            "llama-3.2",
            paris.replace("arguments", "parameters"),
            json!({"role": "assistant", "tool_calls": [call_paris()]}),
            "tool_calls",
        ),
        (
            "chatml",
            format!("```json\n{paris}\n```"),
            json!({"role": "assistant", "tool_calls": [call_paris()]}),
            "tool_calls",
        ),
        // A family that is not read in its own words is told ours.
        (
            "mistral-nemo",
            now.into(),
            json!({"role": "assistant", "tool_calls": [call("now", "{}")]}),
            "tool_calls",
        ),
    ]
}

#[tokio::test]
async fn streamed_and_whole_are_the_same_in_every_family() {
    for (family, words, message, finish) in recorded() {
        let template = template(family);
        for characters in [1, 2, 7, 1000] {
            let app = says(&template, &words, characters);
            let answer = whole(&app, &json!({"n": 2})).await;
            let streams = streamed(&app, &json!({"n": 2})).await;
            assert_eq!(streams.len(), 2);
            for (choice, stream) in answer["choices"].as_array().unwrap().iter().zip(&streams) {
                assert_eq!(plain(&choice["message"]), message, "{family} by {characters}");
                assert_eq!(plain(&stream.0), message, "{family} by {characters}");
                assert_eq!((&choice["finish_reason"], &stream.1), (&json!(finish), &json!(finish)));
                assert_eq!(choice["message"]["content"].is_null(), message.get("content").is_none());
            }
            let ids = |i: usize| &answer["choices"][i]["message"]["tool_calls"][0]["id"];
            assert!(ids(0).is_null() || ids(0) != ids(1));
        }
    }
}

#[tokio::test]
async fn a_call_that_the_limit_cuts_off_is_not_a_whole_one() {
    let app = says(&template("chatml"), &recorded()[5].1, 1);
    for most in [5, 20, 46, 52] {
        let fields = json!({"max_tokens": most});
        let answer = whole(&app, &fields).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length");
        let (message, finish, _) = streamed(&app, &fields).await.remove(0);
        assert_eq!((plain(&message), finish), (plain(&choice["message"]), json!("length")));
    }
    let cut = whole(&app, &json!({"max_tokens": 52})).await;
    let function = &cut["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(function["arguments"], "{\"city\"", "{cut}");
}

#[tokio::test]
async fn log_probabilities_are_those_of_the_text() {
    let app = says(&template("qwen3"), &recorded()[0].1, 1);
    let fields = json!({"logprobs": true});
    let answer = whole(&app, &fields).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let text: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(text, "I look.");
    assert_eq!(&streamed(&app, &fields).await[0].2, content);
}

#[tokio::test]
async fn thoughts_are_counted() {
    let (_, words, ..) = recorded().remove(0);
    let app = says(&template("qwen3"), &words, 1);
    let answer = whole(&app, &json!({})).await;
    let thoughts = "<think>\nThe user asks.\n</think>\n\n".len();
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], thoughts);
    let fields = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = post(&app, "/v1/chat/completions", &ask(&fields)).await.events(true);
    assert_eq!(events.last().unwrap()["usage"], answer["usage"]);
    // Not where the template has the model not think.
    let fields = json!({"chat_template_kwargs": {"enable_thinking": false}});
    assert!(whole(&app, &fields).await["usage"].get("completion_tokens_details").is_none());
    let app = says(&template("chatml"), "<think>a</think>b", 3);
    let answer = whole(&app, &json!({})).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "<think>a</think>b");
    assert!(answer["usage"].get("completion_tokens_details").is_none());
}

#[tokio::test]
async fn without_a_choice_of_tools_the_model_is_told_of_none() {
    let call = &recorded()[6].1;
    for family in ["qwen3", "llama-3.1", "chatml"] {
        let app = says(&template(family), call, 4);
        let none = whole(&app, &json!({"tool_choice": "none"})).await;
        assert_eq!(none["choices"][0]["message"]["content"], **call);
        assert_eq!(none["choices"][0]["finish_reason"], "stop");
        let without = whole(&app, &json!({"tools": null})).await;
        assert_eq!(none["usage"]["prompt_tokens"], without["usage"]["prompt_tokens"]);
        let auto = whole(&app, &json!({})).await;
        assert!(auto["usage"]["prompt_tokens"].as_u64() > none["usage"]["prompt_tokens"].as_u64());
    }
}

#[tokio::test]
async fn conversations_go_on_after_calls() {
    let conversation = json!([
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "call_1", "type": "function",
             "function": {"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "{\"sky\": \"blue\"}"},
    ]);
    let written =
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
    let answered = "<tool_response>\n{\"sky\": \"blue\"}\n</tool_response>";
    for (family, parts) in [
        ("qwen3", vec!["\"name\": \"now\"", written, answered]),
        ("chatml", vec!["\"name\": \"now\"", written, "<|im_start|>user\n", answered]),
        (
            "llama-3.1",
            vec![
                "\"name\": \"now\"",
                "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}",
                "<|start_header_id|>ipython<|end_header_id|>\n\n",
                "sky",
            ],
        ),
    ] {
        let app = says(&template(family), "Blue.", 1);
        let body = json!({"messages": conversation, "tools": tools()});
        let rendered = post(&app, "/apply-template", &body).await.json();
        let prompt = rendered["prompt"].as_str().unwrap();
        let mut rest = prompt;
        for part in parts {
            let at = rest.find(part).unwrap_or_else(|| panic!("{family}: no {part:?} in {prompt}"));
            rest = &rest[at + part.len()..];
        }
        let answer = whole(&app, &json!({"messages": conversation})).await;
        assert_eq!(answer["choices"][0]["message"]["content"], "Blue.");
        assert_eq!(answer["usage"]["prompt_tokens"], prompt.len(), "the same prompt");
    }
}

#[tokio::test]
async fn what_cannot_be_held_to_its_schema_is_refused_whatever_the_choice() {
    let app = says(&template("chatml"), "Hi.", 1);
    let with = |keywords: Value, strict: bool| {
        let mut tools = tools();
        tools[1]["function"]["parameters"] = json!({"type": "object", "properties": {"a": keywords}});
        tools[1]["function"]["strict"] = strict.into();
        tools
    };
    let named = json!({"type": "function", "function": {"name": "now"}});
    for (keyword, keywords) in [
        ("notAKeyword", json!({"notAKeyword": 1})),
        ("uniqueItems", json!({"type": "array", "uniqueItems": true})),
        ("oneOf", json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})),
        ("format", json!({"type": "string", "format": 5})),
    ] {
        for (strict, choice) in [
            (false, json!("auto")),
            (false, json!(null)),
            (true, json!("auto")),
            (false, json!("required")),
            (false, named.clone()),
        ] {
            let fields = json!({"tools": with(keywords.clone(), strict), "tool_choice": choice});
            let answer = post(&app, "/v1/chat/completions", &ask(&fields)).await;
            assert_eq!(answer.status, 400, "{fields}: {}", answer.body);
            let error = answer.error();
            assert_eq!(error["param"], "tools[1].function.parameters", "{error}");
            assert!(error["message"].as_str().unwrap().contains(keyword), "{error}");
        }
        // What may not be called is not looked at.
        let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
            {"type": "function", "function": {"name": "get_weather"}}]}});
        for choice in [json!("none"), allowed] {
            let fields = json!({"tools": with(keywords.clone(), true), "tool_choice": choice});
            assert_eq!(whole(&app, &fields).await["choices"][0]["message"]["content"], "Hi.");
        }
    }
    for (fields, param) in [
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}),
            "tool_choice.function.name",
        ),
        (json!({"tools": [], "tool_choice": "required"}), "tool_choice"),
        (json!({"functions": []}), "functions"),
    ] {
        let answer = post(&app, "/v1/chat/completions", &ask(&fields)).await;
        assert_eq!(answer.status, 400, "{fields}: {}", answer.body);
        assert_eq!(answer.error()["param"], param, "{}", answer.body);
    }
}

/// What pydantic, zod and the agents' protocols write into schemas.
#[tokio::test]
async fn notes_in_schemas_are_accepted() {
    let app = says(&template("chatml"), "Hi.", 1);
    let schema = |format: &str| {
        json!({
            "$schema": "http://json-schema.org/draft-07/schema#", "title": "Arguments", "description": "d",
            "type": "object", "additionalProperties": false, "required": ["a"],
            "properties": {
                "a": {"title": "A", "description": "d", "type": "string", "default": "x", "examples": ["x"], "format": format},
                "b": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": null, "deprecated": true},
                "c": {"$ref": "#/$defs/C"},
            },
            "$defs": {"C": {"title": "C", "enum": ["one", "two"], "type": "string"}},
        })
    };
    let ask_with = |format: &str, strict: Value, choice: Value| {
        ask(&json!({"tool_choice": choice, "tools": [{"type": "function", "function": {
            "name": "f", "parameters": schema(format), "strict": strict}}]}))
    };
    for (format, strict, choice, status) in [
        ("date-time", json!(true), json!("auto"), 200),
        ("date-time", json!(null), json!("auto"), 200),
        // A note where nothing must be held to it.
        ("binary", json!(null), json!("auto"), 200),
        ("int64", json!(false), json!(null), 200),
        ("binary", json!(true), json!("auto"), 400),
        ("binary", json!(null), json!("required"), 400),
    ] {
        let answer = post(&app, "/v1/chat/completions", &ask_with(format, strict, choice)).await;
        assert_eq!(answer.status, status, "{format}: {}", answer.body);
        if status == 400 {
            assert!(answer.error()["message"].as_str().unwrap().contains("format"), "{}", answer.body);
        }
    }
}

#[tokio::test]
async fn a_model_that_must_calls() {
    let app = served();
    let fields = json!({"tool_choice": "required", "parallel_tool_calls": false, "temperature": 1.5, "seed": 5,
        "max_tokens": 200, "n": 2, "logprobs": true, "stop": ["Weather"]});
    let answer = whole(&app, &fields).await;
    for (choice, stream) in answer["choices"].as_array().unwrap().iter().zip(streamed(&app, &fields).await) {
        assert_eq!(plain(&choice["message"]), plain(&stream.0));
        assert_eq!(choice["finish_reason"], stream.1);
        assert_eq!(choice["logprobs"]["content"], json!([]), "no text, no tokens of it");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert!(calls.len() == 1 && choice["message"]["content"].is_null(), "{choice}");
        if choice["finish_reason"] == "tool_calls" {
            let function = &calls[0]["function"];
            let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
            match function["name"].as_str().unwrap() {
                "get_weather" => assert!(arguments["city"].is_string()),
                "now" => assert_eq!(arguments, json!({})),
                other => panic!("{other}"),
            }
        }
    }
    let named = json!({"tool_choice": {"type": "function", "function": {"name": "now"}}, "temperature": 0});
    let answer = whole(&app, &named).await;
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &Value::Null)
    );
    let function = &choice["message"]["tool_calls"][0]["function"];
    let arguments: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
    assert_eq!((&function["name"], arguments), (&json!("now"), json!({})));
}
