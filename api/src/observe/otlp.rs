//! Spans to a collector, by OTLP over HTTP in its JSON form.
//!
//! A thread of its own sends them in batches and waits for the collector; requests never do. What the
//! collector does not take in time is dropped and counted. Plain HTTP only: a collector stands beside the
//! server, and takes spans on from there. Written here because the usual libraries bring a second HTTP client,
//! read the environment by themselves, and are larger than the gateway.

use std::{
    fmt,
    io::{self, Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::spans::SpanData;

/// Most spans that wait to be sent.
const QUEUE: usize = 4096;
/// Most spans in one request to the collector.
const BATCH: usize = 512;
/// How long a span waits for others to come along.
const GATHER: Duration = Duration::from_secs(1);
/// How long the collector may take to connect, and then to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of the process waits for the last spans.
const FAREWELL: Duration = Duration::from_secs(3);

static SENT: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Spans so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) sent: u64,
    pub(super) dropped: u64,
}

/// Of the whole process, which has one exporter at most.
pub(super) fn counts() -> Counts {
    Counts { sent: SENT.load(Ordering::Relaxed), dropped: DROPPED.load(Ordering::Relaxed) }
}

/// Where a collector takes traces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector {
    /// `HOST:PORT`.
    pub authority: String,
    /// Such as `/v1/traces`.
    pub path: String,
}

impl Collector {
    /// Sends one body; anything but a 2xx is an error.
    fn post(&self, body: &[u8]) -> io::Result<()> {
        let mut last = io::Error::other("the host has no address");
        for address in self.authority.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, PATIENCE) {
                Ok(connection) => return self.exchange(connection, body),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn exchange(&self, mut connection: TcpStream, body: &[u8]) -> io::Result<()> {
        connection.set_write_timeout(Some(PATIENCE))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let head = format!(
            "POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
             connection: close\r\n\r\n",
            self.path,
            self.authority,
            body.len()
        );
        connection.write_all(head.as_bytes())?;
        connection.write_all(body)?;
        let mut answer = Vec::new();
        let read = connection.take(64 << 10).read_to_end(&mut answer);
        // `HTTP/1.1 200 …`; what follows the status matters to nobody.
        let line = answer.split(|&b| b == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        match line.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()) {
            Some(200..=299) => Ok(()),
            Some(status) => Err(io::Error::other(format!("it answers {status}"))),
            None => Err(read.err().unwrap_or_else(|| io::Error::other("its answer is not HTTP"))),
        }
    }
}

impl fmt::Display for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority, self.path)
    }
}

/// What the thread is told.
enum Message {
    Span(Box<SpanData>),
    /// Send what there is, answer, and end.
    End(SyncSender<()>),
}

/// The way to the thread that sends. Never blocks.
#[derive(Debug, Clone)]
pub(super) struct Exporter(SyncSender<Message>);

impl Exporter {
    /// Starts the thread.
    pub(super) fn start(collector: Collector) -> io::Result<Self> {
        let (sender, inbox) = mpsc::sync_channel(QUEUE);
        thread::Builder::new().name("m40llm-otlp".into()).spawn(move || run(&collector, &inbox))?;
        Ok(Self(sender))
    }

    pub(super) fn send(&self, span: SpanData) {
        if self.0.try_send(Message::Span(Box::new(span))).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends what there is, within bounds.
    pub(super) fn finish(&self) {
        let (done, ended) = mpsc::sync_channel(1);
        if self.0.try_send(Message::End(done)).is_ok() {
            let _ = ended.recv_timeout(FAREWELL);
        }
    }
}

fn run(collector: &Collector, inbox: &Receiver<Message>) {
    let mut healthy = true;
    loop {
        let (batch, end) = gather(inbox);
        if !batch.is_empty() {
            let count = batch.len() as u64;
            match collector.post(&body(&batch)) {
                Ok(()) => {
                    SENT.fetch_add(count, Ordering::Relaxed);
                    if !std::mem::replace(&mut healthy, true) {
                        tracing::info!("the collector {collector} takes spans again");
                    }
                }
                Err(error) => {
                    DROPPED.fetch_add(count, Ordering::Relaxed);
                    if std::mem::replace(&mut healthy, false) {
                        tracing::warn!(
                            "the collector {collector} takes no spans ({error}): they are dropped until it does"
                        );
                    }
                }
            }
        }
        match end {
            End::No => {}
            End::Asked(done) => {
                let _ = done.send(());
                return;
            }
            End::Gone => return,
        }
    }
}

/// Whether more will come.
enum End {
    No,
    Asked(SyncSender<()>),
    Gone,
}

/// Waits for a span, and a little for others.
fn gather(inbox: &Receiver<Message>) -> (Vec<SpanData>, End) {
    let mut batch = Vec::new();
    let mut until = None;
    while batch.len() < BATCH {
        let wait =
            until.map_or(Duration::MAX, |until: Instant| until.saturating_duration_since(Instant::now()));
        match inbox.recv_timeout(wait) {
            Ok(Message::Span(span)) => {
                until.get_or_insert_with(|| Instant::now() + GATHER);
                batch.push(*span);
            }
            Ok(Message::End(done)) => return (batch, End::Asked(done)),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => return (batch, End::Gone),
        }
    }
    (batch, End::No)
}

/// An `ExportTraceServiceRequest`.
fn body(batch: &[SpanData]) -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let attribute = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let spans: Vec<_> = batch.iter().map(SpanData::to_json).collect();
    json!({"resourceSpans": [{
        "resource": {"attributes": [attribute("service.name", "m40llm"), attribute("service.version", version)]},
        "scopeSpans": [{"scope": {"name": "m40llm", "version": version}, "spans": spans}],
    }]})
    .to_string()
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_does_not_wait_for_a_collector_that_is_away() {
        // Nobody listens on a port that was free a moment ago.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let collector = Collector { authority: free.to_string(), path: "/v1/traces".into() };
        assert!(collector.post(b"{}").is_err());
        let exporter = Exporter::start(collector).unwrap();
        let since = Instant::now();
        exporter.finish();
        exporter.finish();
        assert!(since.elapsed() < FAREWELL);
    }
}
