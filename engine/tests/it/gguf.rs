//! Reading GGUF files: right ones, wrong ones, split ones; expanding every block type.

use std::{fs, path::Path};

use m40llm_engine::gguf::{DType, Gguf, Metadata, Tensor, Value, dequantize};
use proptest::prelude::*;
use serde::Deserialize;

use crate::support::{
    Rng, alloc,
    malformed::{incomplete, malformed, valid, write_into},
    tiny::{self, Family, Spec, Vocabulary},
    writer::Writer,
};

/// The most heap that reading a wrong file of a few kilobytes may take.
const PEAK_BYTES: usize = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn open_bytes(bytes: &[u8]) -> Result<Gguf, String> {
    let folder = folder();
    let path = folder.path().join("m.gguf");
    fs::write(&path, bytes).expect("written");
    Gguf::open(&path).map_err(|e| e.to_string())
}

fn error_of(path: &Path) -> String {
    Gguf::open(path).expect_err(&format!("{} must be refused", path.display())).to_string()
}

#[test]
fn reads_what_was_written() {
    for version in [2, 3] {
        let gguf = open_bytes(&Writer { version, ..valid() }.bytes()).expect("a right file");
        let metadata = gguf.metadata();
        assert_eq!(metadata.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(metadata.u64("llama.block_count").unwrap(), Some(1));
        assert_eq!(metadata.f64s("numbers").unwrap(), Some(vec![1.0, 2.0]));
        assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap(), ["a", "b"]);
        assert_eq!(metadata.u64("absent").unwrap(), None);
        let names: Vec<&str> = gguf.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["a.weight", "b.weight"]);
        let b = gguf.tensor("b.weight").expect("it is there");
        assert_eq!((b.cols(), b.rows(), b.dtype(), b.bytes().len()), (32, 2, DType::Q8_0, 68));
        let a = gguf.tensor("a.weight").expect("it is there");
        drop(gguf);
        assert_eq!(
            a.bytes(),
            [1.0f32; 8].map(f32::to_le_bytes).concat(),
            "mapped for as long as the tensor lives"
        );
    }
}

#[test]
fn a_file_without_tensors_is_right() {
    let gguf =
        open_bytes(&Writer::default().string("general.architecture", "llama").bytes()).expect("a right file");
    assert!(gguf.tensors().is_empty());
}

#[test]
fn alignment_is_the_files_own() {
    let writer = Writer { alignment: 128, ..valid() }.u32("general.alignment", 128);
    let gguf = open_bytes(&writer.bytes()).expect("a right file");
    assert_eq!(gguf.tensor("a.weight").unwrap().bytes(), [1.0f32; 8].map(f32::to_le_bytes).concat());
}

#[test]
fn metadata_errors_name_the_key() {
    let metadata = Metadata::from_pairs([
        ("text".to_owned(), Value::String("s".to_owned())),
        ("negative".to_owned(), Value::I64(-1)),
        ("signed".to_owned(), Value::I64(7)),
        ("list".to_owned(), Value::I64s(vec![1, -2])),
    ]);
    assert_eq!(metadata.u64("signed").unwrap(), Some(7));
    assert_eq!(metadata.u64s("signed").unwrap(), Some(vec![7]));
    assert_eq!(metadata.f64("negative").unwrap(), Some(-1.0));
    assert_eq!(metadata.f64s("list").unwrap(), Some(vec![1.0, -2.0]));
    let errors = [
        metadata.u64("text").unwrap_err(),
        metadata.u64("negative").unwrap_err(),
        metadata.u64s("list").unwrap_err(),
        metadata.bool("signed").unwrap_err(),
        metadata.str("signed").unwrap_err(),
        metadata.strings("text").unwrap_err(),
        metadata.f64("text").unwrap_err(),
        metadata.f64s("text").unwrap_err(),
    ];
    let keys = ["text", "negative", "list", "signed", "signed", "text", "text", "text"];
    for (error, key) in errors.iter().zip(keys) {
        assert!(error.0.contains(&format!("\"{key}\" must be ")), "{error}");
    }
}

#[test]
fn malformed_files_end_in_one_line() {
    let folder = folder();
    let files = malformed();
    assert!(files.len() >= 40, "{} files", files.len());
    for path in write_into(folder.path(), &files) {
        let name = path.display();
        let (result, peak) = alloc::peak(|| Gguf::open(&path));
        let Err(error) = result else { panic!("{name} was taken") };
        let text = error.to_string();
        println!("{text}");
        assert!(text.starts_with(&folder.path().display().to_string()), "{text}");
        assert!(!text.contains('\n') && text.len() < 600, "{name}: {text}");
        assert!(peak < PEAK_BYTES, "{name} took {peak} bytes");
    }
}

#[test]
fn messages_say_what_is_wrong() {
    let folder = folder();
    write_into(folder.path(), &malformed());
    for (name, parts) in [
        ("empty", &["empty"][..]),
        ("magic-of-zip", &["not a GGUF file", "PK"]),
        ("version-1", &["version 1", "2 and 3"]),
        ("big-endian", &["big-endian"]),
        ("string-not-utf8", &["\"k\"", "UTF-8"]),
        ("key-twice", &["\"numbers\"", "twice"]),
        ("type-unsupported", &["\"x\"", "IQ2_XXS", "Q4_K", "IQ4_XS"]),
        ("tensor-twice", &["\"a.weight\"", "twice"]),
        ("offsets-overlap", &["\"b.weight\"", "overlap"]),
        ("alignment-24", &["general.alignment", "24"]),
        ("same-part-00001-of-00002", &["00002-of-00002", "split"]),
        ("sibling-missing-00001-of-00002", &["sibling-missing-00002-of-00002.gguf", "cannot be opened"]),
        ("tensor-lost-00001-of-00002", &["split.tensors.count", "2", "1"]),
        ("tensor-lost-00002-of-00002", &["part 2 of 2", "tensor-lost-00001-of-00002.gguf"]),
    ] {
        let error = error_of(&folder.path().join(format!("{name}.gguf")));
        for part in parts {
            assert!(error.contains(part), "{error} should hold {part}");
        }
    }
    assert!(error_of(folder.path()).contains("a directory"));
    assert!(error_of(&folder.path().join("absent.gguf")).contains("absent.gguf: cannot be opened"));
    assert!(error_of(Path::new("/dev/zero")).contains("not a regular file"));
}

/// A sparse file of 4 GiB whose one string is nearly all of it: refused before it is copied.
#[test]
fn metadata_has_a_heap_limit() {
    let folder = folder();
    let path = folder.path().join("sparse.gguf");
    let value = (4u64 << 30).to_le_bytes();
    fs::write(&path, Writer::default().raw(b"k", 8, &value).bytes()).expect("written");
    fs::OpenOptions::new().write(true).open(&path).expect("opened").set_len(5 << 30).expect("sparse");
    let (error, peak) = alloc::peak(|| error_of(&path));
    assert!(error.contains("256 MiB"), "{error}");
    assert!(peak < PEAK_BYTES, "{peak} bytes");
}

#[test]
fn incomplete_models_are_right_files() {
    for (name, bytes) in incomplete() {
        if let Err(error) = open_bytes(&bytes) {
            panic!("{name}: {error}");
        }
    }
}

#[test]
fn split_files_are_one_model() {
    let folder = folder();
    for no in 0..3u16 {
        let name = format!("model-{:05}-of-00003.gguf", no + 1);
        let part = Writer::default().u16("split.no", no).u16("split.count", 3).i32("split.tensors.count", 3);
        let part = if no == 0 { part.string("general.name", "whole") } else { part };
        let part = part.vector(&format!("t{no}"), &[f32::from(no); 8]);
        fs::write(folder.path().join(name), part.bytes()).expect("written");
    }
    let gguf = Gguf::open(&folder.path().join("model-00001-of-00003.gguf")).expect("a right model");
    assert_eq!(gguf.metadata().str("general.name").unwrap(), Some("whole"));
    for no in 0..3u8 {
        let tensor = gguf.tensor(&format!("t{no}")).expect("it is there");
        assert_eq!(tensor.bytes(), [f32::from(no); 8].map(f32::to_le_bytes).concat());
    }
}

#[derive(Deserialize)]
struct QuantGolden {
    types: Vec<TypeGolden>,
}

#[derive(Deserialize)]
struct TypeGolden {
    #[serde(rename = "type")]
    name: String,
    blocks: String,
    values: String,
}

/// Standard base64, for the golden files.
fn base64(text: &str) -> Vec<u8> {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.bytes().filter(|c| *c != b'=').map(digit).collect();
    let bytes = digits.chunks(4).flat_map(|four| {
        let word = four.iter().enumerate().fold(0u32, |word, (i, d)| word | u32::from(*d) << (26 - 6 * i));
        word.to_be_bytes().into_iter().take(four.len() * 6 / 8).collect::<Vec<u8>>()
    });
    bytes.collect()
}

#[test]
fn dequantize_equals_gguf_py_bit_for_bit() {
    let golden: QuantGolden =
        serde_json::from_str(include_str!("../goldens/quants.json")).expect("the golden parses");
    assert_eq!(golden.types.len(), DType::ALL.len());
    for dtype in DType::ALL {
        let case = golden.types.iter().find(|case| case.name == dtype.name()).expect("every type is there");
        let (blocks, values) = (base64(&case.blocks), base64(&case.values));
        let expected: Vec<u32> =
            values.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        let mut out = vec![0.0; expected.len()];
        dequantize(dtype, &blocks, &mut out);
        for (i, (got, want)) in out.iter().zip(&expected).enumerate() {
            let wanted = f32::from_bits(*want);
            assert!(got.to_bits() == *want, "{} weight {i}: {got} is not {wanted}", dtype.name());
        }
    }
}

#[test]
fn tiny_models_have_sane_weights() {
    for (family, vocabulary) in
        [(Family::Llama, Vocabulary::Spm), (Family::Qwen2, Vocabulary::Bpe), (Family::Qwen3, Vocabulary::Bpe)]
    {
        let gguf = open_bytes(&tiny::model(&Spec {
            family,
            vocabulary,
            tied: false,
            rope_freqs: true,
            ..Spec::default()
        }));
        assert!(gguf.expect("a right file").tensor("output.weight").is_some());
    }
    for dtype in DType::ALL {
        let n = 256 * 64;
        let bytes = tiny::random_blocks(dtype, n, 0.05, &mut Rng(3));
        let tensor = Tensor::from_bytes("t", &[256, 64], dtype, &bytes).expect("whole blocks");
        let mut out = vec![0.0; n];
        dequantize(dtype, tensor.bytes(), &mut out);
        let mean = out.iter().sum::<f32>() / n as f32;
        let rms = (out.iter().map(|x| x * x).sum::<f32>() / n as f32).sqrt();
        assert!(mean.abs() < 0.01 && (0.025..0.1).contains(&rms), "{}: mean {mean}, rms {rms}", dtype.name());
    }
}

#[test]
fn tensors_from_bytes_are_checked() {
    assert!(Tensor::from_bytes("t", &[32, 2], DType::Q8_0, &[0; 68]).is_ok());
    for (dims, len) in
        [(&[32, 2][..], 67), (&[33][..], 34), (&[][..], 0), (&[0, 1][..], 0), (&[32, usize::MAX][..], 34)]
    {
        let error = Tensor::from_bytes("t", dims, DType::Q8_0, &vec![0; len]).expect_err("refused");
        assert!(error.0.contains("\"t\""), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever bytes change, reading ends in a model or one line, and the weights of a model can be read.
    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in prop::option::of(any::<prop::sample::Index>())) {
        let mut bytes = valid().bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let (result, peak) = alloc::peak(|| open_bytes(&bytes));
        prop_assert!(peak < PEAK_BYTES, "{peak} bytes");
        match result {
            Err(error) => prop_assert!(!error.contains('\n'), "{error}"),
            Ok(gguf) => for info in gguf.tensors() {
                let tensor = gguf.tensor(&info.name).expect("listed");
                let mut out = vec![0.0; tensor.rows() * tensor.cols()];
                dequantize(tensor.dtype(), tensor.bytes(), &mut out);
            },
        }
    }
}
