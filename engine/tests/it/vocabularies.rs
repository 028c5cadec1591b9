//! The tokenizers that tests look at, each built once.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock},
};

use m40llm_engine::{
    gguf::{Gguf, Metadata},
    text::Tokenizer,
};

/// All names that [`tokenizer`] and [`metadata`] know.
pub(crate) const NAMES: [&str; 6] = ["smollm2", "qwen2.5-coder", "llama-bpe", "gpt-2", "llama-spm", "phi-3"];

/// A vocabulary's metadata; it and its tokenizer live for the whole run.
pub(crate) struct Vocabulary {
    pub(crate) metadata: Metadata,
    pub(crate) tokenizer: Tokenizer,
}

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A golden file, parsed.
pub(crate) fn golden(name: &str) -> serde_json::Value {
    let path = root().join("engine/tests/goldens").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn file(name: &str) -> (PathBuf, &'static str) {
    let models = root().join("models");
    match name {
        "smollm2" => (models.join("smollm2-135m-instruct-q4_1.gguf"), "scripts/fetch-model.sh smollm2"),
        "qwen2.5-coder" => (
            models.join("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
            "scripts/fetch-model.sh qwen2.5-coder-0.5b",
        ),
        _ => (models.join(format!("vocabs/ggml-vocab-{name}.gguf")), "scripts/fetch-vocabs.sh"),
    }
}

/// The vocabulary of that name; without its file the test fails and says how to get it.
pub(crate) fn vocabulary(name: &'static str) -> &'static Vocabulary {
    static BUILT: OnceLock<Mutex<HashMap<&'static str, &'static Vocabulary>>> = OnceLock::new();
    let mut built = BUILT.get_or_init(Mutex::default).lock().unwrap();
    built.entry(name).or_insert_with(|| {
        let (path, fetch) = file(name);
        assert!(path.exists(), "{} is missing; run {fetch}", path.display());
        let metadata = Gguf::open(&path).unwrap().metadata().clone();
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        Box::leak(Box::new(Vocabulary { metadata, tokenizer }))
    })
}
