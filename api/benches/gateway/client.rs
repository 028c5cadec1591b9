//! The load client: one thread for all connections, and no more work a token than finding its stamp.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use mio::{Events, Interest, Poll, Token, net::TcpStream};
use socket2::{Domain, Socket, Type};

use crate::system::{DIGITS, MARK, delay, now};

/// A non-blocking connection from this loopback address. `receive` bounds what the kernel holds for it.
pub(crate) fn connect(to: SocketAddr, from: Ipv4Addr, receive: Option<usize>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    if let Some(bytes) = receive {
        socket.set_recv_buffer_size(bytes)?;
    }
    socket.bind(&SocketAddr::new(IpAddr::V4(from), 0).into())?;
    socket.set_tcp_nodelay(true)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
            Err(error)
        }
        _ => Ok(TcpStream::from_std(socket.into())),
    }
}

/// A request as bytes. `key`: for `Authorization`.
pub(crate) fn request(key: Option<&str>, tokens: usize) -> Vec<u8> {
    let body = format!(
        r#"{{"messages":[{{"role":"user","content":"Why is the sky blue?"}}],"max_tokens":{tokens},"stream":true}}"#
    );
    let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n{key}content-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// What a connection tells.
pub(crate) enum Told {
    /// A token, so many nanoseconds after it was sent.
    Token(u64),
    /// The request's last byte.
    End,
}

/// One connection, which asks the same again and again.
struct Connection {
    stream: TcpStream,
    /// Bytes of the request that are sent; all of them while an answer is awaited.
    sent: usize,
    /// Whether there is something to send.
    asking: bool,
    /// Tokens of this answer so far.
    tokens: usize,
    /// A stamp that the last read cut.
    cut: Vec<u8>,
}

/// Connections that send one and the same request.
pub(crate) struct Client {
    poll: Poll,
    events: Events,
    connections: Vec<Connection>,
    addr: SocketAddr,
    request: Vec<u8>,
    /// Tokens that an answer has.
    tokens: usize,
    buffer: Vec<u8>,
}

impl Client {
    pub(crate) fn new(addr: SocketAddr, key: Option<&str>, tokens: usize) -> io::Result<Self> {
        Ok(Self {
            poll: Poll::new()?,
            events: Events::with_capacity(1024),
            connections: Vec::new(),
            addr,
            request: request(key, tokens),
            tokens,
            buffer: vec![0; 1 << 16],
        })
    }

    /// One more connection; its number. It asks nothing yet.
    pub(crate) fn open(&mut self) -> io::Result<usize> {
        let mut stream = connect(self.addr, Ipv4Addr::LOCALHOST, None)?;
        let id = self.connections.len();
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, Token(id), both)?;
        self.connections.push(Connection { stream, sent: 0, asking: false, tokens: 0, cut: Vec::new() });
        Ok(id)
    }

    /// Sends the request on a connection that has no answer to wait for.
    pub(crate) fn ask(&mut self, id: usize) -> io::Result<()> {
        let connection = &mut self.connections[id];
        (connection.sent, connection.tokens, connection.asking) = (0, 0, true);
        connection.send(&self.request)
    }

    /// Waits at most so long for something to come, and tells it all.
    pub(crate) fn poll(&mut self, wait: Duration, mut tell: impl FnMut(usize, Told)) -> io::Result<()> {
        if let Err(error) = self.poll.poll(&mut self.events, Some(wait))
            && error.kind() != io::ErrorKind::Interrupted
        {
            return Err(error);
        }
        for event in &self.events {
            let id = event.token().0;
            let connection = &mut self.connections[id];
            if event.is_writable() && connection.asking {
                connection.send(&self.request)?;
            }
            if event.is_readable() {
                connection.receive(&mut self.buffer, self.tokens, |told| tell(id, told))?;
            }
        }
        Ok(())
    }
}

impl Connection {
    fn send(&mut self, request: &[u8]) -> io::Result<()> {
        while self.sent < request.len() {
            match self.stream.write(&request[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) if is_later(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.asking = false;
        Ok(())
    }

    fn receive(&mut self, buffer: &mut [u8], all: usize, mut tell: impl FnMut(Told)) -> io::Result<()> {
        loop {
            let n = match self.stream.read(buffer) {
                Ok(0) => return Err(io::Error::other("the server has closed a connection in use")),
                Ok(n) => n,
                Err(error) if is_later(&error) => return Ok(()),
                Err(error) => return Err(error),
            };
            let received = now();
            let text = &buffer[..n];
            if text.starts_with(b"HTTP/1.1 ") && !text.starts_with(b"HTTP/1.1 200") {
                return Err(io::Error::other(String::from_utf8_lossy(text).into_owned()));
            }
            stamps(&mut self.cut, text, |stamp| {
                self.tokens += 1;
                tell(Told::Token(delay(stamp, received)));
            })?;
            if self.tokens >= all && text.ends_with(b"0\r\n\r\n") {
                tell(Told::End);
            }
            // What comes after a short read is a new event.
            if n < buffer.len() {
                return Ok(());
            }
        }
    }
}

/// The stamps in `text`, of which the first may have begun in the text before; `cut` keeps what is not
/// complete.
fn stamps(cut: &mut Vec<u8>, text: &[u8], mut found: impl FnMut(u64)) -> io::Result<()> {
    let joined;
    let mut rest = text;
    if !cut.is_empty() {
        cut.extend_from_slice(text);
        joined = std::mem::take(cut);
        rest = &joined;
    }
    while let Some(at) = rest.iter().position(|&byte| byte == MARK) {
        let Some(digits) = rest.get(at + 1..=at + DIGITS) else {
            cut.extend_from_slice(&rest[at..]);
            return Ok(());
        };
        let stamp = str::from_utf8(digits).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok());
        found(stamp.ok_or_else(|| io::Error::other("a token without its stamp"))?);
        rest = &rest[at + 1 + DIGITS..];
    }
    Ok(())
}

/// Whether a call would have had to wait. A socket whose connection is not there yet says that it is none.
pub(crate) fn is_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected | io::ErrorKind::Interrupted
    )
}
