//! The built binary with keys: what the command line changes under a running server, raw connections, what the
//! log holds, and what is left after `kill -9`.

mod kill;

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    cli::m40llm,
    keys::{create, keys},
};

/// `m40llm run` with a model of a few kilobytes, on a store of its own.
struct Server {
    child: Child,
    addr: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    fn start(dir: &Path, flags: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", dir, flags)
    }

    fn start_at(addr: &str, dir: &Path, flags: &[&str]) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
        let model = model.to_str().expect("UTF-8");
        let fixed = ["run", model, "--addr", addr, "--prompt-format", "raw", "--model-alias", "tiny"];
        let mut child = m40llm(&[&fixed as &[&str], flags].concat())
            .env("M40LLM_STATE_DIR", dir)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut text = String::new();
        let addr = loop {
            let from = text.len();
            assert_ne!(lines.read_line(&mut text).expect("a log"), 0, "it ended: {text}");
            if let Some((_, addr)) = text[from..].trim_end().split_once("listening on http://") {
                break addr.to_owned();
            }
        };
        let log = Arc::new(Mutex::new(text));
        let rest = Arc::clone(&log);
        thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                rest.lock().expect("a log").push_str(&line);
                line.clear();
            }
        });
        Self { child, addr, log }
    }

    /// The status of `GET path` with `key`.
    fn status(&self, path: &str, key: &str) -> u16 {
        status(&self.ask("GET", path, key, None))
    }

    /// A whole answer, head and body.
    fn ask(&self, method: &str, path: &str, key: &str, body: Option<&Value>) -> String {
        ask(&self.addr, method, path, key, body).expect("an answer")
    }

    /// Whatever comes back for these bytes until the server closes, or says nothing for a while.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.addr).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_millis(400))).expect("a timeout");
        // The server may have closed before it has read everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SIGKILL.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(addr: &str, method: &str, path: &str, key: &str, body: Option<&Value>) -> io::Result<String> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let key = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {addr}\r\n{key}content-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("no status: {answer:?}"))
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

/// Holds for at most the second that a change by the command line may take.
fn within_a_second(what: &str, holds: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(1);
    while !holds() {
        assert!(Instant::now() < until, "not within a second: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_the_command_line_does_counts_within_a_second() {
    let dir = dir();
    let server = Server::start(dir.path(), &[]);
    assert!(server.log.lock().expect("a log").contains("WARN"), "the notice that there is no key");
    assert_eq!(server.status("/v1/models", ""), 200);
    let (id, key) = create(dir.path(), &[]);
    within_a_second("the first key", || server.status("/v1/models", "") == 401);
    assert_eq!(server.status("/v1/models", &key), 200);
    let (_, other) = create(dir.path(), &["--scope", "inference", "--scope", "metrics"]);
    within_a_second("another key", || server.status("/metrics", &other) == 200);
    assert_eq!(server.status("/metrics", &key), 403);
    assert_eq!(keys(dir.path(), &["revoke", &id]).status.code(), Some(0));
    within_a_second("a revocation", || server.status("/v1/models", &key) == 401);
    assert_eq!(server.status("/v1/models", &other), 200);
    assert_eq!(keys(dir.path(), &["rotate-secret"]).status.code(), Some(0));
    let (_, fresh) = create(dir.path(), &[]);
    within_a_second("a new secret", || server.status("/v1/models", &fresh) == 200);
    assert_eq!(server.status("/v1/models", &other), 200, "signed by the secret before");
    assert_eq!(keys(dir.path(), &["rotate-secret", "--drop-old"]).status.code(), Some(0));
    within_a_second("dropped secrets", || server.status("/v1/models", &fresh) == 401);
    assert_eq!(server.status("/v1/models", ""), 401, "the door stays closed");
    drop(server);
    let again = Server::start(dir.path(), &[]);
    assert!(!again.log.lock().expect("a log").contains("WARN"), "keys exist");
    assert_eq!(again.status("/v1/models", ""), 401);
    let (_, last) = create(dir.path(), &[]);
    within_a_second("a key after the restart", || again.status("/v1/models", &last) == 200);
}

#[test]
fn with_a_key_any_address_is_served_and_any_name() {
    let dir = dir();
    let (_, key) = create(dir.path(), &[]);
    let server = Server::start_at("0.0.0.0:0", dir.path(), &["--private-docs"]);
    assert_eq!(server.status("/docs", ""), 401);
    let (_, port) = server.addr.rsplit_once(':').expect("a port");
    let named = format!(
        "GET /v1/models HTTP/1.1\r\nhost: gpu.example:{port}\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n"
    );
    assert_eq!(status(&server.raw(named.as_bytes())), 200, "a proxy's name");
    drop(server);
    let open = Server::start(dir.path(), &["--no-auth"]);
    assert_eq!(open.status("/v1/models", ""), 200);
    assert!(open.log.lock().expect("a log").contains("--no-auth"));
}

#[test]
fn two_readings_of_a_request_are_not_served() {
    let dir = dir();
    let (_, key) = create(dir.path(), &["--scope", "inference", "--scope", "admin"]);
    let server = Server::start(dir.path(), &[]);
    let smuggled = "GET /admin/keys HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n";
    let own = format!("GET /admin/keys HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: {key}\r\n\r\n");
    let head = format!(
        "POST /tokenize HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: {key}\r\ncontent-type: application/json\r\n"
    );
    let json = r#"{"content":"a"}"#;
    let length = format!("content-length: {}\r\n", json.len());
    let chunked = "transfer-encoding: chunked\r\n";

    // The ground: this connection does serve one request after another.
    let both = server.raw(format!("{head}{length}\r\n{json}{own}").as_bytes());
    assert_eq!(both.matches("HTTP/1.1 200").count(), 2, "{both}");

    for (what, bytes) in [
        (
            "length and chunks, the length longer",
            format!("{head}content-length: 500\r\n{chunked}\r\n0\r\n\r\n{smuggled}"),
        ),
        (
            "length and chunks, the length shorter",
            format!("{head}content-length: 3\r\n{chunked}\r\nf\r\n{json}\r\n0\r\n\r\n{smuggled}"),
        ),
        ("two lengths", format!("{head}{length}content-length: 0\r\n\r\n{json}{smuggled}")),
        ("a list of lengths", format!("{head}content-length: {}, 0\r\n\r\n{json}{smuggled}", json.len())),
        ("a signed length", format!("{head}content-length: +{}\r\n\r\n{json}{smuggled}", json.len())),
        ("a negative length", format!("{head}content-length: -1\r\n\r\n{json}{smuggled}")),
        ("chunks in disguise", format!("{head}transfer-encoding: xchunked\r\n{length}\r\n{json}{smuggled}")),
        (
            "chunks, but not last",
            format!("{head}transfer-encoding: chunked, identity\r\n{length}\r\n{json}{smuggled}"),
        ),
        ("chunks twice", format!("{head}{chunked}transfer-encoding: identity\r\n\r\n0\r\n\r\n{smuggled}")),
        ("a space before the colon", format!("{head}content-length : 0\r\n{length}\r\n{json}{smuggled}")),
        (
            "a folded header",
            format!("{head}x-a: b\r\n transfer-encoding: chunked\r\n{length}\r\n{json}{smuggled}"),
        ),
        (
            "a bare line feed in a value",
            format!("{head}x-a: b\ntransfer-encoding: chunked\r\n{length}\r\n{json}{smuggled}"),
        ),
        ("a NUL in a value", format!("{head}x-a: b\0c\r\n{length}\r\n{json}{smuggled}")),
        ("a chunk that lies", format!("{head}{chunked}\r\n3\r\n{json}\r\n0\r\n\r\n{smuggled}")),
        (
            "a chunk's size that overflows",
            format!("{head}{chunked}\r\nfffffffffffffffff\r\n{json}\r\n0\r\n\r\n{smuggled}"),
        ),
    ] {
        let answer = server.raw(bytes.as_bytes());
        assert!(!answer.contains("\"data\""), "{what}: the smuggled request was served: {answer}");
        let served = answer.matches("HTTP/1.1 200").count();
        assert!(served <= 1, "{what}: {answer}");
        if answer.contains("HTTP/1.1 400") {
            let after = answer.rsplit("HTTP/1.1 400").next().unwrap_or_default();
            assert!(!after.contains("HTTP/1.1"), "{what}: a connection out of step goes on: {answer}");
        }
    }
    // Two headers for one key, and one that differs in its spelling.
    for headers in [
        format!("authorization: Bearer {key}\r\nauthorization: Bearer x\r\n"),
        format!("Authorization: Bearer x\r\nAUTHORIZATION: Bearer {key}\r\n"),
        format!("authorization: Bearer x\r\nx-api-key: {key}\r\n"),
        format!("authorization : Bearer {key}\r\n"),
        format!("x-authorization: Bearer {key}\r\n"),
        format!("x_api_key: {key}\r\n"),
    ] {
        let answer =
            server.raw(format!("GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}\r\n").as_bytes());
        assert!(matches!(status(&answer), 400 | 401), "{headers}: {answer}");
    }
}

#[test]
fn headers_beyond_measure_are_refused() {
    let dir = dir();
    let (_, key) = create(dir.path(), &[]);
    let server = Server::start(dir.path(), &[]);
    let with = |headers: &str| {
        status(&server.raw(format!("GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}\r\n").as_bytes()))
    };
    assert_eq!(with(&format!("x-api-key: {key}\r\n")), 200);
    assert_eq!(with(&format!("x-api-key: {}\r\n", "A".repeat(30_000))), 401);
    assert!(matches!(with(&format!("x-api-key: {}\r\n", "A".repeat(200_000))), 400 | 431));
    let many = "x-a: b\r\n".repeat(500);
    assert!(matches!(with(&format!("{many}x-api-key: {key}\r\n")), 400 | 431));
    assert_eq!(server.status("/v1/models", &key), 200, "the server goes on");
}

#[test]
fn a_refused_body_does_not_end_the_connection() {
    let dir = dir();
    let (_, key) = create(dir.path(), &[]);
    let server = Server::start(dir.path(), &[]);
    let mut stream = TcpStream::connect(&server.addr).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let long = "x".repeat(200_000);
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: sk-m40-x\r\ncontent-length: {}\r\n\r\n",
        long.len()
    )
    .expect("it reads");
    let mut reader = BufReader::new(stream.try_clone().expect("the same"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("an answer before the body");
    assert_eq!(status(&line), 401);
    stream.write_all(long.as_bytes()).expect("it reads on");
    write!(
        stream,
        "GET /v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: {key}\r\nconnection: close\r\n\r\n"
    )
    .expect("it reads on");
    let mut rest = String::new();
    reader.read_to_string(&mut rest).expect("the second answer");
    assert_eq!(rest.matches("HTTP/1.1 200").count(), 1, "{rest}");
}

#[test]
fn neither_keys_nor_prompts_are_logged_or_told() {
    const PROMPT: &str = "pineapple-submarine-quartz";
    let dir = dir();
    let (id, key) = create(dir.path(), &["--scope", "inference", "--scope", "metrics", "--scope", "admin"]);
    let server = Server::start(dir.path(), &["--log-level", "trace"]);
    let wrong = format!("sk-m40-{}", "eyJhbGciOiJub25lIn0.eyJqdGkiOiJ4In0.");
    let work = json!({"prompt": PROMPT, "max_tokens": 3});
    let mut told = String::new();
    for answer in [
        server.ask("POST", "/v1/completions", &key, Some(&work)),
        server.ask("POST", "/v1/completions", &wrong, Some(&work)),
        server.ask("GET", &format!("/v1/models?api_key={key}"), "", None),
        server.ask("GET", &format!("/{key}"), &key, None).replace(&key, ""),
        server.ask("POST", "/generate", &key, Some(&json!({"prompt": PROMPT, "max_tokens": "x"}))),
        server.ask("GET", "/admin/keys", &key, None),
        server.ask("GET", "/metrics", &key, None),
        server.ask("GET", "/metrics", "", None),
    ] {
        told += &answer;
    }
    let made = server.ask("POST", "/admin/keys", &key, Some(&json!({"name": "second"})));
    let second: Value = serde_json::from_str(body(&made)).expect("a key");
    let cmdline = fs::read(format!("/proc/{}/cmdline", server.child.id())).expect("arguments");
    thread::sleep(Duration::from_millis(200));
    let log = server.log.lock().expect("a log").clone();
    assert!(log.contains("DEBUG") && log.contains(&id), "the log is at work: {log}");
    let secret = fs::read_to_string(dir.path().join("signing-secrets")).expect("the secret");
    let second = second["key"].as_str().expect("a key");
    for hidden in [&key, second, &wrong, secret.trim(), PROMPT] {
        // The signature is the secret part of a key; whoever has the rest has nothing.
        let hidden = hidden.trim_end_matches('.').rsplit('.').next().unwrap_or(hidden);
        for (place, text) in
            [("log", log.as_str()), ("answers", &told), ("arguments", &String::from_utf8_lossy(&cmdline))]
        {
            assert!(!text.contains(hidden), "{hidden} in the {place}: {text}");
        }
    }
    assert!(!log.contains("sk-m40-"), "{log}");
}
