//! The CPU backends against a formula in f64, against each other, and against themselves under every way
//! of batching.

mod formula;

use std::collections::BTreeMap;

use formula::formula;

use m40llm_engine::{
    KvType,
    backend::{
        AttentionWeights, Backend, Capacity, FeedForwardWeights, Need, Rope, RopeStyle, Row, Shape,
        cpu::{CpuBackend, CpuOptions, Isa, ReferenceBackend},
    },
    gguf::{DType, Tensor},
    sched::{BLOCK_TOKENS, Batch, BatchSequence, BlockCopy},
};

/// A small xorshift generator; every use names its seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) % n as u64) as usize
    }
    /// Uniform in ±1.
    fn number(&mut self) -> f32 {
        ((self.next() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }
    fn numbers(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.number() * scale).collect()
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// A matrix as a tensor and as numbers.
fn tensor(random: &mut Random, name: &str, rows: usize, cols: usize, dtype: DType) -> Tensor {
    let scale = 1.7 / (cols as f32).sqrt();
    let bytes: Vec<u8> = match dtype {
        DType::F32 => random.numbers(rows * cols, scale).iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::Q8_0 => (0..rows * cols / 32)
            .flat_map(|_| {
                let d = half::f16::from_f32(scale / 127.0).to_le_bytes();
                let quants: Vec<u8> = (0..32).map(|_| random.below(255) as u8).collect();
                [d.to_vec(), quants].concat()
            })
            .collect(),
        _ => panic!("the tests make F32 and Q8_0 only"),
    };
    Tensor::from_bytes(name, &[cols, rows], dtype, &bytes).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.bytes().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

struct Model {
    shape: Shape,
    embedding: Tensor,
    attention: Vec<AttentionWeights<Tensor>>,
    feed_forward: Vec<FeedForwardWeights<Tensor>>,
    norm: Vec<f32>,
    output: Tensor,
}

/// What a random model may be.
#[derive(Debug, Clone, Copy)]
struct Case {
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    rotary: usize,
    style: RopeStyle,
    bias: bool,
    qk_norm: bool,
    dtype: DType,
}

impl Case {
    fn random(random: &mut Random, dtype: DType) -> Self {
        let head_dim = random.pick(&[64, 80, 96, 128]);
        Self {
            head_dim,
            kv_heads: 1 + random.below(3),
            group: 1 + random.below(8),
            rotary: if random.below(2) == 0 { head_dim } else { head_dim / 2 },
            style: random.pick(&[RopeStyle::Adjacent, RopeStyle::SplitHalf]),
            bias: random.below(2) == 0,
            qk_norm: random.below(2) == 0,
            dtype,
        }
    }
}

const VOCAB: usize = 64;

impl Model {
    fn new(random: &mut Random, case: &Case) -> Self {
        let (dim, ffn_dim, hd) = (96, 160, case.head_dim);
        let (heads, kv_heads) = (case.group * case.kv_heads, case.kv_heads);
        let shape = Shape {
            layers: 2,
            dim,
            heads,
            kv_heads,
            head_dim: hd,
            ffn_dim,
            vocab: VOCAB,
            norm_epsilon: 1e-5,
            rope: Rope {
                style: case.style,
                inverse_frequencies: (0..case.rotary / 2)
                    .map(|i| 10_000f32.powf(-2.0 * i as f32 / case.rotary as f32))
                    .collect(),
                magnitude: 1.1,
            },
        };
        let mut weight = |name: &str, rows, cols| {
            // Attention's output is no multiple of 32 wide for every head, so blocks may not fit.
            let dtype = if cols % 32 == 0 { case.dtype } else { DType::F32 };
            tensor(random, name, rows, cols, dtype)
        };
        let attention: Vec<_> = (0..shape.layers)
            .map(|_| AttentionWeights {
                norm: Vec::new(),
                q: weight("q", heads * hd, dim),
                k: weight("k", kv_heads * hd, dim),
                v: weight("v", kv_heads * hd, dim),
                output: weight("o", dim, heads * hd),
                bias: None,
                qk_norm: None,
            })
            .collect();
        let feed_forward: Vec<_> = (0..shape.layers)
            .map(|_| FeedForwardWeights {
                norm: Vec::new(),
                gate: weight("gate", ffn_dim, dim),
                up: weight("up", ffn_dim, dim),
                down: weight("down", dim, ffn_dim),
            })
            .collect();
        let (embedding, output) = (weight("embedding", VOCAB, dim), weight("output", VOCAB, dim));
        let mut model =
            Self { shape, embedding, attention, feed_forward, norm: random.numbers(dim, 1.0), output };
        for w in &mut model.attention {
            w.norm = random.numbers(dim, 1.5);
            let widths = [heads * hd, kv_heads * hd, kv_heads * hd];
            w.bias = case.bias.then(|| widths.map(|n| random.numbers(n, 0.5)));
            w.qk_norm = case.qk_norm.then(|| [(); 2].map(|()| random.numbers(hd, 2.0)));
        }
        for w in &mut model.feed_forward {
            w.norm = random.numbers(dim, 1.5);
        }
        model
    }
}

/// Sequences in the middle of being read, with blocks in random order.
struct Run<'a, B: Backend<Weight = Tensor, Vector = Vec<f32>>> {
    backend: B,
    model: &'a Model,
    sequences: &'a [Vec<u32>],
    tables: Vec<Vec<u32>>,
    done: Vec<usize>,
    /// Logits by sequence and position.
    logits: BTreeMap<(usize, usize), Vec<f32>>,
}

impl<'a, B: Backend<Weight = Tensor, Vector = Vec<f32>>> Run<'a, B> {
    fn new(
        mut backend: B,
        model: &'a Model,
        sequences: &'a [Vec<u32>],
        kv_type: KvType,
        random: &mut Random,
    ) -> Self {
        let counts: Vec<usize> = sequences.iter().map(|s| s.len().div_ceil(BLOCK_TOKENS)).collect();
        let total: usize = counts.iter().sum();
        let mut blocks: Vec<u32> = (0..total as u32).collect();
        for i in (1..total).rev() {
            blocks.swap(i, random.below(i + 1));
        }
        let mut tables = Vec::new();
        for n in counts {
            tables.push(blocks.split_off(blocks.len() - n));
        }
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let capacity =
            Capacity { tokens, sequences: sequences.len(), logit_rows: tokens, kv_blocks: total, kv_type };
        backend.allocate(&model.shape, &capacity).unwrap();
        Self { backend, model, sequences, tables, done: vec![0; sequences.len()], logits: BTreeMap::new() }
    }

    /// One step over `(sequence, tokens)`.
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
        let (backend, model) = (&mut self.backend, self.model);
        backend.begin(&batch).unwrap();
        backend.embed(&model.embedding).unwrap();
        for (layer, (attention, feed_forward)) in model.attention.iter().zip(&model.feed_forward).enumerate()
        {
            backend.qkv(layer, attention).unwrap();
            backend.attend(layer, attention).unwrap();
            backend.attention_output(attention).unwrap();
            backend.feed_forward(feed_forward).unwrap();
        }
        backend.logits(&model.norm, &model.output).unwrap();
        backend.rows(&vec![Need::All; rows.len()]).unwrap();
        for (i, row) in rows.into_iter().enumerate() {
            let Row::All(logits) = backend.row(i) else { panic!("a CPU has whole rows") };
            self.logits.insert(row, logits.to_vec());
        }
    }

    /// Each sequence by itself, whole.
    fn one_by_one(mut self) -> BTreeMap<(usize, usize), Vec<f32>> {
        for i in 0..self.sequences.len() {
            self.step(&[(i, self.sequences[i].len())]);
        }
        self.logits
    }

    /// Parts of random length of several sequences at a time.
    fn mixed(mut self, random: &mut Random) -> BTreeMap<(usize, usize), Vec<f32>> {
        loop {
            let left = |run: &Self, i: usize| run.sequences[i].len() - run.done[i];
            let open: Vec<usize> = (0..self.sequences.len()).filter(|&i| left(&self, i) > 0).collect();
            if open.is_empty() {
                return self.logits;
            }
            let mut parts = Vec::new();
            for &i in &open {
                if random.below(4) > 0 || parts.is_empty() {
                    let most = random.pick(&[1, 1, 7, 40, 200]).min(left(&self, i));
                    parts.push((i, 1 + random.below(most)));
                }
            }
            self.step(&parts);
        }
    }
}

fn sequences(random: &mut Random, lengths: &[usize]) -> Vec<Vec<u32>> {
    lengths.iter().map(|&n| (0..n).map(|_| random.below(VOCAB) as u32).collect()).collect()
}

fn fast(isa: Isa, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, isa }).unwrap()
}

/// The largest difference, in units of the row's root mean square.
fn difference(a: &BTreeMap<(usize, usize), Vec<f32>>, b: &BTreeMap<(usize, usize), Vec<f32>>) -> f32 {
    assert!(a.keys().eq(b.keys()));
    let mut worst = 0f32;
    for (a, b) in a.values().zip(b.values()) {
        let rms = (a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32).sqrt();
        for (a, b) in a.iter().zip(b) {
            let d = (a - b).abs() / rms;
            worst = if d > worst || d.is_nan() { d } else { worst };
            assert!(!d.is_nan());
        }
    }
    worst
}

#[test]
fn reference_equals_the_formula_in_f64() {
    for seed in 1..=8 {
        let mut random = Random(seed);
        let case = Case::random(&mut random, DType::F32);
        let model = Model::new(&mut random, &case);
        let sequences = sequences(&mut random, &[37, 5]);
        let run = Run::new(ReferenceBackend::new(2), &model, &sequences, KvType::F32, &mut random);
        let logits = run.mixed(&mut random);
        let mut expected = BTreeMap::new();
        for (i, tokens) in sequences.iter().enumerate() {
            for (position, row) in formula(&model, tokens).into_iter().enumerate() {
                expected.insert((i, position), row.iter().map(|&x| x as f32).collect());
            }
        }
        // Sums of some hundred f32 products over two layers.
        let off = difference(&expected, &logits);
        assert!(off < 2e-5, "seed {seed}, {case:?}: off by {off}");
    }
}

#[test]
fn narrow_keys_and_values_stay_near_f32() {
    // f16 rounds by 2^-12 relative; q8 by 1/254 of the largest of 32. Both average out over a head.
    for (kv_type, bound) in [(KvType::F16, 5e-3), (KvType::Q8, 0.1)] {
        for seed in 40..44 {
            let mut random = Random(seed);
            let case = Case::random(&mut random, DType::F32);
            let model = Model::new(&mut random, &case);
            let sequences = sequences(&mut random, &[45]);
            let mut run = |kv_type| {
                Run::new(ReferenceBackend::new(2), &model, &sequences, kv_type, &mut random).one_by_one()
            };
            let off = difference(&run(KvType::F32), &run(kv_type));
            assert!(off < bound, "seed {seed}, {case:?}, {kv_type:?}: off by {off}");
            assert!(off > 1e-6, "seed {seed}: {kv_type:?} was not narrow");
        }
    }
}

#[test]
fn fast_equals_reference() {
    for isa in Isa::available() {
        for seed in 100..112 {
            let mut random = Random(seed);
            let case = Case::random(&mut random, DType::F32);
            let kv_type = random.pick(&[KvType::F32, KvType::F16, KvType::Q8]);
            let model = Model::new(&mut random, &case);
            let sequences = sequences(&mut random, &[1, 31, 32, 33, 150]);
            let run = Run::new(ReferenceBackend::new(2), &model, &sequences, kv_type, &mut random);
            let expected = run.one_by_one();
            let run = Run::new(fast(isa, 2), &model, &sequences, kv_type, &mut random);
            let logits = run.mixed(&mut random);
            // Float weights: f32 throughout, but a rounding in the last place may store a neighbour of
            // the reference's key or value: 2^-11 of a number in f16, 1/127 of the largest of 32 in q8.
            let bound = match kv_type {
                KvType::F32 => 5e-5,
                KvType::F16 => 2e-3,
                KvType::Q8 => 5e-2,
            };
            let off = difference(&expected, &logits);
            assert!(off < bound, "{isa:?}, seed {seed}, {case:?}, {kv_type:?}: off by {off}");
        }
    }
}

#[test]
fn fast_equals_reference_over_a_long_context() {
    for isa in Isa::available() {
        let mut random = Random(7);
        let case = Case { group: 3, kv_heads: 1, ..Case::random(&mut random, DType::F32) };
        let model = Model::new(&mut random, &case);
        let sequences = sequences(&mut random, &[1200]);
        let expected =
            Run::new(ReferenceBackend::new(2), &model, &sequences, KvType::F16, &mut random).one_by_one();
        let logits = Run::new(fast(isa, 2), &model, &sequences, KvType::F16, &mut random).one_by_one();
        let off = difference(&expected, &logits);
        assert!(off < 2e-3, "{isa:?}: off by {off}");
    }
}

#[test]
fn eight_bit_activations_stay_near_the_reference() {
    for isa in Isa::available() {
        let mut random = Random(17);
        let case = Case::random(&mut random, DType::Q8_0);
        let model = Model::new(&mut random, &case);
        let sequences = sequences(&mut random, &[40]);
        let expected =
            Run::new(ReferenceBackend::new(2), &model, &sequences, KvType::F16, &mut random).one_by_one();
        let logits = Run::new(fast(isa, 2), &model, &sequences, KvType::F16, &mut random).one_by_one();
        // A group's step is 1/127 of its largest, errors of a uniform distribution add as squares: about
        // 0.5 % of a product's deviation in each of 8 products; 64 × 40 results reach some 5 deviations.
        let off = difference(&expected, &logits);
        assert!(off < 0.15, "{isa:?}: off by {off}");
        assert!(off > 1e-6, "{isa:?}: the activations were not in 8 bits");
    }
}

#[test]
fn bits_do_not_depend_on_the_batch_or_the_threads() {
    for isa in Isa::available() {
        for (seed, dtype) in [(21, DType::F32), (22, DType::Q8_0), (23, DType::Q8_0)] {
            let mut random = Random(seed);
            let case = Case::random(&mut random, dtype);
            let kv_type = random.pick(&[KvType::F32, KvType::F16, KvType::Q8]);
            let model = Model::new(&mut random, &case);
            let sequences = sequences(&mut random, &[1, 70, 33, 650]);
            let whole = Run::new(fast(isa, 1), &model, &sequences, kv_type, &mut random).one_by_one();
            for threads in 1..=3 {
                let mixed =
                    Run::new(fast(isa, threads), &model, &sequences, kv_type, &mut random).mixed(&mut random);
                for (at, row) in &whole {
                    let same = row.iter().zip(&mixed[at]).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(
                        same,
                        "{isa:?}, seed {seed}, {case:?}, {kv_type:?}, {threads} threads: differs at {at:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_step_beyond_the_capacity_is_refused() {
    let mut random = Random(3);
    let case = Case::random(&mut random, DType::F32);
    let model = Model::new(&mut random, &case);
    let capacity = Capacity { tokens: 4, sequences: 1, logit_rows: 1, kv_blocks: 2, kv_type: KvType::F16 };
    let good = Batch {
        tokens: vec![1, 2],
        positions: vec![0, 1],
        sequences: vec![BatchSequence { start: 0, len: 2, context: 0, table: 0 }],
        block_tables: vec![1],
        hidden_rows: vec![],
        logit_rows: vec![1],
        copies: Vec::new(),
    };
    let change = |f: &dyn Fn(&mut Batch)| {
        let mut batch = good.clone();
        f(&mut batch);
        batch
    };
    let bad = [
        change(&|b| b.block_tables[0] = 2),
        change(&|b| b.block_tables.clear()),
        change(&|b| b.copies.push(BlockCopy { from: 0, to: 2 })),
        change(&|b| b.logit_rows[0] = 2),
        change(&|b| b.logit_rows = vec![0, 1]),
        change(&|b| b.positions[1] = 5),
        change(&|b| b.sequences[0].len = 1),
        change(&|b| b.sequences[0].len = 3),
        change(&|b| b.sequences[0].context = usize::MAX - 1),
        change(&|b| b.sequences[0].table = usize::MAX),
        change(&|b| b.tokens = vec![1; 5]),
    ];
    let mut backend = fast(Isa::detect(), 1);
    assert!(backend.begin(&good).is_err(), "before allocate");
    backend.allocate(&model.shape, &capacity).unwrap();
    for batch in &bad {
        assert!(backend.begin(batch).is_err(), "{batch:?}");
    }
    let outside = change(&|b| b.tokens[0] = VOCAB as u32);
    backend.begin(&outside).unwrap();
    assert!(backend.embed(&model.embedding).unwrap_err().to_string().contains("vocabulary"));
    backend.begin(&good).unwrap();
    backend.embed(&model.embedding).unwrap();
    let wrong = backend.logits(&model.norm, &model.attention[0].k).unwrap_err().to_string();
    assert!(wrong.contains("tensor k"), "{wrong}");
}
