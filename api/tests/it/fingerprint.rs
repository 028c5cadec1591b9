//! `system_fingerprint`: the same as long as a seed's text is, and another when anything changes that it depends on.

use std::{fs, path::Path};

use m40llm::{AppState, ServerConfig};
use m40llm_engine::{BackendChoice, Engine, EngineConfig, KvType, gguf::Gguf, text::PromptFormat};
use serde_json::json;

use crate::support::{MODEL, post};

async fn fingerprint(path: &Path, config: EngineConfig, prompt_format: PromptFormat) -> String {
    let config = EngineConfig { ctx_size: Some(64), threads: Some(1), ..config };
    let engine = Engine::load(path, &config, |_| {}).unwrap();
    let state = AppState::loading(ServerConfig { prompt_format, ..ServerConfig::new(MODEL, 1_700_000_000) });
    state.set_engine(engine);
    let answer = post(&m40llm::app(state), "/v1/completions", &json!({"prompt": "x", "max_tokens": 1})).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["system_fingerprint"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn fingerprints_change_with_what_answers_depend_on() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
    let cpu = || EngineConfig { backend: BackendChoice::Cpu, ..EngineConfig::default() };
    let of = |config| fingerprint(&tiny, config, PromptFormat::Raw);
    let plain = of(cpu()).await;
    assert!(plain.starts_with("fp_") && plain.len() == 13, "{plain}");

    // The same elsewhere, under another name and with more room.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("other-name.gguf");
    fs::copy(&tiny, &copy).unwrap();
    assert_eq!(fingerprint(&copy, cpu(), PromptFormat::Raw).await, plain);
    assert_eq!(of(EngineConfig { max_batch: 2, max_queue: 3, ..cpu() }).await, plain);

    // As much as a fine-tune changes, and less.
    let file = Gguf::open(&tiny).unwrap();
    let name = &file.tensors()[file.tensors().len() / 2].name;
    let tensor = file.tensor(name).unwrap();
    let bytes = tensor.bytes();
    let middle = &bytes[bytes.len() / 2..][..32];
    let mut changed = fs::read(&tiny).unwrap();
    let at = changed.windows(32).position(|window| window == middle).unwrap();
    changed[at] ^= 1;
    fs::write(&copy, changed).unwrap();

    let mut all = vec![
        plain,
        fingerprint(&copy, cpu(), PromptFormat::Raw).await,
        of(EngineConfig { backend: BackendChoice::Reference, ..EngineConfig::default() }).await,
        of(EngineConfig { kv_type: KvType::F32, ..cpu() }).await,
        fingerprint(&tiny, cpu(), PromptFormat::QwenChat).await,
    ];
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 5, "{all:?}");
}
