//! One file's header: version, key-value section, tensor table, each number checked before it is used.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
};

use super::{
    DType, Metadata, TensorInfo, Value,
    reader::{Checked, HeapBudget, Reader, quoted},
};

/// Where tensor data is aligned to when `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest alignment that makes sense: a huge page.
const MAX_ALIGNMENT: u64 = 2 << 20;
/// Most dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;
/// A key, a type and a value of one byte: the least a key-value pair takes.
const MIN_PAIR_BYTES: usize = 8 + 1 + 4 + 1;
/// A name of one byte, dimension count, one dimension, type, offset: the least a table entry takes.
const MIN_TENSOR_BYTES: usize = 8 + 1 + 4 + 8 + 4 + 8;
/// Rough heap of a map entry beside its key's text.
const MAP_ENTRY_BYTES: usize = 64;

/// What one file holds.
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Parses the header of `bytes`, the whole file; `file` is its number among the parts of a split model.
pub(super) fn header(bytes: &[u8], file: usize, budget: &mut HeapBudget) -> Checked<Header> {
    let mut reader = Reader::new(bytes);
    version(&mut reader, bytes)?;
    let tensor_count = reader.u64()?;
    let pair_count = reader.u64()?;
    let pair_count = reader.count(pair_count, MIN_PAIR_BYTES, "metadata keys")?;

    let mut pairs = BTreeMap::new();
    for _ in 0..pair_count {
        budget.take(1, MAP_ENTRY_BYTES)?;
        let key = reader.name(budget).map_err(|e| format!("metadata key {}: {e}", pairs.len() + 1))?;
        let value = value(&mut reader, budget).map_err(|e| format!("metadata key {}: {e}", quoted(&key)))?;
        if pairs.contains_key(&key) {
            return Err(format!("metadata key {} appears twice", quoted(&key)));
        }
        pairs.insert(key, value);
    }
    let metadata = Metadata(pairs);

    let tensor_count = reader.count(tensor_count, MIN_TENSOR_BYTES, "tensors")?;
    let mut entries = Vec::new();
    for i in 0..tensor_count {
        budget.take(1, size_of::<Entry>() + size_of::<TensorInfo>() + MAP_ENTRY_BYTES)?;
        entries.push(entry(&mut reader, i, budget)?);
    }
    let tensors = place(entries, file, reader.position(), alignment(&metadata)?, bytes.len())?;
    Ok(Header { metadata, tensors })
}

fn version(reader: &mut Reader<'_>, bytes: &[u8]) -> Checked<()> {
    if !bytes.starts_with(b"GGUF") {
        let start = &bytes[..bytes.len().min(4)];
        return Err(format!("not a GGUF file (it starts with \"{}\")", start.escape_ascii()));
    }
    let _magic: [u8; 4] = reader.array()?;
    match reader.u32()? {
        2 | 3 => Ok(()),
        v if (1..=3).contains(&v.swap_bytes()) => {
            Err("a big-endian GGUF file; only little-endian ones are supported".to_owned())
        }
        v => Err(format!("GGUF version {v} is not supported (2 and 3 are)")),
    }
}

fn value(reader: &mut Reader<'_>, budget: &mut HeapBudget) -> Checked<Value> {
    Ok(match reader.u32()? {
        0 => Value::U64(u64::from(u8::from_le_bytes(reader.array()?))),
        1 => Value::I64(i64::from(i8::from_le_bytes(reader.array()?))),
        2 => Value::U64(u64::from(u16::from_le_bytes(reader.array()?))),
        3 => Value::I64(i64::from(i16::from_le_bytes(reader.array()?))),
        4 => Value::U64(u64::from(reader.u32()?)),
        5 => Value::I64(i64::from(i32::from_le_bytes(reader.array()?))),
        6 => Value::F64(f64::from(f32::from_le_bytes(reader.array()?))),
        7 => Value::Bool(boolean(reader.array()?)?),
        8 => Value::String(reader.string(budget)?),
        9 => array(reader, budget)?,
        10 => Value::U64(reader.u64()?),
        11 => Value::I64(i64::from_le_bytes(reader.array()?)),
        12 => Value::F64(f64::from_le_bytes(reader.array()?)),
        other => return Err(format!("unknown value type {other} (0 to 12 are known)")),
    })
}

fn boolean([byte]: [u8; 1]) -> Checked<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(format!("a bool of value {other} (0 or 1 are allowed)")),
    }
}

fn array(reader: &mut Reader<'_>, budget: &mut HeapBudget) -> Checked<Value> {
    let kind = reader.u32()?;
    let count = reader.u64()?;
    Ok(match kind {
        0 => Value::U64s(items(reader, budget, count, |b| u64::from(u8::from_le_bytes(b)))?),
        1 => Value::I64s(items(reader, budget, count, |b| i64::from(i8::from_le_bytes(b)))?),
        2 => Value::U64s(items(reader, budget, count, |b| u64::from(u16::from_le_bytes(b)))?),
        3 => Value::I64s(items(reader, budget, count, |b| i64::from(i16::from_le_bytes(b)))?),
        4 => Value::U64s(items(reader, budget, count, |b| u64::from(u32::from_le_bytes(b)))?),
        5 => Value::I64s(items(reader, budget, count, |b| i64::from(i32::from_le_bytes(b)))?),
        6 => Value::F64s(items(reader, budget, count, |b| f64::from(f32::from_le_bytes(b)))?),
        7 => {
            let bools: Vec<Checked<bool>> = items(reader, budget, count, boolean)?;
            Value::Bools(bools.into_iter().collect::<Checked<_>>()?)
        }
        8 => {
            let count = reader.count(count, 8, "strings")?;
            // Each string pays for itself, its place in the list included; growing by doubling keeps a
            // wrong count from allocating before the first bad string is met.
            let mut strings = Vec::new();
            for _ in 0..count {
                strings.push(reader.string(budget)?);
            }
            Value::Strings(strings)
        }
        9 => return Err("an array of arrays is not supported".to_owned()),
        10 => Value::U64s(items(reader, budget, count, u64::from_le_bytes)?),
        11 => Value::I64s(items(reader, budget, count, i64::from_le_bytes)?),
        12 => Value::F64s(items(reader, budget, count, f64::from_le_bytes)?),
        other => return Err(format!("unknown array element type {other} (0 to 12 are known)")),
    })
}

/// `count` items of `N` bytes each, widened.
fn items<T, const N: usize>(
    reader: &mut Reader<'_>,
    budget: &mut HeapBudget,
    count: u64,
    widen: impl Fn([u8; N]) -> T,
) -> Checked<Vec<T>> {
    let count = reader.count(count, N, "array elements")?;
    budget.take(count, size_of::<T>())?;
    (0..count).map(|_| reader.array().map(&widen)).collect()
}

fn alignment(metadata: &Metadata) -> Checked<u64> {
    let alignment = metadata.u64("general.alignment").map_err(|e| e.0)?.unwrap_or(DEFAULT_ALIGNMENT);
    if !(8..=MAX_ALIGNMENT).contains(&alignment) || !alignment.is_power_of_two() {
        return Err(format!(
            "metadata key \"general.alignment\" is {alignment} (powers of two from 8 to {MAX_ALIGNMENT} are allowed)"
        ));
    }
    Ok(alignment)
}

/// A tensor as the table has it, its place not yet checked.
struct Entry {
    name: String,
    dims: Vec<usize>,
    dtype: DType,
    bytes: u64,
    offset: u64,
}

fn entry(reader: &mut Reader<'_>, index: usize, budget: &mut HeapBudget) -> Checked<Entry> {
    let name = reader.name(budget).map_err(|e| format!("tensor {}: {e}", index + 1))?;
    match geometry(reader) {
        Ok((dims, dtype, bytes, offset)) => Ok(Entry { name, dims, dtype, bytes, offset }),
        Err(e) => Err(format!("tensor {}: {e}", quoted(&name))),
    }
}

/// Dimensions, type, size in bytes and offset.
fn geometry(reader: &mut Reader<'_>) -> Checked<(Vec<usize>, DType, u64, u64)> {
    let n = reader.u32()?;
    if n == 0 || n > MAX_DIMS {
        return Err(format!("{n} dimensions (1 to {MAX_DIMS} are allowed)"));
    }
    let dims: Vec<u64> = (0..n).map(|_| reader.u64()).collect::<Checked<_>>()?;
    let dtype = DType::from_ggml_id(reader.u32()?)?;
    let offset = reader.u64()?;
    if dims.contains(&0) {
        return Err(format!("a dimension of {dims:?} is zero"));
    }
    if !dims[0].is_multiple_of(dtype.block_len() as u64) {
        return Err(format!(
            "rows of {} weights are no multiple of {}'s blocks of {}",
            dims[0],
            dtype.name(),
            dtype.block_len()
        ));
    }
    let bytes = dims.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let bytes = bytes.and_then(|n| (n / dtype.block_len() as u64).checked_mul(dtype.block_bytes() as u64));
    let bytes = bytes.ok_or_else(|| format!("dimensions {dims:?} are too large"))?;
    let dims = dims.into_iter().map(usize::try_from).collect::<Result<_, _>>();
    Ok((dims.map_err(|_| "a dimension is too large".to_owned())?, dtype, bytes, offset))
}

/// Checks every tensor's place: aligned, inside the file, apart from the others, its name its own.
fn place(
    entries: Vec<Entry>,
    file: usize,
    table_end: usize,
    alignment: u64,
    file_len: usize,
) -> Checked<Vec<TensorInfo>> {
    let data = (table_end as u64).checked_next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(entries.len());
    for Entry { name, dims, dtype, bytes, offset } in entries {
        let fail = |what: String| Err(format!("tensor {}: {what}", quoted(&name)));
        if !offset.is_multiple_of(alignment) {
            return fail(format!("offset {offset} is no multiple of the alignment, {alignment}"));
        }
        let start = data.and_then(|data| data.checked_add(offset));
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len as u64 => {
                let range = start as usize..end as usize;
                tensors.push(TensorInfo { name, dims, dtype, file, range });
            }
            _ => {
                return fail(format!(
                    "its {bytes} bytes at offset {offset} end outside the file of {file_len} bytes"
                ));
            }
        }
    }
    check_apart(&tensors)?;
    Ok(tensors)
}

fn check_apart(tensors: &[TensorInfo]) -> Checked<()> {
    let mut names = HashSet::with_capacity(tensors.len());
    for tensor in tensors {
        if !names.insert(tensor.name.as_str()) {
            return Err(format!("tensor {} appears twice", quoted(&tensor.name)));
        }
    }
    let mut places: Vec<(&Range<usize>, &str)> =
        tensors.iter().map(|t| (&t.range, t.name.as_str())).collect();
    places.sort_unstable_by_key(|(range, _)| range.start);
    for pair in places.windows(2) {
        let [(a, a_name), (b, b_name)] = [pair[0], pair[1]];
        if b.start < a.end {
            return Err(format!("tensors {} and {} overlap", quoted(a_name), quoted(b_name)));
        }
    }
    Ok(())
}
