//! The demo model through the engine: the reference's texts, alone and in company, and nothing that leaks.

use std::{
    collections::HashSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use m40llm_engine::{
    BackendChoice, Engine, EngineConfig, Event, GenerateRequest, Generation, KvType, PrefixCache,
    SamplingParams, backend::cuda::Device, gguf::DType, sched::BLOCK_TOKENS,
};

use crate::{
    run::{VOCAB, sequences, shapes, written},
    support::{Rng, tiny::Spec},
};

fn demo_model() -> PathBuf {
    // Beside the checkout's models/, or wherever the tests are run.
    let here = PathBuf::from("models/smollm2-135m-instruct-q4_1.gguf");
    let there =
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/smollm2-135m-instruct-q4_1.gguf"));
    let path = if here.exists() { here } else { there };
    assert!(path.exists(), "{} is missing: run scripts/fetch-model.sh smollm2", path.display());
    path
}

fn config(backend: BackendChoice, max_batch: usize) -> EngineConfig {
    EngineConfig { backend, ctx_size: Some(1024), max_batch, max_queue: 20_000, ..EngineConfig::default() }
}

fn load(backend: BackendChoice, max_batch: usize) -> Engine {
    Engine::load(&demo_model(), &config(backend, max_batch), |_| {}).unwrap()
}

const CUDA: BackendChoice = BackendChoice::Cuda { device: None, require_sm52: false };

fn cuda(max_batch: usize) -> Engine {
    load(CUDA, max_batch)
}

fn request(engine: &Engine, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> GenerateRequest {
    let text = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");
    let prompt = engine.tokenizer().encode(&text, true, true);
    GenerateRequest { prompt, max_tokens: Some(max_tokens), sampling, ..GenerateRequest::default() }
}

fn submit(engine: &Engine, prompt: &str, max_tokens: usize, sampling: SamplingParams) -> Generation {
    engine.submit(request(engine, prompt, max_tokens, sampling)).unwrap()
}

/// The ids of what is generated.
fn ids(mut generation: Generation) -> Vec<u32> {
    let mut ids = Vec::new();
    loop {
        match generation.blocking_next().expect("a last event") {
            Event::Text { tokens, .. } => ids.extend(tokens.iter().map(|token| token.id)),
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Done { .. } => return ids,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn text(mut generation: Generation) -> String {
    let mut text = String::new();
    loop {
        match generation.blocking_next().expect("a last event") {
            Event::Text { text: piece, .. } => text += &piece,
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Done { .. } => return text,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

const QUESTIONS: [&str; 8] = [
    "Why is the sky blue?",
    "What is the capital of France?",
    "Count from one to ten.",
    "Write a short poem about rain.",
    "What is 12 times 12?",
    "Name three colours.",
    "Explain what a GPU is.",
    "Say hello in Spanish.",
];

#[test]
fn greedy_texts_are_the_references_alone_and_together() {
    let reference = load(BackendChoice::Reference, 4);
    let engine = cuda(16);
    let expected: Vec<String> =
        QUESTIONS.iter().map(|q| text(submit(&reference, q, 48, SamplingParams::greedy()))).collect();
    let alone: Vec<String> =
        QUESTIONS.iter().map(|q| text(submit(&engine, q, 48, SamplingParams::greedy()))).collect();
    assert_eq!(alone, expected);
    for streams in [2, 5, 8, 16, 40] {
        let together: Vec<Generation> = (0..streams)
            .map(|i| submit(&engine, QUESTIONS[i % QUESTIONS.len()], 48, SamplingParams::greedy()))
            .collect();
        for (i, generation) in together.into_iter().enumerate() {
            assert_eq!(text(generation), expected[i % QUESTIONS.len()], "stream {i} of {streams}");
        }
    }
}

/// A step's two parts are the whole of it, with a graph and without, and the device works for most of it.
#[test]
fn the_devices_clock_tells_waiting_from_work() {
    for cuda_graphs in [true, false] {
        let config = EngineConfig { cuda_graphs, ..config(CUDA, 16) };
        let engine = Engine::load(&demo_model(), &config, |_| {}).unwrap();
        // None may end within the window.
        let endless = |question: &&str| GenerateRequest {
            ignore_eos: true,
            ..request(&engine, question, 300, SamplingParams::greedy())
        };
        let mut generations: Vec<Generation> =
            QUESTIONS.iter().map(|question| engine.submit(endless(question)).unwrap()).collect();
        let mut token = |count: usize| {
            for _ in 0..count {
                generations[7].blocking_next().expect("an event");
            }
        };
        // Past the prompts, and past the steps that make a graph.
        token(20);
        let (before, start) = (engine.stats(), Instant::now());
        token(100);
        let (after, wall) = (engine.stats(), start.elapsed().as_secs_f64());
        let (idle, busy) =
            (after.idle_seconds - before.idle_seconds, after.busy_seconds - before.busy_seconds);
        println!("graphs {cuda_graphs}: waited {idle:.4} s, worked {busy:.4} s, of {wall:.4} s");
        // The window's ends may be off by a step or two.
        assert!((idle + busy - wall).abs() < wall * 0.05, "{idle} + {busy} of {wall}");
        assert!(idle > 0.0 && idle < busy, "{idle} beside {busy}");
    }
}

/// The seeds are fixed: of random weights a new draw may have two tokens that are equal within rounding.
#[test]
fn greedy_tokens_of_random_models_are_the_references() {
    for (i, spec) in shapes().into_iter().enumerate() {
        let dtype = [DType::Q8_0, DType::F16, DType::Q4_1, DType::Q5_0, DType::Q4_0][i];
        let (_dir, path) = written(&Spec { dtype, seed: 7 + i as u64, ..spec });
        let prompts = sequences(&mut Rng(i as u64), VOCAB, &[1, 9, 40, 100, 33, 2]);
        let answers = |backend: BackendChoice| -> Vec<Vec<u32>> {
            let config = EngineConfig { backend, max_batch: 4, ..EngineConfig::default() };
            let engine = Engine::load(&path, &config, |_| {}).unwrap();
            let request = |prompt: &Vec<u32>| GenerateRequest {
                prompt: prompt.clone(),
                max_tokens: Some(48),
                ignore_eos: true,
                sampling: SamplingParams::greedy(),
                ..GenerateRequest::default()
            };
            let running: Vec<_> = prompts.iter().map(|p| engine.submit(request(p)).unwrap()).collect();
            running.into_iter().map(ids).collect()
        };
        let expected = answers(BackendChoice::Reference);
        assert!(expected.iter().all(|ids| ids.len() == 48), "{expected:?}");
        let found = answers(CUDA);
        assert_eq!(found, expected, "{spec:?}");
    }
}

#[test]
fn sampling_on_the_device_is_sampling_on_the_host() {
    let reference = load(BackendChoice::Reference, 4);
    let engine = cuda(4);
    for (i, params) in [
        SamplingParams { top_k: 40, temperature: 0.8, ..SamplingParams::default() },
        SamplingParams { top_p: 0.9, ..SamplingParams::default() },
        SamplingParams { repetition_penalty: 1.2, temperature: 0.0, ..SamplingParams::default() },
    ]
    .into_iter()
    .enumerate()
    {
        let sampling = SamplingParams { seed: Some(i as u64 + 1), ..params };
        let found = text(submit(&engine, QUESTIONS[i], 32, sampling.clone()));
        assert_eq!(found, text(submit(&reference, QUESTIONS[i], 32, sampling)), "{i}");
    }
}

/// Choices share their prompt's blocks, but for the last one, which is not full: each gets a copy of it to go on in.
/// In f32, as steps of other widths sum in another order: what that changes, storing in f16 rounds up to 1e-4 of a logit, by
/// which draws among tokens of so little probability fall on a neighbour.
#[test]
fn choices_are_what_each_would_be_alone() {
    let shared = "The lighthouse keeper writes down what the weather does, hour after hour. ".repeat(16);
    let config = EngineConfig { kv_type: KvType::F32, prefix_cache: PrefixCache::Off, ..config(CUDA, 8) };
    let engine = Engine::load(&demo_model(), &config, |_| {}).unwrap();
    let text = format!("<|im_start|>user\n{shared}Why?<|im_end|>\n<|im_start|>assistant\n");
    let prompt = engine.tokenizer().encode(&text, true, true);
    assert_ne!(prompt.len() % BLOCK_TOKENS, 0, "the last block is full: change the prompt");
    let blocks = prompt.len().div_ceil(BLOCK_TOKENS);
    for seeded in [false, true] {
        let request = |i: u64| GenerateRequest {
            prompt: prompt.clone(),
            max_tokens: Some(40),
            ignore_eos: true,
            sampling: if seeded {
                SamplingParams { seed: Some(i), top_k: 40, ..SamplingParams::default() }
            } else {
                SamplingParams::greedy()
            },
            ..GenerateRequest::default()
        };
        let alone: Vec<_> = (0..4).map(|i| ids(engine.submit(request(i)).unwrap())).collect();
        let different = alone.iter().collect::<HashSet<_>>().len();
        assert_eq!(different, if seeded { 4 } else { 1 }, "{alone:?}");
        let mut choices = engine.submit_choices((0..4).map(request).collect()).unwrap();
        // Each has had something: all hold their blocks.
        let first: Vec<_> = choices.iter_mut().map(|choice| choice.blocking_next().unwrap()).collect();
        let used = engine.stats().kv_blocks_used;
        assert!(used <= blocks + 2 * 4, "{used} blocks for a prompt of {blocks}");
        for ((choice, first), alone) in choices.into_iter().zip(first).zip(&alone) {
            let Event::Text { tokens, .. } = first else { panic!("{first:?}") };
            let together = tokens.iter().map(|token| token.id).chain(ids(choice));
            assert_eq!(&together.collect::<Vec<_>>(), alone, "seeded: {seeded}");
        }
    }
}

#[test]
fn ten_thousand_requests_leave_the_devices_memory_as_it_was() {
    let engine = cuda(32);
    let device = Device::open(None, false).unwrap();
    let run = |count: usize| {
        let all: Vec<Generation> = (0..count)
            .map(|i| {
                let sampling =
                    SamplingParams { seed: Some(i as u64), top_k: i % 3 * 20, ..SamplingParams::default() };
                submit(&engine, QUESTIONS[i % QUESTIONS.len()], 1 + i % 7, sampling)
            })
            .collect();
        // Every fifth is dropped, which cancels it.
        for (i, generation) in all.into_iter().enumerate() {
            if i % 5 != 0 {
                text(generation);
            }
        }
    };
    run(200);
    let before = device.free_memory().unwrap();
    run(10_000);
    let after = device.free_memory().unwrap();
    assert_eq!(before, after, "free bytes before and after");
    // What was dropped last is let go within a step, which nobody waits for.
    let deadline = Instant::now() + Duration::from_secs(5);
    while engine.stats().kv_blocks_used > 0 {
        assert!(Instant::now() < deadline, "{} blocks are still taken", engine.stats().kv_blocks_used);
        std::thread::sleep(Duration::from_millis(1));
    }
}
