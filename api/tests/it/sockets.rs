//! Callers that behave badly, over real sockets: they get what they deserve, the others notice nothing.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use m40llm::{AppState, ServerConfig, transport::Limits};
use m40llm_engine::{Engine, EngineConfig, backend::cpu::ReferenceBackend, text::PromptFormat};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::oneshot,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{faulty::Faulty, support::MODEL};

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a step takes. A whole answer of [`long`] takes 500 of them.
const STEP: Duration = Duration::from_millis(20);

/// A real server over an engine of its own that takes its time.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) engine: Engine,
    stop: oneshot::Sender<()>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Server {
    /// With the default limits, as `edit` changes them.
    pub(crate) async fn start(edit: impl FnOnce(&mut ServerConfig)) -> Self {
        Self::with(Self::engine(), edit).await
    }

    /// The same, over an engine of another configuration.
    pub(crate) async fn with(engine: EngineConfig, edit: impl FnOnce(&mut ServerConfig)) -> Self {
        Self::listening(TcpListener::bind("127.0.0.1:0").await.unwrap(), &engine, edit)
    }

    pub(crate) fn engine() -> EngineConfig {
        EngineConfig { ctx_size: Some(600), max_batch: 8, ..EngineConfig::default() }
    }

    fn listening(listener: TcpListener, config: &EngineConfig, edit: impl FnOnce(&mut ServerConfig)) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
        let backend = Faulty::slow(ReferenceBackend::new(1), STEP);
        let engine = Engine::load_on(&path, config, backend, |_| {}).unwrap();
        let mut config =
            ServerConfig { prompt_format: PromptFormat::Raw, ..ServerConfig::new(MODEL, 1_700_000_000) };
        edit(&mut config);
        let state = AppState::loading(config);
        state.set_engine(engine.clone());
        let addr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served =
            tokio::spawn(m40llm::serve(listener, state, async { stopped.await.unwrap_or_default() }));
        Self { addr, engine, stop, served }
    }

    /// Connected, and these bytes sent.
    pub(crate) async fn send(&self, bytes: impl AsRef<[u8]>) -> TcpStream {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        stream.write_all(bytes.as_ref()).await.unwrap();
        stream
    }

    /// On a connection of its own.
    pub(crate) async fn get(&self, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        rest(&mut self.send(request).await).await
    }

    async fn health(&self) -> String {
        self.get("/health").await
    }

    /// Waits until `count` sequences are in the batch.
    async fn running(&self, count: usize) {
        let since = Instant::now();
        while self.engine.stats().running != count {
            assert!(since.elapsed() < PATIENCE, "{:?}", self.engine.stats());
            sleep(Duration::from_millis(2)).await;
        }
    }
}

/// What comes up to the connection's end; a reset is an end too.
pub(crate) async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = async {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            bytes.extend_from_slice(&buffer[..n]);
        }
    };
    timeout(PATIENCE, read).await.expect("the connection stays open");
    // One that is cut off may end in the midst of a character.
    String::from_utf8_lossy(&bytes).into_owned()
}

pub(crate) fn post(version: &str, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/completions HTTP/{version}\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Generates `max_tokens` and does not end before.
fn work(max_tokens: usize, stream: bool) -> Value {
    json!({"prompt": "hello", "max_tokens": max_tokens, "stream": stream, "logit_bias": {"2": -100}})
}

/// Ten seconds of work.
fn long(stream: bool) -> Value {
    work(500, stream)
}

fn limits(edit: impl FnOnce(&mut Limits)) -> impl FnOnce(&mut ServerConfig) {
    |config| edit(&mut config.limits)
}

const SHORT: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_come_too_slowly_are_408() {
    let server = Server::start(limits(|l| l.body_stall = SHORT)).await;
    let head = "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n";
    for drips in [false, true] {
        let stream = server.send(head).await;
        let (mut read, mut write) = stream.into_split();
        let drip = tokio::spawn(async move {
            // Never silent for long, and far too slow: some bytes a second.
            while drips && write.write_all(b"{").await.is_ok() {
                sleep(SHORT / 6).await;
            }
            write
        });
        let mut answer = Vec::new();
        timeout(PATIENCE, read.read_to_end(&mut answer)).await.expect("the connection stays open").unwrap();
        drip.abort();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("\r\nconnection: close\r\n"), "{answer}");
        let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert!(body["error"]["message"].as_str().unwrap().contains("too slowly"));
    }
    assert_eq!(server.engine.stats().generated_tokens, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_takes_long_but_keeps_coming_is_read() {
    let stall = Duration::from_secs(1);
    let server = Server::start(limits(|l| (l.body_stall, l.body_rate) = (stall, 1000))).await;
    let body = format!("{}{}", " ".repeat(20_000), work(1, false));
    let request = post("1.1", &Value::Null).replace(
        "content-length: 4\r\n\r\nnull",
        &format!("connection: close\r\ncontent-length: {}\r\n\r\n", body.len()),
    );
    let mut stream = server.send(request).await;
    let since = Instant::now();
    for piece in body.as_bytes().chunks(body.len() / 4 + 1) {
        sleep(stall / 3).await;
        stream.write_all(piece).await.unwrap();
    }
    assert!(since.elapsed() > stall);
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_and_idle_connections_are_closed() {
    let server = Server::start(limits(|l| l.head = SHORT)).await;
    let mut slow = server.send("GET /health HTTP/1.1\r\nhost: ").await;
    let idle = TcpStream::connect(server.addr).await.unwrap();
    assert_eq!(rest(&mut slow).await, "", "there is no request to answer");
    let mut late = idle;
    late.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(rest(&mut late).await.starts_with("HTTP/1.1 200 "), "idle is not slow");

    let server = Server::start(limits(|l| l.idle = SHORT)).await;
    let mut silent = TcpStream::connect(server.addr).await.unwrap();
    assert_eq!(rest(&mut silent).await, "");
    let mut kept = server.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(rest(&mut kept).await.starts_with("HTTP/1.1 200 "));
    // Work is not idleness.
    let mut busy = server.send(post("1.1", &work(40, false))).await;
    let since = Instant::now();
    assert!(rest(&mut busy).await.contains("\"finish_reason\":\"length\""));
    assert!(since.elapsed() > 2 * SHORT);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_have_limits() {
    let server = Server::start(|_| {}).await;
    let get =
        |headers: &str| format!("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    let field = |n: usize| format!("x-long: {}\r\n", "a".repeat(n));
    let many = |n: usize| (0..n).map(|i| format!("x-{i}: 1\r\n")).collect::<Vec<_>>().concat();
    for (headers, status) in [
        (field(60_000), "200"),
        (field(70_000), "431"),
        (field(700_000), "431"),
        (many(98), "200"),
        (many(99), "431"),
    ] {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let (mut read, mut write) = stream.into_split();
        let request = get(&headers);
        // It may be refused before it is sent.
        let sent = tokio::spawn(async move {
            let _ = write.write_all(request.as_bytes()).await;
            write
        });
        let mut answer = String::new();
        timeout(PATIENCE, read.read_to_string(&mut answer)).await.unwrap().unwrap();
        sent.abort();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
        if status == "431" {
            assert!(answer.ends_with("\r\n\r\n"), "no request, no body: {answer}");
        }
    }
    for (length, status) in [(60_000, "404"), (65_530, "431"), (70_000, "431")] {
        let path = "a".repeat(length);
        let mut stream = server.send(format!("GET /{path} HTTP/1.1\r\nconnection: close\r\n\r\n")).await;
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{length}: {answer}");
    }
    assert!(server.health().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_close_end_their_work() {
    let server = Server::start(|_| {}).await;
    let requests = [
        post("1.1", &long(false)),
        post("1.1", &long(true)),
        post("1.0", &long(false)),
        post("1.0", &long(true)),
        // What follows it is not read before the answer.
        post("1.1", &long(false)) + "\r\nGET /health HTTP/1.1\r\n",
    ];
    for request in requests {
        let before = server.engine.stats().generated_tokens;
        let stream = server.send(&request).await;
        server.running(1).await;
        let since = server.engine.stats().steps;
        drop(stream);
        server.running(0).await;
        let steps = server.engine.stats().steps - since;
        println!("{steps} steps after the client went");
        // The one that runs, one more, and what a busy machine adds; not the 25 until it is asked again.
        assert!(steps < 15, "{steps} steps after the client went: {request}");
        assert!(server.engine.stats().generated_tokens - before < 100);
    }
    // All of them at once, while they read.
    let mut streams = Vec::new();
    for i in 0..8 {
        streams.push(server.send(post("1.1", &long(i % 2 == 0))).await);
    }
    server.running(8).await;
    drop(streams);
    server.running(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_closed_clients_get_their_answer() {
    let server = Server::start(|config| config.keep_alive = Duration::from_millis(1)).await;
    for stream in [false, true] {
        let mut client = server.send(post("1.1", &work(60, stream))).await;
        client.shutdown().await.unwrap();
        let mut answer = rest(&mut client).await;
        let mut probes = 0;
        while let Some(rest) = answer.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n") {
            answer = rest.to_owned();
            probes += 1;
        }
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(stream || (1..5).contains(&probes), "{probes} probes in a second");
        assert!(answer.contains("\"finish_reason\":\"length\""), "{answer}");
        assert!(!answer.contains("100 Continue"), "{answer}");
        if stream {
            let (_, body) = answer.split_once("\r\n\r\n").unwrap();
            let body = dechunked(body);
            assert!(body.ends_with("data: [DONE]\n\n"), "{body}");
        }
    }
    // The probe is not for those who do not know it.
    let mut old = server.send(post("1.0", &long(false))).await;
    old.shutdown().await.unwrap();
    assert_eq!(rest(&mut old).await, "");
    server.running(0).await;
    // A half-closed one that closes after all is gone.
    for stream in [false, true] {
        let mut client = server.send(post("1.1", &long(stream))).await;
        client.shutdown().await.unwrap();
        server.running(1).await;
        let mut first = [0; 1];
        client.read_exact(&mut first).await.unwrap();
        drop(client);
        server.running(0).await;
    }
    assert!(server.engine.stats().generated_tokens < 500);
}

/// The text of a body in chunks, which must be well formed.
fn dechunked(mut body: &str) -> String {
    let mut text = String::new();
    loop {
        let (size, after) = body.split_once("\r\n").expect("a chunk's size");
        let size = usize::from_str_radix(size, 16).expect("a chunk's size");
        text.push_str(&after[..size]);
        body = after[size..].strip_prefix("\r\n").expect("a chunk's end");
        if size == 0 {
            assert_eq!(body, "");
            return text;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_that_take_nothing_are_cut_off() {
    // Small buffers of the system's, which a connection has from its listener.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_send_buffer_size(4096).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let server =
        Server::listening(socket.listen(16).unwrap(), &Server::engine(), limits(|l| l.write_stall = SHORT));
    let client = TcpSocket::new_v4().unwrap();
    client.set_recv_buffer_size(4096).unwrap();
    let mut client = client.connect(server.addr).await.unwrap();
    let mut request = long(true);
    request["logprobs"] = json!(5);
    request["n"] = json!(8);
    client.write_all(post("1.1", &request).as_bytes()).await.unwrap();
    server.running(8).await;
    // Nothing is read, so that the work ends before its time.
    server.running(0).await;
    let tokens = server.engine.stats().generated_tokens;
    assert!(tokens < 8 * 500, "{tokens}");
    assert!(!rest(&mut client).await.contains("[DONE]"));
    assert!(server.health().await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_caller_is_served_beside_500_idle_ones() {
    raise_open_files(2000);
    let server = Server::start(|_| {}).await;
    let mut idle = Vec::new();
    for i in 0..500 {
        // Some have said nothing, some have begun, some have had an answer.
        let bytes = ["", "GET /hea", "GET /health HTTP/1.1\r\nhost: x\r\n\r\n"][i % 3];
        idle.push(server.send(bytes).await);
    }
    let mut good =
        server.send(post("1.1", &work(3, false)).replace("host: x", "host: x\r\nconnection: close")).await;
    assert!(rest(&mut good).await.contains("\"finish_reason\":\"length\""));
    // They were not closed for it: the third kind has its answer and no end.
    let mut kept = idle.swap_remove(2);
    let mut answer = [0; 4096];
    assert!(kept.read(&mut answer).await.unwrap() > 0);
    assert!(timeout(SHORT, kept.read(&mut answer)).await.is_err(), "closed while there was room");
}

/// Client and server are one process here.
fn raise_open_files(wanted: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|n| n < wanted) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_above_the_limit_wait_and_idle_ones_make_room() {
    let server = Server::start(limits(|l| l.connections = 2)).await;
    let mut idle = [server.send("").await, server.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await];
    // Room for a third is made of those that have no request.
    assert!(server.health().await.starts_with("HTTP/1.1 200 "));
    assert_eq!(rest(&mut idle[0]).await, "");
    assert!(rest(&mut idle[1]).await.starts_with("HTTP/1.1 200 "));
    // Those that have one are served to its end.
    let busy = [server.send(post("1.1", &long(true))).await, server.send(post("1.1", &long(false))).await];
    server.running(2).await;
    let server = Arc::new(server);
    let third = tokio::spawn({
        let server = server.clone();
        async move { server.health().await }
    });
    sleep(SHORT).await;
    assert!(!third.is_finished(), "there was no room");
    drop(busy);
    assert!(third.await.unwrap().starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_waits_for_answers_and_closes_the_rest() {
    let server = Server::start(|_| {}).await;
    let mut idle = server.send("GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await;
    let mut busy = server.send(post("1.1", &work(30, true))).await;
    server.running(1).await;
    server.stop.send(()).unwrap();
    // While it drains, it still says so, to new connections too.
    let mut asking = TcpStream::connect(server.addr).await.unwrap();
    let mut answer = String::new();
    while !answer.contains("draining") {
        asking.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        answer = rest(&mut asking).await;
        assert!(answer.contains("draining") || answer.contains("ok"), "{answer}");
        if !answer.contains("draining") {
            asking = TcpStream::connect(server.addr).await.unwrap();
        }
    }
    assert!(dechunked(rest(&mut busy).await.split_once("\r\n\r\n").unwrap().1).ends_with("data: [DONE]\n\n"));
    assert!(rest(&mut idle).await.starts_with("HTTP/1.1 200 "));
    timeout(PATIENCE, server.served).await.expect("the server hangs").unwrap().unwrap();
    assert!(TcpStream::connect(server.addr).await.is_err(), "nobody listens any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_does_not_wait_for_ever() {
    let server = Server::start(limits(|l| l.flush = SHORT)).await;
    let mut slow = server.send("GET /hea").await;
    assert!(server.health().await.starts_with("HTTP/1.1 200 "));
    server.stop.send(()).unwrap();
    timeout(PATIENCE, server.served).await.expect("the server hangs").unwrap().unwrap();
    assert_eq!(rest(&mut slow).await, "");
}
