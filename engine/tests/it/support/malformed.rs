//! GGUF files with something wrong, one thing each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use m40llm_engine::gguf::DType;

use super::{
    tiny,
    writer::{Writer, array, string},
};

/// A small right file that the wrong ones start from.
pub(crate) fn valid() -> Writer {
    Writer::default()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .f32s("numbers", &[1.0, 2.0])
        .strings("tokenizer.ggml.tokens", &["a", "b"])
        .vector("a.weight", &[1.0; 8])
        .tensor("b.weight", &[32, 2], DType::Q8_0, vec![0; 68])
}

/// Files that no reader may take. Names of split ones matter; each fails whichever part is opened.
pub(crate) fn malformed() -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    truncated(&mut files);
    headers(&mut files);
    values(&mut files);
    tensors(&mut files);
    splits(&mut files);
    files.into_iter().map(|(name, bytes)| (format!("{name}.gguf"), bytes)).collect()
}

/// Writes `files` into `folder`; their paths.
pub(crate) fn write_into(folder: &Path, files: &[(String, Vec<u8>)]) -> Vec<PathBuf> {
    let write = |(name, bytes): &(String, Vec<u8>)| {
        let path = folder.join(name);
        fs::write(&path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    };
    files.iter().map(write).collect()
}

/// Files whose header is right and whose model is not: the loader must refuse them, not the reader.
pub(crate) fn incomplete() -> Vec<(String, Vec<u8>)> {
    let model = || tiny::writer(&tiny::Spec::default());
    let one = |n: u32| Some((4, n.to_le_bytes().to_vec()));
    let files = [
        ("no-architecture", model().replace("general.architecture", None)),
        ("unknown-architecture", model().replace("general.architecture", Some((8, string(b"none-such"))))),
        ("architecture-number", model().replace("general.architecture", one(7))),
        ("no-block-count", model().replace("llama.block_count", None)),
        ("block-count-string", model().replace("llama.block_count", Some((8, string(b"2"))))),
        ("block-count-huge", model().replace("llama.block_count", one(u32::MAX))),
        ("no-heads", model().replace("llama.attention.head_count", one(0))),
        ("kv-heads-do-not-divide", model().replace("llama.attention.head_count_kv", one(3))),
        ("embedding-huge", model().replace("llama.embedding_length", one(u32::MAX))),
        (
            "epsilon-nan",
            model().replace(
                "llama.attention.layer_norm_rms_epsilon",
                Some((6, f32::NAN.to_le_bytes().to_vec())),
            ),
        ),
        ("rope-odd", model().replace("llama.rope.dimension_count", one(63))),
        ("no-tokens", model().replace("tokenizer.ggml.tokens", None)),
        ("tensor-missing", {
            let mut w = model();
            w.tensors.retain(|t| t.name != b"blk.1.ffn_down.weight");
            w
        }),
        ("tensor-of-wrong-shape", {
            let mut w = model();
            let t =
                w.tensors.iter_mut().find(|t| t.name == b"blk.0.attn_q.weight").expect("the tensor is there");
            t.dims.reverse();
            t.dims[1] /= 2;
            w
        }),
    ];
    files.into_iter().map(|(name, writer)| (format!("{name}.gguf"), writer.bytes())).collect()
}

type Files = Vec<(String, Vec<u8>)>;

fn add(files: &mut Files, name: &str, writer: &Writer) {
    files.push((name.to_owned(), writer.bytes()));
}

fn truncated(files: &mut Files) {
    let (whole, header) = (valid().bytes(), valid().header().len());
    files.push(("empty".into(), Vec::new()));
    for (name, len) in [
        ("cut-in-magic", 3),
        ("cut-in-version", 6),
        ("cut-in-counts", 20),
        ("cut-in-key", 30),
        ("cut-in-value", 60),
        ("cut-in-tensor-table", header - 10),
        ("cut-before-data", header),
        ("cut-in-data", whole.len() - 1),
    ] {
        files.push((name.into(), whole[..len].to_vec()));
    }
}

fn headers(files: &mut Files) {
    let swapped = |version: u32| Writer { version: version.swap_bytes(), ..valid() };
    add(files, "magic-of-zip", &Writer { magic: *b"PK\x03\x04", ..valid() });
    add(files, "version-0", &Writer { version: 0, ..valid() });
    add(files, "version-1", &Writer { version: 1, ..valid() });
    add(files, "version-4", &Writer { version: 4, ..valid() });
    add(files, "big-endian", &swapped(3));
    add(files, "huge-pair-count", &Writer { pair_count: Some(u64::MAX), ..valid() });
    add(files, "one-pair-too-many", &Writer { pair_count: Some(5), ..valid() });
    add(files, "huge-tensor-count", &Writer { tensor_count: Some(1 << 60), ..valid() });
    add(files, "one-tensor-too-many", &Writer { tensor_count: Some(3), ..valid() });
}

fn values(files: &mut Files) {
    let huge_string = [u64::MAX.to_le_bytes().as_slice(), b"x"].concat();
    let nested = array(9, 1, &array(4, 1, &[0; 4]));
    add(files, "key-empty", &valid().raw(b"", 4, &[0; 4]));
    add(files, "key-too-long", &valid().raw(&vec![b'k'; 70_000], 4, &[0; 4]));
    add(files, "key-not-utf8", &valid().raw(b"k\xff\xfe", 4, &[0; 4]));
    add(files, "key-twice", &valid().u32("numbers", 1));
    add(files, "value-type-unknown", &valid().raw(b"k", 13, &[0; 4]));
    add(files, "bool-of-2", &valid().raw(b"k", 7, &[2]));
    add(files, "string-not-utf8", &valid().raw(b"k", 8, &string(b"caf\xe9")));
    add(files, "string-length-huge", &valid().raw(b"k", 8, &huge_string));
    add(files, "string-past-end", &valid().raw(b"k", 8, &[&1_000_000u64.to_le_bytes()[..], b"x"].concat()));
    add(files, "array-count-huge", &valid().raw(b"k", 9, &array(10, u64::MAX, &[0; 8])));
    add(files, "array-count-overflows", &valid().raw(b"k", 9, &array(10, 1 << 61, &[0; 8])));
    add(files, "array-of-strings-huge", &valid().raw(b"k", 9, &array(8, 1 << 40, &[0; 8])));
    add(files, "array-of-arrays", &valid().raw(b"k", 9, &nested));
    add(files, "array-type-unknown", &valid().raw(b"k", 9, &array(99, 1, &[0; 8])));
    add(files, "array-with-bad-string", &valid().raw(b"k", 9, &array(8, 1, &string(b"\xc3"))));
    add(files, "array-with-bad-bool", &valid().raw(b"k", 9, &array(7, 2, &[1, 3])));
    add(files, "alignment-0", &valid().u32("general.alignment", 0));
    add(files, "alignment-24", &valid().u32("general.alignment", 24));
    add(files, "alignment-huge", &valid().raw(b"general.alignment", 10, &(1u64 << 63).to_le_bytes()));
    add(files, "alignment-string", &valid().string("general.alignment", "32"));
}

fn tensors(files: &mut Files) {
    let f32s = |n: usize| vec![0; 4 * n];
    let extra = |dims: &[u64]| valid().vector("x", &[0.0; 8]).last(|t| t.dims = dims.to_vec());
    add(files, "tensor-name-empty", &valid().vector("", &[0.0; 8]));
    add(files, "tensor-name-not-utf8", &valid().vector("x", &[0.0; 8]).last(|t| t.name = vec![0xff]));
    add(files, "tensor-twice", &valid().vector("a.weight", &[0.0; 8]));
    add(files, "no-dims", &extra(&[]));
    add(files, "five-dims", &extra(&[8, 1, 1, 1, 1]));
    add(files, "dim-count-huge", &{
        let mut w = extra(&[]);
        w.tensors.pop();
        w.tensor_count = Some(3);
        w.tensors.push(super::writer::RawTensor {
            name: b"x".to_vec(),
            dims: vec![1; 64],
            kind: 0,
            offset: None,
            data: f32s(1),
        });
        w
    });
    add(files, "dim-zero", &extra(&[8, 0]));
    add(files, "dims-overflow", &extra(&[1 << 32, 1 << 32, 1 << 32]));
    add(files, "bytes-overflow", &extra(&[1 << 62]));
    add(files, "rows-of-part-blocks", &valid().tensor("x", &[33], DType::Q8_0, vec![0; 68]));
    add(files, "type-unknown", &extra(&[8]).last(|t| t.kind = 1000));
    add(files, "type-unsupported", &extra(&[8]).last(|t| t.kind = 16));
    add(files, "type-removed", &extra(&[8]).last(|t| t.kind = 4));
    add(files, "offset-outside", &extra(&[8]).last(|t| t.offset = Some(1 << 20)));
    add(files, "offset-overflows", &extra(&[8]).last(|t| t.offset = Some(u64::MAX - 31)));
    add(files, "offset-not-aligned", &extra(&[8]).last(|t| t.offset = Some(36)));
    add(files, "offsets-overlap", &extra(&[8]).last(|t| t.offset = Some(32)));
    add(files, "same-offset", &extra(&[8]).last(|t| t.offset = Some(0)));
}

fn splits(files: &mut Files) {
    let part = |no: u16, count: u16, tensor: &str| {
        Writer::default()
            .u16("split.no", no)
            .u16("split.count", count)
            .i32("split.tensors.count", 2)
            .vector(tensor, &[0.0; 8])
    };
    add(files, "sibling-missing-00001-of-00002", &part(0, 2, "a"));
    add(files, "name-of-no-part", &part(0, 2, "a"));
    add(files, "count-unlike-name-00001-of-00003", &part(0, 2, "a"));
    add(files, "number-beyond-count", &part(5, 2, "a"));
    add(files, "count-string", &Writer::default().string("split.count", "2").vector("a", &[0.0; 8]));
    add(files, "tensor-in-both-00001-of-00002", &part(0, 2, "a"));
    add(files, "tensor-in-both-00002-of-00002", &part(1, 2, "a"));
    add(files, "same-part-00001-of-00002", &part(0, 2, "a"));
    add(files, "same-part-00002-of-00002", &part(0, 2, "b"));
    add(files, "other-count-00001-of-00002", &part(0, 2, "a"));
    add(files, "other-count-00002-of-00002", &part(1, 3, "b"));
    add(files, "tensor-lost-00001-of-00002", &part(0, 2, "a"));
    add(files, "tensor-lost-00002-of-00002", &{
        let mut w = part(1, 2, "b");
        w.tensors.clear();
        w
    });
}
