//! Limits of keys, over real sockets: what is counted, refused, paused, and told.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use m40llm::{
    AppState, ServerConfig,
    auth::{Gate, KeyLimits, NewKey, Store, ledger::UsageFilter, vault::VaultConfig},
};
use m40llm_engine::EngineConfig;
use serde_json::{Value, json};
use tokio::{net::TcpListener, runtime::Runtime, sync::oneshot};

use crate::{
    source::{self, Pace},
    support::MODEL,
};

/// A server with keys, over a token source.
struct Server {
    addr: SocketAddr,
    store: Store,
    runtime: Runtime,
    _stop: oneshot::Sender<()>,
    _dir: tempfile::TempDir,
}

impl Server {
    fn start(ctx_size: usize, pace: Pace) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&VaultConfig { dir: dir.path().into(), signing_secret: None }).unwrap();
        let state =
            AppState::guarded(ServerConfig::new(MODEL, 1_700_000_000), Gate::guarded(store.clone(), false));
        let config = EngineConfig {
            ctx_size: Some(ctx_size),
            max_batch: 64,
            max_queue: 256,
            ..EngineConfig::default()
        };
        state.set_engine(source::engine(&config, pace));
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        runtime.spawn(m40llm::serve(listener, state, async { stopped.await.unwrap_or_default() }));
        Self { addr, store, runtime, _stop: stop, _dir: dir }
    }

    /// A key's id and text.
    fn key(&self, limits: KeyLimits) -> (String, String) {
        let new = NewKey { name: "a caller".into(), limits, ..NewKey::default() };
        let (key, text) = self.runtime.block_on(self.store.with(|vault| vault.create(new))).unwrap();
        (key.id, text)
    }

    /// Tokens that a key is charged for.
    fn charged(&self, id: &str) -> u64 {
        let filter = UsageFilter { key: Some(id.into()), ..UsageFilter::default() };
        let usage = self.runtime.block_on(self.store.with(move |vault| vault.usage(&filter))).unwrap();
        usage.iter().map(|u| u.amounts.prompt_tokens + u.amounts.completion_tokens).sum()
    }

    fn get(&self, key: &str, path: &str) -> Response {
        Response::read(&mut self.send(key, "GET", path, ""))
    }

    fn post(&self, key: &str, path: &str, body: &Value) -> Response {
        Response::read(&mut self.send(key, "POST", path, &body.to_string()))
    }

    fn send(&self, key: &str, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }
}

/// A whole answer, as it came over the wire.
#[derive(Debug)]
struct Response {
    status: u16,
    headers: HashMap<String, String>,
    body: String,
}

impl Response {
    fn read(stream: &mut TcpStream) -> Self {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap()[9..12].parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_ascii_lowercase(), value.to_owned()))
        };
        let headers: HashMap<_, _> = lines.filter_map(header).collect();
        let chunked = headers.get("transfer-encoding").is_some_and(|v| v == "chunked");
        let body = if chunked { dechunk(body) } else { body.to_owned() };
        Self { status, headers, body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    fn number(&self, header: &str) -> u64 {
        self.text(header).parse().unwrap_or_else(|e| panic!("{header}: {e}: {self:?}"))
    }

    fn text(&self, header: &str) -> &str {
        self.headers.get(header).map_or("", String::as_str)
    }

    /// The 429 of the contract; how long it says to wait.
    fn limited(&self) -> Duration {
        assert_eq!(self.status, 429, "{self:?}");
        let error = &self.json()["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("rate_limit_error"), &json!("rate_limit_exceeded"))
        );
        let (seconds, ms) = (self.number("retry-after"), self.number("retry-after-ms"));
        assert!((1..=60).contains(&seconds) && ms.div_ceil(1000) == seconds, "{seconds} s, {ms} ms");
        assert!(self.text("x-should-retry").is_empty());
        Duration::from_millis(ms)
    }
}

fn dechunk(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}

/// A completion of a prompt of so many tokens (the source's tokens are bytes).
fn completion(prompt: usize, fields: &Value) -> Value {
    let mut body = json!({"prompt": "p".repeat(prompt)});
    for (name, value) in fields.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

const COMPLETIONS: &str = "/v1/completions";

#[test]
fn requests_a_minute() {
    let server = Server::start(4096, Pace::default());
    let (_, key) = server.key(KeyLimits { rpm: Some(12), ..KeyLimits::default() });
    let body = completion(3, &json!({"max_tokens": 2}));
    let started = Instant::now();
    for left in (9..12).rev() {
        let answer = server.post(&key, COMPLETIONS, &body);
        assert_eq!((answer.status, answer.number("x-ratelimit-limit-requests")), (200, 12));
        assert_eq!(answer.number("x-ratelimit-remaining-requests"), left);
        assert!(answer.text("x-ratelimit-reset-requests").ends_with('s'));
        assert_eq!(answer.text("x-ratelimit-limit-tokens"), "", "tokens are not limited");
    }
    // What is no work is told, and does not count; what is refused for its fields counts.
    for path in ["/v1/models", "/nope"] {
        assert_eq!(server.get(&key, path).number("x-ratelimit-remaining-requests"), 9, "{path}");
    }
    let bad = server.post(&key, COMPLETIONS, &json!({"prompt": "x", "temperature": 9}));
    assert_eq!((bad.status, bad.number("x-ratelimit-remaining-requests")), (400, 8));
    for path in ["/v1/chat/completions", "/generate", "/v1/messages/count_tokens"] {
        let body = json!({"messages": [{"role": "user", "content": "x"}], "prompt": "x", "max_tokens": 1});
        assert_eq!(server.post(&key, path, &body).status, 200);
    }
    for _ in 0..5 {
        assert_eq!(server.post(&key, COMPLETIONS, &body).status, 200);
    }
    assert!(started.elapsed() < Duration::from_secs(5), "one comes back every five seconds");
    let refused = server.post(&key, COMPLETIONS, &body);
    let wait = refused.limited();
    assert_eq!(refused.number("x-ratelimit-remaining-requests"), 0);
    assert!(wait <= Duration::from_secs(5), "{wait:?}");
    thread::sleep(wait);
    assert_eq!(server.post(&key, COMPLETIONS, &body).status, 200, "it was the truth");
    assert_eq!(server.post(&key, COMPLETIONS, &body).status, 429);
}

#[test]
fn tokens_a_minute() {
    let server = Server::start(4096, Pace::default());
    let (_, key) = server.key(KeyLimits { tpm: Some(1200), ..KeyLimits::default() });
    let answer = server.post(&key, COMPLETIONS, &completion(100, &json!({"max_tokens": 50})));
    assert_eq!((answer.status, answer.number("x-ratelimit-limit-tokens")), (200, 1200));
    let left = answer.number("x-ratelimit-remaining-tokens");
    assert!((1050..1070).contains(&left), "settled before the answer: {left}");
    assert_eq!(answer.text("x-ratelimit-limit-requests"), "");

    let large = server.post(&key, COMPLETIONS, &completion(1000, &json!({"max_tokens": 201})));
    assert_eq!((large.status, large.text("x-should-retry")), (429, "false"));
    assert_eq!(large.text("retry-after"), "", "waiting does not help");
    assert!(large.body.contains("Request too large") && large.body.contains("1201"), "{}", large.body);

    assert_eq!(server.post(&key, COMPLETIONS, &completion(1000, &json!({"max_tokens": 40}))).status, 200);
    let next = completion(50, &json!({"max_tokens": 20}));
    let wait = server.post(&key, COMPLETIONS, &next).limited();
    // 20 tokens a second, and 70 are wanted.
    assert!((1500..3100).contains(&wait.as_millis()), "{wait:?}");
    thread::sleep(wait.saturating_sub(Duration::from_secs(1)));
    assert_eq!(server.post(&key, COMPLETIONS, &next).status, 429, "a second too early");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(server.post(&key, COMPLETIONS, &next).status, 200, "it was the truth");
}

#[test]
fn a_stream_pauses_when_its_key_has_no_tokens_left() {
    let server = Server::start(400, Pace::default());
    let (id, key) = server.key(KeyLimits { tpm: Some(300), ..KeyLimits::default() });
    let (_, free) = server.key(KeyLimits::default());
    let chat = json!({"messages": [{"role": "user", "content": "x".repeat(89)}], "stream": true});
    let whole = server.post(&free, "/v1/chat/completions", &chat);
    let started = Instant::now();
    let mut stream = server.send(&key, "POST", "/v1/chat/completions", &chat.to_string());
    // 210 of 310 tokens come at once, then five in a second.
    let mut seen = String::new();
    let mut read_until = |text: &str, stream: &mut TcpStream| {
        let mut buffer = [0; 4096];
        while !seen.contains(text) {
            let n = stream.read(&mut buffer).unwrap();
            assert!(n > 0, "it ended before {text}: {seen}");
            seen.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
        }
        started.elapsed()
    };
    assert!(read_until("\"t209 \"", &mut stream) < Duration::from_secs(3));
    for (token, seconds) in [("\"t214 \"", 1), ("\"t219 \"", 2)] {
        let at = read_until(token, &mut stream).as_millis();
        assert!((seconds * 1000 - 100..seconds * 1000 + 3000).contains(&at), "{token} after {at} ms");
    }
    // Who goes gets no more, and pays for what there was.
    drop(stream);
    wait_until("the cancelled stream is charged", || server.charged(&id) > 0);
    let charged = server.charged(&id);
    let left = server.get(&key, "/v1/models").number("x-ratelimit-remaining-tokens");
    let most = 300 + (started.elapsed().as_secs_f64() * 5.0) as u64;
    assert!(charged >= 90 + 220 && charged <= most, "{charged} of {most}");
    assert!((most - charged).abs_diff(left) <= 1, "{charged} of {most} are charged, {left} left");
    // The pauses changed nothing that was sent.
    assert_eq!(contents(&seen), contents(&whole.body)[..contents(&seen).len()]);
    assert!(whole.body.contains("\"t309 \""));
}

/// The texts of a stream's chunks, from whatever of it there is.
fn contents(stream: &str) -> Vec<&str> {
    let pieces = stream.split("\"content\":\"").skip(1);
    pieces.map(|piece| piece.split('"').next().unwrap()).filter(|piece| !piece.is_empty()).collect()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn requests_at_once() {
    let pace = Pace { step: Duration::from_millis(5), ..Pace::default() };
    let server = Server::start(4096, pace);
    let (_, key) = server.key(KeyLimits { concurrency: Some(2), ..KeyLimits::default() });
    let long = completion(3, &json!({"max_tokens": 4000, "stream": true})).to_string();
    let short = completion(3, &json!({"max_tokens": 1}));
    let begun = |mut stream: TcpStream| {
        stream.read_exact(&mut [0; 64]).unwrap();
        stream
    };
    let one = begun(server.send(&key, "POST", COMPLETIONS, &long));
    let _two = begun(server.send(&key, "POST", COMPLETIONS, &long));
    assert_eq!(server.post(&key, COMPLETIONS, &short).limited(), Duration::from_secs(1));
    drop(one);
    wait_until("a place is free", || server.post(&key, COMPLETIONS, &short).status == 200);
    // One after another is one at a time.
    let (_, single) = server.key(KeyLimits { concurrency: Some(1), ..KeyLimits::default() });
    for stream in [false, true, false, true] {
        let body = completion(3, &json!({"max_tokens": 3, "stream": stream}));
        assert_eq!(server.post(&single, COMPLETIONS, &body).status, 200);
    }
}

#[test]
fn models_and_context() {
    let server = Server::start(4096, Pace::default());
    let (_, other) = server.key(KeyLimits { models: vec!["other".into()], ..KeyLimits::default() });
    let (_, mine) = server.key(KeyLimits {
        models: vec!["other".into(), MODEL.into()],
        max_context: Some(100),
        ..KeyLimits::default()
    });
    let refused = server.post(&other, COMPLETIONS, &completion(3, &json!({})));
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert_eq!(server.get(&other, "/v1/models").json()["data"], json!([]));
    assert_eq!(server.get(&other, &format!("/v1/models/{MODEL}")).status, 404);
    assert_eq!(server.get(&mine, "/v1/models").json()["data"][0]["id"], MODEL);
    assert_eq!(server.post(&mine, COMPLETIONS, &completion(90, &json!({"max_tokens": 10}))).status, 200);
    let long = server.post(&mine, COMPLETIONS, &completion(90, &json!({"max_tokens": 11})));
    let error = &long.json()["error"];
    assert_eq!((long.status, &error["code"]), (400, &json!("context_length_exceeded")));
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("maximum context length is 100 tokens"), "{message}");
    // Without a bound of its own the output ends where the key's context does.
    let chat = json!({"messages": [{"role": "user", "content": "x".repeat(89)}]});
    let answer = server.post(&mine, "/v1/chat/completions", &chat).json();
    assert_eq!(answer["usage"]["total_tokens"], 100);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

/// Small and seedable.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// One request of a caller: whole, as a stream, or broken off.
fn call(server: &Server, key: &str, random: &mut Random, finished: &AtomicU64) {
    let (prompt, limit) = (1 + random.below(60) as usize, 1 + random.below(80));
    let stream = random.below(2) == 0;
    let mut body = match random.below(3) {
        0 => completion(prompt, &json!({"max_tokens": limit, "stream": stream})),
        1 => json!({"messages": [{"role": "user", "content": "c".repeat(prompt)}], "stream": stream}),
        _ => completion(prompt, &json!({"max_tokens": limit, "n": 2, "stream": stream})),
    };
    if stream {
        body["stream_options"] = json!({"include_usage": true});
    }
    let path = if body.get("messages").is_some() { "/v1/chat/completions" } else { COMPLETIONS };
    let mut connection = server.send(key, "POST", path, &body.to_string());
    if random.below(3) == 0 {
        let _ = connection.read(&mut vec![0; 1 + random.below(2000) as usize]);
        return;
    }
    let answer = Response::read(&mut connection);
    if answer.status != 200 {
        answer.limited();
        thread::sleep(Duration::from_millis(random.below(100)));
        return;
    }
    let usage = if stream {
        let events = answer.body.split("data: ").filter(|e| e.contains("\"usage\":{"));
        serde_json::from_str::<Value>(events.last().unwrap().trim()).unwrap()["usage"].clone()
    } else {
        answer.json()["usage"].clone()
    };
    finished.fetch_add(usage["total_tokens"].as_u64().unwrap(), Ordering::SeqCst);
}

#[test]
fn fifty_callers_on_five_keys_to_the_token() {
    const TPM: u64 = 12_000;
    const SECONDS: u64 = 3;
    let seed = u64::from(std::process::id()) | 1;
    println!("seed {seed}");
    let server = Server::start(400, Pace { step: Duration::from_micros(500), ..Pace::default() });
    let keys: Vec<_> = (0..5)
        .map(|_| {
            server.key(KeyLimits { tpm: Some(TPM as u32), concurrency: Some(8), ..KeyLimits::default() })
        })
        .collect();
    let finished: Vec<_> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    let started = Instant::now();
    thread::scope(|scope| {
        let (server, keys, finished) = (&server, &keys, &finished);
        for caller in 0..50 {
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_mul(caller as u64 + 1) | 1);
                while started.elapsed() < Duration::from_secs(SECONDS) {
                    call(server, &keys[caller % 5].1, &mut random, &finished[caller % 5]);
                }
            });
        }
    });
    // All have ended; the last cancelled ones are noticed and written down.
    thread::sleep(Duration::from_millis(500));
    for ((id, key), finished) in keys.iter().zip(&finished) {
        let left = server.get(key, "/v1/models").number("x-ratelimit-remaining-tokens");
        let elapsed = started.elapsed().as_secs_f64();
        let charged = server.charged(id);
        let flow = TPM as f64 / 60.0 * elapsed;
        let most = TPM as f64 + flow;
        assert!(charged >= finished.load(Ordering::SeqCst), "what clients were told is charged");
        assert!(charged as f64 <= most, "{charged} of {most}: nobody gets more");
        assert!(charged > TPM * 9 / 10, "the limit was reached: {charged}");
        // Nothing leaks: what is left is what was not used, but for what flows in two seconds: the first
        // request came that much after `started` at most, and until then the bucket was full.
        let expected = most - charged as f64;
        let gap = expected - left as f64;
        assert!((-1.0..=TPM as f64 / 30.0).contains(&gap), "{left} left, {expected} expected");
    }
}
