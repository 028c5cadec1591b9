//! What a constraint costs: tokens a second with one and without, in pairs, for one sequence and for four.
//!
//! `cargo bench -p m40llm-engine --bench structured -- MODEL.gguf [--check]`; `--check` fails where more than 15 % is
//! lost. `make bench-structured` fetches the model first.

use std::{process::ExitCode, time::Instant};

use m40llm_engine::{Constraint, Engine, EngineConfig, Event, GenerateRequest, Grammar, SamplingParams};
use serde_json::{Value, json};

const TOKENS: usize = 160;
const PAIRS: usize = 5;
/// The share of tokens a second that a constraint may cost.
const MOST_LOST: f64 = 0.15;

/// A list of people, as a program would ask for: strings, bounded numbers, an enumeration, a nested list.
fn schema() -> Value {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "role": {"enum": ["engineer", "teacher", "doctor", "other"]},
            "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.(com|org)$"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 16}, "minItems": 1, "maxItems": 3},
            "active": {"type": "boolean"}
        },
        "required": ["name", "age", "role", "email", "tags", "active"],
        "additionalProperties": false
    });
    json!({"type": "array", "items": person, "minItems": 40})
}

/// Tokens a second from the first to the last, over `batch` sequences at once.
fn rate(engine: &Engine, batch: usize, constraint: Option<&Constraint>) -> f64 {
    let prompt = "A list of the people in our small team, as JSON with name, age, role, email and tags:\n";
    let request = |i: usize| GenerateRequest {
        prompt: engine.tokenizer().encode(prompt, true, true),
        max_tokens: Some(TOKENS),
        sampling: SamplingParams { temperature: 0.8, seed: Some(i as u64), ..SamplingParams::default() },
        constraint: constraint.cloned(),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let running: Vec<_> = (0..batch).map(|i| engine.submit(request(i)).expect("submits")).collect();
    let (mut first, mut tokens) = (None, 0);
    for mut generation in running {
        loop {
            match generation.blocking_next().expect("a last event") {
                Event::Done { usage, .. } => {
                    assert_eq!(usage.completion_tokens, TOKENS, "all are of one length");
                    tokens += usage.completion_tokens;
                    break;
                }
                Event::Failed(error) => panic!("{error}"),
                _ => first = first.or_else(|| Some(Instant::now())),
            }
        }
    }
    tokens as f64 / first.expect("some text").elapsed().as_secs_f64()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(model) = arguments.iter().find(|a| !a.starts_with("--")) else {
        eprintln!("usage: structured MODEL.gguf [--check]");
        return ExitCode::from(2);
    };
    let config = EngineConfig { ctx_size: Some(512), max_batch: 4, ..EngineConfig::default() };
    let engine = Engine::load(model.as_ref(), &config, |_| {}).expect("loads");
    let began = Instant::now();
    engine.constrain(&Grammar::JsonObject).expect("compiles");
    let vocabulary = began.elapsed();
    let began = Instant::now();
    let constraint = engine.constrain(&Grammar::JsonSchema(schema())).expect("compiles");
    let compiled = began.elapsed();
    println!("vocabulary of {} tokens: {vocabulary:.1?}; schema: {compiled:.1?}", engine.info().vocab_size);
    let mut kept = true;
    for batch in [1, 4] {
        rate(&engine, batch, None);
        let mut pairs: Vec<(f64, f64)> = (0..PAIRS)
            .map(|_| (rate(&engine, batch, None), rate(&engine, batch, Some(&constraint))))
            .collect();
        pairs.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
        let (free, bound) = pairs[PAIRS / 2];
        let lost = 1.0 - bound / free;
        println!(
            "batch {batch}: {free:.1} tokens/s free, {bound:.1} constrained, {:.1} % lost",
            lost * 100.0
        );
        kept &= lost <= MOST_LOST;
    }
    if arguments.iter().any(|a| a == "--check") && !kept { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
