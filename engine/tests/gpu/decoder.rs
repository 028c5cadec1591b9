//! Logits of random models in the shapes of real ones, in every way of batching.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    path::Path,
};

use m40llm_engine::{
    KvType,
    backend::{
        Backend, Capacity, Need, Row,
        cpu::ReferenceBackend,
        cuda::{CudaBackend, CudaOptions, Device},
    },
    gguf::{DType, Gguf},
    model::{Decoder, ModelConfig, Weights},
    sched::{BLOCK_TOKENS, Batch, BatchSequence},
};

use crate::support::{
    Rng,
    tiny::{self, Family, Spec, Vocabulary},
};

fn cuda(graphs: bool) -> CudaBackend {
    cuda_with(CudaOptions { graphs, ..CudaOptions::default() })
}

fn cuda_with(options: CudaOptions) -> CudaBackend {
    let device = Device::open(None, false).expect("these tests need a CUDA device");
    CudaBackend::new(device, options).unwrap()
}

fn reference() -> ReferenceBackend {
    ReferenceBackend::new(std::thread::available_parallelism().map_or(1, usize::from))
}

/// Sequences in the middle of being read, with blocks in random order.
struct Run<'a, B: Backend> {
    decoder: Decoder<B>,
    vocab: usize,
    sequences: &'a [Vec<u32>],
    tables: Vec<Vec<u32>>,
    done: Vec<usize>,
    /// Logits by sequence and position.
    logits: BTreeMap<(usize, usize), Vec<f32>>,
}

/// New numbers in every run; a failure shows the seed.
fn fresh() -> Rng {
    let seed = RandomState::new().build_hasher().finish();
    println!("seed {seed:#x}");
    Rng(seed)
}

fn below(rng: &mut Rng, n: usize) -> usize {
    (rng.next() % n as u64) as usize
}

impl<'a, B: Backend> Run<'a, B> {
    fn new(mut backend: B, path: &Path, sequences: &'a [Vec<u32>], kv_type: KvType, rng: &mut Rng) -> Self {
        let file = Gguf::open(path).unwrap();
        let config = ModelConfig::from_gguf(&file).unwrap();
        let weights =
            Weights::load(&file, &config.architecture, &config.shape, &mut backend, &mut |_| {}).unwrap();
        let counts: Vec<usize> = sequences.iter().map(|s| s.len().div_ceil(BLOCK_TOKENS)).collect();
        let total: usize = counts.iter().sum();
        let mut blocks: Vec<u32> = (0..total as u32).collect();
        for i in (1..total).rev() {
            blocks.swap(i, below(rng, i + 1));
        }
        let tables = counts.into_iter().map(|n| blocks.split_off(blocks.len() - n)).collect();
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let capacity =
            Capacity { tokens, sequences: sequences.len(), logit_rows: tokens, kv_blocks: total, kv_type };
        backend.allocate(&config.shape, &capacity).unwrap();
        Self {
            decoder: Decoder::new(backend, weights),
            vocab: config.shape.vocab,
            sequences,
            tables,
            done: vec![0; sequences.len()],
            logits: BTreeMap::new(),
        }
    }

    /// One step over `(sequence, tokens)`, all rows wanted.
    fn step(&mut self, parts: &[(usize, usize)]) {
        let mut batch = Batch::default();
        let mut rows = Vec::new();
        for &(i, len) in parts {
            let context = self.done[i];
            let (start, table) = (batch.tokens.len(), batch.block_tables.len());
            batch.sequences.push(BatchSequence { start, len, context, table });
            batch.tokens.extend(&self.sequences[i][context..context + len]);
            batch.positions.extend((context..context + len).map(|p| p as u32));
            batch.block_tables.extend(&self.tables[i][..(context + len).div_ceil(BLOCK_TOKENS)]);
            rows.extend((context..context + len).map(|p| (i, p)));
            self.done[i] += len;
        }
        batch.logit_rows = (0..batch.tokens.len() as u32).collect();
        self.decoder.forward(&batch, &vec![Need::All; rows.len()]).unwrap();
        for (row, &place) in rows.iter().enumerate() {
            let Row::All(logits) = self.decoder.row(row) else { panic!("all was asked for") };
            assert_eq!(logits.len(), self.vocab);
            self.logits.insert(place, logits.to_vec());
        }
    }

    fn one_by_one(mut self) -> BTreeMap<(usize, usize), Vec<f32>> {
        for i in 0..self.sequences.len() {
            self.step(&[(i, self.sequences[i].len())]);
        }
        self.logits
    }

    /// Steps of every kind on five sequences, see `STEPS`.
    fn in_steps(mut self) -> BTreeMap<(usize, usize), Vec<f32>> {
        for parts in STEPS {
            self.step(parts);
        }
        assert!((0..self.sequences.len()).all(|i| self.left(i) == 0));
        self.logits
    }

    fn left(&self, i: usize) -> usize {
        self.sequences[i].len() - self.done[i]
    }

    /// Parts of random length of several sequences at a time; returns the number of steps too.
    fn mixed(mut self, rng: &mut Rng) -> (BTreeMap<(usize, usize), Vec<f32>>, usize) {
        let mut steps = 0;
        loop {
            let open: Vec<usize> = (0..self.sequences.len()).filter(|&i| self.left(i) > 0).collect();
            if open.is_empty() {
                return (self.logits, steps);
            }
            // A third of the steps only decode, as most do in life.
            let lengths: &[usize] = if below(rng, 3) == 0 { &[1] } else { &[1, 1, 1, 7, 40, 200] };
            let mut parts = Vec::new();
            for &i in &open {
                if below(rng, 4) > 0 || parts.is_empty() {
                    let most = lengths[below(rng, lengths.len())].min(self.left(i));
                    parts.push((i, 1 + below(rng, most)));
                }
            }
            self.step(&parts);
            steps += 1;
        }
    }
}

pub(crate) fn sequences(rng: &mut Rng, vocab: usize, lengths: &[usize]) -> Vec<Vec<u32>> {
    lengths.iter().map(|&n| (0..n).map(|_| below(rng, vocab) as u32).collect()).collect()
}

/// How far logits are off.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Off {
    /// The largest ‖a − b‖ / ‖b‖ over all rows.
    row: f64,
    /// The same of all rows taken together.
    all: f64,
}

impl Off {
    fn is_within(self, bound: Off) -> bool {
        // False for NaN.
        self.row <= bound.row && self.all <= bound.all
    }
}

fn difference(a: &BTreeMap<(usize, usize), Vec<f32>>, b: &BTreeMap<(usize, usize), Vec<f32>>) -> Off {
    assert!(a.keys().eq(b.keys()));
    let rows = a.values().zip(b.values()).map(|(a, b)| {
        let off: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
        (off, b.iter().map(|&b| f64::from(b).powi(2)).sum::<f64>())
    });
    let (mut worst, mut off, mut size) = (0.0f64, 0.0, 0.0);
    for (row, of) in rows {
        let one = (row / of).sqrt();
        worst = if one.is_nan() { f64::INFINITY } else { worst.max(one) };
        (off, size) = (off + row, size + of);
    }
    Off { row: worst, all: (off / size).sqrt() }
}

pub(crate) fn written(spec: &Spec) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    std::fs::write(&path, tiny::model(spec)).unwrap();
    (dir, path)
}

/// With f32 in the cache only sums differ.
const EXACT: Off = Off { row: 2e-5, all: 2e-5 };
/// With less than that both sides store alike, but a sum that differs in its last digit may be rounded the other way: by 2^-11
/// of a number in f16.
const F16: Off = Off { row: 1e-3, all: 1e-3 };
/// In 8 bits by 1/127 of the largest of 32, which shows in the logits of tokens that look at few others.
const Q8: Off = Off { row: 3e-3, all: 1e-3 };

const VOCABULARY: Vocabulary = Vocabulary::Bpe;
/// 256 bytes, three merges, three special tokens.
pub(crate) const VOCAB: usize = 262;

/// Rows in the shapes of Qwen2.5-0.5B, Llama 3 (narrower by half) and Qwen3, and heads of 80 and 96; two layers each.
pub(crate) fn shapes() -> [Spec; 5] {
    let base = Spec { vocabulary: VOCABULARY, layers: 2, ..Spec::default() };
    [
        Spec { family: Family::Qwen2, dim: 896, heads: 14, kv_heads: 2, head_dim: 64, ffn: 4864, ..base },
        Spec {
            family: Family::Llama,
            dim: 2048,
            heads: 16,
            kv_heads: 4,
            head_dim: 128,
            ffn: 7168,
            tied: false,
            rope_freqs: true,
            ..base
        },
        Spec { family: Family::Qwen3, dim: 1024, heads: 16, kv_heads: 8, head_dim: 128, ffn: 3072, ..base },
        // Groups of 7 and 3.
        Spec { family: Family::Llama, dim: 1280, heads: 14, kv_heads: 2, head_dim: 80, ffn: 1536, ..base },
        Spec { family: Family::Qwen2, dim: 1152, heads: 12, kv_heads: 4, head_dim: 96, ffn: 1536, ..base },
    ]
}

#[test]
fn logits_equal_the_references() {
    let mut rng = fresh();
    let dtypes = [DType::F16, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::BF16];
    let exact = [(KvType::F32, EXACT)];
    let all = [(KvType::F32, EXACT), (KvType::F16, F16), (KvType::Q8, Q8)];
    for (i, spec) in shapes().into_iter().enumerate() {
        let cases = [
            (DType::Q8_0, &all[..]),
            (dtypes[2 * i % dtypes.len()], &exact[..]),
            (dtypes[(2 * i + 1) % dtypes.len()], &exact[..]),
        ];
        for (dtype, kv_types) in cases {
            let spec = Spec { dtype, seed: rng.next(), ..spec };
            let (_dir, path) = written(&spec);
            let sequences = sequences(&mut rng, VOCAB, &[70, 1, 33, 130]);
            for &(kv_type, bound) in kv_types {
                let expected = Run::new(reference(), &path, &sequences, kv_type, &mut rng).one_by_one();
                let found = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).one_by_one();
                let off = difference(&found, &expected);
                let (mixed, _) = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).mixed(&mut rng);
                let mixed = difference(&mixed, &expected);
                println!("head {}, {}, {kv_type:?}: {off:?}, mixed {mixed:?}", spec.head_dim, dtype.name());
                assert!(
                    off.is_within(bound) && mixed.is_within(bound),
                    "{spec:?}, {kv_type:?}: {off:?}, {mixed:?}"
                );
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

/// Also what the sanitizer's tools are run on, as no kernel has much to do here.
fn small_models_in_every_kind_of_step(dtypes: &[DType]) {
    let mut rng = fresh();
    let lengths: Vec<usize> = (0..5)
        .map(|i| STEPS.iter().copied().flatten().filter(|part| part.0 == i).map(|part| part.1).sum())
        .collect();
    let heads = [(4, 2, 64), (8, 1, 32), (2, 2, 128), (4, 1, 64), (8, 2, 32)];
    let families = [Family::Llama, Family::Qwen2, Family::Qwen3];
    let kv_types = [(KvType::F16, F16), (KvType::Q8, Q8), (KvType::F32, EXACT)];
    for (i, &dtype) in dtypes.iter().enumerate() {
        let ((heads, kv_heads, head_dim), (kv_type, bound)) = (heads[i % heads.len()], kv_types[i % 3]);
        let (family, seed) = (families[(i + i / 3) % 3], rng.next());
        let spec =
            Spec { family, dtype, dim: 256, heads, kv_heads, head_dim, ffn: 512, seed, ..Spec::default() };
        let (_dir, path) = written(&spec);
        let sequences = sequences(&mut rng, VOCAB, &lengths);
        // With f32 in the cache too, which leaves no rounding to hide behind.
        for (kv_type, bound) in [(kv_type, bound), (KvType::F32, EXACT)] {
            let expected = Run::new(reference(), &path, &sequences, kv_type, &mut rng).one_by_one();
            let found = Run::new(cuda(true), &path, &sequences, kv_type, &mut rng).in_steps();
            let off = difference(&found, &expected);
            println!("{}, {kv_type:?}: {off:?}", dtype.name());
            assert!(off.is_within(bound), "{spec:?}, {kv_type:?}: {off:?}");
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

#[test]
fn logits_by_cublas_equal_the_references() {
    let mut rng = fresh();
    let spec = Spec { seed: rng.next(), ..shapes()[0] };
    for dtype in [DType::F16, DType::Q5_1] {
        let (_dir, path) = written(&Spec { dtype, ..spec });
        let sequences = sequences(&mut rng, VOCAB, &[70, 1, 33, 200]);
        let expected = Run::new(reference(), &path, &sequences, KvType::F32, &mut rng).one_by_one();
        let library = || {
            let backend = cuda_with(CudaOptions { graphs: true, cublas: true, trace: None });
            assert!(backend.describe().ends_with(", cublas)"), "{}", backend.describe());
            backend
        };
        let found = Run::new(library(), &path, &sequences, KvType::F32, &mut rng).one_by_one();
        let off = difference(&found, &expected);
        let (mixed, _) = Run::new(library(), &path, &sequences, KvType::F32, &mut rng).mixed(&mut rng);
        let mixed = difference(&mixed, &expected);
        assert!(off.is_within(EXACT) && mixed.is_within(EXACT), "{}: {off:?}, {mixed:?}", dtype.name());
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
            let expected = Run::new(reference(), &path, &sequences, KvType::F32, &mut rng).one_by_one();
            let (found, _) = Run::new(cuda(true), &path, &sequences, KvType::F32, &mut rng).mixed(&mut rng);
            let off = difference(&found, &expected);
            assert!(off.is_within(EXACT), "{spec:?}: {off:?}");
        }
    }
}

/// Launches of steps in which so many sequences write one token each.
fn launches_by_width(spec: Spec, rng: &mut Rng) -> Vec<(usize, u64)> {
    let (_dir, path) = written(&spec);
    let sequences = sequences(rng, VOCAB, &[48; 33]);
    let expected = Run::new(reference(), &path, &sequences, KvType::F32, rng).one_by_one();
    let mut run = Run::new(cuda(true), &path, &sequences, KvType::F32, rng);
    run.step(&(0..33).map(|i| (i, 1 + i % 3)).collect::<Vec<_>>());
    let mut found = Vec::new();
    for width in [1, 3, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33] {
        // Directly, captured, and by the graph.
        for _ in 0..3 {
            let before = run.decoder.counters().launches;
            run.step(&(0..width).map(|i| (32 - i, 1)).collect::<Vec<_>>());
            found.push((width, run.decoder.counters().launches - before));
        }
    }
    let expected = expected.into_iter().filter(|(place, _)| run.logits.contains_key(place)).collect();
    let off = difference(&run.logits, &expected);
    assert!(off.is_within(EXACT), "{spec:?}: {off:?}");
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
        let (found, steps) = Run::new(cuda(graphs), &path, &sequences, KvType::F16, &mut rng).mixed(&mut rng);
        let off = difference(&found, &expected);
        assert!(off.is_within(F16), "{off:?} after {batches} batches");
        batches += steps;
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
