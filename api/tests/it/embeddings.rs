//! `/v1/embeddings` over a real model.

use std::{sync::mpsc, time::Duration};

use m40llm::{AppState, ServerConfig};
use m40llm_engine::{
    Engine, EngineConfig, Event, FinishReason, Usage,
    source::{Inbox, Submitted},
};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::support::{Answer, MODEL, engine, post, served};

async fn embed(body: &Value) -> Value {
    let answer = post(&served(), "/v1/embeddings", body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

fn vectors(answer: &Value) -> Vec<Vec<f32>> {
    let data = answer["data"].as_array().unwrap();
    data.iter().map(|d| serde_json::from_value(d["embedding"].clone()).unwrap()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[tokio::test]
async fn lists_have_openais_shape() {
    let texts = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose by 2 %."];
    let answer = embed(&json!({"input": texts, "user": "u"})).await;
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("test-model")));
    let read: usize = texts.iter().map(|t| engine().tokenizer().encode(t, true, true).len()).sum();
    assert_eq!(answer["usage"], json!({"prompt_tokens": read, "total_tokens": read}));
    for (i, entry) in answer["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(i)));
    }
    let [cat, kitten, rates] = &vectors(&answer)[..] else { panic!("{answer}") };
    for vector in [cat, kitten, rates] {
        assert_eq!(vector.len(), engine().info().embedding_length);
        assert!((dot(vector, vector) - 1.0).abs() < 1e-4);
    }
    assert!(dot(cat, kitten) > dot(cat, rates), "what is alike lies together");
}

#[tokio::test]
async fn every_form_of_input_gives_the_same_vector() {
    let text = "One, two, three.";
    let ids = engine().tokenizer().encode(text, true, true);
    let expected = vectors(&embed(&json!({"input": text})).await);
    for input in [json!([text]), json!(ids), json!([ids])] {
        assert_eq!(vectors(&embed(&json!({"input": input, "encoding_format": null})).await), expected);
    }
    let own = expected[0].len();
    let answer = embed(&json!({"input": text, "encoding_format": "base64", "dimensions": own})).await;
    assert_eq!(decoded(answer["data"][0]["embedding"].as_str().unwrap()), expected[0]);
}

/// By hand, as the server's own library would agree with itself.
fn decoded(base64: &str) -> Vec<f32> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bytes = Vec::new();
    for four in base64.as_bytes().chunks(4) {
        let digits = four.iter().filter(|&&c| c != b'=');
        let bits = digits.clone().fold(0u32, |bits, c| {
            bits << 6 | DIGITS.iter().position(|d| d == c).expect("a digit of base64") as u32
        });
        let count = digits.count();
        bytes.extend_from_slice(&(bits << (6 * (4 - count)) << 8).to_be_bytes()[..count - 1]);
    }
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// More than the queue holds: they follow one another.
#[tokio::test]
async fn two_thousand_inputs_are_one_request() {
    let inputs: Vec<Vec<u32>> = (0..2048).map(|i| vec![1000 + i % 16]).collect();
    let answer = embed(&json!({"input": inputs})).await;
    let found = vectors(&answer);
    assert_eq!((found.len(), &answer["usage"]["prompt_tokens"]), (2048, &json!(2048)));
    for (i, vector) in found.iter().enumerate() {
        assert_eq!(vector, &found[i % 16], "input {i} is in its place");
    }
    let more: Vec<&str> = vec!["x"; 2049];
    refused(&json!({"input": more}), "input").await;
}

/// A server whose engine has two places in the batch and two in the queue, and does what `work` says.
fn over(work: impl FnOnce(&mut Inbox) + Send + 'static) -> (AppState, Engine) {
    let config = EngineConfig { max_batch: 2, max_queue: 2, ..EngineConfig::default() };
    let engine = Engine::from_source(&config, work).unwrap();
    let config = ServerConfig { max_queue: 2, ..ServerConfig::new(MODEL, 1_700_000_000) };
    let state = AppState::loading(config);
    state.set_engine(engine.clone());
    (state, engine)
}

/// The vector of a text is its length and 1.
fn finish(job: &Submitted) {
    let prompt_tokens = job.request.prompt.len();
    job.send(Event::Embedding(vec![prompt_tokens as f32, 1.0]));
    let usage = Usage { prompt_tokens, cached_tokens: 0, completion_tokens: 0 };
    job.send(Event::Done { reason: FinishReason::Length, matched: None, usage, ending: None });
}

fn check_lengths(answer: &Answer, count: usize) {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let found = vectors(&answer.json());
    assert_eq!(found.len(), count);
    for (i, vector) in found.iter().enumerate() {
        assert!((vector[0] / vector[1] - (i + 1) as f32).abs() < 1e-3, "input {i} is in its place");
    }
}

/// What was admitted is finished, also the part of it that the engine has not seen yet.
#[tokio::test(flavor = "multi_thread")]
async fn draining_does_not_cut_a_long_list_off() {
    let (go, told) = mpsc::channel();
    let (state, engine) = over(move |jobs| {
        while told.recv().is_ok()
            && let Some(job) = jobs.recv()
        {
            finish(&job);
        }
    });
    // Gone before the engine, whose thread waits for it.
    let go = go;
    let app = m40llm::app(state.clone());
    let inputs: Vec<String> = (1..=12).map(|n| "x".repeat(n)).collect();
    let list = tokio::spawn({
        let app = app.clone();
        async move { post(&app, "/v1/embeddings", &json!({"input": inputs})).await }
    });
    while !engine.is_busy() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    state.drain();
    for late in [json!("a"), json!(["a", "b", "c"])] {
        let late = post(&app, "/v1/embeddings", &json!({"input": late})).await;
        assert_eq!((late.status.as_u16(), &late.error()["code"]), (503, &json!("overloaded")));
    }
    for _ in 0..11 {
        go.send(()).unwrap();
    }
    let idle = tokio::time::timeout(Duration::from_millis(200), state.idle()).await;
    assert!(idle.is_err(), "the last input is still to come");
    go.send(()).unwrap();
    check_lengths(&list.await.unwrap(), 12);
    tokio::time::timeout(Duration::from_secs(10), state.idle()).await.expect("nothing is left");
}

/// Between two of its inputs others may fill the queue.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_finds_the_queue_full_waits() {
    let (begun, begins) = oneshot::channel();
    let (state, _) = over(move |jobs| {
        let list = [jobs.recv().unwrap(), jobs.recv().unwrap()];
        begun.send(()).unwrap();
        let others = [jobs.recv().unwrap(), jobs.recv().unwrap()];
        // What is finished and not dropped keeps its place: there is none for the third.
        list.iter().for_each(finish);
        std::thread::sleep(Duration::from_millis(100));
        others.iter().for_each(finish);
        drop((list, others));
        finish(&jobs.recv().unwrap());
    });
    let app = m40llm::app(state);
    let ask = |input: Value| {
        let app = app.clone();
        tokio::spawn(async move { post(&app, "/v1/embeddings", &json!({"input": input})).await })
    };
    let list = ask(json!(["x", "xx", "xxx"]));
    begins.await.unwrap();
    for other in [ask(json!("x")), ask(json!("x"))] {
        check_lengths(&other.await.unwrap(), 1);
    }
    check_lengths(&list.await.unwrap(), 3);
}

async fn refused(body: &Value, param: &str) -> Value {
    let answer = post(&served(), "/v1/embeddings", body).await;
    let error = answer.error();
    assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{body:.200}");
    error
}

#[tokio::test]
async fn bad_fields_are_named() {
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": ["a", ""]}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": [1, 99_999_999]}), "input[1]"),
        (json!({"input": [[1], [99_999_999]]}), "input[1][0]"),
        (json!({"input": "a", "encoding_format": "int8"}), "encoding_format"),
        (json!({"input": "a", "dimensions": 64}), "dimensions"),
        (json!({"input": "a", "dimensions": 0}), "dimensions"),
    ] {
        refused(&body, param).await;
    }
    let long = refused(&json!({"input": ["a", "word ".repeat(1100)]}), "input").await;
    assert_eq!(long["code"], "context_length_exceeded");
    assert!(long["message"].as_str().unwrap().contains("This model's maximum context length is 1024 tokens"));
    let other = post(&served(), "/v1/embeddings", &json!({"model": "gpt-4o", "input": "a"})).await;
    assert_eq!((other.status.as_u16(), &other.error()["code"]), (404, &json!("model_not_found")));
}
