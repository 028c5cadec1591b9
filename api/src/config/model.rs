//! Settings of every command that loads a model.

use std::path::PathBuf;

use m40llm_engine::{BackendChoice, DeviceId, EngineConfig, KvType};

use super::{
    ConfigError,
    layers::Layers,
    values::{Backend, backend, boolean, ctx_size, device, kv_memory, kv_type, threads, trace_file},
};

/// Flags of every command that loads a model.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ModelArgs {
    /// Where the model runs; auto takes a CUDA device where there is one, else the CPU [default: auto]
    #[arg(long, value_name = "auto|cuda|cpu", value_parser = backend)]
    backend: Option<Backend>,
    /// Which CUDA device: its number from 0, or its UUID (`m40llm devices` lists them)
    #[arg(long, value_name = "N|GPU-UUID", value_parser = device)]
    device: Option<DeviceId>,
    /// Refuse to start on anything but a CUDA device of compute capability 5.2 (Tesla M40)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    require_sm52: Option<bool>,
    /// Longest one sequence may get, in tokens [default: the model's own, as far as memory allows]
    #[arg(long, value_name = "N", value_parser = ctx_size)]
    ctx_size: Option<usize>,
    /// CPU threads [default: one per core this process may use]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// How keys and values are stored [default: f16]
    #[arg(long, value_name = "f16|f32|q8", value_parser = kv_type)]
    kv_type: Option<KvType>,
    /// Most memory for keys and values, such as 512MB or 4GiB [default: what the device has left for them]
    #[arg(long, value_name = "SIZE", value_parser = kv_memory)]
    kv_memory: Option<u64>,
    /// Run small steps on a CUDA device as captured graphs [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    cuda_graphs: Option<bool>,
    /// Read prompts on a CUDA device with cuBLAS, loaded now, instead of our own kernels [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = boolean)]
    enable_cublas: Option<bool>,
    /// Time every kernel on a CUDA device: at the end a table on stderr, and a Chrome trace in this file
    #[arg(long, value_name = "FILE.json", value_parser = trace_file)]
    trace_kernels: Option<PathBuf>,
    /// Read further settings from this TOML file; its keys are the flag names
    #[arg(long, value_name = "FILE.toml")]
    pub(super) config: Option<PathBuf>,
}

/// What a command that loads a model works with.
#[derive(Debug, Clone)]
pub(crate) struct ModelConfig {
    /// For the engine.
    pub engine: EngineConfig,
    /// The settings that ask for a CUDA device, as flags; empty where any backend will do.
    pub asked_device: String,
    /// Where a trace of kernels goes.
    pub trace_file: Option<PathBuf>,
}

impl ModelArgs {
    /// All layers taken together.
    pub(crate) fn resolve(self) -> Result<ModelConfig, ConfigError> {
        let layers = Layers::read(self.config.as_deref())?;
        self.resolve_in(&layers)
    }

    pub(super) fn resolve_in(self, layers: &Layers) -> Result<ModelConfig, ConfigError> {
        let backend = layers.pick(self.backend, "backend", backend)?.unwrap_or_default();
        let device = layers.pick(self.device, "device", device)?;
        let require_sm52 = layers.pick(self.require_sm52, "require-sm52", boolean)?.unwrap_or(false);
        for (asked, name) in [(device.is_some(), "device"), (require_sm52, "require-sm52")] {
            if asked && backend == Backend::Cpu {
                return Err(ConfigError(format!(
                    "{name} asks for a CUDA device and backend cpu uses none: leave one of the two out"
                )));
            }
        }
        let asked = [
            (backend == Backend::Cuda).then(|| "--backend cuda".to_owned()),
            device.as_ref().map(|id| format!("--device {id}")),
            require_sm52.then(|| "--require-sm52".to_owned()),
        ];
        let asked_device = asked.into_iter().flatten().collect::<Vec<_>>().join(" ");
        let backend = match backend {
            Backend::Cpu => BackendChoice::Cpu,
            Backend::Auto if asked_device.is_empty() => BackendChoice::Auto,
            Backend::Auto | Backend::Cuda => BackendChoice::Cuda { device, require_sm52 },
        };
        let defaults = EngineConfig::default();
        let engine = EngineConfig {
            backend,
            ctx_size: layers.pick(self.ctx_size, "ctx-size", ctx_size)?,
            threads: layers.pick(self.threads, "threads", threads)?,
            kv_type: layers.pick(self.kv_type, "kv-type", kv_type)?.unwrap_or(defaults.kv_type),
            kv_memory: layers.pick(self.kv_memory, "kv-memory", kv_memory)?,
            cuda_graphs: layers
                .pick(self.cuda_graphs, "cuda-graphs", boolean)?
                .unwrap_or(defaults.cuda_graphs),
            cublas: layers.pick(self.enable_cublas, "enable-cublas", boolean)?.unwrap_or(defaults.cublas),
            ..defaults
        };
        let trace_file = layers.pick(self.trace_kernels, "trace-kernels", trace_file)?;
        Ok(ModelConfig { engine, asked_device, trace_file })
    }
}
