//! The built binary, as a user runs it: exit codes, what goes to which stream, settings by layer.

#[cfg(feature = "server")]
mod server;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

/// A command that sees no settings, no keys and no CUDA devices of the surroundings.
pub(crate) fn m40llm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_m40llm"));
    command.args(arguments).stdin(Stdio::null()).env("CUDA_VISIBLE_DEVICES", "-1");
    // Whoever runs the tests may have keys; here are none.
    command.env("XDG_STATE_HOME", env!("CARGO_TARGET_TMPDIR"));
    for setting in [
        "ADDR",
        "BACKEND",
        "CONFIG",
        "CORS_ORIGINS",
        "CTX_SIZE",
        "DEFAULT_CONCURRENCY",
        "DEFAULT_RPM",
        "DEFAULT_TPM",
        "DEVICE",
        "DRAIN_TIMEOUT",
        "ENABLE_CUBLAS",
        "KV_MEMORY",
        "KV_TYPE",
        "LOG_FORMAT",
        "LOG_LEVEL",
        "MAX_BATCH",
        "MAX_CONNECTIONS",
        "MAX_QUEUE",
        "MODEL_ALIAS",
        "NO_AUTH",
        "OTLP_ENDPOINT",
        "PREFIX_CACHE",
        "PRIVATE_DOCS",
        "PROMPT_FORMAT",
        "REQUIRE_SM52",
        "SIGNING_SECRET",
        "STATE_DIR",
        "THREADS",
        "TLS_CERT",
        "TLS_KEY",
    ] {
        command.env_remove(format!("M40LLM_{setting}"));
    }
    command.env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
    command
}

pub(crate) fn run(arguments: &[&str]) -> Output {
    m40llm(arguments).output().expect("the binary starts")
}

pub(crate) fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8 on stdout")
}

pub(crate) fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("UTF-8 on stderr")
}

/// It failed with this code, one line on stderr that holds all `parts`, and nothing on stdout.
pub(crate) fn refused(output: &Output, code: i32, parts: &[&str]) {
    let line = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{line}");
    assert_eq!(stdout(output), "");
    assert_eq!(line.lines().count(), 1, "{line:?}");
    for part in parts {
        assert!(line.contains(part), "{line:?} lacks {part:?}");
    }
}

pub(crate) fn model() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/smollm2-135m-instruct-q4_1.gguf");
    assert!(path.is_file(), "{} is missing: scripts/fetch-model.sh smollm2", path.display());
    path.to_str().expect("a UTF-8 path").to_owned()
}

fn file(content: &[u8], name: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(name);
    std::fs::write(&path, content).expect("a file");
    (dir, path)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// The demo model's answer, chosen as `flags` say.
fn generate(flags: &[&str]) -> Output {
    let model = model();
    let fixed = ["generate", &model, "Say hello in French.", "--max-tokens", "12", "--ctx-size", "256"];
    run(&[&fixed as &[&str], flags].concat())
}

#[test]
fn help_teaches_and_goes_to_stdout() {
    let output = run(&["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let mut commands = vec![
        "generate",
        "chat",
        "inspect",
        "bench",
        "devices",
        "health",
        "keys",
        "openapi",
        "pull",
        "completions",
        "man",
    ];
    if cfg!(feature = "server") {
        commands.push("run");
    }
    for command in commands {
        assert!(stdout(&output).contains(&format!("\n  {command} ")), "{command} is not listed");
        let help = run(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(stdout(&help).contains("Example"), "{command} shows no example");
    }
    let version = m40llm::version::FULL_VERSION.as_str();
    assert_eq!(stdout(&run(&["--version"])), format!("m40llm {version}\n"));
}

#[test]
fn a_wrong_command_line_is_2_and_leaves_stdout_alone() {
    for arguments in [
        &[] as &[&str],
        &["serve"],
        &["generate", "model.gguf"],
        &["generate", "model.gguf", "prompt", "--threads", "0"],
        &["generate", "model.gguf", "prompt", "--temperature", "3"],
        &["generate", "model.gguf", "prompt", "--prompt-format", "llama"],
        &["generate", "model.gguf", "prompt", "--kv-type", "q4"],
        &["generate", "model.gguf", "prompt", "--max-token", "5"],
        &["chat", "model.gguf", "--top-p", "1.5"],
        &["bench", "model.gguf", "-b", "1,0"],
        &["health", "--addr", "localhost"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stdout(&output), "", "{arguments:?}");
        assert_ne!(stderr(&output), "", "{arguments:?}");
    }
}

#[test]
fn a_wrong_value_says_what_is_allowed() {
    let output = run(&["generate", "model.gguf", "prompt", "--kv-type", "q4"]);
    assert!(stderr(&output).contains("f16, f32, q8"), "{}", stderr(&output));
}

#[test]
fn a_wrong_variable_is_2_and_named() {
    let output = m40llm(&["generate", "model.gguf", "prompt"]).env("M40LLM_CTX_SIZE", "big").output();
    refused(&output.expect("the binary starts"), 2, &["M40LLM_CTX_SIZE", "\"big\"", "whole number"]);
}

#[test]
fn a_wrong_file_is_2_and_names_key_and_file() {
    for (toml, parts) in [
        ("ctx_size = 5", &["\"ctx_size\"", "m40llm.toml", "ctx-size"] as &[&str]),
        ("kv-type = \"q4\"", &["\"kv-type\"", "m40llm.toml", "f16, f32, q8"]),
        ("threads = true", &["\"threads\"", "m40llm.toml", "whole number"]),
        ("threads =", &["m40llm.toml", "line 1"]),
    ] {
        let (_dir, path) = file(toml.as_bytes(), "m40llm.toml");
        refused(&run(&["generate", "model.gguf", "prompt", "--config", text(&path)]), 2, parts);
        let output = m40llm(&["chat", "model.gguf"]).env("M40LLM_CONFIG", &path).output();
        refused(&output.expect("the binary starts"), 2, parts);
    }
    refused(&run(&["chat", "model.gguf", "--config", "/nowhere.toml"]), 2, &["/nowhere.toml"]);
}

/// `bench` refuses a context that is too small before it loads anything, and says which one it got.
#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let (_dir, path) = file(b"ctx-size = 11", "m40llm.toml");
    let bench = ["bench", "model.gguf", "--config", text(&path)];
    refused(&run(&bench), 2, &["--ctx-size is 11"]);
    let by_environment = m40llm(&bench).env("M40LLM_CTX_SIZE", "12").output().expect("the binary starts");
    refused(&by_environment, 2, &["--ctx-size is 12"]);
    let by_flag = m40llm(&bench).args(["--ctx-size", "13"]).env("M40LLM_CTX_SIZE", "12").output();
    refused(&by_flag.expect("the binary starts"), 2, &["--ctx-size is 13"]);
}

/// What a build says that finds no device, because it has none to find or cannot look for one.
const NO_DEVICE: &str = if cfg!(feature = "cuda") { "driver" } else { "--features cuda" };

#[test]
fn a_device_that_is_not_there_is_1() {
    for flags in [
        &["--backend", "cuda"] as &[&str],
        &["--require-sm52"],
        &["--device", "0"],
        &["--device", "GPU-5f2c"],
        &["--backend", "cuda", "--device", "63", "--require-sm52"],
    ] {
        let arguments = [&["generate", "model.gguf", "prompt"], flags].concat();
        refused(&run(&arguments), 1, &[&flags.join(" "), NO_DEVICE, "--backend cpu"]);
    }
    let (_dir, path) = file(b"device = \"GPU-5f2c\"", "m40llm.toml");
    refused(&run(&["chat", "model.gguf", "--config", text(&path)]), 1, &["--device GPU-5f2c", NO_DEVICE]);
}

#[test]
fn no_device_is_listed_in_one_line_and_0() {
    let output = run(&["devices"]);
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    let line = stdout(&output);
    assert!(line.starts_with("no CUDA device: ") && line.contains(NO_DEVICE), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    let output = run(&["devices", "--json"]);
    let report: Value = serde_json::from_str(stdout(&output)).expect("JSON");
    assert_eq!(report["devices"], serde_json::json!([]));
    assert!(report["note"].as_str().is_some_and(|note| line.contains(note)), "{report}");
}

#[test]
fn an_unusable_model_is_1_in_every_command() {
    let (_dir, not_a_model) = file(b"This is no model at all.", "text.gguf");
    let (_dir2, cut) = file(&std::fs::read(model()).expect("the model")[..5000], "cut.gguf");
    for path in ["/nowhere/model.gguf", text(&not_a_model), text(&cut)] {
        for command in
            [&["inspect", path] as &[&str], &["generate", path, "x"], &["chat", path], &["bench", path]]
        {
            refused(&run(command), 1, &[path]);
        }
    }
}

#[test]
fn generate_prints_the_text_and_nothing_else() {
    let output = generate(&["--temperature", "0"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    let text = stdout(&output);
    assert!(text.contains("Bonjour"), "{text:?}");
    assert!(!text.contains("Say hello"), "{text:?}");
    assert!(!text.contains("<|"), "{text:?}");
    assert!(text.ends_with('\n') && !text.ends_with("\n\n"), "{text:?}");
    let streamed = generate(&["--temperature", "0", "--stream"]);
    assert_eq!(stdout(&streamed), text);
    assert_eq!(stdout(&generate(&["--top-k", "1"])), text, "top-k 1 is greedy");
}

#[test]
fn generate_leaves_a_rendered_prompt_alone() {
    let model = model();
    let rendered = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n";
    let greedy = ["--temperature", "0", "--max-tokens", "8", "--ctx-size", "256"];
    let by = |format: &str| {
        run(&[&["generate", &model, rendered, "--prompt-format", format], &greedy as &[&str]].concat())
    };
    let raw = by("raw");
    assert_eq!(raw.status.code(), Some(0), "{}", stderr(&raw));
    assert_eq!(stdout(&by("auto")), stdout(&raw));
}

#[test]
fn generate_counts_token_ids() {
    let model = model();
    let by = |n: &str| {
        let flags = ["--prompt-format", "raw", "--temperature", "0", "--ctx-size", "128", "--max-tokens", n];
        stdout(&run(&[&["generate", &model, "1 2 3 4 5 6"], &flags as &[&str]].concat())).to_owned()
    };
    assert_eq!(by("0"), "\n");
    let (four, eight) = (by("4"), by("8"));
    assert!(eight.starts_with(four.trim_end()) && eight.len() > four.len(), "{four:?} {eight:?}");
}

#[test]
fn a_prompt_longer_than_the_context_is_1_and_says_so() {
    let prompt = "word ".repeat(100);
    refused(&run(&["generate", &model(), &prompt, "--ctx-size", "64"]), 1, &["the context holds 64"]);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut child = m40llm(&["inspect", &model()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
}

#[test]
fn chat_takes_each_line_of_a_pipe_as_a_turn() {
    let mut child = m40llm(&["chat", &model(), "--temperature", "0", "--ctx-size", "256"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(b"Say hello in French.\n/clear\n\n/exit\nnever read\n").expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), ""));
    assert!(stdout(&output).contains("Bonjour"), "{}", stdout(&output));
    assert!(!stdout(&output).contains("Say hello"), "{}", stdout(&output));
}

#[test]
fn inspect_tells_what_the_file_holds() {
    let output = run(&["inspect", &model(), "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: Value = serde_json::from_str(stdout(&output)).expect("JSON");
    assert_eq!(report["architecture"], "llama");
    assert_eq!(report["quantization"], "Q4_1");
    assert_eq!(
        (&report["layers"], &report["heads"], &report["kv_heads"]),
        (&30.into(), &9.into(), &3.into())
    );
    assert_eq!(report["tokenizer"]["pre"], "smollm");
    assert_eq!(report["tokenizer"]["end_of_generation"].as_array().map(Vec::is_empty), Some(false));
    assert_eq!(report["chat_template"]["source"], "model");
    // 30 layers of 3 heads of 64, keys and values, 2 bytes each.
    assert_eq!(report["memory"]["kv_bytes_per_token"]["f16"], 30 * 3 * 64 * 2 * 2);
    let cards = report["memory"]["cards"].as_array().expect("cards");
    assert_eq!(cards.iter().map(|c| c["gigabytes"].as_u64()).collect::<Vec<_>>(), [Some(12), Some(24)]);
    assert!(cards.iter().all(|c| c["fits"] == true && c["max_context"]["f16"] == report["context_length"]));
    let plain = run(&["inspect", &model()]);
    for part in ["llama", "Q4_1", "smollm", "12 GB card", "24 GB card"] {
        assert!(stdout(&plain).contains(part), "{part} is not in\n{}", stdout(&plain));
    }
}

#[test]
fn bench_prints_the_contracts_json() {
    let flags = ["-p", "64", "-n", "4", "-b", "1,2", "--depth", "8", "-r", "1", "--json"];
    let output = run(&[&["bench", &model()], &flags as &[&str]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: Value = serde_json::from_str(stdout(&output)).expect("JSON");
    let keys =
        |value: &Value| value.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    assert_eq!(keys(&report), ["device", "model", "quant", "copy_gb_per_s", "results"]);
    let results = report["results"].as_array().expect("results");
    let tests: Vec<_> = results.iter().map(|r| (r["test"].as_str(), r["batch"].as_u64())).collect();
    let expected = [("prompt", 1), ("prompt", 2), ("decode", 1), ("decode", 2)];
    assert_eq!(tests, expected.map(|(test, batch)| (Some(test), Some(batch))));
    for result in results {
        let decode = result["test"] == "decode";
        let mut expected =
            vec!["test", "n_tokens", "batch", "depth", "tokens_per_s", "gb_per_s", "share_of_copy"];
        expected.extend(decode.then_some("host_share"));
        assert_eq!(keys(result), expected);
        let host = result["host_share"].as_f64();
        assert!(host.is_some_and(|v| v > 0.0 && v < 0.5) == decode, "{result}");
        assert_eq!(result["depth"], 8);
        assert!(result["tokens_per_s"].as_f64().is_some_and(|v| v > 0.0 && v.is_finite()), "{result}");
        assert!(result["share_of_copy"].as_f64().is_some_and(|v| v > 0.0 && v.is_finite()), "{result}");
    }
}

#[test]
fn openapi_prints_the_repositorys_document() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi/openapi.json");
    let document = std::fs::read_to_string(path).expect("openapi/openapi.json");
    let output = run(&["openapi"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output) == document, "stale: make openapi");
}

#[test]
fn a_shell_completes_commands_and_flags() {
    let script = run(&["completions", "bash"]);
    let (_dir, path) = file(&script.stdout, "m40llm.bash");
    let completed = |words: &[&str]| {
        let last = words.len() - 1;
        let ask = "source \"$0\"; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
            _m40llm \"$1\" \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD-1]}\"; echo \"${COMPREPLY[*]}\"";
        let output = Command::new("bash").args(["--norc", "-c", ask]).arg(&path).args(words).output();
        let output = output.expect("bash");
        assert!(output.status.success() && last > 0, "{}", stderr(&output));
        stdout(&output).trim().to_owned()
    };
    assert_eq!(completed(&["m40llm", "pu"]), "pull");
    assert_eq!(completed(&["m40llm", "pull", "--re"]), "--revision");
    assert_eq!(completed(&["m40llm", "keys", "cr"]), "create");
    for shell in ["zsh", "fish"] {
        assert!(stdout(&run(&["completions", shell])).contains("revision"), "{shell}");
    }
    assert_eq!(run(&["completions", "cmd"]).status.code(), Some(2));
}

#[test]
fn every_command_has_a_manual_page() {
    for (command, page, says) in [
        (&[] as &[&str], "m40llm", "m40llm\\-pull(1)"),
        (&["pull"], "m40llm-pull", "HF_ENDPOINT"),
        (&["keys", "create"], "m40llm-keys-create", "expires"),
    ] {
        let output = run(&[&["man"], command].concat());
        let text = stdout(&output);
        assert!(output.status.success() && text.contains(&format!(".TH {page} 1")), "{text}");
        assert!(text.contains(says), "{page} lacks {says}: {text}");
    }
    refused(&run(&["man", "keys", "make"]), 2, &["m40llm-keys", "\"make\""]);
}

#[test]
fn health_of_nothing_is_1() {
    // A port that was free a moment ago.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address").to_string();
    drop(listener);
    refused(&run(&["health", "--addr", &addr]), 1, &[&addr, "m40llm run"]);
    let output = m40llm(&["health"]).env("M40LLM_ADDR", &addr).output().expect("the binary starts");
    refused(&output, 1, &[&addr]);
}
