//! Bad company, in a process of its own: wrong keys, and connections that only cost.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddr},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mio::net::TcpStream;

use crate::{
    client::{connect, is_later, request},
    server::Server,
    system,
};

/// What is done to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Nothing: how far apart two equal runs are
    Nothing,
    /// 1,000 requests with wrong keys a second, from 16 addresses, the good callers' own among them
    WrongKeys,
    /// 500 idle connections, 100 senders and 100 readers of 10 bytes a second, 100 half-closed sockets
    Connections,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Nothing, Self::WrongKeys, Self::Connections];
}

/// An attack under way in a process of its own; ended when dropped.
pub(crate) struct Attack(Child);

impl Attack {
    pub(crate) fn start(kind: Kind, server: &Server) -> anyhow::Result<Self> {
        let name = if kind == Kind::WrongKeys { "wrong-keys" } else { "connections" };
        // Which secret signs is no secret, and wrong keys that name another are refused unread.
        let header =
            server.key().and_then(|key| key.strip_prefix("sk-m40-")).map(jsonwebtoken::decode_header);
        let kid = header.transpose()?.and_then(|header| header.kid).unwrap_or_default();
        let child = Command::new(std::env::current_exe()?)
            .args(["attack", "--kind", name, "--addr", &server.addr.to_string(), &format!("--kid={kid}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Self(child))
    }

    /// Ends it; how often a second it had something refused or closed. An error: it could not do what it was
    /// to do, and the run counts for nothing.
    pub(crate) fn end(mut self) -> anyhow::Result<f64> {
        drop(self.0.stdin.take());
        let mut output = String::new();
        self.0.stdout.take().map(|mut out| out.read_to_string(&mut output)).transpose()?;
        let status = self.0.wait()?;
        anyhow::ensure!(status.success(), "the attack did not go as it should");
        Ok(output.trim().parse()?)
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Attacks until the standard input ends.
pub(crate) fn run(kind: Kind, addr: SocketAddr, kid: &str) -> anyhow::Result<()> {
    system::allow_many_files();
    let ended = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ended);
    thread::spawn(move || {
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        end.store(true, Ordering::Relaxed);
    });
    let started = Instant::now();
    let count = match kind {
        Kind::Nothing => 0,
        Kind::WrongKeys => wrong_keys(addr, kid, &ended)?,
        Kind::Connections => connections(addr, &ended)?,
    };
    println!("{}", count as f64 / started.elapsed().as_secs_f64());
    Ok(())
}

/// Calls `step` with 0, 1, 2 … at times that lie `period` apart, whatever each takes, until the end.
fn every(
    period: Duration,
    ended: &AtomicBool,
    mut step: impl FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut due = Instant::now();
    for n in 0.. {
        if ended.load(Ordering::Relaxed) {
            break;
        }
        step(n)?;
        due += period;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

const ADDRESSES: usize = 16;

/// A connection that brings wrong keys.
#[derive(Default)]
struct Guesser {
    stream: Option<TcpStream>,
    /// Whether the last key has no answer yet.
    waits: bool,
}

/// A thousand a second, on connections that are kept as long as the server keeps them. How many were refused.
fn wrong_keys(addr: SocketAddr, kid: &str, ended: &AtomicBool) -> anyhow::Result<usize> {
    let keys = (0..1000).map(|n| Ok(request(Some(&wrong_key(n, kid)?), 16)));
    let keys: Vec<Vec<u8>> = keys.collect::<anyhow::Result<_>>()?;
    let mut guessers: Vec<Guesser> = (0..4 * ADDRESSES).map(|_| Guesser::default()).collect();
    let mut refused = 0;
    every(Duration::from_millis(1), ended, |n| {
        let i = n % guessers.len();
        let from = Ipv4Addr::new(127, 0, 0, 1 + (i % ADDRESSES) as u8);
        refused += usize::from(guessers[i].hear()?);
        guessers[i].guess(addr, from, &keys[n % keys.len()])
    })?;
    Ok(refused)
}

impl Guesser {
    /// Whether a key was refused since the last time.
    fn hear(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 4096];
        match self.stream.as_mut().map(|stream| stream.read(&mut buffer)) {
            Some(Ok(n @ 1..)) => {
                let text = String::from_utf8_lossy(&buffer[..n]);
                if !(text.starts_with("HTTP/1.1 401") || text.starts_with("HTTP/1.1 429")) {
                    return Err(io::Error::other(text.into_owned()));
                }
                if text.contains("connection: close") {
                    self.stream = None;
                }
                return Ok(std::mem::take(&mut self.waits));
            }
            Some(Err(error)) if is_later(&error) => {}
            // Closed by the server.
            _ => self.stream = None,
        }
        Ok(false)
    }

    /// Tries a key, unless the last one has no answer yet.
    fn guess(&mut self, addr: SocketAddr, from: Ipv4Addr, request: &[u8]) -> io::Result<()> {
        if self.stream.is_none() {
            *self = Self { stream: Some(connected(connect(addr, from, None)?)), waits: false };
        }
        if let Some(stream) = self.stream.as_mut().filter(|_| !self.waits) {
            // A connection that the server is closing is seen to be closed when it is heard.
            self.waits = stream.write_all(request).is_ok();
        }
        Ok(())
    }
}

/// Signed by somebody else, and otherwise as a key should be.
fn wrong_key(n: usize, kid: &str) -> anyhow::Result<String> {
    let claims = serde_json::json!({
        "jti": format!("key_{n:024x}"), "sub": "stranger", "scope": "inference", "iat": 1_700_000_000,
    });
    let secret = jsonwebtoken::EncodingKey::from_secret(b"of somebody else, and long enough for it");
    let header = jsonwebtoken::Header { kid: Some(kid.into()), ..jsonwebtoken::Header::default() };
    Ok(format!("sk-m40-{}", jsonwebtoken::encode(&header, &claims, &secret)?))
}

/// Waits for a connection to be there, which on loopback takes as long as the server's queue is full.
fn connected(stream: TcpStream) -> TcpStream {
    for _ in 0..100 {
        if stream.peer_addr().is_ok() {
            break;
        }
        thread::sleep(Duration::from_micros(100));
    }
    stream
}

/// A connection that only costs.
#[derive(Debug, Clone, Copy)]
enum Burden {
    Idle,
    /// A byte of a request's head every 100 ms.
    SlowSender,
    /// A byte of an answer every 100 ms; the answer has so many tokens.
    SlowReader(usize),
    /// A whole request, then the sending half is closed, and nothing read.
    HalfClosed,
    /// The sending half is closed at once.
    HalfClosedEmpty,
}

const BURDENS: [(usize, Burden); 6] = [
    (500, Burden::Idle),
    (100, Burden::SlowSender),
    // More than the kernel holds for a connection: the server has to wait with the rest.
    (10, Burden::SlowReader(20_000)),
    (90, Burden::SlowReader(500)),
    (60, Burden::HalfClosed),
    (40, Burden::HalfClosedEmpty),
];

/// How long a burden stays away when the server has closed its connection: so many requests in their place
/// would be ordinary load.
const AWAY: Duration = Duration::from_secs(5);

/// Keeps all of them there, opening anew, after a while, what the server closes. How often it did.
fn connections(addr: SocketAddr, ended: &AtomicBool) -> anyhow::Result<usize> {
    struct Place {
        burden: Burden,
        stream: Option<TcpStream>,
        /// Turns since it was opened.
        turns: usize,
        opens: Instant,
    }
    let place = |burden| Place { burden, stream: None, turns: 0, opens: Instant::now() };
    let mut all: Vec<Place> = BURDENS
        .iter()
        .flat_map(|&(count, burden)| std::iter::repeat_with(move || place(burden)).take(count))
        .collect();
    let mut closed = 0;
    // Each has its turn every 100 ms, and no two hundredths of them at the same time.
    every(Duration::from_millis(1), ended, |n| {
        for place in all.iter_mut().skip(n % 100).step_by(100) {
            let Place { burden, stream, turns, opens } = place;
            *turns += 1;
            match stream.as_mut().map(|open| burden.hold(open, *turns)) {
                Some(false) => {
                    (*stream, *opens) = (None, Instant::now() + AWAY);
                    closed += 1;
                }
                None if Instant::now() >= *opens => (*stream, *turns) = (Some(burden.open(addr)?), 0),
                Some(true) | None => {}
            }
        }
        Ok(())
    })?;
    Ok(closed)
}

impl Burden {
    fn open(self, addr: SocketAddr) -> io::Result<TcpStream> {
        let receive = matches!(self, Self::SlowReader(_)).then_some(4096);
        let mut stream = connected(connect(addr, Ipv4Addr::LOCALHOST, receive)?);
        // What cannot be written shows when the connection has its turn.
        let _ = match self {
            Self::Idle | Self::SlowSender => Ok(()),
            Self::SlowReader(tokens) => stream.write_all(&request(None, tokens)),
            Self::HalfClosed => {
                stream.write_all(&request(None, 16)).and_then(|()| stream.shutdown(Shutdown::Write))
            }
            Self::HalfClosedEmpty => stream.shutdown(Shutdown::Write),
        };
        Ok(stream)
    }

    /// Does a turn's work; false when the server has closed the connection.
    fn hold(self, stream: &mut TcpStream, turn: usize) -> bool {
        const HEAD: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ";
        let done = match self {
            Self::SlowSender => stream.write(&[HEAD.get(turn - 1).copied().unwrap_or(b'x')]),
            Self::SlowReader(_) => stream.read(&mut [0]),
            // Only looked at, now and then.
            Self::Idle | Self::HalfClosed | Self::HalfClosedEmpty => {
                return !turn.is_multiple_of(10) || is_open(&stream.peek(&mut [0]));
            }
        };
        is_open(&done)
    }
}

/// Whether a read or a write says that the connection still stands.
fn is_open(done: &io::Result<usize>) -> bool {
    match done {
        Ok(n) => *n > 0,
        Err(error) => is_later(error),
    }
}
