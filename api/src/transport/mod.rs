//! From a listener to requests: TLS, one task a connection, and the limits that keep one caller from
//! taking what the others need.
//!
//! | module | holds |
//! | --- | --- |
//! | `accept` | new connections, also when there are no file descriptors left |
//! | `connection` | one connection: handshake, HTTP/1.1, its end |
//! | `phase` | what a connection is doing, known to its socket, its bodies and its task |
//! | `socket` | reads and writes with time limits, and the question whether a silent client still reads |
//! | `bodies` | request bodies that must not stall, response bodies whose end is seen |
//! | [`tls`] | certificates, read again when their files change |
//! | `guard` | security headers, and which names the server answers to |

mod accept;
mod bodies;
mod connection;
pub(crate) mod guard;
mod phase;
mod socket;
pub mod tls;

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

pub(crate) use bodies::is_stalled;
pub(crate) use phase::Filler;

use self::tls::Tls;

/// What a connection may take. The defaults are those of docs/CONFIGURATION.md.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most connections at once; further ones wait in the system's accept queue.
    pub connections: usize,
    /// From a connection to the end of its TLS handshake.
    pub handshake: Duration,
    /// From a request's first byte to the end of its headers.
    pub head: Duration,
    /// How long a connection may be open without a request.
    pub idle: Duration,
    /// How long a request's body may bring nothing.
    pub body_stall: Duration,
    /// Bytes per second that a body must bring on the average, once it has taken longer than
    /// `body_stall`.
    pub body_rate: u32,
    /// How long a client may take nothing while there is something for it.
    pub write_stall: Duration,
    /// Bytes of a request's line and headers.
    pub head_bytes: usize,
    /// How long finished answers may take to reach slow clients at the end.
    pub flush: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(10),
            idle: Duration::from_secs(75),
            body_stall: Duration::from_secs(30),
            body_rate: 1024,
            write_stall: Duration::from_secs(60),
            head_bytes: 64 << 10,
            flush: Duration::from_secs(10),
        }
    }
}

/// What all connections are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Serve on.
    Serve,
    /// There is no room for others: whoever has no request now must come again. The number makes two of
    /// these differ.
    MakeRoom(u64),
    /// Finish the request that is there, then close.
    Finish,
    /// Close.
    Abort,
}

/// What all connections work with.
struct Shared {
    app: Router,
    limits: Limits,
    tls: Option<Tls>,
}

/// Serves `app` until `end` is ready, lets requests finish that are there by then, and returns.
pub(crate) async fn serve(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    tls: Option<Tls>,
    end: impl Future<Output = ()>,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let shared = Arc::new(Shared { app, limits, tls });
    let (stages, _) = watch::channel(Stage::Serve);
    let accepting = async {
        loop {
            let permit = accept::room(&permits, &stages).await;
            let (tcp, peer) = accept::accept(&listener, &stages).await;
            tokio::spawn(connection::run(tcp, peer, shared.clone(), stages.subscribe(), permit));
        }
    };
    let reloading = async {
        match &shared.tls {
            Some(tls) => tls.follow().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = accepting => {}
        () = reloading => {}
        () = pin!(end) => {}
    }
    stages.send_replace(Stage::Finish);
    if tokio::time::timeout(shared.limits.flush, stages.closed()).await.is_err() {
        stages.send_replace(Stage::Abort);
    }
    Ok(())
}
