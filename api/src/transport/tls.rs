//! Certificates and keys from PEM files, read again when the files change.

use std::{
    fmt,
    fs::Metadata,
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use tokio::net::TcpStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::{CryptoProvider, ring},
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// The first byte of every TLS connection: a record of the handshake.
const HANDSHAKE: u8 = 0x16;

/// A certificate with its key. Clones share both.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    cert: PathBuf,
    key: PathBuf,
    look: Duration,
    current: RwLock<Arc<ServerConfig>>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("cert", &self.0.cert).field("key", &self.0.key).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the certificate chain and its key, both PEM. An error names the setting and the file.
    pub fn load(cert: &Path, key: &Path) -> Result<Self, String> {
        Self::load_looking(cert, key, LOOK)
    }

    /// As [`Self::load`], with the time between two looks at the files.
    pub fn load_looking(cert: &Path, key: &Path, look: Duration) -> Result<Self, String> {
        let current = RwLock::new(read(cert, key)?);
        Ok(Self(Arc::new(Inner { cert: cert.to_owned(), key: key.to_owned(), look, current })))
    }

    /// For the next handshake.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Reads the files again whenever they change; does not return. Connections that are there keep what
    /// they have. A pair that is not usable is reported once, and the former one stays.
    pub(super) async fn follow(&self) {
        let Inner { cert, key, look, current } = &*self.0;
        let stamps = || [Stamp::of(cert), Stamp::of(key)];
        let mut loaded = stamps();
        let mut seen = loaded.clone();
        loop {
            tokio::time::sleep(*look).await;
            let now = stamps();
            // Two files are replaced one after the other: wait until they have come to rest.
            if now != seen {
                seen = now;
                continue;
            }
            if seen == loaded {
                continue;
            }
            loaded.clone_from(&seen);
            match read(cert, key) {
                Ok(new) => {
                    *current.write().unwrap_or_else(PoisonError::into_inner) = new;
                    tracing::info!("the TLS certificate was replaced, from {}", cert.display());
                }
                Err(why) => tracing::error!("the TLS certificate stays the former one: {why}"),
            }
        }
    }
}

/// What changes when a file does, also one that was renamed over it or that a link points to now.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp(Option<(SystemTime, u64, u64)>);

impl Stamp {
    fn of(path: &Path) -> Self {
        let inode = |m: &Metadata| std::os::unix::fs::MetadataExt::ino(m);
        let read = |m: Metadata| Some((m.modified().ok()?, m.len(), inode(&m)));
        Self(std::fs::metadata(path).ok().and_then(read))
    }
}

fn read(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, String> {
    let chain = certificates(cert).map_err(|why| format!("tls-cert: {}: {why}", cert.display()))?;
    let key_file = key.display();
    let pem = std::fs::read(key).map_err(|e| format!("tls-key: {key_file}: {e}"))?;
    // The parser's words might quote the key.
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| format!("tls-key: {key_file}: no PEM private key is in it"))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|e| format!("tls-key: {key_file} does not go with tls-cert {}: {e}", cert.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The certificates of a PEM file, the server's own first.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|e| e.to_string())?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err("no PEM certificate is in it".into()),
    }
}

/// The cryptography, on both sides.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Whether the client does not begin with TLS. Waits for its first byte.
pub(super) async fn is_plain(tcp: &TcpStream) -> bool {
    let mut first = [0];
    matches!(tcp.peek(&mut first).await, Ok(1) if first[0] != HANDSHAKE)
}

/// Tells a client that speaks plain HTTP; it would not understand an alert of TLS.
pub(super) async fn refuse_plain(tcp: &TcpStream) {
    const BODY: &str = r#"{"error":{"message":"This port speaks TLS: use https://.","type":"invalid_request_error","param":null,"code":null}}"#;
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{BODY}",
        BODY.len()
    );
    // It fits into the send buffer of a new connection.
    if tcp.writable().await.is_ok() {
        let _: io::Result<usize> = tcp.try_write(answer.as_bytes());
    }
}
