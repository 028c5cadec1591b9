//! What is measured, and the bytes that a step of it moves.

use std::path::Path;

use m40llm_engine::{
    Engine, KvType,
    gguf::Gguf,
    memory::kv_bytes_per_token,
    model::{Mixture, ModelConfig, NamedShape},
};

use super::{Args, load};
use crate::config::{ConfigError, ModelConfig as ModelSettings};

/// What is measured.
pub(super) enum Model<'a> {
    File(&'a Path),
    Shape(&'static NamedShape, Mixture),
}

impl<'a> Model<'a> {
    pub(super) fn of(args: &'a Args) -> anyhow::Result<Self> {
        match (&args.model, args.shape, args.quant) {
            (Some(path), None, None) => Ok(Self::File(path)),
            (None, Some(shape), Some(mixture)) => Ok(Self::Shape(shape, mixture)),
            _ => Err(ConfigError("either MODEL.gguf, or --shape and --quant".into()).into()),
        }
    }

    pub(super) fn load(&self, config: &ModelSettings) -> anyhow::Result<Engine> {
        match *self {
            Self::File(path) => load(path, config),
            Self::Shape(shape, mixture) => Ok(Engine::random(shape, mixture, &config.engine)?),
        }
    }

    pub(super) fn name(&self) -> String {
        match self {
            Self::File(path) => path.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Shape(shape, _) => shape.name.to_owned(),
        }
    }

    pub(super) fn traffic(&self, kv_type: KvType) -> anyhow::Result<Traffic> {
        match *self {
            Self::File(path) => Traffic::read(path, kv_type),
            Self::Shape(shape, mixture) => Ok(Traffic::of_shape(shape, mixture, kv_type)),
        }
    }
}

/// Bytes that a step moves.
pub(super) struct Traffic {
    /// Weights read once a step: all of them, but of an embedding that is not the output matrix too.
    pub(super) weights: u64,
    /// Keys and values of one token.
    pub(super) kv_per_token: u64,
}

impl Traffic {
    pub(super) fn read(path: &Path, kv_type: KvType) -> anyhow::Result<Self> {
        let file = Gguf::open(path)?;
        let untied = file.tensor("output.weight").is_some();
        let read = file.tensors().iter().filter(|t| !(untied && t.name == "token_embd.weight"));
        let bytes = read.map(|t| t.dims[1..].iter().product::<usize>() * t.dtype.row_bytes(t.dims[0]));
        let kv_per_token = kv_bytes_per_token(&ModelConfig::from_gguf(&file)?, kv_type) as u64;
        Ok(Self { weights: bytes.sum::<usize>() as u64, kv_per_token })
    }

    pub(super) fn of_shape(shape: &NamedShape, mixture: Mixture, kv_type: KvType) -> Self {
        let matrices = shape.matrices(mixture);
        let read = matrices.iter().skip(usize::from(!shape.is_tied()));
        let bytes = read.map(|&(dtype, rows, cols)| (rows * dtype.row_bytes(cols)) as u64);
        Self { weights: bytes.sum(), kv_per_token: kv_bytes_per_token(&shape.config(), kv_type) as u64 }
    }
}
