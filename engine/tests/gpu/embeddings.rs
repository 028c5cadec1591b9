//! Vectors of texts on a device against the reference's.

use std::path::Path;

use m40llm_engine::{
    BackendChoice, Engine, EngineConfig, Event, GenerateRequest, Generation, KvType, Pooling, SamplingParams,
    gguf::DType,
};

use crate::{
    run::{VOCAB, fresh, sequences, shapes, written},
    support::tiny::Spec,
};

fn load(path: &Path, backend: BackendChoice) -> Engine {
    let config = EngineConfig {
        backend,
        kv_type: KvType::F32,
        ctx_size: Some(1024),
        max_batch: 8,
        ..EngineConfig::default()
    };
    Engine::load(path, &config, |_| {}).unwrap()
}

fn vector(mut generation: Generation) -> Vec<f32> {
    loop {
        match generation.blocking_next().expect("a vector") {
            Event::Embedding(vector) => return vector,
            Event::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
}

/// Of all prompts at once, beside a stream that decodes meanwhile.
fn vectors(engine: &Engine, prompts: &[Vec<u32>], pooling: Pooling) -> Vec<Vec<f32>> {
    let stream = GenerateRequest {
        prompt: vec![1, 2, 3],
        max_tokens: Some(200),
        sampling: SamplingParams::greedy(),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let beside = engine.submit(stream).unwrap();
    let submitted: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let request = GenerateRequest {
                prompt: prompt.clone(),
                embedding: Some(pooling),
                ..GenerateRequest::default()
            };
            engine.submit(request).unwrap()
        })
        .collect();
    let vectors = submitted.into_iter().map(vector).collect();
    drop(beside);
    vectors
}

#[test]
fn vectors_equal_the_references() {
    let mut rng = fresh();
    for spec in shapes().into_iter().take(3) {
        let spec = Spec { dtype: DType::Q8_0, seed: rng.next(), ..spec };
        let (_dir, path) = written(&spec);
        let prompts = sequences(&mut rng, VOCAB, &[1, 2, 33, 130, 600]);
        let reference = load(&path, BackendChoice::Reference);
        let device = load(&path, BackendChoice::Cuda { device: None, require_sm52: false });
        for pooling in [Pooling::Mean, Pooling::Last] {
            let expected = vectors(&reference, &prompts, pooling);
            let found = vectors(&device, &prompts, pooling);
            for ((found, expected), prompt) in found.iter().zip(&expected).zip(&prompts) {
                let off: f64 =
                    found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
                let size: f64 = expected.iter().map(|x| f64::from(*x).powi(2)).sum();
                let off = (off / size).sqrt();
                println!("head {}, {pooling:?} of {}: {off:.1e}", spec.head_dim, prompt.len());
                assert!(off <= 5e-5, "{spec:?}, {pooling:?} of {}: {off}", prompt.len());
            }
        }
    }
}
