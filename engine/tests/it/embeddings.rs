//! Vectors of texts against llama.cpp's (`scripts/goldens/embeddings.py`), and in company.

use m40llm_engine::{
    BackendChoice, Engine, EngineConfig, Event, GenerateRequest, Generation, KvType, Pooling, SamplingParams,
    SubmitError, Usage,
};
use serde::Deserialize;

use super::{
    engine::demo_model,
    support::tiny::{self, Spec, Vocabulary},
    vocabularies::golden,
};

#[derive(Deserialize)]
struct Text {
    name: String,
    prompt: Vec<u32>,
    /// Of length 1.
    mean: Vec<f32>,
    last: Vec<f32>,
}

fn texts() -> Vec<Text> {
    serde_json::from_value(golden("embeddings-smollm2.json")["texts"].clone()).unwrap()
}

fn load(backend: BackendChoice, kv_type: KvType) -> Engine {
    let config =
        EngineConfig { backend, kv_type, ctx_size: Some(1024), max_batch: 4, ..EngineConfig::default() };
    Engine::load(&demo_model(), &config, |_| {}).unwrap()
}

fn request(prompt: &[u32], pooling: Pooling) -> GenerateRequest {
    GenerateRequest { prompt: prompt.to_vec(), embedding: Some(pooling), ..GenerateRequest::default() }
}

fn vector(mut generation: Generation) -> (Vec<f32>, Usage) {
    let Some(Event::Embedding(vector)) = generation.blocking_next() else { panic!("no vector") };
    let Some(Event::Done { usage, .. }) = generation.blocking_next() else { panic!("no end") };
    assert!(generation.blocking_next().is_none());
    (vector, usage)
}

fn embed(engine: &Engine, prompt: &[u32], pooling: Pooling) -> Vec<f32> {
    let (vector, usage) = vector(engine.submit(request(prompt, pooling)).unwrap());
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (prompt.len(), 0));
    vector
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn check(engine: &Engine, least: f64) {
    for text in texts() {
        for (pooling, expected) in [(Pooling::Mean, &text.mean), (Pooling::Last, &text.last)] {
            let found = embed(engine, &text.prompt, pooling);
            assert_eq!(found.len(), expected.len());
            let cosine = cosine(&found, expected);
            println!("{} {pooling:?}: 1 - {:.2e}", text.name, 1.0 - cosine);
            assert!(cosine >= least, "{} {pooling:?}: {cosine}", text.name);
        }
    }
}

#[test]
fn the_references_vectors_are_those_of_llama_cpp() {
    check(&load(BackendChoice::Reference, KvType::F32), 0.999_999_999);
}

/// Activations in 8 bits and a cache of f16 cost this much.
#[test]
fn the_fast_paths_vectors_are_close() {
    check(&load(BackendChoice::Cpu, KvType::F16), 0.998);
}

/// A cached beginning must not be missing in the mean, and what runs beside must not show.
#[test]
fn neither_the_cache_nor_company_changes_a_vector() {
    let engine = load(BackendChoice::Cpu, KvType::F16);
    let prompt: Vec<u32> = (0..150).map(|i| 1000 + i * 7).collect();
    let alone = [Pooling::Mean, Pooling::Last].map(|pooling| embed(&engine, &prompt, pooling));
    let chatting = GenerateRequest {
        prompt: prompt.clone(),
        max_tokens: Some(40),
        sampling: SamplingParams::greedy(),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let streams: Vec<_> = (0..2).map(|_| engine.submit(chatting.clone()).unwrap()).collect();
    let submitted = [Pooling::Mean, Pooling::Last].map(|p| engine.submit(request(&prompt, p)).unwrap());
    for (generation, alone) in submitted.into_iter().zip(&alone) {
        assert_eq!(&vector(generation).0, alone);
    }
    drop(streams);
    // The last token's alone may take its beginning from the cache.
    let cached = [Pooling::Mean, Pooling::Last]
        .map(|p| vector(engine.submit(request(&prompt, p)).unwrap()).1.cached_tokens);
    assert_eq!(cached, [0, 128]);
}

#[test]
fn a_text_may_fill_the_context_and_no_more() {
    let engine = load(BackendChoice::Cpu, KvType::F16);
    let full: Vec<u32> = (0..1024).map(|i| 500 + i).collect();
    assert_eq!(embed(&engine, &full, Pooling::Mean).len(), 576);
    let refused = engine.submit(request(&[&full[..], &[1]].concat(), Pooling::Mean)).unwrap_err();
    assert!(matches!(refused, SubmitError::ContextLength { requested: 1025, limit: 1024, .. }), "{refused}");
}

#[test]
fn the_file_says_how_vectors_are_made() {
    let with = |number: Option<u32>| {
        let spec = Spec { vocabulary: Vocabulary::Bpe, ..Spec::default() };
        let mut file = tiny::writer(&spec);
        if let Some(number) = number {
            file = file.u32("llama.pooling_type", number);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        std::fs::write(&path, file.bytes()).unwrap();
        let engine = Engine::load(&path, &EngineConfig::default(), |_| {});
        engine.map(|engine| engine.info().pooling).map_err(|error| error.to_string())
    };
    for (number, pooling) in
        [(None, Pooling::Mean), (Some(0), Pooling::Mean), (Some(1), Pooling::Mean), (Some(3), Pooling::Last)]
    {
        assert_eq!(with(number).unwrap(), Some(pooling), "{number:?}");
    }
    // Ranks, say: it loads, as it may still generate.
    assert_eq!(with(Some(4)).unwrap(), None);
}
