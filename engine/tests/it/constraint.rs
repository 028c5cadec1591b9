//! Constrained outputs, from a grammar to the last event, over a real model.

use std::sync::OnceLock;

use m40llm_engine::{
    Engine, EngineConfig, Event, FinishReason, GenerateRequest, Generation, Grammar, SamplingParams,
    TokenOut, Usage,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::engine::demo_model;

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    let config = EngineConfig { ctx_size: Some(1024), max_batch: 8, ..EngineConfig::default() };
    ENGINE.get_or_init(|| Engine::load(&demo_model(), &config, |_| {}).unwrap())
}

struct Answer {
    text: String,
    tokens: Vec<TokenOut>,
    reason: FinishReason,
    usage: Usage,
}

fn answer(request: GenerateRequest) -> Answer {
    collect(engine().submit(request).unwrap())
}

fn collect(mut generation: Generation) -> Answer {
    let (mut text, mut all) = (String::new(), Vec::new());
    loop {
        match generation.blocking_next().expect("a last event") {
            Event::Text { text: piece, tokens } => {
                text += &piece;
                all.extend(tokens);
            }
            Event::Done { reason, usage, .. } => return Answer { text, tokens: all, reason, usage },
            other => panic!("{other:?}"),
        }
    }
}

fn request(prompt: &str, grammar: &Grammar, sampling: SamplingParams) -> GenerateRequest {
    let prompt = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");
    GenerateRequest {
        prompt: engine().tokenizer().encode(&prompt, true, true),
        max_tokens: Some(200),
        sampling,
        constraint: Some(engine().constrain(grammar).unwrap()),
        ..GenerateRequest::default()
    }
}

fn hot(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.5, seed: Some(seed), ..SamplingParams::default() }
}

#[test]
fn a_choice_is_one_of_the_texts_and_ends_by_itself() {
    let cities = Grammar::Choice(["Rome", "Paris", "Berlin"].map(String::from).into());
    let greedy = answer(request("What is the capital of France?", &cities, SamplingParams::greedy()));
    assert_eq!(greedy.text, "Paris");
    let texts = ["Paris", "Parisian \"café\"", "Rome", "東京"];
    let choices = Grammar::Choice(texts.map(String::from).into());
    for seed in 0..20 {
        let answer = answer(request("Say a word.", &choices, hot(seed)));
        assert!(texts.contains(&answer.text.as_str()), "{}", answer.text);
        assert_eq!(answer.reason, FinishReason::Stop);
    }
}

#[test]
fn a_choice_is_among_thousands_or_refused() {
    let texts = |count: usize| (0..count).map(|n| format!("{n:x}")).collect::<Vec<_>>();
    for count in [2_001, 7_000] {
        let answer = answer(request("Say a word.", &Grammar::Choice(texts(count)), hot(count as u64)));
        assert!(texts(count).contains(&answer.text), "{count}: {}", answer.text);
        assert_eq!(answer.reason, FinishReason::Stop);
    }
    let error = engine().constrain(&Grammar::Choice(texts(9_000))).unwrap_err().to_string();
    assert!(error.contains("65536 bytes"), "{error}");
}

#[test]
fn json_follows_its_schema() {
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": false
    });
    for seed in 0..10 {
        let answer =
            answer(request("Describe a person as JSON.", &Grammar::JsonSchema(schema.clone()), hot(seed)));
        assert_eq!(answer.reason, FinishReason::Stop, "{}", answer.text);
        let value: Value = serde_json::from_str(&answer.text).expect(&answer.text);
        assert!(
            value["age"].as_u64().unwrap() <= 150 && value["name"].as_str().unwrap().chars().count() <= 20
        );
        assert_eq!(answer.text, answer.text.trim());
        // The last brace ends it: there is no token for the end.
        assert_eq!(answer.usage.completion_tokens, answer.tokens.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever the bounds: what may be written is within them, and what is within them may be written, in one form at least.
    #[test]
    fn numbers_stay_within_their_bounds(quarters in (-9i32..9, 0i32..8), kinds in (0usize..3, 0usize..3)) {
        let (low, high) = (f64::from(quarters.0) / 4.0, f64::from(quarters.0 + quarters.1) / 4.0);
        let mut schema = json!({"type": "number"});
        if let Some(keyword) = ["", "minimum", "exclusiveMinimum"].get(kinds.0).filter(|word| !word.is_empty()) {
            schema[keyword] = json!(low);
        }
        if let Some(keyword) = ["", "maximum", "exclusiveMaximum"].get(kinds.1).filter(|word| !word.is_empty()) {
            schema[keyword] = json!(high);
        }
        let within = |n: f64| {
            let above = kinds.0 == 0 || n > low || (n == low && kinds.0 == 1);
            above && (kinds.1 == 0 || n < high || (n == high && kinds.1 == 1))
        };
        let Ok(constraint) = engine().constrain(&Grammar::JsonSchema(schema.clone())) else {
            // No number is within.
            let closed = kinds.0 > 0 && kinds.1 > 0;
            prop_assert!(closed && kinds != (1, 1) && low == high, "{schema}");
            return Ok(());
        };
        for n in (-500..500).step_by(5).map(|n| f64::from(n) / 100.0) {
            let mut written = false;
            for text in [format!("{n}"), format!("{n}0"), format!("{n:.1}"), format!("{n:.2}"), format!("-{n}")] {
                let Ok(value) = serde_json::from_str::<f64>(&text) else { continue };
                let tokens = engine().tokenizer().encode(&text, false, false);
                let (fits, ends) = constraint.allows(&tokens);
                let allowed = fits == tokens.len() && ends;
                prop_assert!(!allowed || within(value), "{text} is allowed by {schema}");
                written |= allowed && value == n;
            }
            prop_assert!(written || !within(n), "{n} is refused by {schema}");
        }
    }
}

/// A sequence that loses its blocks computes them again, but not its way through the grammar, and nobody's masks get
/// mixed up.
#[test]
fn a_preempted_sequence_goes_on_in_its_grammar() {
    let block = 32 * 30 * 2 * 3 * 64 * 2; // tokens, layers, K and V, heads, width, bytes
    let config = EngineConfig {
        ctx_size: Some(256),
        max_batch: 4,
        kv_memory: Some(12 * block),
        ..EngineConfig::default()
    };
    // Four sequences of 5 blocks over 12 blocks: they cannot all stay.
    let tight = Engine::load(&demo_model(), &config, |_| {}).unwrap();
    let item = json!({
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": false
    });
    let schema = json!({"type": "array", "items": item, "minItems": 40});
    let constraint = tight.constrain(&Grammar::JsonSchema(schema)).unwrap();
    let work = |seed: u64| GenerateRequest {
        prompt: tight.tokenizer().encode(&format!("People of team {seed}:\n"), true, true),
        max_tokens: Some(130),
        constraint: Some(constraint.clone()),
        sampling: hot(seed),
        ..GenerateRequest::default()
    };
    let submit = |seed: u64| tight.submit(work(seed)).unwrap();
    let alone: Vec<_> = (0..4).map(|seed| collect(submit(seed)).text).collect();
    assert_eq!(tight.stats().preemptions, 0);
    let together: Vec<_> = (0..4).map(submit).collect();
    let together: Vec<_> = together.into_iter().map(collect).collect();
    assert!(together.iter().all(|answer| answer.reason == FinishReason::Length));
    assert_eq!(alone, together.into_iter().map(|answer| answer.text).collect::<Vec<_>>());
    assert!(tight.stats().preemptions > 0, "the pool was not too small");
}
