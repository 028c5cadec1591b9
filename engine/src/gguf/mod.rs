//! GGUF files: mapping, checked parsing, metadata, tensors, block formats.
//!
//! Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.

mod dequant;
mod dequant_k;
mod dtype;
mod metadata;
mod parse;
mod reader;
mod split;

pub use dequant::dequantize;
pub use dtype::DType;
pub use metadata::{Metadata, Value};

use std::{collections::HashMap, fs, ops::Range, path::Path, sync::Arc};

use memmap2::{Advice, Mmap, MmapMut};
use reader::{HeapBudget, quoted};

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
    map: Arc<Mmap>,
}

impl Tensor {
    /// A tensor that is in no file, for tests and tools. `dims` innermost first; `bytes` its blocks.
    ///
    /// # Errors
    /// When `bytes` is not as long as `dims` and `dtype` make it, or memory is short.
    pub fn from_bytes(name: &str, dims: &[usize], dtype: DType, bytes: &[u8]) -> Result<Self, GgufError> {
        let fail = |what: String| GgufError(format!("tensor {}: {what}", quoted(name)));
        let cols = dims.first().copied().unwrap_or(0);
        let rows = dims.iter().skip(1).try_fold(1usize, |product, &dim| product.checked_mul(dim));
        let len = rows.and_then(|rows| rows.checked_mul(dtype.row_bytes(cols)));
        if cols == 0 || cols % dtype.block_len() != 0 || len != Some(bytes.len()) {
            return Err(fail(format!("{} bytes do not make {dims:?} of {}", bytes.len(), dtype.name())));
        }
        let map = MmapMut::map_anon(bytes.len()).and_then(|mut map| {
            map.copy_from_slice(bytes);
            map.make_read_only()
        });
        let map = map.map_err(|e| fail(format!("no memory for {} bytes: {e}", bytes.len())))?;
        let info =
            TensorInfo { name: name.to_owned(), dims: dims.to_vec(), dtype, file: 0, range: 0..bytes.len() };
        Ok(Self { info, map: Arc::new(map) })
    }
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
    by_name: HashMap<String, usize>,
    maps: Vec<Arc<Mmap>>,
}

impl Gguf {
    /// Maps the file (and its siblings, when it is the first of `name-00001-of-0000N.gguf`) and checks
    /// every count, offset, type and string in its header against it.
    ///
    /// # Errors
    /// One line with the path: not a regular file, empty, not GGUF, cut short, or what is wrong where.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let mut budget = HeapBudget::new();
        let (map, header) = open_part(path, 0, &mut budget)?;
        let mut model = Self {
            metadata: header.metadata,
            tensors: header.tensors,
            by_name: HashMap::new(),
            maps: vec![map],
        };
        let at = |e: String| in_file(path, &e);
        match split::part(&model.metadata).map_err(at)? {
            None => {}
            Some(part) if part.index > 0 => return Err(at(split::not_the_first(path, part))),
            Some(part) => {
                for (index, sibling) in
                    split::siblings(path, part.count).map_err(at)?.iter().enumerate().skip(1)
                {
                    model.add_part(sibling, split::Part { index, ..part }, &mut budget)?;
                }
                model.check_total().map_err(at)?;
            }
        }
        model.index().map_err(at)?;
        Ok(model)
    }

    fn add_part(
        &mut self,
        path: &Path,
        expected: split::Part,
        budget: &mut HeapBudget,
    ) -> Result<(), GgufError> {
        let (map, header) = open_part(path, expected.index, budget)?;
        let at = |e: String| in_file(path, &e);
        if split::part(&header.metadata).map_err(at)? != Some(expected) {
            let split::Part { index, count } = expected;
            return Err(at(format!("its split.* keys do not make it part {} of {count}", index + 1)));
        }
        self.maps.push(map);
        self.tensors.extend(header.tensors);
        Ok(())
    }

    fn check_total(&self) -> Result<(), String> {
        match split::tensor_count(&self.metadata)? {
            Some(n) if n != self.tensors.len() as u64 => Err(format!(
                "metadata key \"split.tensors.count\" is {n}, the parts hold {} tensors",
                self.tensors.len()
            )),
            _ => Ok(()),
        }
    }

    fn index(&mut self) -> Result<(), String> {
        for (i, tensor) in self.tensors.iter().enumerate() {
            if self.by_name.insert(tensor.name.clone(), i).is_some() {
                return Err(format!("tensor {} appears in two parts", quoted(&tensor.name)));
            }
        }
        Ok(())
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
        let info = self.tensors[*self.by_name.get(name)?].clone();
        let map = Arc::clone(&self.maps[info.file]);
        Some(Tensor { info, map })
    }

    /// Starts reading all files ahead. For those who will read every weight; a header alone needs none of it.
    pub fn prefetch(&self) {
        for map in &self.maps {
            // A hint: without it pages come one fault at a time, so a refusal costs only speed.
            let _ = map.advise(Advice::WillNeed);
        }
    }
}

fn in_file(path: &Path, what: &str) -> GgufError {
    GgufError(format!("{}: {what}", path.display()))
}

/// Maps one file and parses its header.
fn open_part(
    path: &Path,
    index: usize,
    budget: &mut HeapBudget,
) -> Result<(Arc<Mmap>, parse::Header), GgufError> {
    let map = map_file(path).map_err(|e| in_file(path, &e))?;
    let header = parse::header(&map, index, budget).map_err(|e| in_file(path, &e))?;
    Ok((Arc::new(map), header))
}

fn map_file(path: &Path) -> Result<Mmap, String> {
    // Asked before opening: opening a pipe would wait for its other end.
    let kind = fs::metadata(path).map_err(|e| format!("cannot be opened: {e}"))?;
    if kind.is_dir() {
        return Err("a directory, not a GGUF file".to_owned());
    }
    if !kind.is_file() {
        return Err("not a regular file".to_owned());
    }
    let file = fs::File::open(path).map_err(|e| format!("cannot be opened: {e}"))?;
    if file.metadata().map_err(|e| format!("cannot be read: {e}"))?.len() == 0 {
        return Err("the file is empty".to_owned());
    }
    // SAFETY: the mapping is read-only and private to this process's view, but it is not a snapshot: if
    // someone writes to the file meanwhile, its bytes change under us, and if someone truncates it, a
    // read past the new end raises SIGBUS. Nothing in user space can prevent that short of copying the
    // model; every runtime that maps weights accepts it, and documentation tells operators to replace a
    // model by renaming a new file over it. Header values are copied out while they are parsed, so a
    // later change can alter weights (numbers, any bit pattern is valid), never a checked offset.
    unsafe { Mmap::map(&file) }.map_err(|e| format!("cannot be mapped: {e}"))
}
