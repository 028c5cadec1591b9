//! C programs against the shared library and its header, as a user builds them.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use m40llm_engine::{BackendChoice, Engine, EngineConfig, GenerateRequest, SamplingParams};

use super::engine::{collect, demo_model};

/// Where cargo has put the library: beside the test's own binary.
fn library_folder() -> PathBuf {
    let folder = env::current_exe().unwrap().parent().unwrap().to_owned();
    assert!(folder.join("libm40llm_engine.so").exists(), "no library in {}", folder.display());
    folder
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Compiles `tests/c/NAME.c` and runs it on the demo model.
fn run(name: &str) -> Output {
    build_and_run(name, &root().join(format!("tests/c/{name}.c")))
}

/// Compiles a program, every warning an error, and runs it on the demo model.
fn build_and_run(name: &str, source: &Path) -> Output {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("c-{name}"));
    let library = library_folder();
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread", "-I"])
        .arg(root().join("include"))
        .arg(source)
        .arg("-o")
        .arg(&program)
        .arg("-L")
        .arg(&library)
        .arg(format!("-Wl,-rpath,{}", library.display()))
        .arg("-lm40llm_engine");
    let built = cc.output().expect("a C compiler, cc");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let output = Command::new(program).arg(demo_model()).output().unwrap();
    assert!(
        output.status.success(),
        "{name}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Two turns as `generate.c` has them, on an engine that it configures the same way.
fn turns() -> [String; 2] {
    let config = EngineConfig {
        backend: BackendChoice::Cpu,
        ctx_size: Some(512),
        max_batch: 4,
        threads: Some(2),
        ..EngineConfig::default()
    };
    let engine = Engine::load(&demo_model(), &config, |_| {}).unwrap();
    let mut history = Vec::new();
    ["<|im_start|>user\nWhat is the capital of France?", "<|im_end|>\n<|im_start|>user\nAnd of Italy?"].map(
        |question| {
            let text = format!("{question}<|im_end|>\n<|im_start|>assistant\n");
            history.extend(engine.tokenizer().encode(&text, false, true));
            let answer = collect(
                engine
                    .submit(GenerateRequest {
                        prompt: history.clone(),
                        max_tokens: Some(48),
                        sampling: SamplingParams::greedy(),
                        ..GenerateRequest::default()
                    })
                    .unwrap(),
            );
            history.extend(answer.ids);
            answer.text
        },
    )
}

#[test]
fn c_gets_the_engines_answers() {
    let [first, second] = turns();
    assert_eq!(first, "The capital of France is Paris.");
    let output = String::from_utf8(run("generate").stdout).unwrap();
    assert_eq!(output, format!("{first}\n--\n{second}\n--\n{second}"));
}

#[test]
fn c_cancels_and_runs_sessions_from_several_threads() {
    run("threads");
}

#[test]
fn c_errors_are_statuses() {
    run("errors");
}

#[test]
fn the_documented_program_answers() {
    let page = fs::read_to_string(root().join("../docs/c-api.md")).unwrap();
    let program = page.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a program");
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c-documented.c");
    fs::write(&source, program).unwrap();
    let output = build_and_run("documented", &source);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "The capital of France is Paris.");
}
