//! New connections, one after another.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{sleep, timeout},
};

use super::Stage;

/// How long idle connections have to go before they are asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// The first pause after an accept that failed; each further one is twice as long, up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Where connections come from; in tests, not from a socket.
pub(super) trait Source {
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send;
}

impl Source for TcpListener {
    fn accept(&self) -> impl Future<Output = io::Result<(TcpStream, SocketAddr)>> + Send {
        TcpListener::accept(self)
    }
}

/// Waits for room for one more connection. While there is none, those without a request are closed.
pub(super) async fn room(permits: &Arc<Semaphore>, stages: &watch::Sender<Stage>) -> OwnedSemaphorePermit {
    loop {
        if let Ok(Ok(permit)) = timeout(Duration::ZERO, permits.clone().acquire_owned()).await {
            return permit;
        }
        make_room(stages);
        if let Ok(Ok(permit)) = timeout(ASK_AGAIN, permits.clone().acquire_owned()).await {
            return permit;
        }
    }
}

fn make_room(stages: &watch::Sender<Stage>) {
    stages.send_modify(|stage| {
        *stage = match *stage {
            Stage::Serve => Stage::MakeRoom(0),
            Stage::MakeRoom(n) => Stage::MakeRoom(n.wrapping_add(1)),
            last => last,
        };
    });
}

/// The next connection. Where the system has no file descriptor or memory for it, this closes idle
/// connections and pauses: the listener stays readable, and asking at once again would take a core.
pub(super) async fn accept(source: &impl Source, stages: &watch::Sender<Stage>) -> (TcpStream, SocketAddr) {
    let mut pause = FIRST_PAUSE;
    loop {
        match source.accept().await {
            Ok(accepted) => return accepted,
            // The client's doing, over with it.
            Err(error) if is_peers(&error) => {}
            Err(error) => {
                // Once a streak.
                if pause == FIRST_PAUSE {
                    tracing::error!(
                        "cannot accept connections: {error}; where file descriptors are short, raise the limit \
                         (ulimit -n, LimitNOFILE=)"
                    );
                }
                make_room(stages);
                sleep(pause).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

fn is_peers(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
