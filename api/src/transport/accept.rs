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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// No file descriptor is ever free.
    struct Exhausted {
        asked: AtomicUsize,
        error: fn() -> io::Error,
    }

    impl Source for Exhausted {
        async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            // Also what is ready at once must let the others run.
            tokio::task::yield_now().await;
            Err((self.error)())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_file_descriptors_it_pauses_and_closes_idle_connections() {
        let (stages, stage) = watch::channel(Stage::Serve);
        let source =
            Exhausted { asked: AtomicUsize::new(0), error: || io::Error::from_raw_os_error(24 /* EMFILE */) };
        assert!(timeout(Duration::from_secs(60), accept(&source, &stages)).await.is_err());
        let asked = source.asked.load(Ordering::Relaxed);
        assert!((60..70).contains(&asked), "asked {asked} times in a minute");
        assert_eq!(*stage.borrow(), Stage::MakeRoom(asked as u64 - 1));
        // The end is the end.
        stages.send_replace(Stage::Finish);
        make_room(&stages);
        assert_eq!(*stage.borrow(), Stage::Finish);
    }

    #[tokio::test(start_paused = true)]
    async fn where_there_is_no_room_idle_connections_are_asked_every_second() {
        let (stages, stage) = watch::channel(Stage::Serve);
        let permits = Arc::new(Semaphore::new(1));
        let held = room(&permits, &stages).await;
        assert_eq!(*stage.borrow(), Stage::Serve, "there was room");
        assert!(timeout(Duration::from_millis(4500), room(&permits, &stages)).await.is_err());
        assert_eq!(*stage.borrow(), Stage::MakeRoom(4));
        drop(held);
        let _held = room(&permits, &stages).await;
    }
}
