//! A model read step by step, on any backend, and how far two of them are apart.

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    path::Path,
};

use m40llm_engine::{
    KvType,
    backend::{
        Backend, Capacity, Need, Row, Shape,
        cpu::ReferenceBackend,
        cuda::{CudaBackend, CudaOptions, Device},
    },
    gguf::Gguf,
    model::{Decoder, ModelConfig, Weights},
    sched::{BLOCK_TOKENS, Batch, BatchSequence, BlockCopy},
};

use crate::support::{
    Rng,
    tiny::{self, Family, Spec, Vocabulary},
};

pub(crate) fn cuda(graphs: bool) -> CudaBackend {
    cuda_with(CudaOptions { graphs, ..CudaOptions::default() })
}

pub(crate) fn cuda_with(options: CudaOptions) -> CudaBackend {
    let device = Device::open(None, false).expect("these tests need a CUDA device");
    CudaBackend::new(device, options).unwrap()
}

pub(crate) fn reference() -> ReferenceBackend {
    ReferenceBackend::new(std::thread::available_parallelism().map_or(1, usize::from))
}

/// New numbers in every run; a failure shows the seed.
pub(crate) fn fresh() -> Rng {
    let seed = RandomState::new().build_hasher().finish();
    println!("seed {seed:#x}");
    Rng(seed)
}

pub(crate) fn below(rng: &mut Rng, n: usize) -> usize {
    (rng.next() % n as u64) as usize
}

/// Sequences in the middle of being read.
pub(crate) struct Run<'a, B: Backend> {
    pub(crate) decoder: Decoder<B>,
    pub(crate) shape: Shape,
    pub(crate) sequences: &'a [Vec<u32>],
    /// Of KV blocks, by sequence.
    pub(crate) tables: Vec<Vec<u32>>,
    done: Vec<usize>,
    /// Blocks to be copied at the next step's beginning.
    copies: Vec<BlockCopy>,
    pub(crate) steps: usize,
    /// Logits by sequence and position.
    logits: BTreeMap<(usize, usize), Vec<f32>>,
}

impl<'a, B: Backend> Run<'a, B> {
    /// With KV blocks in random order.
    pub(crate) fn new(
        backend: B,
        path: &Path,
        sequences: &'a [Vec<u32>],
        kv_type: KvType,
        rng: &mut Rng,
    ) -> Self {
        let counts = sequences.iter().map(|s| s.len().div_ceil(BLOCK_TOKENS));
        let total: usize = counts.clone().sum();
        let mut blocks: Vec<u32> = (0..total as u32).collect();
        for i in (1..total).rev() {
            blocks.swap(i, below(rng, i + 1));
        }
        let tables = counts.map(|n| blocks.split_off(blocks.len() - n)).collect();
        Self::over(tables, backend, path, sequences, kv_type)
    }

    /// With given KV blocks.
    pub(crate) fn over(
        tables: Vec<Vec<u32>>,
        mut backend: B,
        path: &Path,
        sequences: &'a [Vec<u32>],
        kv_type: KvType,
    ) -> Self {
        let file = Gguf::open(path).unwrap();
        let ModelConfig { architecture, shape, .. } = ModelConfig::from_gguf(&file).unwrap();
        let weights = Weights::load(&file, &architecture, &shape, &mut backend, &mut |_| {}).unwrap();
        let tokens: usize = sequences.iter().map(Vec::len).sum();
        let kv_blocks = tables.iter().map(Vec::len).sum();
        let capacity =
            Capacity { tokens, sequences: sequences.len(), logit_rows: tokens, kv_blocks, kv_type };
        backend.allocate(&shape, &capacity).unwrap();
        Self {
            decoder: Decoder::new(backend, weights),
            shape,
            sequences,
            tables,
            done: vec![0; sequences.len()],
            copies: Vec::new(),
            steps: 0,
            logits: BTreeMap::new(),
        }
    }

    /// One step over `(sequence, tokens)`, all rows wanted.
    pub(crate) fn step(&mut self, parts: &[(usize, usize)]) {
        let mut batch = Batch { copies: std::mem::take(&mut self.copies), ..Batch::default() };
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
        self.decoder.wait_for_rows(rows.len()).unwrap();
        for (row, &place) in rows.iter().enumerate() {
            let Row::All(logits) = self.decoder.row(row) else { panic!("all was asked for") };
            assert_eq!(logits.len(), self.shape.vocab);
            self.logits.insert(place, logits.to_vec());
        }
        self.steps += 1;
    }

    /// Lets a sequence go on where another one is, which it must equal so far: from a copy of each block that is another in
    /// its own table.
    pub(crate) fn fork(&mut self, from: usize, to: usize) {
        self.done[to] = self.done[from];
        let pairs =
            self.tables[from].iter().zip(&self.tables[to]).take(self.done[from].div_ceil(BLOCK_TOKENS));
        self.copies.extend(pairs.filter(|(from, to)| from != to).map(|(&from, &to)| BlockCopy { from, to }));
    }

    pub(crate) fn one_by_one(mut self) -> Self {
        for i in 0..self.sequences.len() {
            self.step(&[(i, self.sequences[i].len())]);
        }
        self
    }

    /// Given steps, which must use every sequence up.
    pub(crate) fn in_steps(mut self, steps: &[&[(usize, usize)]]) -> Self {
        for parts in steps {
            self.step(parts);
        }
        assert!((0..self.sequences.len()).all(|i| self.left(i) == 0));
        self
    }

    /// Sequence and position of each row.
    pub(crate) fn places(&self) -> impl Iterator<Item = &(usize, usize)> {
        self.logits.keys()
    }

    fn left(&self, i: usize) -> usize {
        self.sequences[i].len() - self.done[i]
    }

    /// Parts of random length of several sequences at a time.
    pub(crate) fn mixed(mut self, rng: &mut Rng) -> Self {
        loop {
            let open: Vec<usize> = (0..self.sequences.len()).filter(|&i| self.left(i) > 0).collect();
            if open.is_empty() {
                return self;
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
        }
    }
}

pub(crate) fn sequences(rng: &mut Rng, vocab: usize, lengths: &[usize]) -> Vec<Vec<u32>> {
    lengths.iter().map(|&n| (0..n).map(|_| below(rng, vocab) as u32).collect()).collect()
}

/// How far logits are off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Off {
    /// The largest ‖a − b‖ / ‖b‖ over all rows.
    pub(crate) row: f64,
    /// The same of all rows taken together.
    pub(crate) all: f64,
}

impl Off {
    pub(crate) fn is_within(self, bound: Off) -> bool {
        // False for NaN.
        self.row <= bound.row && self.all <= bound.all
    }
}

/// Of the rows that `a` has had; `b` must have had them too.
pub(crate) fn difference<A: Backend, B: Backend>(a: &Run<'_, A>, b: &Run<'_, B>) -> Off {
    let (mut worst, mut off, mut size) = (0.0f64, 0.0, 0.0);
    for (place, a) in &a.logits {
        let b = &b.logits[place];
        let row: f64 = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2)).sum();
        let of: f64 = b.iter().map(|&b| f64::from(b).powi(2)).sum();
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

pub(crate) const VOCABULARY: Vocabulary = Vocabulary::Bpe;
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
