//! Writes GGUF files: right ones, and wrong ones where a test asks for it.

use m40llm_engine::gguf::DType;

/// A GGUF file to be. What the counts and offsets should be is worked out unless they are set.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// Where tensor data is aligned to; not written as a key.
    pub(crate) alignment: usize,
    pub(crate) pair_count: Option<u64>,
    pub(crate) tensor_count: Option<u64>,
    /// Key, value type, value.
    pub(crate) pairs: Vec<(Vec<u8>, u32, Vec<u8>)>,
    pub(crate) tensors: Vec<RawTensor>,
}

/// A tensor to be.
#[derive(Debug, Clone)]
pub(crate) struct RawTensor {
    pub(crate) name: Vec<u8>,
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: Option<u64>,
    pub(crate) data: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            alignment: 32,
            pair_count: None,
            tensor_count: None,
            pairs: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

/// A string as the format has it: length, bytes.
pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// An array's value: element type, count, elements.
pub(crate) fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &count.to_le_bytes(), elements].concat()
}

impl Writer {
    pub(crate) fn raw(mut self, key: &[u8], kind: u32, value: &[u8]) -> Self {
        self.pairs.push((key.to_vec(), kind, value.to_vec()));
        self
    }
    pub(crate) fn u16(self, key: &str, value: u16) -> Self {
        self.raw(key.as_bytes(), 2, &value.to_le_bytes())
    }
    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key.as_bytes(), 4, &value.to_le_bytes())
    }
    pub(crate) fn i32(self, key: &str, value: i32) -> Self {
        self.raw(key.as_bytes(), 5, &value.to_le_bytes())
    }
    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key.as_bytes(), 6, &value.to_le_bytes())
    }
    pub(crate) fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key.as_bytes(), 7, &[u8::from(value)])
    }
    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.raw(key.as_bytes(), 8, &string(value.as_bytes()))
    }
    pub(crate) fn strings<S: AsRef<str>>(self, key: &str, values: &[S]) -> Self {
        let all: Vec<u8> = values.iter().flat_map(|s| string(s.as_ref().as_bytes())).collect();
        self.raw(key.as_bytes(), 9, &array(8, values.len() as u64, &all))
    }
    pub(crate) fn f32s(self, key: &str, values: &[f32]) -> Self {
        let all: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.raw(key.as_bytes(), 9, &array(6, values.len() as u64, &all))
    }
    pub(crate) fn i32s(self, key: &str, values: &[i32]) -> Self {
        let all: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.raw(key.as_bytes(), 9, &array(5, values.len() as u64, &all))
    }
    /// Replaces a key's value or, with `None`, takes the key out.
    pub(crate) fn replace(mut self, key: &str, value: Option<(u32, Vec<u8>)>) -> Self {
        let at = self.pairs.iter().position(|(k, ..)| k == key.as_bytes()).expect("the key is there");
        match value {
            Some((kind, value)) => self.pairs[at] = (key.into(), kind, value),
            None => drop(self.pairs.remove(at)),
        }
        self
    }

    /// `dims` innermost first, `data` whole blocks.
    pub(crate) fn tensor(mut self, name: &str, dims: &[usize], dtype: DType, data: Vec<u8>) -> Self {
        let dims = dims.iter().map(|&d| d as u64).collect();
        self.tensors.push(RawTensor { name: name.into(), dims, kind: dtype.ggml_id(), offset: None, data });
        self
    }
    /// A vector in F32.
    pub(crate) fn vector(self, name: &str, values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, &[values.len()], DType::F32, data)
    }
    /// Changes the last tensor.
    pub(crate) fn last(mut self, change: impl FnOnce(&mut RawTensor)) -> Self {
        change(self.tensors.last_mut().expect("a tensor"));
        self
    }

    /// The header: everything before the padding that ends at the tensor data.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.pairs {
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset = (offset + tensor.data.len() as u64).next_multiple_of(self.alignment as u64);
        }
        out
    }

    /// The whole file.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}
