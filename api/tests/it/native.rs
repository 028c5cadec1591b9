//! `/generate`, `/tokenize`, `/detokenize` and `/apply-template` over a real model.

use axum::http::Method;
use serde_json::{Value, json};

use crate::support::{Answer, get, post, request, send, served};

const QUESTION: &str = "Say hello in French.";

fn body(fields: &Value) -> Value {
    let mut body = json!({"prompt": QUESTION, "max_tokens": 10, "temperature": 0});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn generate(fields: &Value, accept: &str) -> Answer {
    let headers = [("content-type", "application/json"), ("accept", accept)];
    send(&served(), request(Method::POST, "/generate", &headers, body(fields).to_string())).await
}

#[tokio::test]
async fn whole_and_streamed_outputs_agree() {
    let whole = generate(&json!({}), "*/*").await.json();
    let output = whole["output"].as_str().unwrap();
    assert!(output.contains("Bonjour") && !output.contains(QUESTION), "{output}");
    assert!(["stop", "length"].contains(&whole["finish_reason"].as_str().unwrap()));
    assert!(whole["usage"]["total_tokens"].as_u64().unwrap() > 10);

    let lines = generate(&json!({"stream": true}), "*/*").await;
    assert!(lines.header("content-type").starts_with("application/x-ndjson"));
    let pieces: Vec<Value> = lines.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sse = generate(&json!({"stream": true}), "text/event-stream").await;
    assert_eq!(sse.header("content-type"), "text/event-stream; charset=utf-8");
    assert_eq!(sse.events(false), pieces);

    let (last, rest) = pieces.split_last().unwrap();
    assert!(rest.iter().all(|p| p["done"] == false && p.get("usage").is_none()));
    let joined: String = rest.iter().map(|p| p["output"].as_str().unwrap()).collect();
    assert_eq!(joined, output);
    let expected =
        json!({"output": "", "done": true, "finish_reason": whole["finish_reason"], "usage": whole["usage"]});
    assert_eq!(last, &expected);
}

#[tokio::test]
async fn formats_render_the_prompt_once() {
    let app = served();
    let messages = json!({"messages": [{"role": "user", "content": QUESTION}]});
    let rendered = post(&app, "/apply-template", &messages).await.json()["prompt"].clone();
    assert!(rendered.as_str().unwrap().ends_with("<|im_start|>assistant\n"), "{rendered}");
    let auto = generate(&json!({}), "*/*").await.json();
    for fields in [
        json!({"prompt_format": "auto"}),
        json!({"prompt_format": "template"}),
        json!({"prompt_format": null, "prompt": rendered}),
        json!({"prompt_format": "raw", "prompt": rendered}),
    ] {
        assert_eq!(generate(&fields, "*/*").await.json()["output"], auto["output"], "{fields}");
    }
    let raw = generate(&json!({"prompt_format": "raw"}), "*/*").await.json();
    assert!(raw["usage"]["prompt_tokens"].as_u64() < auto["usage"]["prompt_tokens"].as_u64());
}

#[tokio::test]
async fn bad_fields_are_named() {
    for (fields, param) in [
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt_format": "chatml"}), "prompt_format"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"max_tokens": 1.5}), "max_tokens"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
    ] {
        let answer = generate(&fields, "*/*").await;
        assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!(param)), "{fields}");
    }
    let app = served();
    for (path, body, param) in [
        ("/detokenize", json!({"tokens": [1, 99_999_999]}), "tokens[1]"),
        ("/apply-template", json!({"messages": []}), "messages"),
        ("/apply-template", json!({"messages": [{"role": "user"}], "tools": [{}]}), "tools[0].type"),
    ] {
        let answer = post(&app, path, &body).await;
        assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!(param)), "{path}");
    }
}

#[tokio::test]
async fn text_survives_tokens() {
    let app = served();
    for text in ["Hello, world!", "  Zürich ☕\n\n", "<|im_start|>user"] {
        let tokens = post(&app, "/tokenize", &json!({"content": text})).await.json();
        assert_eq!(post(&app, "/detokenize", &tokens).await.json(), json!({"content": text}));
    }
    let of = |fields: Value| {
        let app = app.clone();
        async move { post(&app, "/tokenize", &fields).await.json()["tokens"].as_array().unwrap().len() }
    };
    assert_eq!(of(json!({"content": "<|im_start|>", "parse_special": null})).await, 1);
    assert!(of(json!({"content": "<|im_start|>", "parse_special": false})).await > 1);
    let long = "word ".repeat(50_000);
    assert!(of(json!({"content": long})).await >= 50_000);
}

/// lm-evaluation-harness takes them for vLLM's.
#[tokio::test]
async fn the_tokenizer_speaks_vllms_words_too() {
    let app = served();
    let of = |fields: Value| {
        let app = app.clone();
        async move { post(&app, "/tokenize", &fields).await }
    };
    let text = "<|im_start|>user\nHi";
    let own = of(json!({"content": text, "add_special": true})).await.json();
    assert_eq!(of(json!({"prompt": text, "add_special_tokens": true})).await.json(), own);
    let info = get(&app, "/tokenizer_info").await.json();
    assert_eq!(info, json!({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}));
    for (fields, word) in [(json!({}), "content"), (json!({"content": "a", "prompt": "b"}), "twice")] {
        let refused = of(fields).await;
        let message = refused.error()["message"].as_str().unwrap().to_owned();
        assert!(refused.status == 400 && message.contains(word), "{message}");
    }
}

#[tokio::test]
async fn work_is_counted() {
    let app = served();
    let length = post(&app, "/generate", &body(&json!({}))).await;
    assert_eq!(length.status, 200);
    let metrics = get(&app, "/metrics").await.body;
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert!(value("m40llm_generated_tokens_total") >= 1.0);
    assert!(value("m40llm_prompt_tokens_total") >= 10.0);
    assert!(value("m40llm_kv_blocks") >= 32.0);
    assert!((value("m40llm_time_to_first_token_seconds_count") - 1.0).abs() < f64::EPSILON);
}
