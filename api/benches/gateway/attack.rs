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
            .args(["attack", "--kind", name, "--addr", &server.addr.to_string(), "--kid", &kid])
            .stdin(Stdio::piped())
            .spawn()?;
        Ok(Self(child))
    }

    /// Ends it. An error: it could not do what it was to do, and the run counts for nothing.
    pub(crate) fn end(mut self) -> anyhow::Result<()> {
        drop(self.0.stdin.take());
        let status = self.0.wait()?;
        anyhow::ensure!(status.success(), "the attack did not go as it should");
        Ok(())
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
    match kind {
        Kind::Nothing => Ok(()),
        Kind::WrongKeys => wrong_keys(addr, kid, &ended),
        Kind::Connections => connections(addr, &ended),
    }
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

/// A thousand a second, on connections that are kept as long as the server keeps them.
fn wrong_keys(addr: SocketAddr, kid: &str, ended: &AtomicBool) -> anyhow::Result<()> {
    let keys = (0..1000).map(|n| Ok(request(Some(&wrong_key(n, kid)?), 16)));
    let keys: Vec<Vec<u8>> = keys.collect::<anyhow::Result<_>>()?;
    let mut open: Vec<Option<TcpStream>> = (0..4 * ADDRESSES).map(|_| None).collect();
    let (mut refused, mut buffer) = (0_usize, [0; 4096]);
    let mut sent = 0;
    every(Duration::from_millis(1), ended, |n| {
        let i = n % open.len();
        if let Some(stream) = &mut open[i] {
            match stream.read(&mut buffer) {
                Ok(0) => open[i] = None,
                Ok(length) => {
                    let text = &buffer[..length];
                    if !(text.starts_with(b"HTTP/1.1 401") || text.starts_with(b"HTTP/1.1 429")) {
                        return Err(io::Error::other(String::from_utf8_lossy(text).into_owned()));
                    }
                    refused += 1;
                }
                Err(error) if is_later(&error) => {}
                Err(_) => open[i] = None,
            }
        }
        if open[i].is_none() {
            let from = Ipv4Addr::new(127, 0, 0, 1 + (i % ADDRESSES) as u8);
            open[i] = Some(connected(connect(addr, from, None)?));
        }
        if let Some(stream) = &mut open[i] {
            match stream.write(&keys[n % keys.len()]) {
                Ok(_) => sent += 1,
                Err(_) => open[i] = None,
            }
        }
        Ok(())
    })?;
    anyhow::ensure!(refused * 10 >= sent * 8, "{sent} wrong keys were sent, {refused} refused");
    Ok(())
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

/// Keeps all of them there, opening anew what the server closes.
fn connections(addr: SocketAddr, ended: &AtomicBool) -> anyhow::Result<()> {
    let mut all: Vec<(Burden, Option<TcpStream>)> =
        BURDENS.iter().flat_map(|&(count, burden)| (0..count).map(move |_| (burden, None))).collect();
    // Each has its turn every 100 ms.
    every(Duration::from_millis(10), ended, |n| {
        for (burden, stream) in all.iter_mut().skip(n % 10).step_by(10) {
            let held = stream.as_mut().is_some_and(|open| burden.hold(open, n / 10));
            if !held {
                *stream = Some(burden.open(addr)?);
            }
        }
        Ok(())
    })?;
    Ok(())
}

impl Burden {
    fn open(self, addr: SocketAddr) -> io::Result<TcpStream> {
        let receive = matches!(self, Self::SlowReader(_)).then_some(4096);
        let mut stream = connected(connect(addr, Ipv4Addr::LOCALHOST, receive)?);
        // What cannot be written now shows when the connection has its turn.
        match self {
            Self::Idle | Self::SlowSender => {}
            Self::SlowReader(tokens) => drop(stream.write(&request(None, tokens))),
            Self::HalfClosed => {
                drop(stream.write(&request(None, 16)).and_then(|_| stream.shutdown(Shutdown::Write)))
            }
            Self::HalfClosedEmpty => drop(stream.shutdown(Shutdown::Write)),
        }
        Ok(stream)
    }

    /// Does a turn's work; false when the server has closed the connection.
    fn hold(self, stream: &mut TcpStream, turn: usize) -> bool {
        const HEAD: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nx-slow: ";
        let done = match self {
            Self::SlowSender => {
                let byte = HEAD.get(turn % (4 * HEAD.len())).copied().unwrap_or(b'x');
                stream.write(&[byte])
            }
            Self::SlowReader(_) => stream.read(&mut [0]),
            Self::Idle | Self::HalfClosed | Self::HalfClosedEmpty => stream.peek(&mut [0]),
        };
        match done {
            Ok(n) => n > 0,
            Err(error) => is_later(&error),
        }
    }
}
