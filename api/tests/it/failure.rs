//! A device that fails under a real server: what runs is told, `/health` says so, the server ends or stays.

use std::{
    future::pending,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::mpsc::{self, Sender},
    thread,
    time::{Duration, Instant},
};

use m40llm::{AppState, ServerConfig};
use m40llm_engine::{
    Engine, EngineConfig, EngineError, Event, GenerateRequest, Generation, SubmitError,
    backend::cpu::ReferenceBackend, text::PromptFormat,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};

use crate::{
    faulty::{Fault, Faulty},
    support::MODEL,
};

const CALL: &str = "cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS: start again";

fn lost() -> Fault {
    Box::new(|| EngineError::DeviceLost(CALL.into()))
}

/// Over an engine that runs one sequence at a time, and whose third step waits for a fault.
struct Server {
    engine: Engine,
    addr: SocketAddr,
    fault: Sender<Fault>,
    served: JoinHandle<io::Result<()>>,
}

impl Server {
    async fn start(exit_on_failure: bool) -> Self {
        let (fault, faults) = mpsc::channel();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
        let config = EngineConfig { ctx_size: Some(128), max_batch: 1, ..EngineConfig::default() };
        let backend = Faulty::new(ReferenceBackend::new(1), 3, faults);
        let engine = Engine::load_on(&path, &config, backend, |_| {}).unwrap();
        let state = AppState::loading(ServerConfig {
            prompt_format: PromptFormat::Raw,
            exit_on_failure,
            ..ServerConfig::new(MODEL, 1_700_000_000)
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        // Served before the model is there, as `run` does it.
        let served = tokio::spawn(m40llm::serve(listener, state.clone(), pending()));
        state.set_engine(engine.clone());
        Self { engine, addr, fault, served }
    }

    /// A request over HTTP that runs and waits in its third step, and one that waits for it to end.
    async fn two_in_work(&self, stream: bool) -> (thread::JoinHandle<Answer>, Generation) {
        let addr = self.addr;
        let running = thread::spawn(move || generate(addr, stream));
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.engine.stats().steps < 2 {
            assert!(Instant::now() < deadline, "{:?}", self.engine.stats());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let request = GenerateRequest { prompt: vec![1], max_tokens: Some(4), ..GenerateRequest::default() };
        (running, self.engine.submit(request).unwrap())
    }

    async fn ended(self) -> String {
        let ended = timeout(Duration::from_secs(30), self.served).await.expect("the server hangs");
        ended.unwrap().expect_err("the server ended well").to_string()
    }
}

/// Status and body.
type Answer = (u16, String);

/// A request on a connection of its own, read to the connection's end.
fn send(addr: SocketAddr, method: &str, path: &str, body: &str) -> Answer {
    let answer = exchange(addr, method, path, body);
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer with a head");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Head and body as they came.
fn exchange(addr: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut connection = TcpStream::connect(addr).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let length = body.len();
    write!(
        connection,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    answer
}

fn generate(addr: SocketAddr, stream: bool) -> Answer {
    let body = json!({"prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": stream});
    send(addr, "POST", "/generate", &body.to_string())
}

fn health(addr: SocketAddr) -> (u16, Value) {
    let (status, body) = send(addr, "GET", "/health", "");
    (status, serde_json::from_str(&body).unwrap())
}

async fn last(mut generation: Generation) -> Event {
    loop {
        match generation.next().await.expect("a last event") {
            Event::Text { .. } | Event::Prompt(_) | Event::Embedding(_) => {}
            event => return event,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_fails_every_request_and_ends_the_server() {
    let server = Server::start(true).await;
    let (running, waiting) = server.two_in_work(true).await;
    assert_eq!(health(server.addr), (200, json!({"status": "ok"})));
    server.fault.send(lost()).unwrap();

    let (status, body) = running.join().unwrap();
    assert_eq!(status, 200, "its stream had begun");
    assert!(body.contains("\"done\":false"), "{body}");
    assert!(body.contains(&format!("the device has failed: {CALL}")) && body.contains("\"error\""), "{body}");
    assert!(!body.contains("\"done\":true"), "{body}");
    assert!(matches!(last(waiting).await, Event::Failed(EngineError::DeviceLost(call)) if call == CALL));
    let refused = server.engine.submit(GenerateRequest { prompt: vec![1], ..GenerateRequest::default() });
    assert!(matches!(refused, Err(SubmitError::Stopped(words)) if words.contains(CALL)));
    assert_eq!((server.engine.stats().running, server.engine.stats().kv_blocks_used), (0, 0));
    assert_eq!(server.ended().await, format!("the device has failed: {CALL}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_told_to_stay_says_that_it_has_failed() {
    let server = Server::start(false).await;
    let (running, waiting) = server.two_in_work(false).await;
    server.fault.send(lost()).unwrap();

    for (status, body) in [running.join().unwrap(), generate(server.addr, false)] {
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &body["error"]["type"]), (500, &json!("server_error")));
        assert!(body["error"]["message"].as_str().unwrap().contains(CALL), "{body}");
    }
    assert!(matches!(last(waiting).await, Event::Failed(EngineError::DeviceLost(_))));
    assert_eq!(health(server.addr), (503, json!({"status": "failed"})));
    // The backend of this test says that each step launches once and waits twice.
    let (_, metrics) = send(server.addr, "GET", "/metrics", "");
    assert!(metrics.contains("\nm40llm_kernel_launches_total 3\n"), "{metrics}");
    assert!(metrics.contains("\nm40llm_device_syncs_total 6\n"), "{metrics}");
    assert!(metrics.contains("\nm40llm_outcomes_total{outcome=\"failed\"} 2\n"), "{metrics}");
    assert!(metrics.contains("\nm40llm_ready 0\n"), "{metrics}");
    // It stays so until somebody starts it again: the SDKs need not try twice more.
    let refused = exchange(server.addr, "POST", "/generate", &json!({"prompt": "hello"}).to_string());
    assert!(
        refused.starts_with("HTTP/1.1 500 ") && refused.contains("\r\nx-should-retry: false\r\n"),
        "{refused}"
    );
    assert!(!server.served.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_ends_its_own_requests_only() {
    let server = Server::start(true).await;
    let (running, waiting) = server.two_in_work(false).await;
    server.fault.send(Box::new(|| EngineError::Backend("no room for a batch".into()))).unwrap();

    let (status, body) = running.join().unwrap();
    assert!(status == 500 && body.contains("no room for a batch"), "{status} {body}");
    assert!(matches!(last(waiting).await, Event::Done { .. }));
    assert_eq!(health(server.addr), (200, json!({"status": "ok"})));
    assert_eq!(generate(server.addr, false).0, 200);
    assert!(!server.served.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_of_the_worker_counts_as_a_lost_device() {
    let server = Server::start(true).await;
    let (running, waiting) = server.two_in_work(false).await;
    server.fault.send(Box::new(|| panic!("on purpose"))).unwrap();

    let (status, body) = running.join().unwrap();
    assert!(status == 500 && body.contains("worker failed: on purpose"), "{status} {body}");
    assert!(matches!(last(waiting).await, Event::Failed(_)));
    assert!(server.ended().await.contains("worker failed: on purpose"));
}
