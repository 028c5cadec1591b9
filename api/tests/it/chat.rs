//! `/v1/chat/completions` over a real model, whole answers.

use serde_json::{Value, json};

use crate::support::{MODEL, engine, get, post, served};

fn ask(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0})
}

fn with(mut body: Value, fields: &Value) -> Value {
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn chat(body: &Value) -> Value {
    let answer = post(&served(), "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

async fn refused(body: &Value) -> Value {
    let answer = post(&served(), "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert_eq!(answer.header("x-should-retry"), "false");
    answer.error()
}

#[tokio::test]
async fn answers_have_openais_shape() {
    let answer = chat(&with(ask("Say hello in French."), &json!({"model": MODEL}))).await;
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let choice = &answer["choices"][0];
    assert_eq!((&choice["index"], &choice["logprobs"]), (&json!(0), &Value::Null));
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].as_str().unwrap().contains("Bonjour"), "{answer}");
    assert!(choice["message"].get("tool_calls").is_none());
    let usage = &answer["usage"];
    let total = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], total);
    assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
}

#[tokio::test]
async fn both_limits_may_come_and_the_new_one_wins() {
    let answer =
        chat(&with(ask("Count to one hundred."), &json!({"max_tokens": 9, "max_completion_tokens": 3.0})))
            .await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn stop_strings_end_and_are_left_out() {
    let whole = chat(&ask("Say hello in French.")).await;
    let whole = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let stop: String = whole.chars().skip(5).take(4).collect();
    let cut = chat(&with(ask("Say hello in French."), &json!({"stop": stop}))).await;
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    let expected = &whole[..whole.find(&stop).unwrap()];
    assert_eq!(cut["choices"][0]["message"]["content"], expected);
}

#[tokio::test]
async fn seeds_repeat_and_choices_differ_by_theirs() {
    let body = with(ask("Tell me a story."), &json!({"temperature": 1, "seed": 7, "n": 3}));
    let (first, second) = (chat(&body).await, chat(&body).await);
    assert_eq!(first["choices"], second["choices"]);
    let texts: Vec<&Value> = (0..3).map(|i| &first["choices"][i]["message"]["content"]).collect();
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "{texts:?}");
    // Choice j has the seed 7 + j.
    let third = chat(&with(body, &json!({"seed": 9, "n": 1}))).await;
    assert_eq!(&third["choices"][0]["message"]["content"], texts[2]);
    // The prompt counts once.
    assert_eq!(first["usage"]["prompt_tokens"], third["usage"]["prompt_tokens"]);
    assert!(first["usage"]["completion_tokens"].as_u64() > third["usage"]["completion_tokens"].as_u64());
}

#[tokio::test]
async fn logprobs_have_the_chat_shape() {
    let answer =
        chat(&with(ask("Say hello in French."), &json!({"logprobs": true, "top_logprobs": 3}))).await;
    let choice = &answer["choices"][0];
    assert!(choice["logprobs"]["refusal"].is_null());
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let text: String = tokens.iter().map(|t| t["token"].as_str().unwrap()).collect();
    assert!(text.starts_with(choice["message"]["content"].as_str().unwrap()), "{text}");
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), token["token"].as_str().unwrap());
        // Greedy: the chosen token is the best one.
        assert_eq!(top[0]["token"], token["token"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    let own = chat(&with(ask("Hi"), &json!({"logprobs": true}))).await;
    assert_eq!(own["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

#[tokio::test]
async fn bias_forces_a_token() {
    let id = engine().tokenizer().encode("yes", false, false)[0];
    let answer = chat(&with(ask("Hi"), &json!({"max_tokens": 2, "logit_bias": {id.to_string(): 100}}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "yesyes");
}

#[tokio::test]
async fn what_is_lenient_passes() {
    let body = json!({
        "model": "", "max_tokens": 2, "temperature": 0, "stop": [], "n": 1.0, "user": "u", "store": false,
        "metadata": {"a": "b"}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": null, "tool_calls": []},
            {"role": "user", "content": "Hello", "name": null}
        ]
    });
    assert_eq!(chat(&body).await["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn bad_fields_are_named() {
    for (fields, param) in [
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_p": -0.1}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"presence_penalty": 2.5}), "presence_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999999": 1}}), "logit_bias"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"stop": vec!["x"; 17]}), "stop"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"functions": []}), "functions"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "king", "content": "x"}]}), "messages[0].role"),
        (
            json!({"messages": [{"role": "user", "content": [
                {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0].content[1]",
        ),
    ] {
        let error = refused(&with(ask("Hi"), &fields)).await;
        assert_eq!(
            (&error["param"], &error["type"]),
            (&json!(param), &json!("invalid_request_error")),
            "{fields}"
        );
    }
}

#[tokio::test]
async fn overflow_has_the_words_that_clients_match() {
    for body in [ask(&"word ".repeat(2000)), with(ask("Hi"), &json!({"max_tokens": 5000}))] {
        let error = refused(&body).await;
        assert_eq!(error["code"], "context_length_exceeded");
        assert!(
            error["message"].as_str().unwrap().contains("This model's maximum context length is 1024 tokens")
        );
    }
}

#[tokio::test]
async fn a_full_context_ends_an_answer_by_length() {
    let prompt = "word ".repeat(980);
    let mut body = with(ask(&prompt), &json!({"logit_bias": {"0": -100, "2": -100}}));
    body.as_object_mut().unwrap().remove("max_tokens");
    let answer = chat(&body).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["total_tokens"], 1024, "all of the context: {}", answer["usage"]);
    body["max_tokens"] = Value::Null;
    assert_eq!(chat(&body).await["usage"]["total_tokens"], 1024);
}

#[tokio::test]
async fn eight_at_once_give_the_same_texts_as_one_after_another() {
    let prompts: Vec<Value> = (1..=8).map(|i| ask(&format!("Write {i} words about the sea."))).collect();
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(chat(prompt).await["choices"].clone());
    }
    let together = futures_util::future::join_all(prompts.iter().map(chat)).await;
    for (alone, together) in alone.iter().zip(&together) {
        assert_eq!(alone, &together["choices"]);
    }
}

#[tokio::test]
async fn the_model_is_listed() {
    let app = served();
    let list = get(&app, "/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let model = &list["data"][0];
    assert_eq!(
        (&model["id"], &model["object"], &model["owned_by"]),
        (&json!(MODEL), &json!("model"), &json!("m40llm"))
    );
    assert_eq!(model["created"], 1_700_000_000);
    assert_eq!(
        (&model["meta"]["context_length"], &model["meta"]["quantization"]),
        (&json!(1024), &json!("Q4_1"))
    );
    let meta = &model["meta"];
    assert!(
        meta["parameters"].as_u64() > Some(130_000_000) && meta["context_length_train"].as_u64() > Some(1024),
        "{meta}"
    );
    assert_eq!(&get(&app, &format!("/v1/models/{MODEL}")).await.json(), model);
    assert_eq!(get(&app, "/health").await.json(), json!({"status": "ok"}));
}
