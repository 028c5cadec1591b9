//! What the engine is told at start.

use crate::{device::DeviceId, sched::PrefixCache, trace::SharedTrace};

/// Where the model runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// A CUDA device where one is usable, else the CPU's fast paths.
    #[default]
    Auto,
    /// A CUDA device or an error.
    Cuda {
        /// This one; `None`: the first of compute capability 5.2, else the first newer one.
        device: Option<DeviceId>,
        /// Nothing but compute capability 5.2 will do.
        require_sm52: bool,
    },
    /// The CPU's fast paths.
    Cpu,
    /// The plain f32 reference on the CPU: slow, exact, the oracle of the tests.
    Reference,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvType {
    /// Half precision, the default.
    #[default]
    F16,
    /// Single precision, for comparisons.
    F32,
    /// 8-bit blocks of 32 with an f16 scale.
    Q8,
}

impl KvType {
    /// Bytes that `elements` of one head's key or value take.
    pub const fn bytes(self, elements: usize) -> usize {
        match self {
            KvType::F16 => elements * 2,
            KvType::F32 => elements * 4,
            KvType::Q8 => elements + elements.div_ceil(32) * 2,
        }
    }
}

/// What [`Engine::load`] needs to know beside the file.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Where the model runs.
    pub backend: BackendChoice,
    /// Longest sequence served, in tokens; `None`: the model's own, as far as memory allows.
    pub ctx_size: Option<usize>,
    /// Most sequences in one step.
    pub max_batch: usize,
    /// Most requests waiting for a place in the batch.
    pub max_queue: usize,
    /// CPU threads; `None`: one per core this process may use.
    pub threads: Option<usize>,
    /// Storage of keys and values.
    pub kv_type: KvType,
    /// Most bytes for keys and values; `None`: what the backend has for them.
    pub kv_memory: Option<u64>,
    /// Who may find whose prompts in the cache.
    pub prefix_cache: PrefixCache,
    /// Capture steps of few sequences in CUDA graphs.
    pub cuda_graphs: bool,
    /// On a CUDA device: multiply by cuBLAS where a step has many tokens.
    pub cublas: bool,
    /// Time every kernel into this; `None`: do not.
    pub trace: Option<SharedTrace>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            backend: BackendChoice::Auto,
            ctx_size: None,
            max_batch: 16,
            max_queue: 256,
            threads: None,
            kv_type: KvType::F16,
            kv_memory: None,
            prefix_cache: PrefixCache::default(),
            cuda_graphs: true,
            cublas: false,
            trace: None,
        }
    }
}
