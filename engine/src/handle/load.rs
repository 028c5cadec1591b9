//! From a model's file to an engine: the backend is chosen, memory planned, weights taken in, the worker started.

use std::{path::Path, sync::Arc, thread, time::Instant};

use super::Engine;
#[cfg(not(feature = "cuda"))]
use crate::backend;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{self, CudaBackend, CudaOptions, device::Chosen};
use crate::{
    backend::{
        Backend, Capacity, Demand, NO_CUDA,
        cpu::{CpuBackend, CpuOptions, Isa, ReferenceBackend},
    },
    config::{BackendChoice, EngineConfig},
    error::EngineError,
    gguf::{Gguf, Metadata},
    info::{Described, ModelInfo},
    memory,
    model::{Decoder, Mixture, ModelConfig, NamedShape, Weights},
    sched::{Limits, Resources, blocks_for},
    text::{self, Tokenizer},
    worker,
};

/// Tokens of prompts and decode in one step: enough to keep a matrix product busy, few enough that a
/// stranger's prompt does not hold up running streams for long.
const STEP_TOKENS: usize = 512;
/// Rows of logits in one step; a row of a 150k vocabulary is 600 KB.
const LOGIT_ROWS: usize = 32;
/// More sequences than this would not fit a step.
const MAX_BATCH: usize = 512;

/// Loading, in bytes of weights.
#[derive(Debug, Clone, Copy)]
pub struct LoadProgress {
    /// Bytes taken in so far.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

impl Engine {
    /// Maps and checks the file, takes the weights in and starts the worker.
    pub fn load(
        path: &Path,
        config: &EngineConfig,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        Self::choose(&Source::File(path), config, progress)
    }

    /// A model of random weights in the dimensions of a known one, for benchmarks: no file, and no text worth
    /// reading.
    pub fn random(named: &NamedShape, mixture: Mixture, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::choose(&Source::Shape(named, mixture), config, |_| {})
    }

    /// The one place where a backend is chosen.
    fn choose(
        source: &Source<'_>,
        config: &EngineConfig,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        let threads =
            config.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
        #[cfg(feature = "cuda")]
        let no_device = match cuda::device::chosen(&config.backend)? {
            Chosen::Device(device) => {
                let options = CudaOptions {
                    graphs: config.cuda_graphs,
                    cublas: config.cublas,
                    trace: config.trace.clone(),
                };
                return Self::start(source, config, CudaBackend::new(device, options)?, progress);
            }
            Chosen::Cpu(reason) => reason,
        };
        #[cfg(not(feature = "cuda"))]
        let no_device = backend::unused_card(&config.backend);
        match config.backend {
            BackendChoice::Auto | BackendChoice::Cpu => {
                let backend = CpuBackend::new(CpuOptions { threads, isa: Isa::detect() })?;
                let notice =
                    no_device.map(|why| format!("no CUDA device, so the model runs on the CPU: {why}"));
                Self::start(source, config, backend.with_notice(notice), progress)
            }
            BackendChoice::Reference => Self::start(source, config, ReferenceBackend::new(threads), progress),
            BackendChoice::Cuda { .. } => Err(EngineError::Device(NO_CUDA.into())),
        }
    }

    /// As [`Engine::load`], on a backend of the caller's.
    pub fn load_on<B: Backend>(
        path: &Path,
        config: &EngineConfig,
        backend: B,
        progress: impl FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        Self::start(&Source::File(path), config, backend, progress)
    }

    fn start<B: Backend>(
        source: &Source<'_>,
        config: &EngineConfig,
        mut backend: B,
        mut progress: impl FnMut(LoadProgress),
    ) -> Result<Self, EngineError> {
        if config.max_batch == 0 || config.max_batch > MAX_BATCH {
            return Err(EngineError::Config(format!("max-batch must be 1 to {MAX_BATCH}")));
        }
        let Opened { model, metadata, described, tensors } = source.open()?;
        let tokenizer = Arc::new(Tokenizer::from_metadata(&metadata)?);
        let limits = Limits {
            tokens: STEP_TOKENS.max(config.max_batch),
            sequences: config.max_batch,
            logit_rows: LOGIT_ROWS.max(config.max_batch),
        };
        let mut capacity = Capacity {
            tokens: limits.tokens,
            sequences: limits.sequences,
            logit_rows: limits.logit_rows,
            kv_blocks: 0,
            kv_type: config.kv_type,
        };
        let matrices = described.matrices.iter();
        let room = backend.kv_room(&Demand {
            weights: matrices.map(|&(dtype, rows, cols)| backend.stored_bytes(dtype, rows, cols)).sum(),
            shape: &model.shape,
            capacity: &capacity,
            ctx_size: config.ctx_size,
        })?;
        let plan = memory::plan(&model, config, room)?;
        capacity.kv_blocks = plan.kv_blocks;

        let total = described.size_bytes;
        let start = Instant::now();
        let mut load_time = None;
        let weights = match tensors {
            Tensors::Random(named, mixture) => Weights::random(named, mixture, &mut backend)?,
            Tensors::File(file) => {
                file.prefetch();
                let weights =
                    Weights::load(&file, &model.architecture, &model.shape, &mut backend, &mut |done| {
                        progress(LoadProgress { done, total });
                    })?;
                load_time = backend.copies_weights().then(|| start.elapsed());
                weights
            }
        };
        backend.allocate(&model.shape, &capacity)?;

        let resources = Resources {
            limits,
            blocks: plan.kv_blocks,
            // A host commits memory as it is written: what is kept there is bounded by the longest sequence.
            most_idle: if backend.commits_cache() { plan.kv_blocks } else { blocks_for(plan.ctx_size) },
            prefix_cache: config.prefix_cache,
        };
        let info = ModelInfo::new(described, &model, &plan, &backend, load_time);
        let decoder = Decoder::new(backend, weights);
        let text = Arc::clone(&tokenizer);
        Self::over(info, metadata, tokenizer, config, move |inbox, shared| {
            worker::run(decoder, &text, resources, inbox, &shared);
        })
    }
}

/// Where a model comes from.
enum Source<'a> {
    File(&'a Path),
    Shape(&'a NamedShape, Mixture),
}

/// A model before its weights.
struct Opened<'a> {
    model: ModelConfig,
    metadata: Metadata,
    described: Described,
    tensors: Tensors<'a>,
}

/// Where its weights come from.
enum Tensors<'a> {
    File(Gguf),
    Random(&'a NamedShape, Mixture),
}

impl<'a> Source<'a> {
    fn open(&self) -> Result<Opened<'a>, EngineError> {
        match *self {
            Source::File(path) => {
                let file = Gguf::open(path)?;
                let model = ModelConfig::from_gguf(&file)?;
                let (metadata, described) = (file.metadata().clone(), Described::of_file(&file));
                Ok(Opened { model, metadata, described, tensors: Tensors::File(file) })
            }
            Source::Shape(named, mixture) => {
                let model = named.config();
                let metadata = text::numbered_vocabulary(model.shape.vocab);
                let described = Described::of_shape(named, mixture);
                Ok(Opened { model, metadata, described, tensors: Tensors::Random(named, mixture) })
            }
        }
    }
}
