//! `m40llm run` as a process: its address, its log, its signals.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Stdio},
};

use super::{m40llm, model, refused, run};

#[test]
fn run_refuses_an_address_that_others_reach() {
    for addr in ["0.0.0.0:0", "[::]:0"] {
        refused(&run(&["run", "model.gguf", "--addr", addr]), 2, &[addr, "m40llm keys create", "--no-auth"]);
    }
}

#[test]
fn run_on_a_taken_port_is_1_before_the_model_is_read() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address").to_string();
    refused(&run(&["run", "/nowhere/model.gguf", "--addr", &addr]), 1, &[&addr, "--addr"]);
}

#[test]
fn run_without_a_model_is_1_and_logs_nothing() {
    refused(&run(&["run", "/nowhere/model.gguf", "--addr", "127.0.0.1:0"]), 1, &["/nowhere/model.gguf"]);
}

/// A running server, its address and the lines it logged until it listened.
struct Server {
    child: Child,
    addr: String,
    lines: Vec<String>,
    log: BufReader<std::process::ChildStderr>,
}

impl Server {
    fn start(flags: &[&str]) -> Self {
        let model = model();
        let fixed = ["run", &model, "--addr", "127.0.0.1:0", "--ctx-size", "512"];
        let mut child = m40llm(&[&fixed as &[&str], flags].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut lines = Vec::new();
        let addr = loop {
            let mut line = String::new();
            assert_ne!(log.read_line(&mut line).expect("a log"), 0, "it ended: {lines:?}");
            lines.push(line.clone());
            if let Some((_, addr)) = line.trim_end().split_once("listening on http://") {
                break addr.to_owned();
            }
        };
        Self { child, addr, lines, log }
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let kill = std::process::Command::new("kill").args([name, &id]).status().expect("kill");
        assert!(kill.success());
    }

    /// Exit code, stdout and the rest of the log.
    fn end(mut self) -> (Option<i32>, String, String) {
        let (mut out, mut rest) = (String::new(), String::new());
        self.log.read_to_string(&mut rest).expect("a log");
        self.child.stdout.take().expect("a pipe").read_to_string(&mut out).expect("stdout");
        (self.child.wait().expect("it ends").code(), out, rest)
    }
}

/// Sends a request; the connection, to read the answer from.
fn post(addr: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).expect("a connection");
    let head = "POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n";
    write!(stream, "{head}host: {addr}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).expect("it reads");
    stream
}

fn answer(mut stream: TcpStream) -> String {
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

#[test]
fn run_serves_warns_once_and_ends_on_a_signal() {
    let server = Server::start(&["--model-alias", "demo"]);
    let warnings: Vec<_> = server.lines.iter().filter(|line| line.contains("WARN")).collect();
    assert_eq!(warnings.len(), 1, "{:?}", server.lines);
    assert!(warnings[0].contains("no API key"), "{warnings:?}");
    let health = run(&["health", "--addr", &server.addr]);
    assert_eq!(health.status.code(), Some(0), "{health:?}");
    let answer = answer(post(&server.addr, r#"{"model":"demo","prompt":"1 2 3","max_tokens":2}"#));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.signal("-TERM");
    let (code, out, rest) = server.end();
    assert_eq!((code, out.as_str()), (Some(0), ""));
    assert!(rest.contains("curl http://"), "{rest}");
}

#[test]
fn a_signal_finishes_what_runs_and_refuses_what_comes() {
    let server = Server::start(&["--no-auth"]);
    assert!(!server.lines.iter().any(|line| line.contains("WARN")), "{:?}", server.lines);
    let mut running =
        post(&server.addr, r#"{"prompt":"1 2 3","max_tokens":250,"stream":true,"temperature":0}"#);
    // Its first bytes are there: it runs.
    running.read_exact(&mut [0; 12]).expect("a status line");
    server.signal("-INT");
    let draining = loop {
        let health = run(&["health", "--addr", &server.addr]);
        if health.status.code() != Some(0) {
            break health;
        }
    };
    refused(&draining, 1, &["shutting down"]);
    let late = answer(post(&server.addr, r#"{"prompt":"1","max_tokens":1}"#));
    assert!(late.starts_with("HTTP/1.1 503") && late.contains("overloaded"), "{late}");
    assert!(answer(running).ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "the stream was cut");
    assert_eq!(server.end().0, Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let server = Server::start(&[]);
    let mut running =
        post(&server.addr, r#"{"prompt":"1 2 3","max_tokens":500,"stream":true,"temperature":0}"#);
    running.read_exact(&mut [0; 12]).expect("a status line");
    server.signal("-TERM");
    while run(&["health", "--addr", &server.addr]).status.code() == Some(0) {}
    server.signal("-TERM");
    let (code, _, rest) = server.end();
    assert_eq!(code, Some(1), "{rest}");
    assert!(rest.contains("second signal"), "{rest}");
}
