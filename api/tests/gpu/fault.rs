//! A kernel that faults under the real server: whoever runs or waits is told why, `/health` says so, and the process ends
//! with exit code 1 or stays, as it was told. The fault comes from `fault.c`, loaded into the unchanged binary.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use m40llm_engine::gguf::DType;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::gguf_files::tiny::{self, Spec};

/// A server is given so long for whatever it should do within seconds.
const PATIENCE: Duration = Duration::from_secs(60);
/// From a fault to the end of the process: answers are delivered within ten seconds.
const END: Duration = Duration::from_secs(20);
/// As the engine says it.
const WORDS: &str = "the device has failed: cu";

/// Compiles `fault.c`.
fn fault_library() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/fault.c");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libfault.so");
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]);
    let built = cc.arg(source).arg("-o").arg(&library).arg("-ldl").output().expect("a C compiler, cc");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

/// The server on a random model, one sequence at a time.
struct Server {
    child: Child,
    addr: String,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    trigger: PathBuf,
    _files: TempDir,
}

impl Server {
    fn start(kind: &str, policy: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        let (model, trigger) = (files.path().join("random.gguf"), files.path().join("trigger"));
        let spec = Spec { dim: 256, heads: 4, ffn: 512, layers: 4, dtype: DType::F16, ..Spec::default() };
        fs::write(&model, tiny::model(&spec)).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_m40llm"))
            .arg("run")
            .arg(&model)
            .args(["--backend", "cuda", "--device", "0", "--addr", "127.0.0.1:0", "--max-batch", "1"])
            .args(["--prompt-format", "raw", "--on-device-failure", policy])
            .env("LD_PRELOAD", fault_library())
            .env("FAULT_TRIGGER", &trigger)
            .env("FAULT_KIND", kind)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (found, listening) = mpsc::channel();
        let (lines, shared) = (BufReader::new(child.stderr.take().unwrap()).lines(), Arc::clone(&log));
        let reader = thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Some((_, addr)) = line.split_once("listening on http://") {
                    let _ = found.send(addr.trim().to_owned());
                }
                *shared.lock().unwrap() += &(line + "\n");
            }
        });
        let addr = listening.recv_timeout(PATIENCE);
        let addr = addr.unwrap_or_else(|_| panic!("no server: {}", log.lock().unwrap()));
        Self { child, addr, log, reader: Some(reader), trigger, _files: files }
    }

    /// Clients that ask again and again, one running and the others waiting, until a fault; their last answers.
    fn fault_among_requests(&self) -> Vec<io::Result<Answer>> {
        let answered = Arc::new(AtomicUsize::new(0));
        let clients: Vec<_> = (0..4)
            .map(|i| {
                let (addr, answered) = (self.addr.clone(), Arc::clone(&answered));
                thread::spawn(move || {
                    loop {
                        let answer = generate(&addr, i % 2 == 0);
                        match &answer {
                            Ok((200, body)) if !body.contains("error") => {
                                answered.fetch_add(1, Ordering::Relaxed)
                            }
                            _ => return answer,
                        };
                    }
                })
            })
            .collect();
        let deadline = Instant::now() + PATIENCE;
        while answered.load(Ordering::Relaxed) < 8 {
            assert!(Instant::now() < deadline, "{}", self.log());
            thread::sleep(Duration::from_millis(1));
        }
        fs::write(&self.trigger, "").unwrap();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for the process, and for all that it has said.
    fn ended(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.reader.take().unwrap().join().unwrap();
                return status;
            }
            assert!(Instant::now() < deadline, "the process hangs: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body.
type Answer = (u16, String);

/// A request on a connection of its own, read to the connection's end.
fn send(addr: &str, method: &str, path: &str, body: &str) -> io::Result<Answer> {
    let mut connection = TcpStream::connect(addr)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(
        connection,
        "{method} {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
}

fn generate(addr: &str, stream: bool) -> io::Result<Answer> {
    let body = json!({"prompt": "hello", "max_tokens": 400, "temperature": 0, "stream": stream});
    send(addr, "POST", "/generate", &body.to_string())
}

/// The error that names the driver's call and what it said.
fn is_told(answer: &Answer) -> bool {
    let (status, body) = answer;
    // A stream had begun.
    (*status == 200 || *status >= 500) && body.contains(WORDS) && body.contains(": CUDA_ERROR_")
}

#[test]
fn a_fault_fails_every_request_and_ends_the_process() {
    let mut server = Server::start("trap", "exit");
    let answers = server.fault_among_requests();
    let start = Instant::now();
    let status = server.ended(END);
    println!("ended {:?} after the last answer: {answers:?}", start.elapsed());
    let told = answers.iter().flatten().filter(|answer| is_told(answer)).count();
    // Who asked again in between may have found nobody.
    assert!(told >= 2 && answers.iter().flatten().count() == told, "{answers:?}\n{}", server.log());
    assert_eq!(status.code(), Some(1), "{}", server.log());
    let log = server.log();
    let last = log.lines().last().unwrap();
    assert!(last.starts_with(&format!("m40llm: {WORDS}")) && last.contains(": CUDA_ERROR_"), "{log}");
}

#[test]
fn a_server_told_to_stay_refuses_after_a_fault_and_ends_when_told() {
    let mut server = Server::start("address", "stay");
    let answers = server.fault_among_requests();
    for answer in &answers {
        assert!(answer.as_ref().is_ok_and(is_told), "{answers:?}\n{}", server.log());
    }
    let named = |(_, body): &Answer| body.contains("CUDA_ERROR_ILLEGAL_ADDRESS");
    assert!(answers.iter().flatten().any(named), "{answers:?}");
    let (status, body) = send(&server.addr, "GET", "/health", "").unwrap();
    assert_eq!((status, serde_json::from_str::<Value>(&body).unwrap()), (503, json!({"status": "failed"})));
    assert!(is_told(&generate(&server.addr, false).unwrap()));
    assert!(server.child.try_wait().unwrap().is_none(), "it did not stay");
    let pid = server.child.id().to_string();
    assert!(Command::new("kill").arg(pid).status().unwrap().success());
    assert_eq!(server.ended(END).code(), Some(1), "{}", server.log());
}
