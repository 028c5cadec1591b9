//! Log-probabilities and greedy continuations against llama.cpp's, F32 weights and F32 KV on both sides.
//!
//! The goldens are made by `scripts/goldens/logits.py`; the tiny models by `scripts/goldens/tiny.py`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use m40llm_engine::{
    BackendChoice, Engine, EngineConfig, Event, GenerateRequest, KvType, SamplingParams, TokenOut,
};
use serde::Deserialize;

/// Alternatives asked for where the whole vocabulary would be too much: the golden's 20 and room for ties.
const TOP: usize = 40;
/// Most alternatives kept of one request.
const MOST_ALTERNATIVES: usize = 12 << 20;

#[derive(Deserialize)]
struct Golden {
    vocab: usize,
    prompts: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    prompt: Vec<u32>,
    /// Log-probability of each token of the prompt but the first.
    own: Vec<f32>,
    positions: Vec<Position>,
    /// What greedy decoding goes on with, and how far the best token was ahead at each step, in nat.
    continuation: Vec<u32>,
    margins: Vec<f32>,
}

/// The distribution that follows token `at` of the prompt.
#[derive(Deserialize)]
struct Position {
    at: usize,
    /// The 20 most likely tokens.
    top: Vec<(u32, f32)>,
    /// 20 random tokens.
    others: Vec<(u32, f32)>,
}

/// How far a backend may be from the oracle.
struct Bounds {
    mean: f32,
    worst: f32,
    /// Greedy choices must agree where the oracle's margin exceeds this.
    margin: f32,
}

/// Nothing but the order of float additions differs.
const EXACT: Bounds = Bounds { mean: 1e-3, worst: 5e-2, margin: 0.5 };
/// Activations rounded to 8 bits a block of 32 (relative error about 1/250 of a block's largest value, at
/// every matrix) and keys and values to half precision. llama.cpp's own kernels, which round activations
/// alike, are 0.146 in the mean and 1.64 at worst from the same goldens on SmolLM2, whose 135M parameters
/// are sensitive; being no further off than a tenth above that is what the rounding justifies.
const FAST: Bounds = Bounds { mean: 0.16, worst: 1.8, margin: 1.0 };

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the engine lies in the repository").to_owned()
}

fn golden(name: &str) -> Golden {
    let path = repository().join(format!("engine/tests/goldens/logits-{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A demo model, fetched beforehand.
fn demo(file: &str, name: &str) -> PathBuf {
    let path = repository().join("models").join(file);
    assert!(path.is_file(), "{} is missing; fetch it with `scripts/fetch-model.sh {name}`", path.display());
    path
}

fn tiny(name: &str) -> PathBuf {
    repository().join(format!("engine/tests/goldens/tiny-{name}.gguf"))
}

fn load(path: &Path, backend: BackendChoice, kv_type: KvType) -> Engine {
    let config =
        EngineConfig { backend, kv_type, ctx_size: Some(512), max_batch: 1, ..EngineConfig::default() };
    Engine::load(path, &config, |_| {}).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs a request; the prompt's tokens and the generated ones.
fn run(engine: &Engine, request: GenerateRequest) -> (Vec<TokenOut>, Vec<TokenOut>) {
    let mut generation = engine.submit(request).unwrap_or_else(|e| panic!("{e}"));
    let (mut prompt, mut output) = (Vec::new(), Vec::new());
    loop {
        match generation.blocking_next().expect("a generation ends with Done") {
            Event::Prompt(tokens) => prompt = tokens,
            Event::Text { tokens, .. } => output.extend(tokens),
            Event::Done { .. } => return (prompt, output),
            Event::Embedding(_) => panic!("nobody asked for a vector"),
            Event::Failed(e) => panic!("{e}"),
        }
    }
}

/// Absolute differences in log-probability, gathered.
#[derive(Default)]
struct Differences {
    count: usize,
    sum: f64,
    worst: f32,
    where_worst: String,
}

impl Differences {
    fn add(&mut self, difference: f32, place: impl FnOnce() -> String) {
        assert!(difference.is_finite(), "{}: {difference}", place());
        self.count += 1;
        self.sum += f64::from(difference.abs());
        if difference.abs() > self.worst {
            self.worst = difference.abs();
            self.where_worst = place();
        }
    }

    /// Compares one distribution. A token beyond our alternatives is at most as likely as the last of
    /// them, which is then what the golden is held to.
    fn compare(&mut self, ours: &[(u32, f32)], theirs: &[(u32, f32)], must_be_listed: bool, place: &str) {
        for &(id, theirs) in theirs {
            match ours.iter().find(|(i, _)| *i == id) {
                Some((_, ours)) => self.add(ours - theirs, || format!("{place}, token {id}")),
                None if must_be_listed => {
                    let last = ours.last().expect("alternatives").1;
                    self.add((theirs - last).max(0.0), || format!("{place}, token {id}"));
                }
                None => {}
            }
        }
    }
}

/// Scores prompt and golden continuation in one pass and compares all that the golden has.
fn check_case(engine: &Engine, vocab: usize, case: &Case, bounds: &Bounds, differences: &mut Differences) {
    let sequence = [case.prompt.as_slice(), &case.continuation].concat();
    let alternatives = if sequence.len() * vocab <= MOST_ALTERNATIVES { vocab } else { TOP };
    let request = GenerateRequest {
        prompt: sequence.clone(),
        max_tokens: Some(0),
        prompt_logprobs: Some(alternatives),
        ..GenerateRequest::default()
    };
    let (tokens, _) = run(engine, request);
    assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), sequence, "{}: the tokens scored", case.name);
    let scored = |i: usize| tokens[i].logprob.as_ref().expect("asked for");

    assert!(scored(0).logprob.is_none(), "nothing predicts the first token");
    for (i, theirs) in case.own.iter().enumerate() {
        let ours = scored(i + 1).logprob.expect("only the first has none");
        differences.add(ours - theirs, || format!("{}, prompt token {}", case.name, i + 1));
    }
    for position in &case.positions {
        let ours = &scored(position.at + 1).top;
        let place = format!("{}, after token {}", case.name, position.at);
        differences.compare(ours, &position.top, true, &place);
        differences.compare(ours, &position.others, false, &place);
    }
    for (i, (id, margin)) in case.continuation.iter().zip(&case.margins).enumerate() {
        let best = scored(case.prompt.len() + i).top[0].0;
        assert!(
            best == *id || *margin <= bounds.margin,
            "{}, step {i}: {best}, not {id} (margin {margin})",
            case.name
        );
    }
}

/// Generates greedily: equal to the golden up to the first step whose margin is small.
fn check_greedy(engine: &Engine, case: &Case, bounds: &Bounds) {
    let request = GenerateRequest {
        prompt: case.prompt.clone(),
        max_tokens: Some(case.continuation.len()),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        ignore_eos: true,
        logprobs: Some(1),
        ..GenerateRequest::default()
    };
    let (_, output) = run(engine, request);
    assert_eq!(output.len(), case.continuation.len(), "{}", case.name);
    for (i, (ours, theirs)) in output.iter().zip(&case.continuation).enumerate() {
        let (best, logprob) = ours.logprob.as_ref().expect("asked for").top[0];
        assert_eq!(best, ours.id, "{}, step {i}: greedy takes the most likely token ({logprob})", case.name);
        if ours.id != *theirs {
            assert!(case.margins[i] <= bounds.margin, "{}, step {i}: {}, not {theirs}", case.name, ours.id);
            return;
        }
    }
}

fn check(name: &str, path: &Path, backend: &BackendChoice, kv_type: KvType, bounds: &Bounds) {
    let golden = golden(name);
    let engine = load(path, backend.clone(), kv_type);
    assert_eq!(engine.info().vocab_size, golden.vocab);
    let mut differences = Differences::default();
    for case in &golden.prompts {
        check_case(&engine, golden.vocab, case, bounds, &mut differences);
    }
    check_greedy(&engine, &golden.prompts[0], bounds);
    let mean = (differences.sum / differences.count as f64) as f32;
    let Differences { count, worst, where_worst, .. } = differences;
    println!(
        "{name}, {backend:?}: {count} log-probabilities, mean {mean:.2e}, worst {worst:.2e} ({where_worst})"
    );
    assert!(mean <= bounds.mean, "{name}: mean difference {mean} over {count}");
    assert!(worst <= bounds.worst, "{name}: {where_worst} differs by {worst}");
}

const SMOLLM2: (&str, &str) = ("smollm2-135m-instruct-q4_1.gguf", "smollm2");
const QWEN: (&str, &str) = ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-0.5b");

#[test]
fn reference_equals_llama_cpp_on_tiny_llama() {
    check("tiny-llama", &tiny("llama"), &BackendChoice::Reference, KvType::F32, &EXACT);
}

#[test]
fn reference_equals_llama_cpp_on_tiny_qwen3() {
    check("tiny-qwen3", &tiny("qwen3"), &BackendChoice::Reference, KvType::F32, &EXACT);
}

#[test]
fn reference_equals_llama_cpp_on_smollm2() {
    check(SMOLLM2.1, &demo(SMOLLM2.0, SMOLLM2.1), &BackendChoice::Reference, KvType::F32, &EXACT);
}

#[test]
fn reference_equals_llama_cpp_on_qwen() {
    check(QWEN.1, &demo(QWEN.0, QWEN.1), &BackendChoice::Reference, KvType::F32, &EXACT);
}

#[test]
fn fast_path_is_near_llama_cpp_on_smollm2() {
    check(SMOLLM2.1, &demo(SMOLLM2.0, SMOLLM2.1), &BackendChoice::Cpu, KvType::F16, &FAST);
}

#[test]
fn fast_path_is_near_llama_cpp_on_qwen() {
    check(QWEN.1, &demo(QWEN.0, QWEN.1), &BackendChoice::Cpu, KvType::F16, &FAST);
}
