//! `m40llm health`: asks a running server whether it serves. Without a runtime, so that container health
//! checks start fast.

#[cfg(feature = "server")]
use std::path::PathBuf;
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{anyhow, bail};

use super::print;
use crate::config::{self, Addr};

const TIMEOUT: Duration = Duration::from_secs(5);

/// Ask a running server whether it serves
///
/// Exit code 0 when the server's /health says that a request would be served, 1 otherwise.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm health
  m40llm health --addr 127.0.0.1:8080 && echo serving
  m40llm health --tls-cert server.pem")]
pub(crate) struct Args {
    /// Where the server listens (also `M40LLM_ADDR`) [default: 127.0.0.1:58439]
    #[arg(long, value_name = "HOST:PORT", value_parser = config::addr)]
    addr: Option<Addr>,
    /// The server speaks TLS and must show the first certificate of this file: the one that `run` has
    /// (also `M40LLM_TLS_CERT`). Names and issuers do not matter then
    #[cfg(feature = "server")]
    #[arg(long, value_name = "FILE.pem", value_parser = config::pem_file)]
    tls_cert: Option<PathBuf>,
}

/// One request, one line.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let addr = config::health_addr(args.addr)?;
    #[cfg(feature = "server")]
    let pinned = config::health_cert(args.tls_cert)?.map(|file| pinned::first_of(&file)).transpose()?;
    #[cfg(not(feature = "server"))]
    let pinned: Option<()> = None;
    let scheme = if pinned.is_some() { "https" } else { "http" };
    let answer = connect(&addr).and_then(|tcp| match pinned {
        #[cfg(feature = "server")]
        Some(cert) => ask(pinned::connect(tcp, cert)?, &addr),
        _ => ask(tcp, &addr),
    });
    let (status, body) = answer.map_err(|e| {
        anyhow!("no server answers at {addr} ({e}); start one with `m40llm run MODEL.gguf --addr {addr}`")
    })?;
    match status {
        200 => Ok(print(&format!("serving at {scheme}://{addr}\n"))?),
        503 if body.contains("loading") => {
            bail!("the server at {addr} is still loading its model; ask again")
        }
        503 if body.contains("draining") => bail!("the server at {addr} is shutting down; start it again"),
        _ => bail!("{addr} answers /health with {status}: that is no healthy m40llm; see its log"),
    }
}

/// Status and body of `GET /health`.
fn ask(mut stream: impl Read + Write, addr: &Addr) -> io::Result<(u16, String)> {
    write!(stream, "GET /health HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    // A health answer is short; whatever speaks longer is not ours.
    stream.take(16 << 10).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("what listens there does not speak HTTP"))?;
    Ok((status, answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned()))
}

fn connect(addr: &Addr) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the host has no address");
    for mut target in addr.resolve()? {
        // A server on "every address" is asked at home.
        if target.ip().is_unspecified() {
            let port = target.port();
            let home =
                if target.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            target = SocketAddr::new(home, port);
        }
        match TcpStream::connect_timeout(&target, TIMEOUT) {
            Ok(stream) => {
                stream.set_read_timeout(Some(TIMEOUT))?;
                stream.set_write_timeout(Some(TIMEOUT))?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// TLS with a server that is known by its certificate. The check runs beside the server and has its file,
/// but its address need not be the certificate's name, nor its issuer a known one.
#[cfg(feature = "server")]
mod pinned {
    use std::{
        io::{self, Read, Write},
        net::TcpStream,
        path::Path,
        sync::Arc,
    };

    use crate::config::ConfigError;
    use m40llm::transport::tls::{certificates, provider};
    use tokio_rustls::rustls::{
        self, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme,
        StreamOwned,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
        pki_types::{CertificateDer, ServerName, UnixTime},
    };

    /// The certificate to expect.
    pub(super) fn first_of(file: &Path) -> Result<CertificateDer<'static>, ConfigError> {
        let chain =
            certificates(file).and_then(|c| c.into_iter().next().ok_or_else(|| "it is empty".to_owned()));
        chain.map_err(|why| ConfigError(format!("tls-cert: {}: {why}", file.display())))
    }

    /// A stream to the server that has the certificate `expected`.
    pub(super) fn connect(
        tcp: TcpStream,
        expected: CertificateDer<'static>,
    ) -> io::Result<impl Read + Write + use<>> {
        let name = ServerName::IpAddress(tcp.peer_addr()?.ip().into());
        let provider = provider();
        let verifier = Arc::new(Pinned { expected, provider: provider.clone() });
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, tcp))
    }

    #[derive(Debug)]
    struct Pinned {
        expected: CertificateDer<'static>,
        provider: Arc<CryptoProvider>,
    }

    impl ServerCertVerifier for Pinned {
        fn verify_server_cert(
            &self,
            end_entity: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, rustls::Error> {
            if *end_entity == self.expected {
                Ok(ServerCertVerified::assertion())
            } else {
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }

        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            dss: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    }
}
