//! Tokenizers against llama.cpp and Hugging Face (goldens/tokens.json, made by scripts/goldens/tokens.py).

use std::time::{Duration, Instant};

use m40llm_engine::{
    gguf::{Metadata, Value},
    text::{FillInMiddle, Tokenizer},
};
use proptest::prelude::*;
use serde_json::Value as Json;

use super::vocabularies::{NAMES, golden, vocabulary};

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

/// Every string of the golden file in one vocabulary.
fn check_ids(name: &'static str) {
    let golden = golden("tokens.json");
    let strings: Vec<String> = serde_json::from_value(golden["strings"].clone()).unwrap();
    assert!(strings.len() >= 200);
    let expected = &golden["vocabularies"][name];
    let tokenizer = &vocabulary(name).tokenizer;
    let mut wrong = Vec::new();
    for (index, text) in strings.iter().enumerate() {
        let plain = ids(&expected["plain"][index]);
        let special = expected["special"].get(index.to_string()).map_or_else(|| plain.clone(), ids);
        for (parse_special, expected) in [(false, plain), (true, special)] {
            let got = tokenizer.encode(text, false, parse_special);
            if got != expected {
                wrong.push(format!("{text:?} (parse_special {parse_special}): {got:?}, not {expected:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {} strings:\n{}", wrong.len(), strings.len(), wrong.join("\n"));

    assert_eq!(tokenizer.encode(&strings[0], true, false), ids(&expected["added"]));
    let all = 0..tokenizer.vocab_size() as u32;
    let ends: Vec<u32> = all.clone().filter(|id| tokenizer.is_end_of_generation(*id)).collect();
    assert_eq!(ends, ids(&expected["eog"]));
    assert!(ends.iter().all(|id| tokenizer.is_control(*id)));
    assert_eq!(pieces_hash(tokenizer), expected["pieces"].as_str().unwrap());
}

/// FNV-1a (64 bits) over every token's bytes, each behind its length.
fn pieces_hash(tokenizer: &Tokenizer) -> String {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    for id in 0..tokenizer.vocab_size() as u32 {
        let bytes = tokenizer.token_bytes(id);
        for byte in (bytes.len() as u32).to_le_bytes().iter().chain(bytes) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
        }
    }
    format!("{hash:016x}")
}

#[test]
fn smollm2_ids_are_those_of_llama_cpp() {
    check_ids("smollm2");
}

#[test]
fn qwen2_ids_are_those_of_llama_cpp() {
    check_ids("qwen2.5-coder");
}

#[test]
fn llama_bpe_ids_are_those_of_llama_cpp() {
    check_ids("llama-bpe");
}

#[test]
fn gpt2_ids_are_those_of_llama_cpp() {
    check_ids("gpt-2");
}

#[test]
fn llama_spm_ids_are_those_of_llama_cpp() {
    check_ids("llama-spm");
}

#[test]
fn phi3_ids_are_those_of_llama_cpp() {
    check_ids("phi-3");
}

/// What a vocabulary cannot spell: SmolLM2 has no tokens for some bytes, and SentencePiece writes a
/// space as U+2581.
fn speakable(name: &str, text: &str) -> String {
    let rare = |c: char| match name {
        "smollm2" => {
            "\u{4}\u{6}\u{13}\u{14}\u{16}\u{1d}".contains(c) || ('\u{40000}'..'\u{c0000}').contains(&c)
        }
        "llama-spm" | "phi-3" => c == '▁',
        _ => false,
    };
    text.chars().filter(|c| !rare(*c)).collect()
}

fn hard_text() -> impl Strategy<Value = String> {
    let bit = prop_oneof![
        4 => any::<String>(),
        2 => "[ \t\r\n]{1,6}",
        2 => "[a-zA-Z' ]{1,12}",
        1 => "[0-9]{1,7}",
        1 => "\\p{Han}{1,4}",
        1 => "[\\p{M}\\p{So}\u{200d}\u{fe0f}]{1,4}",
        1 => prop::sample::select(vec!["<|im_end|>", "<|endoftext|>", "</s>", "<s>", "<|eot_id|>", "<tool_call>", "<0x0A>"])
            .prop_map(str::to_owned),
    ];
    prop::collection::vec(bit, 0..6).prop_map(|bits| bits.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn decoding_gives_back_what_was_encoded(text in hard_text()) {
        for name in NAMES {
            let text = speakable(name, &text);
            let tokenizer = &vocabulary(name).tokenizer;
            for parse_special in [false, true] {
                let ids = tokenizer.encode(&text, false, parse_special);
                prop_assert_eq!(&tokenizer.decode(&ids), &text, "{} {:?}", name, ids);
                if !parse_special {
                    prop_assert!(!ids.iter().any(|id| tokenizer.is_control(*id)), "{} {:?}", name, ids);
                }
            }
        }
    }
}

#[test]
fn bos_comes_once() {
    let llama = &vocabulary("llama-bpe").tokenizer;
    let bos = llama.bos().unwrap();
    assert_eq!(llama.token_text(bos), "<|begin_of_text|>");
    let twice = llama.encode("<|begin_of_text|>hi", true, true);
    assert_eq!(twice, llama.encode("hi", true, true));
    assert_eq!(twice[0], bos);
    assert_eq!(llama.encode("", true, true), [bos]);
    assert_eq!(llama.encode("", false, true), [0_u32; 0]);
    let smollm = &vocabulary("smollm2").tokenizer;
    assert_eq!(smollm.encode("hi", true, true), smollm.encode("hi", false, true));
}

#[test]
fn ids_out_of_range_are_nothing() {
    for name in NAMES {
        let tokenizer = &vocabulary(name).tokenizer;
        for id in [tokenizer.vocab_size() as u32, u32::MAX] {
            assert_eq!(tokenizer.token_bytes(id), b"");
            assert!(!tokenizer.is_control(id) && !tokenizer.is_end_of_generation(id));
        }
        assert_eq!(tokenizer.decode(&[u32::MAX]), "");
    }
}

#[test]
fn long_runs_take_linear_time() {
    for name in NAMES {
        let tokenizer = &vocabulary(name).tokenizer;
        for unit in [" ", "a", "\n", "1", " \n", "\u{301}", "ab", "!", "👩\u{200d}", "<|", "<s>"] {
            let text = unit.repeat(100_000 / unit.len());
            let start = Instant::now();
            let ids = tokenizer.encode(&text, false, true);
            assert_eq!(tokenizer.decode(&ids), text);
            assert!(start.elapsed() < Duration::from_secs(4), "{name} {unit:?}: {:?}", start.elapsed());
        }
    }
}

/// A byte-level vocabulary of two letters, a merge and a control token, which tests then spoil.
fn small() -> Vec<(String, Value)> {
    let strings = |list: &[&str]| Value::Strings(list.iter().map(ToString::to_string).collect());
    [
        ("model", Value::String("gpt2".into())),
        ("pre", Value::String("gpt-2".into())),
        ("tokens", strings(&["a", "b", "ab", "<|end|>"])),
        ("token_type", Value::I64s(vec![1, 1, 1, 3])),
        ("merges", strings(&["a b"])),
        ("eos_token_id", Value::U64(3)),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .into()
}

fn changed(key: &str, value: Option<Value>) -> Result<Tokenizer, String> {
    let mut pairs = small();
    let key = format!("tokenizer.ggml.{key}");
    pairs.retain(|(name, _)| *name != key);
    pairs.extend(value.map(|value| (key, value)));
    Tokenizer::from_metadata(&Metadata::from_pairs(pairs)).map_err(|error| error.to_string())
}

#[test]
fn a_small_vocabulary_works() {
    let tokenizer = changed("x", None).unwrap();
    assert_eq!(tokenizer.encode("abba<|end|>", false, true), [2, 1, 0, 3]);
    assert_eq!(tokenizer.encode("ab", false, true), [2]);
    assert_eq!(tokenizer.eos(), Some(3));
    assert!(tokenizer.is_end_of_generation(3) && tokenizer.is_control(3));
    assert_eq!(tokenizer.bos(), None);
    assert!(changed("pre", None).is_ok(), "a missing pre is the default one");
    assert!(changed("token_type", None).is_ok());
}

#[test]
fn bad_metadata_is_refused_by_name() {
    let text = |text: &str| Some(Value::String(text.into()));
    let strings = |list: &[&str]| Some(Value::Strings(list.iter().map(ToString::to_string).collect()));
    for (key, value, words) in [
        ("model", None, vec!["tokenizer.ggml.model", "missing"]),
        ("model", text("t5"), vec!["tokenizer.ggml.model", "t5", "gpt2", "llama"]),
        ("model", Some(Value::U64(1)), vec!["tokenizer.ggml.model"]),
        ("model", text("llama"), vec!["tokenizer.ggml.scores"]),
        (
            "pre",
            text("tekken"),
            vec!["tokenizer.ggml.pre", "tekken", "llama-bpe", "qwen2", "smollm", "gpt-2", "default"],
        ),
        ("tokens", None, vec!["tokenizer.ggml.tokens"]),
        ("tokens", strings(&[]), vec!["tokenizer.ggml.tokens"]),
        ("tokens", strings(&["a", "b"]), vec!["tokenizer.ggml.token_type", "4", "2"]),
        ("token_type", Some(Value::I64s(vec![1, 1, 1])), vec!["tokenizer.ggml.token_type", "3", "4"]),
        ("token_type", Some(Value::I64s(vec![1, 1, 1, 9])), vec!["tokenizer.ggml.token_type[3]", "9"]),
        ("token_type", Some(Value::I64s(vec![1, 1, 1, -1])), vec!["tokenizer.ggml.token_type"]),
        ("token_type", Some(Value::I64s(vec![6, 1, 1, 1])), vec!["tokenizer.ggml.tokens[0]", "<0x00>"]),
        ("merges", None, vec!["tokenizer.ggml.merges"]),
        ("merges", strings(&["ab"]), vec!["tokenizer.ggml.merges[0]", "ab"]),
        ("merges", strings(&["a b", "a "]), vec!["tokenizer.ggml.merges[1]"]),
        ("merges", strings(&["a z"]), vec!["tokenizer.ggml.merges[0]", "z"]),
        ("merges", strings(&["b a"]), vec!["tokenizer.ggml.merges[0]", "ba"]),
        ("eos_token_id", Some(Value::U64(4)), vec!["tokenizer.ggml.eos_token_id", "4"]),
        ("bos_token_id", Some(Value::U64(u64::MAX)), vec!["tokenizer.ggml.bos_token_id"]),
        ("eot_token_id", Some(Value::String("x".into())), vec!["tokenizer.ggml.eot_token_id"]),
        ("add_bos_token", Some(Value::Bool(true)), vec!["tokenizer.ggml.add_bos_token", "bos_token_id"]),
        ("add_eos_token", Some(Value::U64(1)), vec!["tokenizer.ggml.add_eos_token"]),
    ] {
        let error = changed(key, value.clone()).expect_err(&format!("{key} = {value:?}"));
        for word in &words {
            assert!(error.contains(word), "{key} = {value:?}: {error:?} does not say {word:?}");
        }
        assert!(!error.contains('\n'));
    }
}

/// A gap in a text, as Qwen2.5-Coder's model card spells it.
#[test]
fn a_gap_is_marked_in_the_order_of_training() {
    let tokenizer = &vocabulary("qwen2.5-coder").tokenizer;
    let before = tokenizer.encode("def add(a, b):\n    ", false, false);
    let ids = tokenizer.encode_gap(&before, "\n\nprint(add(1, 2))").unwrap();
    let written = "<|fim_prefix|>def add(a, b):\n    <|fim_suffix|>\n\nprint(add(1, 2))<|fim_middle|>";
    assert_eq!(ids, tokenizer.encode(written, true, true));
    let marks = tokenizer.fill_in_middle().unwrap();
    assert_eq!(marks.ids(), [151_659, 151_661, 151_660]);
    // Somebody's source about tokenizers holds no marks.
    let about = tokenizer.encode_gap(&before, "<|fim_middle|>").unwrap();
    assert_eq!(about.iter().filter(|&&id| id == marks.middle).count(), 1);
    assert_eq!(vocabulary("smollm2").tokenizer.fill_in_middle(), None);
    assert_eq!(vocabulary("smollm2").tokenizer.encode_gap(&before, "x"), None);
}

#[test]
fn marks_of_a_gap_are_found_by_key_and_by_name() {
    let with = |tokens: &[&str], keys: &[(&str, u32)]| {
        let mut pairs = small();
        for (key, value) in &mut pairs {
            match (key.as_str(), value) {
                ("tokenizer.ggml.tokens", Value::Strings(all)) => {
                    all.extend(tokens.iter().map(ToString::to_string));
                }
                ("tokenizer.ggml.token_type", value) => {
                    *value = Value::I64s([1, 1, 1, 3].into_iter().chain(tokens.iter().map(|_| 3)).collect());
                }
                _ => {}
            }
        }
        pairs.extend(
            keys.iter().map(|(k, id)| (format!("tokenizer.ggml.{k}_token_id"), Value::U64(u64::from(*id)))),
        );
        Tokenizer::from_metadata(&Metadata::from_pairs(pairs))
            .map(|t| t.fill_in_middle().map(FillInMiddle::ids))
    };
    for names in [
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        ["▁<PRE>", "▁<SUF>", "▁<MID>"],
    ] {
        assert_eq!(with(&names, &[]).unwrap(), Some([4, 5, 6]), "{names:?}");
        assert_eq!(with(&names[..2], &[]).unwrap(), None, "all three or none");
    }
    let keys = [("fim_mid", 1), ("fim_pre", 2), ("fim_suf", 0)];
    assert_eq!(with(&[], &keys).unwrap(), Some([2, 0, 1]));
    assert_eq!(with(&[], &[("prefix", 0), ("suffix", 1), ("middle", 2)]).unwrap(), Some([0, 1, 2]));
    let error = with(&[], &[("fim_pre", 0), ("fim_suf", 1), ("fim_mid", 99)]).unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.fim_mid_token_id"), "{error}");
}
