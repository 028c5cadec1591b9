//! GGUF files: mapping, checked parsing, metadata, tensors, block formats.
//!
//! Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.

mod dequant;
mod dtype;
mod metadata;

pub use dequant::dequantize;
pub use dtype::DType;
pub use metadata::{Metadata, Value};

use std::{ops::Range, path::Path, sync::Arc};

/// What is wrong with a file. One line, names the file's key, tensor or offset.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct GgufError(pub String);

/// A tensor's place in the file, checked against it.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Dimensions, innermost (contiguous) first, as ggml has them; 1 to 4, none zero.
    pub dims: Vec<usize>,
    /// Storage type.
    pub dtype: DType,
    /// Which of the mapped files.
    pub(crate) file: usize,
    /// Bytes within that file.
    pub(crate) range: Range<usize>,
}

/// A tensor's bytes, kept mapped for as long as this lives. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Where it came from.
    pub info: TensorInfo,
    map: Arc<memmap2::Mmap>,
}

impl Tensor {
    /// The raw blocks: `rows() * dtype.row_bytes(cols())` bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.info.range.clone()]
    }
    /// The innermost dimension: a row's length, the matrix's input width.
    pub fn cols(&self) -> usize {
        self.info.dims[0]
    }
    /// All the other dimensions multiplied.
    pub fn rows(&self) -> usize {
        self.info.dims[1..].iter().product()
    }
    /// Storage type.
    pub fn dtype(&self) -> DType {
        self.info.dtype
    }
}

/// A parsed model: one file, or the parts of a split one.
#[derive(Debug)]
pub struct Gguf {
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    maps: Vec<Arc<memmap2::Mmap>>,
}

impl Gguf {
    /// Maps the file (and its siblings, when it is the first of `name-00001-of-0000N.gguf`) and checks
    /// every count, offset, type and string in its header against it.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        unimplemented!()
    }
    /// The key-value section (of the first part).
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        unimplemented!()
    }
}
