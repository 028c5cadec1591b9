//! `suffix`: filling in the middle, over a model that was made for it.

use serde_json::{Value, json};

use crate::support::{coder, post, served};

async fn fill(body: &Value) -> Value {
    let answer = post(&coder(), "/v1/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn a_gap_is_filled_with_what_belongs_there() {
    // A model this small, made to chat, often talks on after the gap is filled; not after the first of these.
    for (prompt, suffix, expected, ends) in [
        ("def add(a, b):\n    return ", "\n\nprint(add(1, 2))  # 3\n", "a + b", true),
        ("def is_even(n):\n    return n % ", " == 0\n\nprint(is_even(4))  # True\n", "2", false),
        ("fn square(x: i32) -> i32 {\n    ", "\n}\n\nassert_eq!(square(3), 9);\n", "x * x", false),
    ] {
        let answer =
            fill(&json!({"prompt": prompt, "suffix": suffix, "temperature": 0, "max_tokens": 24})).await;
        let choice = &answer["choices"][0];
        assert!(text(&answer).starts_with(expected), "{prompt:?} … {suffix:?}: {choice}");
        assert!(!ends || choice["finish_reason"] == "stop", "{choice}");
        assert!(!text(&answer).contains("<|"), "no marks: {choice}");
    }
}

#[tokio::test]
async fn what_follows_changes_what_is_filled_in() {
    let of = |suffix: &'static str| async move {
        let body =
            json!({"prompt": "x = ", "suffix": suffix, "temperature": 0, "max_tokens": 12, "stop": "\n"});
        text(&fill(&body).await).to_owned()
    };
    assert_ne!(of("\nprint(x.upper())").await, of("\nprint(x * 3.5)").await);
}

/// The prompt as text or ids, streamed or whole, echoed or not.
#[tokio::test]
async fn every_form_of_the_request_fills_alike() {
    let (prompt, suffix) = ("def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n");
    let body = |extra: Value| {
        let mut body = json!({"prompt": prompt, "suffix": suffix, "temperature": 0, "max_tokens": 8});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let plain = fill(&body(json!({}))).await;
    let ids = post(&coder(), "/tokenize", &json!({"content": prompt})).await.json()["tokens"].clone();
    assert_eq!(text(&fill(&body(json!({"prompt": ids}))).await), text(&plain));
    let both = fill(&body(json!({"prompt": [prompt, "x = "]}))).await;
    assert_eq!(text(&both), text(&plain));
    assert_eq!(both["choices"].as_array().unwrap().len(), 2);
    let echoed = fill(&body(json!({"echo": true}))).await;
    assert_eq!(text(&echoed), format!("{prompt}{}", text(&plain)), "the suffix is not repeated");
    let chunks = post(&coder(), "/v1/completions", &body(json!({"stream": true}))).await.events(true);
    let streamed: String = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(streamed, text(&plain));
    let scored = fill(&body(json!({"logprobs": 1}))).await;
    assert!(scored["choices"][0]["logprobs"]["token_logprobs"][0].is_number());
    // The marks and the suffix are part of what was read.
    let unmarked = fill(&json!({"prompt": prompt, "max_tokens": 1})).await;
    let read = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().unwrap();
    assert!(read(&plain) > read(&unmarked) + 3);
}

#[tokio::test]
async fn what_cannot_be_filled_is_refused() {
    let body = json!({"prompt": "x = ", "suffix": "\ny = 2", "echo": true, "logprobs": 1});
    let answer = post(&coder(), "/v1/completions", &body).await;
    assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!("suffix")));
    let answer = post(&served(), "/v1/completions", &json!({"prompt": "x", "suffix": "y"})).await;
    assert_eq!((answer.status.as_u16(), &answer.error()["param"]), (400, &json!("suffix")));
    assert_eq!(post(&served(), "/v1/completions", &json!({"prompt": "x", "suffix": ""})).await.status, 200);
}
