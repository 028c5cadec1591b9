//! Reads and writes with time limits.
//!
//! [`Socket`] is the TCP connection and sees to clients that take nothing; above it may come TLS; [`Io`]
//! is what hyper has, and sees to clients that send nothing.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep, sleep, sleep_until},
};

use super::{
    Limits,
    phase::{Link, Phase},
};

/// A TCP connection that its task sees too, to learn when the client goes.
pub(super) struct Socket {
    tcp: Arc<TcpStream>,
    stall: Duration,
    /// Runs while there are bytes that the client does not take.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    pub(super) fn new(tcp: Arc<TcpStream>, limits: &Limits) -> Self {
        Self { tcp, stall: limits.write_stall, stalled: None }
    }

    fn poll_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        while self.tcp.poll_write_ready(cx)?.is_ready() {
            match write(&self.tcp) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    self.stalled = None;
                    return Poll::Ready(result);
                }
            }
        }
        let stall = self.stall;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(stall)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.tcp.poll_read_ready(cx))?;
            match self.tcp.try_read(buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |tcp| tcp.try_write(buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_with(cx, |tcp| tcp.try_write_vectored(bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shut_down(&self.tcp))
    }
}

/// Says that nothing more will come.
pub(super) fn shut_down(tcp: &TcpStream) -> io::Result<()> {
    match socket2::SockRef::from(tcp).shutdown(std::net::Shutdown::Write) {
        Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
        _ => Ok(()),
    }
}

/// The options that every connection has.
pub(super) fn set_options(tcp: &TcpStream, limits: &Limits) {
    // Tokens are small and each is wanted at once.
    let _ = tcp.set_nodelay(true);
    let socket = socket2::SockRef::from(tcp);
    // A client whose machine or network is gone says nothing: ask it now and then.
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(limits.write_stall));
    #[cfg(not(target_os = "linux"))]
    let _ = limits;
}

/// The pauses between questions to a client that has said that it sends nothing more; the last goes on.
const ASK_AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// Returns when the client is gone while an answer is under way.
///
/// A client that has closed its connection and one that has only said that it will send nothing more
/// look alike: both have sent a FIN. But the former's system answers whatever comes with a reset. So it
/// is sent something that means nothing.
pub(super) async fn gone(tcp: &TcpStream, link: &Link) {
    // Ready with the FIN, also while bytes before it are unread.
    if tcp.ready(Interest::PRIORITY).await.is_err() {
        return;
    }
    let mut pauses = ASK_AGAIN.into_iter();
    let mut pause = ASK_AGAIN[0];
    while link.ask() {
        pause = pauses.next().unwrap_or(pause);
        tokio::select! {
            _ = tcp.ready(Interest::ERROR) => return,
            () = sleep(pause) => {}
        }
    }
}

/// What hyper reads and writes.
pub(super) struct Io<S> {
    stream: S,
    link: Arc<Link>,
    head: Duration,
    idle: Duration,
    /// The phase when last seen in a read, and since when.
    phase: Phase,
    since: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    /// The rest of a probe.
    probe: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Io<S> {
    pub(super) fn new(stream: S, link: Arc<Link>, limits: &Limits) -> Self {
        Self {
            stream,
            link,
            head: limits.head,
            idle: limits.idle,
            phase: Phase::Idle,
            since: Instant::now(),
            timer: None,
            probe: Bytes::new(),
        }
    }

    /// Takes note of what the connection is doing.
    fn look(&mut self) -> Phase {
        let phase = self.link.phase();
        if phase != self.phase {
            self.phase = phase;
            self.since = Instant::now();
        }
        phase
    }

    /// Whether the phase has taken too long.
    fn is_late(&mut self, cx: &mut Context<'_>) -> bool {
        let limit = match self.look() {
            Phase::Idle => self.idle,
            Phase::Head => self.head,
            // The bodies' own affair.
            Phase::Body | Phase::Waiting | Phase::Answering => return false,
        };
        let deadline = self.since + limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx).is_ready()
    }

    /// Writes what is left of a probe, which hyper's bytes must not part.
    fn poll_probe(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.probe.is_empty() {
            let n = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.probe))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            let _ = self.probe.split_to(n);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Io<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        match Pin::new(&mut this.stream).poll_read(cx, buf) {
            Poll::Ready(result) => {
                if buf.filled().len() > before {
                    this.look();
                    this.link.begin();
                    this.look();
                }
                Poll::Ready(result)
            }
            Poll::Pending if this.is_late(cx) => match this.phase {
                // As if the client had closed it.
                Phase::Idle => Poll::Ready(Ok(())),
                _ => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            },
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Io<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// hyper flushes whenever it has nothing more to write, so this is the place between its writes.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.probe.is_empty()
            && let Some(probe) = this.link.take_probe()
        {
            this.probe = probe;
        }
        ready!(this.poll_probe(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
