//! Split models: `name-00001-of-0000N.gguf` and its siblings, as llama.cpp's `gguf-split` writes them.

use std::path::{Path, PathBuf};

use super::{
    Metadata,
    reader::{Checked, quoted},
};

/// Most parts of a model; the file name has five digits, the metadata 16 bits.
const MAX_PARTS: u64 = 65_535;

/// What a part says of itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Its number, from 0.
    pub(super) index: usize,
    /// Parts in all.
    pub(super) count: usize,
}

/// The `split.*` keys; `None` for a model in one file.
pub(super) fn part(metadata: &Metadata) -> Checked<Option<Part>> {
    let get = |key: &str| metadata.u64(key).map_err(|e| e.0);
    let count = get("split.count")?.unwrap_or(0);
    let index = get("split.no")?.unwrap_or(0);
    if count <= 1 && index == 0 {
        return Ok(None);
    }
    if count > MAX_PARTS || index >= count {
        return Err(format!(
            "metadata keys \"split.no\" = {index} and \"split.count\" = {count} do not fit together \
             (0 ≤ split.no < split.count ≤ {MAX_PARTS})"
        ));
    }
    Ok(Some(Part { index: index as usize, count: count as usize }))
}

/// Tensors over all parts, as each part states it; `None` where it does not.
pub(super) fn tensor_count(metadata: &Metadata) -> Checked<Option<u64>> {
    metadata.u64("split.tensors.count").map_err(|e| e.0)
}

/// The paths of all parts, `first` being the first one's.
pub(super) fn siblings(first: &Path, count: usize) -> Checked<Vec<PathBuf>> {
    let ending = |index: usize| format!("-{:05}-of-{count:05}.gguf", index + 1);
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&ending(0)) else {
        return Err(format!("the first of {count} parts, so its name must end in {}", quoted(&ending(0))));
    };
    Ok((0..count).map(|i| first.with_file_name(format!("{stem}{}", ending(i)))).collect())
}

/// The message for a part that is not the first.
pub(super) fn not_the_first(path: &Path, part: Part) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let own = format!("-{:05}-of-{:05}.gguf", part.index + 1, part.count);
    let first = format!("-00001-of-{:05}.gguf", part.count);
    let first = match name.strip_suffix(&own) {
        Some(stem) => format!("{stem}{first}"),
        None => format!("…{first}"),
    };
    format!("part {} of {} of a split model; open the first one, {first}", part.index + 1, part.count)
}
