//! Structured output over a real model, through the gateway.

use std::{sync::Mutex, time::Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::support::{post, served};

async fn answered(path: &str, body: &Value) -> Value {
    let answer = post(&served(), path, body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 18, "maximum": 99},
            "colour": {"enum": ["red", "green"]}
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": false
    })
}

fn chat(schema: &Value) -> Value {
    json!({
        "messages": [{"role": "user", "content": "Invent a person."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": true}},
        "temperature": 1.5, "seed": 7, "max_tokens": 120
    })
}

fn check(text: &str) {
    let value: Value = serde_json::from_str(text).expect(text);
    assert_eq!(value.as_object().unwrap().keys().collect::<Vec<_>>(), ["name", "age", "colour"], "{text}");
    assert!((18..=99).contains(&value["age"].as_i64().unwrap()), "{text}");
    assert!(["red", "green"].contains(&value["colour"].as_str().unwrap()), "{text}");
}

#[tokio::test]
async fn choices_follow_the_schema_and_streams_say_the_same() {
    let mut body = chat(&person());
    body["n"] = json!(3);
    body["logprobs"] = json!(true);
    let whole = answered("/v1/chat/completions", &body).await;
    let mut texts: Vec<String> = Vec::new();
    for choice in whole["choices"].as_array().unwrap() {
        let text = choice["message"]["content"].as_str().unwrap();
        assert_eq!(choice["finish_reason"], "stop", "{text}");
        check(text);
        texts.push(text.into());
        let tokens = choice["logprobs"]["content"].as_array().unwrap();
        let joined: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
        assert_eq!(joined, text, "every token of the text is scored");
    }
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "each choice has its seed: {texts:?}");

    body["stream"] = json!(true);
    let mut streamed = vec![String::new(); 3];
    for chunk in post(&served(), "/v1/chat/completions", &body).await.events(true) {
        for choice in chunk["choices"].as_array().unwrap() {
            let text = choice["delta"]["content"].as_str().unwrap_or_default();
            streamed[choice["index"].as_u64().unwrap() as usize] += text;
        }
    }
    assert_eq!(streamed, texts);
}

#[tokio::test]
async fn completions_take_the_same_fields() {
    let body = json!({
        "prompt": ["Once", "A telephone number:"], "n": 2, "temperature": 1.5, "seed": 1, "max_tokens": 40,
        "regex": "[0-9]{3}-[0-9]{4}"
    });
    for choice in answered("/v1/completions", &body).await["choices"].as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        assert_eq!((choice["finish_reason"].as_str(), text.len()), (Some("stop"), 8), "{text}");
        assert_eq!(text.find('-'), Some(3), "{text}");
    }
    let body =
        json!({"prompt": "x", "max_tokens": 40, "seed": 3, "stop": "lo", "choice": ["hello", "yellow"]});
    let choice = &answered("/v1/completions", &body).await["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert!(["hel", "yel"].contains(&choice["text"].as_str().unwrap()), "a stop string cuts it: {choice}");
    let body = json!({"prompt": "x", "max_tokens": 2, "seed": 3, "temperature": 0, "choice": ["aaaa bbbb cccc dddd eeee"]});
    let choice = &answered("/v1/completions", &body).await["choices"][0];
    assert_eq!(choice["finish_reason"], "length", "{choice}");
    assert!("aaaa bbbb cccc dddd eeee".starts_with(choice["text"].as_str().unwrap()));
}

#[tokio::test]
async fn bias_and_penalties_choose_only_among_what_is_allowed() {
    for fields in [
        json!({"logit_bias": {"0": 100, "2": 100}}),
        json!({"frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 1.5}),
        json!({"temperature": 0}),
        json!({"top_k": 3, "min_p": 0.1, "top_p": 0.5}),
    ] {
        let mut body = chat(&person());
        for (key, value) in fields.as_object().unwrap() {
            body[key] = value.clone();
        }
        let answer = answered("/v1/chat/completions", &body).await;
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{fields}: {choice}");
        check(choice["message"]["content"].as_str().unwrap());
    }
}

/// What the grammar or a bias forbids has a log-probability all the same, and one that JSON can say.
#[tokio::test]
async fn constrained_outputs_have_finite_log_probabilities() {
    let bias: serde_json::Map<String, Value> = (0..40).map(|id| (id.to_string(), json!(-100))).collect();
    let constrained = |path: &str| {
        let mut body = json!({"choice": ["zebra crossing"], "max_tokens": 12, "seed": 1, "logit_bias": bias});
        if path == "/v1/completions" {
            (body["prompt"], body["logprobs"], body["echo"]) = ("2 + 2 =".into(), 20.into(), true.into());
        } else {
            body["messages"] = json!([{"role": "user", "content": "2 + 2 ="}]);
            (body["logprobs"], body["top_logprobs"]) = (true.into(), 20.into());
        }
        body
    };
    let chat = answered("/v1/chat/completions", &constrained("/v1/chat/completions")).await;
    let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let said: String = content.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!(said, "zebra crossing");
    let top = content.iter().flat_map(|token| token["top_logprobs"].as_array().unwrap());
    let all: Vec<&Value> = content.iter().chain(top).map(|token| &token["logprob"]).collect();
    assert_eq!(all.len(), content.len() * 21);
    let mut numbers: Vec<f64> = all.iter().map(|logprob| logprob.as_f64().unwrap()).collect();

    let legacy = answered("/v1/completions", &constrained("/v1/completions")).await;
    let logprobs = &legacy["choices"][0]["logprobs"];
    let own = logprobs["token_logprobs"].as_array().unwrap();
    let top = logprobs["top_logprobs"].as_array().unwrap();
    assert!(own[0].is_null() && top[0].is_null(), "nothing predicts the first token");
    numbers.extend(own[1..].iter().map(|logprob| logprob.as_f64().unwrap()));
    for best in &top[1..] {
        numbers.extend(best.as_object().unwrap().values().map(|logprob| logprob.as_f64().unwrap()));
    }
    assert!(numbers.iter().all(|logprob| (-9999.0..=0.0).contains(logprob)), "{numbers:?}");
}

#[tokio::test]
async fn what_cannot_be_enforced_is_refused() {
    let schema = "response_format.json_schema.schema";
    for (fields, param, word) in [
        (chat(&json!({"properties": {"a": {"uniqueItems": true}}})), schema, "#/properties/a/uniqueItems"),
        (chat(&json!({"oneOf": [{"type": "integer"}, {"type": "number"}]})), schema, "anyOf always is"),
        (chat(&json!({"type": "string", "pattern": "("})), schema, "unclosed group"),
        (chat(&json!({"$ref": "#"})), schema, "no text satisfies it"),
        (json!({"regex": "a("}), "regex", "unclosed group"),
        (json!({"choice": []}), "choice", "at least"),
        (json!({"grammar": "start: nobody"}), "grammar", "nobody"),
        (json!({"regex": "a", "grammar": "start: \"a\""}), "grammar", "one shape"),
        (json!({"regex": 1}), "regex", "string"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": 1}}}),
            "response_format.json_schema.name",
            "string",
        ),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "prompt": "x"});
        for (key, value) in fields.as_object().unwrap() {
            body[key] = value.clone();
        }
        for path in ["/v1/chat/completions", "/v1/completions"] {
            let answer = post(&served(), path, &body).await;
            assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!(param)), "{body}");
            let message = answer.error()["message"].as_str().unwrap().to_owned();
            assert!(message.contains(word) && !message.contains('\n'), "{body}: {message}");
        }
    }
}

/// On one thread: what compiled a grammar on it would keep all others from being read at all.
#[tokio::test]
async fn a_flood_of_costly_grammars_holds_up_nobody_else() {
    let app = served();
    let began = Instant::now();
    let ended = Mutex::new(Vec::new());
    let ask = async |costly: bool, body: Value| {
        let answer = post(&app, "/v1/completions", &body).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        ended.lock().unwrap().push((costly, began.elapsed()));
    };
    let choices: Vec<_> = (0..7000).map(|n| format!("{n:x}")).collect();
    let costly = (0..12).map(|_| ask(true, json!({"prompt": "x", "choice": choices, "max_tokens": 1})));
    let plain = (0..4).map(|_| ask(false, json!({"prompt": "x", "max_tokens": 2})));
    join_all(costly.chain(plain)).await;
    let ended = ended.into_inner().unwrap();
    let [last_costly, last_plain] = [true, false].map(|kind| ended.iter().rposition(|&(is, _)| is == kind));
    assert!(last_plain < last_costly, "{ended:?}");
}
