//! One connection, from the accept to its end.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::ConnectInfo,
    http::{Request, Response, Version},
};
use hyper::{
    body::{Body as _, Incoming},
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, watch},
    time::timeout,
};

use super::{
    Filler, Limits, Shared, Stage,
    bodies::{RequestBody, ResponseBody},
    phase::Link,
    socket::{Io, Socket, gone, set_options, shut_down},
    tls,
};

/// How long, and how much, a client may go on sending what nobody reads, so that it sees the answer that
/// came before.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1 << 20;
/// A connection without a request is left alone for so long, also where there is no room.
const FRESH: Duration = Duration::from_secs(1);

/// Serves a connection to its end. `_permit` is its place among all.
pub(super) async fn run(
    tcp: TcpStream,
    peer: SocketAddr,
    shared: Arc<Shared>,
    stages: watch::Receiver<Stage>,
    _permit: OwnedSemaphorePermit,
) {
    set_options(&tcp, &shared.limits);
    // An IPv4 client of a socket for both is one client.
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let tcp = Arc::new(tcp);
    let socket = Socket::new(tcp.clone(), &shared.limits);
    let Some(tls) = &shared.tls else {
        return http(socket, &tcp, peer, &shared, stages).await;
    };
    let mut aborted = stages.clone();
    let handshake = timeout(shared.limits.handshake, async {
        if tls::is_plain(&tcp).await {
            tls::refuse_plain(&tcp).await;
            return None;
        }
        tls.acceptor().accept(socket).await.ok()
    });
    let stream = tokio::select! {
        stream = handshake => stream.ok().flatten(),
        _ = aborted.wait_for(|stage| *stage == Stage::Abort) => None,
    };
    drop(aborted);
    match stream {
        Some(stream) => http(stream, &tcp, peer, &shared, stages).await,
        None => linger(&tcp).await,
    }
}

/// HTTP/1.1 on a connection.
async fn http<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    tcp: &TcpStream,
    peer: SocketAddr,
    shared: &Shared,
    mut stages: watch::Receiver<Stage>,
) {
    let Shared { app, limits, .. } = shared;
    let link = Arc::new(Link::new());
    let io = TokioIo::new(Io::new(stream, link.clone(), limits));
    let service = service_fn(|request| exchange(app.clone(), request, peer, link.clone(), limits));
    let served = http1::Builder::new()
        // Time limits are the socket's, which tells idle connections from slow headers. The number of
        // headers is hyper's own limit, 100.
        .header_read_timeout(None)
        .max_buf_size(limits.head_bytes)
        .max_header_size(limits.head_bytes)
        // A FIN in the midst of a request is judged by `gone`.
        .half_close(true)
        .serve_connection(io, service);
    let mut served = pin!(served);
    let mut gone = pin!(gone(tcp, &link));
    let ended = loop {
        tokio::select! {
            // First `gone`, as what it asks for is sent by the next poll of the connection.
            biased;
            () = &mut gone => return,
            ended = &mut served => break ended,
            changed = stages.changed() => {
                let stage = *stages.borrow_and_update();
                match stage {
                    _ if changed.is_err() => return,
                    Stage::Abort => return,
                    // Its request may be on the way.
                    Stage::MakeRoom(_) if link.idle().is_some_and(|time| time < FRESH) => {}
                    Stage::Serve | Stage::MakeRoom(_) | Stage::Finish => served.as_mut().graceful_shutdown(),
                }
            }
        }
    };
    match ended {
        Err(error) => {
            tracing::debug!(%peer, "connection: {error}");
            if error.is_parse() || link.has_unread() {
                linger(tcp).await;
            }
        }
        Ok(()) if link.has_unread() => linger(tcp).await,
        Ok(()) => {}
    }
}

/// One request and its response, with what the connection knows of it.
async fn exchange(
    app: Router,
    request: Request<Incoming>,
    peer: SocketAddr,
    link: Arc<Link>,
    limits: &Limits,
) -> Result<Response<ResponseBody>, Infallible> {
    link.request(request.version() >= Version::HTTP_11, !request.body().is_end_stream());
    let mut request = request.map(|body| Body::new(RequestBody::new(body, link.clone(), limits)));
    request.extensions_mut().insert(ConnectInfo(peer));
    let mut response = TowerToHyperService::new(app).call(request).await?;
    link.answer(response.extensions_mut().remove::<Filler>());
    Ok(response.map(|body| ResponseBody::new(body, link)))
}

/// Closes a connection on which the client may still send: unread bytes would turn the close into a
/// reset, and that may take the answer from it.
async fn linger(tcp: &TcpStream) {
    if shut_down(tcp).is_err() {
        return;
    }
    let discard = async {
        let mut buffer = [0; 4096];
        let mut left = LINGER_BYTES;
        while left > 0 && tcp.readable().await.is_ok() {
            match tcp.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => left = left.saturating_sub(n),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
    };
    let _ = timeout(LINGER, discard).await;
}
