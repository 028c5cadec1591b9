//! TLS over real sockets: a real client, certificates that change, callers that do not speak it.

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use m40llm::transport::tls::Tls;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
        version::{TLS12, TLS13},
    },
};

use crate::sockets::{Server, rest};

const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// Certificate and key on the disk.
pub(crate) struct Files {
    dir: TempDir,
}

impl Files {
    pub(crate) fn new(name: &str) -> Self {
        let files = Self { dir: tempfile::tempdir().unwrap() };
        files.renew(name);
        files
    }

    pub(crate) fn cert(&self) -> PathBuf {
        self.dir.path().join("cert.pem")
    }

    pub(crate) fn key(&self) -> PathBuf {
        self.dir.path().join("key.pem")
    }

    /// A new pair for `name`, put there as certificate managers do it: by renaming.
    pub(crate) fn renew(&self, name: &str) {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed([name.to_owned()]).unwrap();
        for (path, text) in [(self.cert(), cert.pem()), (self.key(), signing_key.serialize_pem())] {
            let new = path.with_extension("new");
            fs::write(&new, text).unwrap();
            fs::rename(new, path).unwrap();
        }
    }

    fn load(&self) -> Tls {
        Tls::load_looking(&self.cert(), &self.key(), LOOK).unwrap()
    }

    /// A client that trusts the certificate that is there now, and nothing else.
    fn client(&self) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.cert()).unwrap()).unwrap();
        ClientConfig::builder_with_provider(m40llm::transport::tls::provider())
            .with_protocol_versions(&[&TLS12, &TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    }
}

async fn serve(files: &Files) -> Server {
    let tls = files.load();
    Server::start(|config| {
        config.tls = Some(tls);
        config.keep_alive = Duration::from_millis(1);
    })
    .await
}

async fn connect(server: &Server, client: ClientConfig, name: &str) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let tcp = TcpStream::connect(server.addr).await?;
    timeout(PATIENCE, TlsConnector::from(Arc::new(client)).connect(name, tcp)).await.expect("a handshake")
}

/// A request's answer, to the end of the connection.
async fn ask(stream: &mut TlsStream<TcpStream>, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an end").unwrap();
    answer
}

fn get(host: &str) -> String {
    format!("GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
}

fn generate(tokens: usize, stream: bool) -> String {
    let body = format!(
        "{{\"prompt\":\"hello\",\"max_tokens\":{tokens},\"stream\":{stream},\"logit_bias\":{{\"2\":-100}}}}"
    );
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_knows_the_certificate_is_served() {
    let files = Files::new("api.example");
    let server = serve(&files).await;
    for alpn in [vec![], vec![b"h2".to_vec(), b"http/1.1".to_vec()]] {
        let mut client = files.client();
        client.alpn_protocols = alpn.clone();
        let mut stream = connect(&server, client, "api.example").await.unwrap();
        let agreed = stream.get_ref().1.alpn_protocol();
        assert_eq!(agreed, (!alpn.is_empty()).then_some(b"http/1.1".as_slice()));
        let answer = ask(&mut stream, &get("api.example")).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("{\"status\":\"ok\"}"), "{answer}");
        assert!(answer.contains("\r\nstrict-transport-security: max-age="), "{answer}");
    }
    // Other servers of this machine would be asked for https, too.
    let mut stream = connect(&server, files.client(), "api.example").await.unwrap();
    assert!(!ask(&mut stream, &get("localhost:58439")).await.contains("strict-transport"));
    let mut stream = connect(&server, files.client(), "api.example").await.unwrap();
    let answer = ask(&mut stream, &generate(5, true)).await;
    assert!(answer.contains("data: [DONE]"), "{answer}");
    let refused = connect(&server, files.client(), "other.example").await.unwrap_err();
    assert!(refused.to_string().contains("certificate"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_go_are_told_from_those_that_listen() {
    let files = Files::new("api.example");
    let server = serve(&files).await;
    let running = async |count| {
        let since = Instant::now();
        while server.engine.stats().running != count {
            assert!(since.elapsed() < PATIENCE, "{:?}", server.engine.stats());
            sleep(Duration::from_millis(2)).await;
        }
    };
    for stream in [false, true] {
        let mut gone = connect(&server, files.client(), "api.example").await.unwrap();
        gone.write_all(generate(500, stream).as_bytes()).await.unwrap();
        running(1).await;
        drop(gone);
        running(0).await;
        let mut listening = connect(&server, files.client(), "api.example").await.unwrap();
        listening.write_all(generate(30, stream).as_bytes()).await.unwrap();
        // close_notify and FIN.
        listening.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, listening.read_to_string(&mut answer)).await.expect("an end").unwrap();
        assert!(answer.contains("\"finish_reason\":\"length\""), "{answer}");
    }
    assert!(server.engine.stats().generated_tokens < 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_certificate_is_shown_to_new_connections() {
    let files = Files::new("old.example");
    let server = serve(&files).await;
    let old = files.client();
    let mut kept = connect(&server, old.clone(), "old.example").await.unwrap();

    // A broken pair changes nothing: a key that is none, then one that belongs to another certificate.
    for key in ["no key", &rcgen::KeyPair::generate().unwrap().serialize_pem()] {
        fs::write(files.key(), key).unwrap();
        sleep(LOOK * 10).await;
        connect(&server, old.clone(), "old.example").await.unwrap();
    }

    files.renew("new.example");
    let since = Instant::now();
    while connect(&server, files.client(), "new.example").await.is_err() {
        assert!(since.elapsed() < PATIENCE, "the new certificate never came");
        sleep(LOOK).await;
    }
    assert!(connect(&server, old, "old.example").await.is_err());
    assert!(ask(&mut kept, &get("old.example")).await.starts_with("HTTP/1.1 200 "), "what is there stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_told_so_at_once() {
    let files = Files::new("api.example");
    let server = serve(&files).await;
    let mut plain = TcpStream::connect(server.addr).await.unwrap();
    plain.write_all(get("x").as_bytes()).await.unwrap();
    let answer = rest(&mut plain).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("use https://"), "{answer}");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(body).unwrap()["error"]["type"],
        "invalid_request_error"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_end() {
    let files = Files::new("api.example");
    let tls = files.load();
    let server = Server::start(|config| {
        config.tls = Some(tls);
        config.limits.handshake = Duration::from_millis(200);
    })
    .await;
    // Nothing, the beginning of one, and nonsense that looks like one.
    for bytes in [b"".as_slice(), b"\x16\x03\x01\x02\x00", &[0x16; 600]] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection stays open");
        assert!(answer.len() < 16, "at most an alert: {answer:?}");
    }
    connect(&server, files.client(), "api.example").await.unwrap();
}

#[test]
fn files_that_are_no_pair_are_named() {
    let (one, other) = (Files::new("one"), Files::new("other"));
    let empty = one.dir.path().join("empty.pem");
    fs::write(&empty, "").unwrap();
    let absent = one.dir.path().join("absent.pem");
    for (cert, key, setting, file) in [
        (&absent, &one.key(), "tls-cert", "absent.pem"),
        (&empty, &one.key(), "tls-cert", "empty.pem"),
        (&one.key(), &one.key(), "tls-cert", "key.pem"),
        (&one.cert(), &absent, "tls-key", "absent.pem"),
        (&one.cert(), &empty, "tls-key", "empty.pem"),
        (&one.cert(), &one.cert(), "tls-key", "cert.pem"),
        (&one.cert(), &other.key(), "tls-key", "does not go with tls-cert"),
    ] {
        let error = Tls::load(cert, key).unwrap_err();
        assert!(error.starts_with(setting) && error.contains(file), "{error}");
        assert!(!error.contains('\n') && !error.contains("PRIVATE"), "{error}");
    }
    Tls::load(&one.cert(), &one.key()).unwrap();
}
