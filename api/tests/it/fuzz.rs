//! Random prompts, stop strings and characters of many bytes: what is streamed is what is said whole.
//!
//! `TEST_STREAMS` says how many requests, 40 unless it is set.

use m40llm_engine::{Event, GenerateRequest, SamplingParams};
use serde_json::{Value, json};

use crate::support::{engine, post, served};

/// A small generator of numbers (xorshift), so that a failure can be repeated by its number.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// Texts whose characters take several tokens each: a model that is made to repeat them splits them.
const WIDE: [&str; 8] =
    ["🚀🎉☕", "東京は日本", "안녕하세요", "naïve café", "👩‍👩‍👧‍👦", "здравствуй", "ﷺ𝄞", "ไทยภาษา"];
const PLAIN: [&str; 4] = ["Once upon a time", "def f(x):\n", "The rivers are", "1, 2, 3,"];

/// Ids that together spell `text`, biased so that little else is said.
fn bias(text: &str) -> Value {
    let ids = engine().tokenizer().encode(text, false, false);
    ids.iter().map(|id| (id.to_string(), json!(18))).collect::<serde_json::Map<_, _>>().into()
}

struct Case {
    path: &'static str,
    body: Value,
    stops: Vec<String>,
}

fn case(random: &mut Random, number: u64) -> Case {
    let wide: Vec<&str> = (0..2).map(|_| *random.one_of(&WIDE)).collect();
    let joined = wide.join(" ");
    let mut body = json!({
        "max_tokens": 6 + random.below(26), "temperature": *random.one_of(&[0.0, 0.7, 1.2]), "seed": number,
    });
    if random.below(4) > 0 {
        body["logit_bias"] = bias(&joined);
    }
    // Whole characters, parts of what is likely to be said, and what is never said.
    let mut stops = Vec::new();
    for _ in 0..random.below(4) {
        let characters: Vec<char> = joined.chars().collect();
        let from = random.below(characters.len());
        let len = 1 + random.below(3);
        stops.push(match random.below(3) {
            0 => characters[from..(from + len).min(characters.len())].iter().collect(),
            1 => random.one_of(&[" the", "\n", ".", " a", "zzz"]).to_string(),
            _ => format!("{}{}", characters[from], random.one_of(&["!", "\u{301}", " ", "x"])),
        });
    }
    if !stops.is_empty() {
        body["stop"] = json!(stops);
    }
    let prompt = format!("{} {joined}", random.one_of(&PLAIN));
    let path = if random.below(2) == 0 {
        body["messages"] = json!([{"role": "user", "content": format!("Repeat: {prompt}")}]);
        body["logprobs"] = json!(true);
        "/v1/chat/completions"
    } else {
        body["prompt"] = if random.below(2) == 0 {
            json!(prompt)
        } else {
            // Cut anywhere, in the midst of a character too.
            let ids = engine().tokenizer().encode(&prompt, true, true);
            json!(ids[..=random.below(ids.len())])
        };
        body["logprobs"] = json!(0);
        "/v1/completions"
    };
    Case { path, body, stops }
}

/// Text, log-probabilities and reason of the one choice, whole or of its pieces.
fn said(choices: &[&Value]) -> (String, Vec<f64>, Value) {
    let mut text = String::new();
    let mut scores = Vec::new();
    for choice in choices {
        let piece = [&choice["text"], &choice["delta"]["content"], &choice["message"]["content"]];
        text.extend(piece.iter().filter_map(|piece| piece.as_str()));
        let logprobs = &choice["logprobs"];
        scores.extend(logprobs["token_logprobs"].as_array().into_iter().flatten().filter_map(Value::as_f64));
        let chat = logprobs["content"].as_array().into_iter().flatten();
        scores.extend(chat.filter_map(|token| token["logprob"].as_f64()));
    }
    (text, scores, choices.last().unwrap()["finish_reason"].clone())
}

/// The bytes of a chat's tokens, which its log-probabilities tell, but for control tokens.
fn scored(answer: &Value) -> Vec<u8> {
    let tokenizer = engine().tokenizer();
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().iter();
    let is_text = |token: &&Value| {
        let ids = tokenizer.encode(token["token"].as_str().unwrap(), false, true);
        !matches!(ids[..], [id] if tokenizer.is_control(id))
    };
    tokens
        .filter(is_text)
        .flat_map(|t| serde_json::from_value::<Vec<u8>>(t["bytes"].clone()).unwrap())
        .collect()
}

/// The bytes of what the engine itself generates for a completion, without its stop strings.
fn generated(body: &Value) -> Vec<u8> {
    let tokenizer = engine().tokenizer();
    let bias = body["logit_bias"].as_object().into_iter().flatten();
    let request = GenerateRequest {
        prompt: match &body["prompt"] {
            Value::String(text) => tokenizer.encode(text, true, true),
            ids => serde_json::from_value(ids.clone()).unwrap(),
        },
        max_tokens: Some(body["max_tokens"].as_u64().unwrap() as usize),
        sampling: SamplingParams {
            temperature: body["temperature"].as_f64().unwrap() as f32,
            seed: body["seed"].as_u64(),
            logit_bias: bias.map(|(id, bias)| (id.parse().unwrap(), bias.as_f64().unwrap() as f32)).collect(),
            ..SamplingParams::default()
        },
        logprobs: Some(0),
        ..GenerateRequest::default()
    };
    let mut generation = engine().submit(request).unwrap();
    let mut bytes = Vec::new();
    while let Some(event) = generation.blocking_next() {
        if let Event::Text { tokens, .. } = event {
            let text = tokens.iter().filter(|token| !tokenizer.is_control(token.id));
            bytes.extend(text.flat_map(|token| tokenizer.token_bytes(token.id)));
        }
    }
    bytes
}

/// `TEST_STREAMS`, for the full count.
#[expect(clippy::disallowed_methods, reason = "a count for tests is no setting of the program")]
fn streams() -> u64 {
    std::env::var("TEST_STREAMS").map_or(40, |n| n.parse().expect("TEST_STREAMS is a number"))
}

#[tokio::test]
async fn what_is_streamed_is_what_is_said_whole() {
    let count = streams();
    let app = served();
    let (mut wide, mut stopped) = (0, 0);
    for number in 1..=count {
        let Case { path, mut body, stops } =
            case(&mut Random(number.wrapping_mul(0x9E37_79B9_7F4A_7C15)), number);
        let answer = post(&app, path, &body).await;
        assert_eq!(answer.status, 200, "{number}: {}", answer.body);
        let whole = answer.json();
        let (text, scores, reason) = said(&[&whole["choices"][0]]);
        body["stream"] = json!(true);
        let chunks = post(&app, path, &body).await.events(true);
        let pieces: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
        let (streamed, streamed_scores, streamed_reason) = said(&pieces);
        let what = format!("{number}: {body}");
        assert_eq!((&streamed, &streamed_reason), (&text, &reason), "{what}");
        assert_eq!(streamed_scores, scores, "{what}");
        for stop in &stops {
            assert!(!text.contains(stop.as_str()), "{stop:?} leaks into {text:?}: {what}");
        }
        // Exactly what the bytes of all tokens say, up to a stop: U+FFFD only where they are no character.
        let bytes = match path {
            "/v1/completions" => {
                let body = body.clone();
                tokio::task::spawn_blocking(move || generated(&body)).await.unwrap()
            }
            _ => scored(&whole),
        };
        let said = String::from_utf8_lossy(&bytes);
        assert!(said.starts_with(&text), "{text:?} of {said:?}: {what}");
        assert!(reason == "stop" || said == text, "{text:?} of {said:?}: {what}");
        wide += u64::from(text.chars().any(|c| c.len_utf8() > 2));
        stopped += u64::from(reason == "stop" && !stops.is_empty());
    }
    println!("{wide} of {count} with wide characters, {stopped} stopped");
    assert!(wide * 4 > count && stopped * 10 > count, "{wide} wide and {stopped} stopped of {count}");
}
