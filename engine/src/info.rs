//! What is loaded, in numbers a person asks for.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    backend::Backend,
    gguf::{DType, Gguf},
    memory::Plan,
    model::{Mixture, ModelConfig, NamedShape, Pooling},
    sched::BLOCK_TOKENS,
};

/// What is loaded, for `/v1/models`, `inspect` and logs.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// `general.name`, when the file has it.
    pub name: Option<String>,
    /// `general.architecture`.
    pub architecture: String,
    /// The quantisation as users know it: `Q4_K_M`, `Q8_0`, `F16`.
    pub quantization: String,
    /// Weights, counted.
    pub parameters: u64,
    /// Bytes of tensor data.
    pub size_bytes: u64,
    /// The longest sequence served.
    pub ctx_size: usize,
    /// The context the model was trained for.
    pub ctx_train: usize,
    /// Tells models apart that are alike in all this: of the tensors' names, types and sizes, and of a few bytes of each.
    pub digest: u64,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Embedding width.
    pub embedding_length: usize,
    /// How it makes one vector of a text; `None`: in a way that is not known here.
    pub pooling: Option<Pooling>,
    /// Transformer layers.
    pub layers: usize,
    /// The backend in words, such as `cpu (avx512-vnni, 2 threads)`.
    pub backend: String,
    /// What a user should know of the device, one line each.
    pub notices: Vec<String>,
    /// How long the weights took to the device; `None` where they stay in the file's mapping, or there is no file.
    pub load_time: Option<Duration>,
    /// Tokens the KV pool holds, over all sequences.
    pub kv_tokens: usize,
    /// Bytes of the KV pool.
    pub kv_bytes: u64,
}

/// A model's description before a backend has it.
pub(crate) struct Described {
    name: Option<String>,
    quantization: String,
    parameters: u64,
    digest: u64,
    /// Bytes of tensor data.
    pub(crate) size_bytes: u64,
    /// Type, rows and columns of each matrix.
    pub(crate) matrices: Vec<(DType, usize, usize)>,
}

impl Described {
    pub(crate) fn of_file(file: &Gguf) -> Self {
        let tensors = file.tensors();
        let matrices = tensors.iter().filter(|t| t.dims.len() > 1);
        Self {
            name: file.metadata().str("general.name").ok().flatten().map(str::to_owned),
            quantization: quantization(file),
            parameters: tensors.iter().map(|t| t.dims.iter().product::<usize>() as u64).sum(),
            digest: digest(file),
            size_bytes: tensors.iter().map(|t| t.range.len() as u64).sum(),
            matrices: matrices.map(|t| (t.dtype, t.dims[1..].iter().product(), t.dims[0])).collect(),
        }
    }

    pub(crate) fn of_shape(named: &NamedShape, mixture: Mixture) -> Self {
        let matrices = named.matrices(mixture);
        Self {
            name: Some(named.name.to_owned()),
            quantization: mixture.name(),
            parameters: matrices.iter().map(|&(_, rows, cols)| (rows * cols) as u64).sum(),
            digest: 0,
            size_bytes: matrices
                .iter()
                .map(|&(dtype, rows, cols)| (rows * dtype.row_bytes(cols)) as u64)
                .sum(),
            matrices,
        }
    }
}

impl ModelInfo {
    pub(crate) fn new<B: Backend>(
        described: Described,
        model: &ModelConfig,
        plan: &Plan,
        backend: &B,
        load_time: Option<Duration>,
    ) -> Self {
        Self {
            name: described.name,
            architecture: model.architecture.clone(),
            quantization: described.quantization,
            parameters: described.parameters,
            size_bytes: described.size_bytes,
            ctx_size: plan.ctx_size,
            ctx_train: model.ctx_train,
            digest: described.digest,
            vocab_size: model.shape.vocab,
            embedding_length: model.shape.dim,
            pooling: model.pooling,
            layers: model.shape.layers,
            backend: backend.describe(),
            notices: backend.notices(),
            load_time,
            kv_tokens: plan.kv_blocks * BLOCK_TOKENS,
            kv_bytes: (plan.kv_blocks * BLOCK_TOKENS * plan.token_bytes) as u64,
        }
    }
}

impl ModelInfo {
    /// How fast the weights came to the device, in words; `None` as [`ModelInfo::load_time`].
    pub fn load_speed(&self) -> Option<String> {
        let seconds = self.load_time?.as_secs_f64();
        let gigabytes = self.size_bytes as f64 / 1e9;
        Some(format!("{gigabytes:.2} GB in {seconds:.2} s, {:.1} GB/s", gigabytes / seconds))
    }
}

/// FNV-1a (64 bits) of each tensor's description and of what stands in its midst: training changes every tensor, and
/// reading all of them would take as long as loading.
fn digest(file: &Gguf) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for info in file.tensors() {
        take(format!("{}|{}|{:?}", info.name, info.dtype.name(), info.dims).as_bytes());
        if let Some(tensor) = file.tensor(&info.name) {
            let middle = tensor.bytes().len() / 2;
            take(&tensor.bytes()[middle..][..64.min(tensor.bytes().len() - middle)]);
        }
    }
    hash
}

/// The name of `general.file_type` (llama.cpp's `llama_ftype`), else that of the type most bytes have.
pub fn quantization(file: &Gguf) -> String {
    let named = match file.metadata().u64("general.file_type").ok().flatten() {
        Some(0) => "F32",
        Some(1) => "F16",
        Some(2) => "Q4_0",
        Some(3) => "Q4_1",
        Some(7) => "Q8_0",
        Some(8) => "Q5_0",
        Some(9) => "Q5_1",
        Some(10) => "Q2_K",
        Some(11) => "Q3_K_S",
        Some(12) => "Q3_K_M",
        Some(13) => "Q3_K_L",
        Some(14) => "Q4_K_S",
        Some(15) => "Q4_K_M",
        Some(16) => "Q5_K_S",
        Some(17) => "Q5_K_M",
        Some(18) => "Q6_K",
        Some(25) => "IQ4_NL",
        Some(30) => "IQ4_XS",
        Some(32) => "BF16",
        _ => "",
    };
    if !named.is_empty() {
        return named.to_owned();
    }
    let mut bytes: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in file.tensors() {
        *bytes.entry(tensor.dtype.name()).or_default() += tensor.range.len();
    }
    bytes.into_iter().max_by_key(|&(_, b)| b).map_or("F32", |(name, _)| name).to_owned()
}
