//! `/v1/completions` over a real model.

use serde_json::{Value, json};

use crate::support::{engine, post, served};

const PROMPT: &str = "The capital of France is";

async fn complete(body: &Value) -> Value {
    let answer = post(&served(), "/v1/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn ids(text: &str) -> Vec<u32> {
    engine().tokenizer().encode(text, true, true)
}

#[tokio::test]
async fn completions_have_openais_shape() {
    let answer = complete(&json!({"prompt": PROMPT, "temperature": 0})).await;
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["choices"][0]["logprobs"].is_null());
    assert!(answer["choices"][0]["text"].as_str().unwrap().contains("Paris"), "{answer}");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 16, "the default limit");
}

#[tokio::test]
async fn four_forms_of_prompts_agree() {
    let other = "One, two, three,";
    let of = |prompt: Value| async move {
        let answer = complete(&json!({"prompt": prompt, "max_tokens": 4, "temperature": 0})).await;
        let choices = answer["choices"].as_array().unwrap().clone();
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], i);
        }
        choices.iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let text = of(json!(PROMPT)).await;
    assert_eq!(of(json!(ids(PROMPT))).await, text);
    let both = of(json!([PROMPT, other])).await;
    assert_eq!(both[0], text[0]);
    assert_eq!(of(json!([ids(PROMPT), ids(other)])).await, both);
}

#[tokio::test]
async fn choices_are_numbered_by_prompt() {
    let body = json!({"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "temperature": 1, "seed": 3});
    let answer = complete(&body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| c["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    // Choice j of each prompt has the seed 3 + j.
    let alone = complete(&json!({"prompt": "b", "max_tokens": 4, "temperature": 1, "seed": 4})).await;
    assert_eq!(alone["choices"][0]["text"], choices[3]["text"]);
    let once = ids("a").len() + ids("b").len();
    assert_eq!(answer["usage"]["prompt_tokens"], once);
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let answer = complete(&json!({"prompt": PROMPT, "echo": true, "max_tokens": 0, "logprobs": 2})).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(PROMPT), &json!("length")));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let logprobs = &choice["logprobs"];
    let prompt = ids(PROMPT);
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), prompt.len(), "{list}");
    }
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    for i in 1..prompt.len() {
        let (token, own) =
            (logprobs["tokens"][i].as_str().unwrap(), logprobs["token_logprobs"][i].as_f64().unwrap());
        assert!((-9999.0..=0.0).contains(&own));
        assert_eq!(logprobs["top_logprobs"][i][token], own, "the token itself is among the best");
        let offset = logprobs["text_offset"][i].as_u64().unwrap() as usize;
        assert!(PROMPT[offset..].starts_with(token), "{token:?} at {offset}");
    }
}

/// lm-evaluation-harness asks for one token behind the text that it scores, and leaves out the last score.
#[tokio::test]
async fn the_token_that_ends_a_choice_is_scored() {
    let prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n\
        The capital of France is Paris.";
    let body = json!({"prompt": prompt, "echo": true, "max_tokens": 1, "logprobs": 1, "temperature": 0});
    let answer = complete(&body).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(prompt), &json!("stop")));
    let logprobs = &choice["logprobs"];
    let count = ids(prompt).len();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), count + 1, "{list}");
    }
    assert_eq!(logprobs["tokens"][count], "<|im_end|>");
    assert_eq!(logprobs["top_logprobs"][count]["<|im_end|>"], logprobs["token_logprobs"][count]);
    assert_eq!(logprobs["text_offset"][count], prompt.chars().count());
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let mut tokens = Vec::new();
    for event in post(&served(), "/v1/completions", &streamed).await.events(true) {
        tokens.extend(event["choices"][0]["logprobs"]["tokens"].as_array().into_iter().flatten().cloned());
    }
    assert_eq!(json!(tokens), logprobs["tokens"]);
}

/// Else two tokens that are no whole characters would be one key of `top_logprobs`, and the worse could pass for the best.
#[tokio::test]
async fn tokens_of_half_a_character_keep_their_bytes() {
    let answer = complete(&json!({"prompt": "水", "echo": true, "max_tokens": 0, "logprobs": 20})).await;
    let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    let hex = |byte: &u8| format!("\\x{byte:02x}");
    let names: String =
        tokens.iter().map(|token| token.as_str().unwrap().strip_prefix("bytes:").unwrap()).collect();
    assert!(tokens.len() > 1, "{tokens:?}");
    assert_eq!(names, "水".as_bytes().iter().map(hex).collect::<String>());
    let best = answer["choices"][0]["logprobs"]["top_logprobs"][1].as_object().unwrap();
    assert!(best.len() >= 20, "each of them has a key: {best:?}");
}

#[tokio::test]
async fn echo_and_output_follow_one_another() {
    let prompt = "Zürich, Genève ☕ and";
    let body = json!({"prompt": prompt, "echo": true, "max_tokens": 5, "logprobs": 0, "temperature": 0});
    let choice = complete(&body).await["choices"][0].clone();
    let text = choice["text"].as_str().unwrap();
    assert!(text.starts_with(prompt) && text.len() > prompt.len());
    let plain = complete(&json!({"prompt": prompt, "max_tokens": 5, "temperature": 0})).await;
    assert_eq!(&text[prompt.len()..], plain["choices"][0]["text"].as_str().unwrap());
    let offsets: Vec<u64> = serde_json::from_value(choice["logprobs"]["text_offset"].clone()).unwrap();
    assert!(offsets.is_sorted());
    let first = ids(prompt).len();
    assert_eq!(offsets[first], prompt.chars().count() as u64, "characters, not bytes");
}

#[tokio::test]
async fn best_of_picks_the_likeliest() {
    let body = |extra: Value| {
        let mut body =
            json!({"prompt": PROMPT, "max_tokens": 6, "temperature": 1.5, "seed": 11, "logprobs": 0});
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        body
    };
    let mean = |choice: &Value| {
        let scores: Vec<f64> = serde_json::from_value(choice["logprobs"]["token_logprobs"].clone()).unwrap();
        scores.iter().sum::<f64>() / scores.len() as f64
    };
    let all = complete(&body(json!({"n": 4}))).await;
    let best = complete(&body(json!({"best_of": 4}))).await;
    let choices = all["choices"].as_array().unwrap();
    let expected = choices.iter().max_by(|a, b| mean(a).total_cmp(&mean(b))).unwrap();
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert_eq!(best["choices"][0]["text"], expected["text"]);
    assert_eq!(
        best["usage"]["completion_tokens"], all["usage"]["completion_tokens"],
        "all that was generated"
    );
}

#[tokio::test]
async fn bad_fields_are_named() {
    for (body, param) in [
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [1, 99_999_999]}), "prompt[1]"),
        (json!({"prompt": [[1], [2, 99_999_999]]}), "prompt[1][1]"),
        (json!({"prompt": "x", "suffix": "y"}), "suffix"),
        (json!({"prompt": "x", "n": 2, "best_of": 1}), "best_of"),
        (json!({"prompt": "x", "best_of": 2, "stream": true}), "best_of"),
        (json!({"prompt": "x", "logprobs": 21}), "logprobs"),
        (json!({"prompt": "x", "logprobs": true}), "logprobs"),
        (json!({"prompt": "x", "max_tokens": -1}), "max_tokens"),
        (json!({"prompt": vec!["x"; 65]}), "prompt"),
        (json!({"prompt": "x", "response_format": {"type": "yaml"}}), "response_format.type"),
    ] {
        let answer = post(&served(), "/v1/completions", &body).await;
        assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!(param)), "{body}");
    }
}

#[tokio::test]
async fn null_suffix_and_empty_prompt_pass() {
    let body = json!({"prompt": "", "suffix": null, "best_of": null, "logprobs": null, "max_tokens": 1});
    assert_eq!(complete(&body).await["usage"]["completion_tokens"], 1);
}
