//! Logits of random models in the shapes of real ones, in every way of batching.

use std::path::Path;

use m40llm_engine::{
    KvType,
    backend::{
        Backend as _, Capacity,
        cuda::{CudaBackend, CudaOptions},
    },
    gguf::{DType, Gguf},
    model::ModelConfig,
    sched::BLOCK_TOKENS,
};

use crate::{
    run::{
        Off, Run, VOCAB, VOCABULARY, below, cuda, cuda_with, difference, fresh, reference, sequences, shapes,
        written,
    },
    stored::on_stored,
    support::{
        Rng,
        tiny::{Family, Spec},
    },
};

/// With the same numbers in the cache only sums differ.
const EXACT: Off = Off { row: 2e-5, all: 2e-5 };
/// With f16 both sides store alike, but a sum that differs in its last digit may be rounded the other way: by 2^-11 of a number.
const F16: Off = Off { row: 1e-3, all: 1e-3 };

/// Holds a run's logits to the reference's; those over rounded keys and values also, and those over 8 bits only, to
/// the reference's over the numbers that the run has stored.
fn check(found: &Run<'_, CudaBackend>, path: &Path, kv_type: KvType, what: &str) {
    let hold = |off: Off, bound: Off, to: &str| {
        println!("{what}, {kv_type:?}, {} steps, {to}: {off:?}", found.steps);
        assert!(off.is_within(bound), "{what}, {kv_type:?}, {to}: {off:?}");
    };
    if kv_type != KvType::Q8 {
        let (tables, bound) = (found.tables.clone(), if kv_type == KvType::F32 { EXACT } else { F16 });
        let expected = Run::over(tables, reference(), path, found.sequences, kv_type).one_by_one();
        hold(difference(found, &expected), bound, "the reference's");
    }
    if kv_type != KvType::F32 {
        hold(
            difference(found, &on_stored(found, path, kv_type)),
            EXACT,
            "the reference's over what is stored",
        );
    }
}

#[test]
fn logits_equal_the_references() {
    let mut rng = fresh();
    let dtypes = [DType::F16, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::BF16];
    for (i, spec) in shapes().into_iter().enumerate() {
        let cases = [
            (DType::Q8_0, &[KvType::F32, KvType::F16, KvType::Q8][..]),
            (dtypes[2 * i % dtypes.len()], &[KvType::F32][..]),
            (dtypes[(2 * i + 1) % dtypes.len()], &[KvType::F32][..]),
        ];
        for (dtype, kv_types) in cases {
            let spec = Spec { dtype, seed: rng.next(), ..spec };
            let (_dir, path) = written(&spec);
            let sequences = sequences(&mut rng, VOCAB, &[70, 1, 33, 130]);
            for &kv_type in kv_types {
                let found = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).one_by_one();
                check(&found, &path, kv_type, &format!("{spec:?}"));
                let found = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).mixed(&mut rng);
                check(&found, &path, kv_type, &format!("{spec:?}"));
            }
        }
    }
}

/// Steps of `(sequence, tokens)` that between them run every kernel of a type: tiles of 128 and of 64 tokens, up to 16 and up
/// to 32 tokens, a mixture of prompts and decode, and decode of 1, 2, 3 and 5, each twice, as the second one makes a graph.
const STEPS: &[&[(usize, usize)]] = &[
    &[(0, 128)],
    &[(1, 33)],
    &[(2, 12)],
    &[(3, 25)],
    &[(0, 1), (1, 5), (4, 1)],
    &[(0, 1)],
    &[(1, 1)],
    &[(0, 1), (2, 1)],
    &[(1, 1), (3, 1)],
    &[(0, 1), (1, 1), (2, 1)],
    &[(2, 1), (3, 1), (4, 1)],
    &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
    &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
];

fn small_models_in_every_kind_of_step(dtypes: &[DType]) {
    let mut rng = fresh();
    let lengths: Vec<usize> = (0..5)
        .map(|i| STEPS.iter().copied().flatten().filter(|part| part.0 == i).map(|part| part.1).sum())
        .collect();
    let heads = [(4, 2, 64), (8, 1, 32), (2, 2, 128), (4, 1, 64), (8, 2, 32)];
    let families = [Family::Llama, Family::Qwen2, Family::Qwen3];
    let kv_types = [KvType::F16, KvType::Q8, KvType::F32];
    for (i, &dtype) in dtypes.iter().enumerate() {
        let ((heads, kv_heads, head_dim), kv_type) = (heads[i % heads.len()], kv_types[i % 3]);
        let (family, seed) = (families[(i + i / 3) % 3], rng.next());
        let spec =
            Spec { family, dtype, dim: 256, heads, kv_heads, head_dim, ffn: 512, seed, ..Spec::default() };
        let (_dir, path) = written(&spec);
        let sequences = sequences(&mut rng, VOCAB, &lengths);
        for kv_type in [kv_type, KvType::F32] {
            let found = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).in_steps(STEPS);
            check(&found, &path, kv_type, &format!("{spec:?}"));
        }
    }
}

#[test]
fn small_models_of_plain_types() {
    small_models_in_every_kind_of_step(&[DType::F16, DType::BF16, DType::Q8_0]);
}

#[test]
fn small_models_of_short_blocks() {
    small_models_in_every_kind_of_step(&[DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1]);
}

#[test]
fn small_models_of_k_quants() {
    small_models_in_every_kind_of_step(&[DType::Q4_K, DType::Q5_K, DType::Q6_K]);
}

/// A layer of keys and values kept so, with heads of every width, of groups of up to 4 and up to 8, and weights of
/// every type between them, in steps of each kind: prompts beside one another, decode beside prompts, and decode of few
/// and of many. For compute-sanitizer, under which a launch takes long.
fn tiny_models(which: usize) {
    let mut rng = fresh();
    let kv_type = [KvType::F16, KvType::Q8, KvType::F32][which];
    let plain = [DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1];
    for (i, head_dim) in [32, 64, 80, 96, 128].into_iter().enumerate() {
        let (heads, kv_heads) = if (which + i).is_multiple_of(2) { (8, 1) } else { (4, 2) };
        let (dtype, dim, ffn) = match head_dim {
            128 => ([DType::Q4_K, DType::Q5_K, DType::Q6_K][which], 256, 256),
            _ => (plain[(4 * which + i) % plain.len()], 64, 96),
        };
        let (family, seed) = ([Family::Llama, Family::Qwen2, Family::Qwen3][(which + i) % 3], rng.next());
        let spec =
            Spec { family, dtype, layers: 1, dim, heads, kv_heads, head_dim, ffn, seed, ..Spec::default() };
        let (_dir, path) = written(&spec);
        let wide: Vec<(usize, usize)> = (0..[9, 16, 24, 32][(which + i) % 4]).map(|s| (s, 1)).collect();
        let steps: [&[(usize, usize)]; 5] =
            [&[(0, 70), (1, 5)], &[(0, 1), (1, 2), (2, 1)], &[(0, 1)], &[(0, 1), (1, 1), (2, 1)], &wide];
        let lengths: Vec<usize> = (0..wide.len())
            .map(|i| steps.iter().copied().flatten().filter(|part| part.0 == i).map(|part| part.1).sum())
            .collect();
        let sequences = sequences(&mut rng, VOCAB, &lengths);
        let found = Run::new(cuda(false), &path, &sequences, kv_type, &mut rng).in_steps(&steps);
        check(&found, &path, kv_type, &format!("{spec:?}"));
    }
}

#[test]
fn tiny_models_over_f16() {
    tiny_models(0);
}

#[test]
fn tiny_models_over_q8() {
    tiny_models(1);
}

#[test]
fn tiny_models_over_f32() {
    tiny_models(2);
}

/// Choices share their prompt's blocks, and go on in copies of the last one, which is not full.
#[test]
fn sequences_go_on_in_copies_of_a_block() {
    let mut rng = fresh();
    for (i, kv_type) in [KvType::F16, KvType::Q8, KvType::F32].into_iter().enumerate() {
        let spec = Spec { family: Family::Qwen3, heads: 4, kv_heads: 2, seed: rng.next(), ..Spec::default() };
        let (_dir, path) = written(&spec);
        let prompt = &sequences(&mut rng, VOCAB, &[2 * BLOCK_TOKENS + 9 + i])[0];
        let sequences: Vec<Vec<u32>> =
            sequences(&mut rng, VOCAB, &[30; 4]).iter().map(|rest| [&prompt[..], rest].concat()).collect();
        let tables = vec![vec![7, 2, 9, 0], vec![7, 2, 4, 3], vec![7, 2, 1, 8], vec![7, 2, 5, 6]];
        let mut run = Run::over(tables, cuda(i == 0), &path, &sequences, kv_type);
        run.step(&[(0, prompt.len())]);
        (1..4).for_each(|choice| run.fork(0, choice));
        // Each writes into its copy at once.
        for _ in 0..30 {
            run.step(&[(0, 1), (1, 1), (2, 1), (3, 1)]);
        }
        let bytes = run.decoder.backend().stored(1).unwrap();
        check(&run, &path, kv_type, &format!("{spec:?}"));
        // The prompt's part of each copy, to the bit.
        let head_bytes = bytes.len() / 16 / spec.kv_heads / 2;
        let token_bytes = spec.head_dim * kv_type.bytes(32) / 32;
        let width = if kv_type == KvType::Q8 { spec.head_dim } else { token_bytes };
        for copy in [4, 1, 5] {
            for half in 0..2 * spec.kv_heads {
                let part = |block: usize| {
                    &bytes[(block * 2 * spec.kv_heads + half) * head_bytes..][..(9 + i) * width]
                };
                assert!(part(9) == part(copy), "{kv_type:?}: block {copy} is no copy");
            }
        }
    }
}

#[test]
fn logits_by_cublas_equal_the_references() {
    let mut rng = fresh();
    let spec = Spec { seed: rng.next(), ..shapes()[0] };
    for dtype in [DType::F16, DType::Q5_1] {
        let (_dir, path) = written(&Spec { dtype, ..spec });
        let sequences = sequences(&mut rng, VOCAB, &[70, 1, 33, 200]);
        let library = || {
            let backend = cuda_with(CudaOptions { graphs: true, cublas: true, trace: None });
            assert!(backend.describe().ends_with(", cublas)"), "{}", backend.describe());
            backend
        };
        let found = Run::new(library(), &path, &sequences, KvType::F32, &mut rng).one_by_one();
        check(&found, &path, KvType::F32, dtype.name());
        let found = Run::new(library(), &path, &sequences, KvType::F32, &mut rng).mixed(&mut rng);
        check(&found, &path, KvType::F32, dtype.name());
    }
}

#[test]
fn k_quants_in_whole_models() {
    let mut rng = fresh();
    for dtype in [DType::Q4_K, DType::Q5_K, DType::Q6_K] {
        for (dim, heads, kv_heads, ffn) in [(1536, 12, 2, 8960), (1024, 8, 8, 3584)] {
            let spec = Spec {
                family: Family::Qwen2,
                dtype,
                dim,
                heads,
                kv_heads,
                head_dim: 128,
                ffn,
                vocabulary: VOCABULARY,
                ..Spec::default()
            };
            let (_dir, path) = written(&spec);
            let sequences = sequences(&mut rng, VOCAB, &[40, 9, 100]);
            let found = Run::new(cuda(true), &path, &sequences, KvType::F32, &mut rng).mixed(&mut rng);
            check(&found, &path, KvType::F32, &format!("{spec:?}"));
        }
    }
}

/// Launches of steps in which so many sequences write one token each.
fn launches_by_width(spec: Spec, rng: &mut Rng) -> Vec<(usize, u64)> {
    let (_dir, path) = written(&spec);
    let sequences = sequences(rng, VOCAB, &[64; 33]);
    let mut run = Run::new(cuda(true), &path, &sequences, KvType::F32, rng);
    run.step(&(0..33).map(|i| (i, 1 + i % 3)).collect::<Vec<_>>());
    let mut found = Vec::new();
    for width in [1, 2, 3, 5, 6, 7, 9, 11, 12, 13, 17, 20, 21, 24, 25, 28, 29, 32, 33] {
        // Directly, captured, and by the graph.
        for _ in 0..3 {
            let before = run.decoder.counters().launches;
            run.step(&(0..width).map(|i| (32 - i, 1)).collect::<Vec<_>>());
            found.push((width, run.decoder.counters().launches - before));
        }
    }
    check(&run, &path, KvType::F32, &format!("{spec:?}"));
    found
}

#[test]
fn decoding_is_right_at_every_width_and_takes_few_launches() {
    let mut rng = fresh();
    let base = Spec {
        dim: 512,
        heads: 8,
        kv_heads: 2,
        ffn: 1536,
        vocabulary: VOCABULARY,
        seed: rng.next(),
        ..Spec::default()
    };
    let cases = [
        (Spec { family: Family::Qwen2, dtype: DType::Q4_K, ..base }, 5),
        (Spec { family: Family::Qwen3, dtype: DType::F16, ..base }, 5),
        (Spec { family: Family::Llama, dtype: DType::Q5_1, ..base }, 5),
        // v and up in launches of their own.
        (Spec { family: Family::Qwen2, dtype: DType::Q4_0, other: Some(DType::Q6_K), ..base }, 7),
    ];
    for (spec, a_layer) in cases {
        let two = launches_by_width(Spec { layers: 2, ..spec }, &mut rng);
        let four = launches_by_width(Spec { layers: 4, ..spec }, &mut rng);
        for (&(width, two), &(_, four)) in two.iter().zip(&four) {
            let found = (four - two) as f64 / 2.0;
            // More than 32: a norm each for attention and feed-forward, RoPE, and up by itself.
            let allowed = if width <= 32 { a_layer } else { a_layer + 4 };
            assert!(found <= f64::from(allowed), "{spec:?}: {found} launches a layer at {width} sequences");
        }
    }
}

#[test]
fn two_hundred_mixed_batches_equal_one_by_one() {
    let mut rng = fresh();
    let spec = Spec {
        family: Family::Qwen2,
        dim: 896,
        heads: 14,
        kv_heads: 2,
        ffn: 1536,
        vocabulary: VOCABULARY,
        ..Spec::default()
    };
    let (_dir, path) = written(&spec);
    let mut batches = 0;
    while batches < 200 {
        let lengths: Vec<usize> = (0..20).map(|_| 1 + below(&mut rng, 120)).collect();
        let sequences = sequences(&mut rng, VOCAB, &lengths);
        let graphs = below(&mut rng, 2) == 0;
        let expected = Run::new(cuda(graphs), &path, &sequences, KvType::F16, &mut rng).one_by_one();
        let found = Run::new(cuda(graphs), &path, &sequences, KvType::F16, &mut rng).mixed(&mut rng);
        assert!(found.places().eq(expected.places()), "the same rows");
        let off = difference(&found, &expected);
        assert!(off.is_within(F16), "{off:?} after {batches} batches");
        batches += found.steps;
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_loaded() {
    let backend = cuda(true);
    let shape = ModelConfig::from_gguf(&Gguf::open(&written(&Spec::default()).1).unwrap()).map(|c| c.shape);
    let shape = shape.unwrap();
    let capacity = Capacity { tokens: 64, sequences: 4, logit_rows: 4, kv_blocks: 0, kv_type: KvType::F16 };
    let demand = |weights, ctx_size| m40llm_engine::backend::Demand {
        weights,
        shape: &shape,
        capacity: &capacity,
        ctx_size,
    };
    let error = backend.kv_room(&demand(1 << 50, None)).unwrap_err().to_string();
    assert!(error.contains("weights") && error.lines().count() == 1, "{error}");
    let error = backend.kv_room(&demand(1 << 20, Some(1 << 40))).unwrap_err().to_string();
    assert!(error.contains("--ctx-size"), "{error}");
    assert!(backend.kv_room(&demand(1 << 20, Some(1024))).unwrap() > 1 << 20);
}
