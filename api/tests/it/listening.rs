//! The built binary and its sockets: TLS by settings, and what happens without file descriptors.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use crate::{
    cli::{m40llm, refused, run},
    tls::Files,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A running server and the lines of its log.
struct Server {
    child: Child,
    addr: String,
    log: Receiver<String>,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tiny() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
    path.to_str().unwrap().to_owned()
}

impl Server {
    fn start(mut command: Command, scheme: &str) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (lines, log) = mpsc::channel();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        let mut server = Self { child, addr: String::new(), log };
        let line = server.logs(&format!("listening on {scheme}://"));
        line.rsplit_once("://").unwrap().1.clone_into(&mut server.addr);
        server
    }

    /// Waits for a line of the log.
    fn logs(&self, words: &str) -> String {
        let since = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(since.elapsed());
            let line = self.log.recv_timeout(left).unwrap_or_else(|_| panic!("the log never said {words:?}"));
            if line.contains(words) {
                return line;
            }
        }
    }

    /// Processor time so far, in hundredths of a second.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn health(&self) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(&self.addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

#[test]
fn without_file_descriptors_it_waits_and_recovers() {
    let mut command = Command::new("sh");
    // The hard limit too, so that it cannot be raised.
    command.args(["-c", r#"ulimit -n 40 && exec "$0" run "$1" --addr 127.0.0.1:0 --no-auth --threads 1"#]);
    command.args([env!("CARGO_BIN_EXE_m40llm"), &tiny()]);
    let server = Server::start(command, "http");
    // Each has begun a request, so that none is closed to make room.
    let mut begun = Vec::new();
    for _ in 0..60 {
        let mut stream = TcpStream::connect(&server.addr).unwrap();
        stream.write_all(b"GET /hea").unwrap();
        begun.push(stream);
    }
    server.logs("cannot accept connections");
    let before = server.ticks();
    thread::sleep(Duration::from_secs(1));
    let used = server.ticks() - before;
    assert!(used < 30, "{used} hundredths of a second in a second of waiting");
    drop(begun);
    assert!(server.health().unwrap().starts_with("HTTP/1.1 200 "));
}

#[test]
fn tls_comes_by_settings_and_health_knows_the_certificate() {
    let files = Files::new("api.example");
    let (cert, key) = (files.cert(), files.key());
    let mut command = m40llm(&["run", &tiny(), "--addr", "127.0.0.1:0", "--threads", "1"]);
    command.env("M40LLM_TLS_CERT", &cert).arg("--tls-key").arg(&key);
    let server = Server::start(command, "https");
    let hint = server.logs("try it: curl");
    assert!(hint.contains("--cacert") && hint.contains("https://127.0.0.1:"), "{hint}");

    let health = |cert: &Path| {
        let output = m40llm(&["health", "--addr", &server.addr]).env("M40LLM_TLS_CERT", cert).output();
        output.unwrap()
    };
    let good = health(&cert);
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    assert_eq!(String::from_utf8(good.stdout).unwrap(), format!("serving at https://{}\n", server.addr));
    refused(&health(&Files::new("api.example").cert()), 1, &["no server answers", "certificate"]);
    refused(&health(&key), 2, &["tls-cert", "key.pem"]);
    refused(&run(&["health", "--addr", &server.addr]), 1, &["with 400"]);

    // It is replaced while it serves.
    files.renew("api.example");
    server.logs("the TLS certificate was replaced");
    assert_eq!(health(&cert).status.code(), Some(0));
    fs::write(&key, "no key").unwrap();
    let line = server.logs("the TLS certificate stays the former one");
    assert!(line.contains("ERROR") && line.contains("tls-key") && line.contains("key.pem"), "{line}");
    assert_eq!(health(&cert).status.code(), Some(0));
}

#[test]
fn wrong_tls_files_are_configuration_errors() {
    let files = Files::new("api.example");
    let (cert, key) = (files.cert(), files.key());
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    for (flags, parts) in [
        (vec!["--tls-cert", cert], ["tls-cert", "tls-key is not"]),
        (vec!["--tls-key", key], ["tls-key", "tls-cert is not"]),
        (vec!["--tls-cert", "/absent.pem", "--tls-key", key], ["tls-cert", "/absent.pem"]),
        (vec!["--tls-cert", cert, "--tls-key", cert], ["tls-key", "no PEM private key"]),
    ] {
        refused(&run(&[&["run", &tiny()] as &[&str], &flags].concat()), 2, &parts);
    }
}

#[test]
fn other_names_are_refused_without_keys_only() {
    for (flag, status) in [("--no-auth=false", "HTTP/1.1 403 "), ("--no-auth", "HTTP/1.1 200 ")] {
        let server =
            Server::start(m40llm(&["run", &tiny(), "--addr", "127.0.0.1:0", "--threads", "1", flag]), "http");
        let mut stream = TcpStream::connect(&server.addr).unwrap();
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(status), "{flag}: {answer}");
        assert!(server.health().unwrap().starts_with("HTTP/1.1 200 "), "{flag}");
    }
}
