//! `m40llm keys`, as a user runs it, on a real store.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::{m40llm, refused, stderr, stdout};

/// `m40llm keys …` on the store in `dir`.
pub(crate) fn keys(dir: &Path, arguments: &[&str]) -> Output {
    command(dir, arguments).output().expect("the binary starts")
}

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = m40llm(&[&["keys"], arguments].concat());
    command.env("M40LLM_STATE_DIR", dir);
    command
}

/// The same, with `--json`, of a command that works.
pub(crate) fn keys_json(dir: &Path, arguments: &[&str]) -> Value {
    let output = keys(dir, &[arguments, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
    assert_eq!(stderr(&output), "", "{arguments:?}");
    serde_json::from_str(stdout(&output)).expect("JSON")
}

/// A new key: its id and its text.
pub(crate) fn create(dir: &Path, flags: &[&str]) -> (String, String) {
    let made = keys_json(dir, &[&["create", "--name", "test"], flags].concat());
    let text = |name: &str| made[name].as_str().unwrap_or_else(|| panic!("no {name}: {made}")).to_owned();
    (text("id"), text("key"))
}

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

#[test]
fn a_key_is_printed_once_and_alone() {
    let dir = dir();
    let made = keys(dir.path(), &["create", "--name", "laptop"]);
    assert_eq!(made.status.code(), Some(0), "{made:?}");
    let key = stdout(&made).strip_suffix('\n').expect("a line");
    assert!(key.starts_with("sk-m40-eyJ") && !key.contains(char::is_whitespace), "{key}");
    let listed = keys_json(dir.path(), &["list"]);
    let id = listed[0]["id"].as_str().expect("an id");
    assert!(stderr(&made).contains(id) && !stderr(&made).contains("eyJ"), "{made:?}");
    let table = keys(dir.path(), &["list"]);
    assert!(stdout(&table).contains(id) && stdout(&table).contains("laptop"), "{table:?}");
    assert!(!stdout(&table).contains("eyJ") && !listed.to_string().contains("eyJ"));
    // Not in any file either: neither the key nor its signature.
    let signature = key.rsplit('.').next().expect("a signature");
    for file in fs::read_dir(dir.path()).expect("files") {
        let bytes = fs::read(file.expect("a file").path()).expect("bytes");
        assert!(!bytes.windows(signature.len()).any(|window| window == signature.as_bytes()));
    }
}

#[test]
fn a_key_is_what_its_flags_say() {
    let dir = dir();
    let flags = "create --name ci --scope metrics --scope inference --scope metrics --expires 30d --rpm 1000000 \
        --tpm 4294967295 --concurrency 3 --model a --model b --max-context 2048 --priority high";
    let made = keys_json(dir.path(), &flags.split_whitespace().collect::<Vec<_>>());
    assert_eq!(made["scopes"], json!(["inference", "metrics"]));
    assert_eq!(made["expires_at"].as_u64(), made["created_at"].as_u64().map(|t| t + 30 * 86_400));
    let listed = keys_json(dir.path(), &["list"]);
    for (field, value) in [
        ("rpm", json!(1_000_000)),
        ("tpm", json!(4_294_967_295_u32)),
        ("concurrency", json!(3)),
        ("models", json!(["a", "b"])),
        ("max_context", json!(2048)),
        ("priority", json!("high")),
        ("name", json!("ci")),
        ("status", json!("active")),
    ] {
        assert_eq!((&made[field], &listed[0][field]), (&value, &value), "{field}");
    }
    let table = keys(dir.path(), &["list"]);
    assert!(stdout(&table).contains(" 1000000  4294967295  ci\n"), "plain digits: {}", stdout(&table));
    let plain = keys_json(dir.path(), &["create", "--name", "plain"]);
    assert_eq!(
        (&plain["scopes"], &plain["expires_at"], &plain["rpm"]),
        (&json!(["inference"]), &json!(null), &json!(null))
    );
}

#[test]
fn revoked_and_expired_keys_are_marked() {
    let dir = dir();
    let (short, _) = create(dir.path(), &["--expires", "1s"]);
    let (taken, _) = create(dir.path(), &[]);
    let (kept, _) = create(dir.path(), &["--expires", "12h"]);
    let revoked = keys(dir.path(), &["revoke", &taken]);
    assert_eq!((revoked.status.code(), stdout(&revoked)), (Some(0), format!("revoked {taken}\n").as_str()));
    assert_eq!(keys_json(dir.path(), &["revoke", &taken])["revoked"], json!(true), "again is no error");
    thread::sleep(Duration::from_millis(1100));
    let listed = keys_json(dir.path(), &["list"]);
    let status: Vec<_> =
        listed.as_array().expect("a list").iter().map(|k| (&k["id"], &k["status"])).collect();
    assert_eq!(
        status,
        [
            (&json!(short), &json!("expired")),
            (&json!(taken), &json!("revoked")),
            (&json!(kept), &json!("active"))
        ]
    );
    let table = stdout(&keys(dir.path(), &["list"])).to_owned();
    for (id, mark) in [(&short, "expired"), (&taken, "revoked"), (&kept, "active")] {
        assert!(table.lines().any(|line| line.contains(id.as_str()) && line.contains(mark)), "{table}");
    }
    refused(&keys(dir.path(), &["revoke", "key_nobody"]), 1, &["key_nobody", "keys list"]);
}

#[test]
fn a_wrong_command_line_is_2_and_says_what_is_allowed() {
    let dir = dir();
    for (arguments, allowed) in [
        (&["create"] as &[&str], "--name"),
        (&["create", "--name", ""], "1 to 100 characters"),
        (&["create", "--name", "a\nb"], "control character"),
        (&["create", "--name", "x", "--scope", "root"], "inference, metrics, admin"),
        (&["create", "--name", "x", "--expires", "30"], "90s, 15m, 12h or 30d"),
        (&["create", "--name", "x", "--expires", "0d"], "90s, 15m, 12h or 30d"),
        (&["create", "--name", "x", "--rpm", "0"], "1.."),
        (&["create", "--name", "x", "--priority", "urgent"], "low, normal, high"),
        (&["create", "--name", "x", "--model", ""], "models"),
        (&["usage", "--since", "yesterday"], "2026-01-31"),
        (&["usage", "--csv", "--json"], "--csv"),
        (&["revoke"], "ID"),
        (&[], "Usage"),
        (&["list", "--state-dir", ""], "a directory"),
    ] {
        let output = keys(dir.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert_eq!(stdout(&output), "", "{arguments:?}");
        assert!(stderr(&output).contains(allowed), "{arguments:?}: {}", stderr(&output));
    }
    assert_eq!(keys_json(dir.path(), &["list"]), json!([]));
}

#[test]
fn the_store_is_found_by_flag_variable_file_and_default() {
    let base = dir();
    let place = |name: &str| base.path().join(name);
    let file = place("m40llm.toml");
    fs::write(&file, format!("state-dir = {:?}\nthreads = 2\n", place("file"))).expect("a file");
    let file = file.to_str().expect("UTF-8");
    let flag = place("flag");
    let flag = flag.to_str().expect("UTF-8");
    for (name, arguments, variable) in [
        ("flag", &["--state-dir", flag, "create", "--name", "x", "--config", file] as &[&str], true),
        ("env", &["create", "--name", "x", "--config", file], true),
        ("file", &["create", "--config", file, "--name", "x"], false),
        ("xdg/m40llm", &["create", "--name", "x"], false),
    ] {
        let mut command = command(&place("env"), arguments);
        if !variable {
            command.env_remove("M40LLM_STATE_DIR");
        }
        let output = command.env("XDG_STATE_HOME", place("xdg")).output().expect("the binary starts");
        assert_eq!(output.status.code(), Some(0), "{name}: {output:?}");
        assert_eq!(keys_json(&place(name), &["list"]).as_array().map(Vec::len), Some(1), "{name}");
    }
    let mut lost = m40llm(&["keys", "list"]);
    for variable in ["M40LLM_STATE_DIR", "XDG_STATE_HOME", "HOME"] {
        lost.env_remove(variable);
    }
    let lost = lost.output().expect("the binary starts");
    refused(&lost, 2, &["--state-dir"]);
    let blocked = place("m40llm.toml");
    refused(&keys(&blocked, &["list"]), 1, &["m40llm.toml", "--state-dir"]);
}

#[test]
fn every_file_of_the_store_is_private() {
    let base = dir();
    let state = base.path().join("deep/state");
    create(&state, &[]);
    keys_json(&state, &["rotate-secret"]);
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&base.path().join("deep"))), (0o700, 0o700));
    let mut files = 0;
    for file in fs::read_dir(&state).expect("files") {
        let path = file.expect("a file").path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        files += 1;
    }
    assert!(files >= 2, "a database and a secret");
}

#[test]
fn accounts_of_keys_that_used_nothing_are_there() {
    let dir = dir();
    let (id, _) = create(dir.path(), &[]);
    assert_eq!(
        keys_json(dir.path(), &["usage"]),
        json!([{"id": id, "name": "test", "requests": 0, "prompt_tokens": 0, "cached_tokens": 0,
            "completion_tokens": 0}])
    );
    let csv = keys(dir.path(), &["usage", "--csv"]);
    assert_eq!(
        stdout(&csv),
        "id,name,day,model,requests,prompt_tokens,cached_tokens,completion_tokens,device_seconds\n"
    );
    assert!(stdout(&keys(dir.path(), &["usage"])).contains(&id));
}

#[test]
fn many_commands_at_once_lose_nothing() {
    let dir = dir();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| create(dir.path(), &[]));
        }
    });
    assert_eq!(keys_json(dir.path(), &["list"]).as_array().map(Vec::len), Some(8));
    // One secret signed them all, whoever came first.
    assert_eq!(keys_json(dir.path(), &["rotate-secret"]), json!({"valid_secrets": 2}));
    assert_eq!(keys_json(dir.path(), &["drop-old-secrets"]), json!({"valid_secrets": 1}));
    assert_eq!(keys_json(dir.path(), &["rotate-secret"]), json!({"valid_secrets": 2}));
    assert_eq!(keys_json(dir.path(), &["rotate-secret", "--drop-old"]), json!({"valid_secrets": 1}));
}

#[test]
fn the_secret_may_come_from_the_environment_and_is_never_shown() {
    let dir = dir();
    let secret = "correct-horse-battery-staple-0123";
    let with = |secret: &str, arguments: &[&str]| {
        let mut command = command(dir.path(), arguments);
        command.env("M40LLM_SIGNING_SECRET", secret).output().expect("the binary starts")
    };
    assert_eq!(with(secret, &["create", "--name", "x"]).status.code(), Some(0));
    assert!(!dir.path().join("signing-secrets").exists());
    refused(&with(secret, &["rotate-secret"]), 1, &["M40LLM_SIGNING_SECRET"]);
    let short = with("hunter2", &["list"]);
    refused(&short, 2, &["M40LLM_SIGNING_SECRET", "32"]);
    assert!(!stderr(&short).contains("hunter2"), "{short:?}");
}
