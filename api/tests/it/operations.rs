//! The real binary as its operator sees it: log lines, spans at a collector, SIGHUP; and that prompts and keys
//! are in none of them.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::cli::{m40llm, model};

/// Long work that does not end by itself.
const ENDLESS: &str =
    r#"{"prompt":"1 2 3","max_tokens":450,"temperature":0,"logit_bias":{"0":-100,"2":-100},"stream":STREAM}"#;

/// Waits for `found`, at most a minute.
fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A running server and what it has logged.
struct Server {
    child: Child,
    addr: String,
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start(flags: &[&str]) -> Self {
        let model = model();
        let fixed = ["run", &model, "--addr", "127.0.0.1:0", "--ctx-size", "512"];
        let mut command = m40llm(&[&fixed as &[&str], flags].concat());
        let mut child =
            command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the binary starts");
        let log = BufReader::new(child.stderr.take().expect("a pipe"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                kept.lock().expect("no panic").push(line);
            }
        });
        let mut server = Self { child, addr: String::new(), lines, reader: Some(reader) };
        server.addr = server.line("it listens", |line| {
            let (_, rest) = line.split_once("listening on http://")?;
            Some(rest.split(['"', ' ']).next()?.to_owned())
        });
        server
    }

    fn log(&self) -> Vec<String> {
        self.lines.lock().expect("no panic").clone()
    }

    /// The first line that `found` takes.
    fn line<T>(&self, what: &str, found: impl Fn(&str) -> Option<T>) -> T {
        wait_for(what, || self.log().iter().find_map(|line| found(line)))
    }

    /// The JSON line of the request with this id.
    fn entry(&self, id: &str) -> Value {
        self.line(id, |line| {
            let line: Value = serde_json::from_str(line).expect("each line is an object");
            (line["message"] == "request" && line["id"] == id).then_some(line)
        })
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(std::process::Command::new("kill").args([name, &id]).status().expect("kill").success());
    }

    /// Ends it by SIGTERM; all that it logged.
    fn end(mut self) -> Vec<String> {
        self.signal("-TERM");
        assert_eq!(self.child.wait().expect("it ends").code(), Some(0));
        self.reader.take().expect("it ends once").join().expect("no panic");
        self.log()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request with these header lines; the connection, to read the answer from.
fn send(addr: &str, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut connection = TcpStream::connect(addr).expect("a connection");
    connection.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let length = body.len();
    write!(
        connection,
        "{method} {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n{body}"
    )
    .expect("it reads");
    connection
}

fn ask(addr: &str, method: &str, path: &str, headers: &str, body: &str) -> String {
    let mut answer = String::new();
    send(addr, method, path, headers, body).read_to_string(&mut answer).expect("an answer");
    answer
}

/// A completion under an id.
fn complete(addr: &str, id: &str, body: &str) -> TcpStream {
    send(addr, "POST", "/v1/completions", &format!("x-request-id: {id}\r\n"), body)
}

fn answer(mut connection: TcpStream) -> String {
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    answer
}

/// The sum of a metric's samples.
fn metric(addr: &str, name: &str) -> f64 {
    let page = ask(addr, "GET", "/metrics", "", "");
    let samples = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

fn fields(entry: &Value) -> BTreeSet<String> {
    entry.as_object().unwrap().keys().cloned().collect()
}

/// The fields that docs/diagnostics.md gives to requests of these kinds.
fn documented(kinds: &[&str]) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/diagnostics.md");
    let text = std::fs::read_to_string(path).expect("the page");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let mut found = BTreeSet::new();
    for kind in kinds {
        let fields = rows.clone().filter(|(_, rest)| rest.split(" | ").next() == Some(*kind));
        let before = found.len();
        found.extend(fields.map(|(field, _)| field.to_owned()));
        assert!(found.len() > before, "no field is of {kind}");
    }
    found
}

const EVERY: &str = "every request";
const ERROR: &str = "those answered with an error";
const WORK: [&str; 4] =
    [EVERY, "those that the engine was asked for", "those that a step took up", "those with output"];

#[test]
fn every_request_leaves_one_line_that_says_what_it_came_to() {
    let server = Server::start(&["--log-format", "json", "--model-alias", "demo", "--max-batch", "1"]);
    let addr = &*server.addr;
    let short = r#"{"prompt":"1 2 3","max_tokens":4,"temperature":0}"#;
    assert!(answer(complete(addr, "whole", short)).contains("200 OK"));
    let streamed = short.replace("\"max", "\"stream\":true,\"max");
    assert!(answer(complete(addr, "stream", &streamed)).contains("[DONE]"));
    assert!(answer(complete(addr, "refused", r#"{"prompt":"x","temperature":9}"#)).contains("400 Bad"));
    assert!(ask(addr, "GET", "/nothing", "x-request-id: nothing\r\n", "").contains("404 Not"));
    assert!(ask(addr, "GET", "/v1/models", "x-request-id: models\r\n", "").contains("demo"));

    // A stream that is left after its first bytes, while another request waits for its place.
    let endless = |stream: bool| ENDLESS.replace("STREAM", if stream { "true" } else { "false" });
    let mut left = complete(addr, "left", &endless(true));
    left.read_exact(&mut [0; 12]).expect("a status line");
    let waiting = complete(addr, "waiting", short);
    wait_for("it waits", || (metric(addr, "m40llm_sequences_waiting") >= 1.0).then_some(()));
    let since = Instant::now();
    thread::sleep(Duration::from_millis(100));
    let waited = since.elapsed();
    drop(left);
    assert!(answer(waiting).contains("200 OK"));
    // One that is left before it has an answer, and is counted nevertheless.
    let gone = complete(addr, "gone", &endless(false));
    wait_for("it runs", || (metric(addr, "m40llm_sequences_running") >= 1.0).then_some(()));
    drop(gone);

    let work = documented(&WORK);
    for (id, status, outcome) in [
        ("whole", 200, "length"),
        ("stream", 200, "length"),
        ("left", 200, "cancelled"),
        ("waiting", 200, "length"),
        ("gone", 499, "cancelled"),
        ("refused", 400, "refused"),
        ("nothing", 404, "refused"),
        ("models", 200, "done"),
    ] {
        let entry = server.entry(id);
        assert_eq!((&entry["status"], &entry["outcome"]), (&json!(status), &json!(outcome)), "{entry}");
        assert_eq!(entry["level"], "INFO");
        let number = |key: &str| entry[key].as_f64().unwrap_or_else(|| panic!("{key}: {entry}"));
        match id {
            "whole" | "stream" | "left" | "waiting" => {
                assert_eq!(fields(&entry), work, "{entry}");
                assert!(number("queue_ms") <= number("ttft_ms"), "{entry}");
                assert!(number("ttft_ms") <= number("duration_ms"), "{entry}");
            }
            // It had no output yet, or had: both are true, as it may be.
            "gone" => assert!(fields(&entry).is_subset(&work) && entry["model"] == "demo", "{entry}"),
            "refused" | "nothing" => assert_eq!(fields(&entry), documented(&[EVERY, ERROR]), "{entry}"),
            _ => assert_eq!(fields(&entry), documented(&[EVERY]), "{entry}"),
        }
    }
    assert_eq!(server.entry("whole")["generated_tokens"], 4);
    assert_eq!(server.entry("stream")["prompt_tokens"], server.entry("whole")["prompt_tokens"]);
    assert!(server.entry("left")["generated_tokens"].as_u64().unwrap() < 450);
    let queue = server.entry("waiting")["queue_ms"].as_f64().unwrap();
    assert!(queue >= waited.as_secs_f64() * 1e3, "{queue} ms in the queue, of {waited:?}");
    assert_eq!(server.entry("nothing")["route"], "unmatched");
    assert_eq!(server.entry("refused")["error"], "invalid_request_error");

    let log = server.end();
    let mut ids = Vec::new();
    for line in &log {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        if line["message"] == "request" {
            ids.push(line["id"].as_str().unwrap().to_owned());
        }
    }
    // The many requests for metrics are at level debug.
    ids.sort_unstable();
    assert_eq!(ids, ["gone", "left", "models", "nothing", "refused", "stream", "waiting", "whole"]);
}

/// A collector that takes everything: the bodies it got.
fn collector() -> (String, Arc<Mutex<Vec<Value>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address").to_string();
    let bodies = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&bodies);
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = BufReader::new(connection.expect("a connection"));
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                assert_ne!(connection.read_line(&mut head).expect("a head"), 0, "{head}");
            }
            assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
            assert!(head.contains("\r\ncontent-type: application/json\r\n"), "{head}");
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
            let mut body = vec![0; length.parse().expect("a number")];
            connection.read_exact(&mut body).expect("a body");
            kept.lock().expect("no panic").push(serde_json::from_slice(&body).expect("JSON"));
            let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
            connection.get_mut().write_all(answer.as_bytes()).expect("it reads");
        }
    });
    (addr, bodies)
}

fn attribute<'a>(span: &'a Value, key: &str) -> Option<&'a str> {
    let attributes = span["attributes"].as_array()?;
    let value = &attributes.iter().find(|attribute| attribute["key"] == key)?["value"];
    value["stringValue"].as_str().or(value["intValue"].as_str())
}

const PROMPT: &str = "zebracorn";
/// No key of this server.
const FOREIGN: &str = "sk-m40-eyJtb25rZXkiOjF9.c3dvcmRmaXNo.okapi";

/// A new key in this state directory: its id and itself.
fn key(state: &Path, scope: &str) -> (String, String) {
    let state = state.to_str().expect("UTF-8");
    let arguments =
        ["keys", "create", "--name", "somebody", "--scope", scope, "--json", "--state-dir", state];
    let output = m40llm(&arguments).output().expect("the binary starts");
    let created: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    let text = |field: &str| created[field].as_str().unwrap_or_else(|| panic!("{created}")).to_owned();
    (text("id"), text("key"))
}

#[test]
fn prompts_and_keys_are_in_no_log_no_metric_and_no_span() {
    let (at, bodies) = collector();
    let state = tempfile::tempdir().expect("a directory");
    let ((id, inference), (_, metrics)) = (key(state.path(), "inference"), key(state.path(), "metrics"));
    let state = state.path().to_str().expect("UTF-8");
    let collector = format!("http://{at}");
    let server =
        Server::start(&["--log-level", "trace", "--otlp-endpoint", &collector, "--state-dir", state]);
    let addr = &*server.addr;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let bearer = |key: &str| format!("authorization: Bearer {key}\r\n");
    let headers = |id: &str, sampled: u8| {
        let parent = format!("traceparent: 00-{trace}-00f067aa0ba902b7-0{sampled}");
        format!("x-request-id: {id}\r\n{parent}\r\n{}x-api-key: {inference}\r\n", bearer(&inference))
    };
    let message = json!([{"role": "user", "content": PROMPT}]);
    let chat = json!({"messages": message, "max_tokens": 4, "user": PROMPT, "stop": [PROMPT]});
    let mut answers = String::new();
    let mut ask = |path: &str, headers: &str, body: &str| {
        let answer = ask(addr, "POST", path, headers, body);
        answers.push_str(&answer);
        answer
    };
    assert!(ask("/v1/chat/completions", &headers("wanted", 1), &chat.to_string()).contains("200 OK"));
    let mut streamed = chat.clone();
    streamed["stream"] = json!(true);
    assert!(ask("/v1/chat/completions", &headers("unwanted", 0), &streamed.to_string()).contains("[DONE]"));
    let good = bearer(&inference);
    let native = json!({"prompt": PROMPT, "max_tokens": 2}).to_string();
    assert!(ask("/generate", &good, &native).contains("200 OK"));
    assert!(ask("/tokenize", &good, &json!({"content": PROMPT}).to_string()).contains("200 OK"));
    let late = json!({"prompt": PROMPT.repeat(2000), "max_tokens": 2}).to_string();
    assert!(ask("/v1/completions", &good, &late).contains("context_length_exceeded"));
    let no_json = format!("{{\"prompt\": \"{PROMPT}");
    assert!(ask("/v1/completions", &good, &no_json).contains("not valid JSON"));
    // Keys that are none, and keys where they do not belong.
    assert!(ask("/generate", &bearer(FOREIGN), &native).contains("401 Unauthorized"));
    assert!(ask("/metrics", &good, "").contains("403 Forbidden"));
    let query = format!("/v1/completions?api_key={inference}");
    assert!(ask(&query, &format!("x-request-id: {inference}\r\n"), "{}").contains("401 Unauthorized"));
    ask("/v1/completions", &format!("cookie: key={inference}\r\n"), &native);
    ask("/v1/completions", &good, &json!({"prompt": 5, "key": inference}).to_string());
    let metrics = self::ask(addr, "GET", "/metrics", &bearer(&metrics), "");
    for sample in [
        "m40llm_refused_total{reason=\"invalid_key\"} 1",
        "m40llm_refused_total{reason=\"missing_key\"} 2",
        "m40llm_refused_total{reason=\"insufficient_scope\"} 1",
    ] {
        assert!(metrics.contains(sample), "{sample}:\n{metrics}");
    }
    let signature = inference.rsplit('.').next().expect("a signature");
    let secrets = ["sk-m40-eyJ", "c3dvcmRmaXNo", signature];
    assert!(!secrets.iter().any(|secret| answers.contains(secret)), "a key came back:\n{answers}");
    let said = |where_: &str, text: &str| {
        for part in secrets.iter().chain(&[PROMPT]) {
            assert!(!text.contains(part), "{part} is in {where_}:\n{text}");
        }
    };
    said("the metrics", &metrics);

    let log = server.end().join("\n");
    said("the log", &log);
    // It did log at that level, and lines within a request carry its id.
    assert!(log.contains("DEBUG") && log.contains("request{id=\"wanted\"}"), "{log}");
    let line = log.lines().find(|line| line.contains(": request id=\"wanted\"")).expect("its line");
    assert!(
        line.contains(&format!("key=\"{id}\"")) && line.contains(&format!("trace_id=\"{trace}\"")),
        "{line}"
    );

    // The end has sent the last spans.
    let bodies = bodies.lock().expect("no panic");
    let text = Value::from(bodies.clone()).to_string();
    said("a span", &text);
    let resource = &bodies[0]["resourceSpans"][0]["resource"];
    assert_eq!(attribute(resource, "service.name"), Some("m40llm"));
    let spans =
        bodies.iter().flat_map(|body| body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap());
    let spans: Vec<&Value> = spans.collect();
    let request = |id: &str| spans.iter().find(|span| attribute(span, "m40llm.request_id") == Some(id));
    assert!(request("unwanted").is_none(), "its caller records nothing");
    let wanted = request("wanted").unwrap_or_else(|| panic!("{text}"));
    assert_eq!(wanted["traceId"], trace);
    assert_eq!(wanted["parentSpanId"], "00f067aa0ba902b7");
    assert_eq!(wanted["name"], "POST /v1/chat/completions");
    assert_eq!(attribute(wanted, "m40llm.key_id"), Some(&*id));
    assert_eq!(attribute(wanted, "http.response.status_code"), Some("200"));
    assert_eq!(attribute(wanted, "gen_ai.usage.output_tokens"), Some("4"));
    let time = |span: &Value, key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
    for name in ["queue", "prompt", "decode"] {
        let part = spans.iter().find(|span| span["name"] == name && span["parentSpanId"] == wanted["spanId"]);
        let part = part.unwrap_or_else(|| panic!("no span {name}:\n{text}"));
        assert_eq!(part["traceId"], trace);
        assert!(time(part, "startTimeUnixNano") >= time(wanted, "startTimeUnixNano"));
        assert!(time(part, "endTimeUnixNano") <= time(wanted, "endTimeUnixNano") + 1_000_000);
    }
}

#[test]
fn a_collector_that_is_away_holds_nothing_up() {
    // Nobody listens on a port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let server = Server::start(&["--otlp-endpoint", &format!("http://{free}")]);
    let body = r#"{"prompt":"1 2 3","max_tokens":2}"#;
    assert!(answer(complete(&server.addr, "one", body)).contains("200 OK"));
    server
        .line("it says so", |line| (line.contains("WARN") && line.contains("takes no spans")).then_some(()));
    assert!(answer(complete(&server.addr, "two", body)).contains("200 OK"));
    wait_for("both are dropped", || {
        let page = ask(&server.addr, "GET", "/metrics", "", "");
        let dropped =
            page.lines().find_map(|line| line.strip_prefix("m40llm_spans_total{result=\"dropped\"} "));
        (dropped.expect("the metric").parse::<u64>().expect("a number") >= 8).then_some(())
    });
    let log = server.end();
    assert_eq!(log.iter().filter(|line| line.contains("takes no spans")).count(), 1, "{log:?}");
}

#[test]
fn sighup_takes_the_log_level_over_and_names_what_wants_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("m40llm.toml");
    let write = |toml: &str| std::fs::write(&path, toml).expect("a file");
    write("threads = 1\n");
    let server = Server::start(&["--config", path.to_str().expect("UTF-8")]);
    let addr = &*server.addr;
    let request = |id: &str| ask(addr, "GET", "/v1/models", &format!("x-request-id: {id}\r\n"), "");
    let with = |parts: &[&str]| {
        let found = |line: &str| parts.iter().all(|part| line.contains(part)).then(|| line.to_owned());
        server.line(&parts.join(" "), found)
    };
    request("before");
    with(&["id=\"before\""]);

    write("threads = 2\nlog-level = \"error\"\nmax-queue = 5\n");
    server.signal("-HUP");
    // Said before the level takes it away.
    assert!(with(&["WARN", "restart"]).ends_with("max-queue, threads"), "{:?}", server.log());
    with(&["read again", "log-level"]);
    wait_for("the reload is counted", || (metric(addr, "m40llm_config_reloads_total") >= 1.0).then_some(()));
    request("silent");

    write("log-level = \"loud\"\n");
    server.signal("-HUP");
    with(&["ERROR", "stays as it was", "log-level", "error, warn, info, debug, trace"]);
    std::fs::remove_file(&path).expect("a file");
    server.signal("-HUP");
    with(&["ERROR", "stays as it was", "cannot read the configuration file", "m40llm.toml"]);

    write("threads = 1\nlog-level = \"debug\"\n");
    server.signal("-HUP");
    wait_for("debug lines", || {
        ask(addr, "GET", "/health", "x-request-id: after\r\n", "");
        server.log().iter().any(|line| line.contains("DEBUG") && line.contains("id=\"after\"")).then_some(())
    });
    let page = ask(addr, "GET", "/metrics", "", "");
    for line in
        ["m40llm_config_reloads_total{result=\"ok\"} 2", "m40llm_config_reloads_total{result=\"failed\"} 2"]
    {
        assert!(page.contains(line), "{page}");
    }
    let log = server.end();
    assert!(!log.iter().any(|line| line.contains("id=\"silent\"")), "{log:?}");
    assert_eq!(log.iter().filter(|line| line.contains("WARN") && line.contains("restart")).count(), 1);
}

#[test]
fn sighup_without_a_file_changes_nothing() {
    let server = Server::start(&[]);
    server.signal("-HUP");
    server.line("it says so", |line| line.contains("no configuration file").then_some(()));
    assert!(Path::new("/proc").join(server.child.id().to_string()).exists());
    assert!(ask(&server.addr, "GET", "/health", "", "").contains("200 OK"));
    server.end();
}
