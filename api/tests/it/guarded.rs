//! The built binary with keys: what the command line changes under a running server, raw connections, what the
//! log holds, and what is left after `kill -9`.

use std::{
    collections::BTreeMap,
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
    keys::{create, keys, keys_json},
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

/// What a client knows of its finished requests, or the accounts say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    requests: u64,
    prompt: u64,
    completion: u64,
}

impl Tally {
    fn of(usage: &Value) -> Self {
        let field = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("no {name}: {usage}"));
        Self { requests: 1, prompt: field("prompt_tokens"), completion: field("completion_tokens") }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            prompt: self.prompt + other.prompt,
            completion: self.completion + other.completion,
        }
    }

    fn fits_in(self, other: Self) -> bool {
        self.requests <= other.requests && self.prompt <= other.prompt && self.completion <= other.completion
    }
}

/// The accounts by key.
fn accounts(dir: &Path) -> BTreeMap<String, Tally> {
    let usage = keys_json(dir, &["usage"]);
    let row = |row: &Value| {
        let requests = row["requests"].as_u64().expect("requests");
        (row["id"].as_str().expect("an id").to_owned(), Tally { requests, ..Tally::of(row) })
    };
    usage.as_array().expect("a list").iter().map(row).collect()
}

/// Numbers that look random and can be had again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Requests one after another until the server is gone. What was finished, and the most that the one which was
/// not may have cost.
fn load(addr: &str, key: &str, seed: u64) -> (Tally, Tally) {
    let mut random = Random(seed);
    let mut finished = Tally::default();
    loop {
        let (stream, most) = (random.below(2) == 0, 1 + random.below(60));
        let mut request = json!({"prompt": "hello", "max_tokens": most, "stream": stream, "temperature": 0});
        if stream {
            request["stream_options"] = json!({"include_usage": true});
        }
        let answer = ask(addr, "POST", "/v1/completions", key, Some(&request)).unwrap_or_default();
        match usage_of(&answer, stream) {
            Some(usage) => finished = finished.plus(Tally::of(&usage)),
            None => return (finished, Tally { requests: 1, prompt: 64, completion: most }),
        }
    }
}

/// The usage of a whole answer; a stream is whole when its last event is there.
fn usage_of(answer: &str, stream: bool) -> Option<Value> {
    if answer.is_empty() {
        return None;
    }
    assert!(answer.len() < 12 || status(answer) == 200, "{answer}");
    if !stream {
        return Some(serde_json::from_str::<Value>(body(answer)).ok()?["usage"].clone());
    }
    answer.contains("data: [DONE]\n\n").then_some(())?;
    let mut events = answer.lines().filter_map(|line| line.strip_prefix("data: {"));
    let last = events
        .next_back()
        .map(|event| serde_json::from_str::<Value>(&format!("{{{event}")).expect("JSON"))?;
    Some(last["usage"].clone())
}

/// Keys made over HTTP until the server is gone: those that were told.
fn make_keys(addr: &str, admin: &str) -> Vec<String> {
    let mut made = Vec::new();
    loop {
        let answer =
            ask(addr, "POST", "/admin/keys", admin, Some(&json!({"name": "made"}))).unwrap_or_default();
        let Ok(key) = serde_json::from_str::<Value>(body(&answer)) else { return made };
        made.push(key["id"].as_str().unwrap_or_else(|| panic!("no id: {answer}")).to_owned());
        thread::sleep(Duration::from_millis(20));
    }
}

/// `TEST_KILLS`, for the full count.
#[expect(clippy::disallowed_methods, reason = "a count for tests is no setting of the program")]
fn kills() -> u64 {
    std::env::var("TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// After `kill -9` at any moment the database opens; the accounts hold every request whose answer a client has
/// had whole, to the token, and at most the one more that each client was waiting for; every key that was told
/// of is there, and revoked ones are revoked.
#[test]
fn nothing_told_is_lost_by_kill_9() {
    const CLIENTS: usize = 4;
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    let mut random = Random(seed);
    let dir = dir();
    let clients: Vec<_> = (0..CLIENTS).map(|_| create(dir.path(), &[])).collect();
    let (_, admin) = create(dir.path(), &["--scope", "admin"]);
    let (revoked, _) = create(dir.path(), &[]);
    assert_eq!(keys(dir.path(), &["revoke", &revoked]).status.code(), Some(0));
    let mut before = accounts(dir.path());
    let mut made: Vec<String> = Vec::new();
    let (mut finished_requests, mut with_extra) = (0, 0);
    for round in 0..kills() {
        let server = Server::start(dir.path(), &[]);
        let addr = server.addr.clone();
        let results: Vec<(Tally, Tally)> = thread::scope(|scope| {
            let running: Vec<_> = clients
                .iter()
                .map(|(_, key)| {
                    let (addr, seed) = (addr.clone(), random.below(u64::MAX));
                    scope.spawn(move || load(&addr, key, seed))
                })
                .collect();
            let maker = scope.spawn(|| make_keys(&addr, &admin));
            thread::sleep(Duration::from_millis(30 + random.below(400)));
            drop(server);
            made.extend(maker.join().expect("keys"));
            running.into_iter().map(|client| client.join().expect("a client")).collect()
        });

        let database = rusqlite::Connection::open(dir.path().join("keys.sqlite3")).expect("it opens");
        let check: String =
            database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a check");
        assert_eq!(check, "ok", "round {round}");
        let after = accounts(dir.path());
        for ((id, _), (finished, open)) in clients.iter().zip(&results) {
            let lower = before[id].plus(*finished);
            let recorded = after[id];
            assert!(
                lower.fits_in(recorded),
                "round {round}, {id}: {lower:?} finished, {recorded:?} recorded"
            );
            assert!(
                recorded.fits_in(lower.plus(*open)),
                "round {round}, {id}: {lower:?} + {open:?}, {recorded:?}"
            );
            if recorded.requests == lower.requests {
                assert_eq!(recorded, lower, "round {round}, {id}");
            } else {
                with_extra += 1;
            }
            finished_requests += finished.requests;
        }
        before = after;
        let listed = keys_json(dir.path(), &["list"]);
        let status = |id: &str| {
            let key = listed.as_array().expect("a list").iter().find(|key| key["id"] == id);
            key.unwrap_or_else(|| panic!("round {round}: {id} is lost"))["status"].clone()
        };
        assert_eq!(status(&revoked), "revoked");
        for id in made.iter().chain(clients.iter().map(|(id, _)| id)) {
            assert_eq!(status(id), "active");
        }
    }
    println!(
        "{} kills: {finished_requests} requests finished, {with_extra} recorded whose answers did not arrive, {} keys made",
        kills(),
        made.len()
    );
    assert!(finished_requests > kills() && !made.is_empty(), "there was no load");
}
