//! `m40llm health`: asks a running server whether it serves. Plain `std`, so that container health
//! checks start fast and work in every build.

use std::{
    io::{self, Read as _, Write as _},
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
  m40llm health --addr 127.0.0.1:8080 && echo serving")]
pub(crate) struct Args {
    /// Where the server listens (also `M40LLM_ADDR`) [default: 127.0.0.1:58439]
    #[arg(long, value_name = "HOST:PORT", value_parser = config::addr)]
    addr: Option<Addr>,
}

/// One request, one line.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let addr = config::health_addr(args.addr)?;
    let (status, body) = ask(&addr).map_err(|e| {
        anyhow!("no server answers at {addr} ({e}); start one with `m40llm run MODEL.gguf --addr {addr}`")
    })?;
    match status {
        200 => Ok(print(&format!("serving at http://{addr}\n"))?),
        503 if body.contains("loading") => {
            bail!("the server at {addr} is still loading its model; ask again")
        }
        503 if body.contains("draining") => bail!("the server at {addr} is shutting down; start it again"),
        _ => bail!("{addr} answers /health with {status}: that is no healthy m40llm; see its log"),
    }
}

/// Status and body of `GET /health`.
fn ask(addr: &Addr) -> io::Result<(u16, String)> {
    let mut stream = connect(addr)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
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
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}
