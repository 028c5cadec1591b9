//! Bytes from the hub: asked for from where the last attempt ended, and compared with their checksum.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use hf_hub::{Repo, RepoType};
use sha2::{Digest as _, Sha256};
use ureq::{Agent, config::RedirectAuthHeaders};

use super::listing::RemoteFile;
use crate::config::HubConfig;

/// How often a transfer that brings nothing is tried again.
const RETRIES: u32 = 4;
/// The first wait between two; each further one is twice as long.
const WAIT: Duration = Duration::from_millis(500);
/// How long a server may say nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// Speaks to the hub.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    authorization: Option<String>,
}

/// How one attempt ended that has not brought everything.
enum Failure {
    /// It may go better another time.
    Passing(String),
    /// It will not.
    Final(anyhow::Error),
}

impl Client {
    /// A client of this hub.
    pub(super) fn new(hub: &HubConfig) -> Self {
        let config = Agent::config_builder()
            .user_agent(concat!("m40llm/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            // The token is the hub's: hosts that it redirects to do not see it.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        let authorization = hub.token.as_ref().map(|token| format!("Bearer {}", token.0));
        Self { agent: config.into(), endpoint: hub.endpoint.clone(), authorization }
    }

    /// The hub's address.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The address of a repository's file at a commit.
    pub(super) fn url(&self, repo: &str, commit: &str, file: &str) -> String {
        let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, commit.to_owned());
        format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint,
            repo.url(),
            repo.url_revision(),
            file.replace(' ', "%20")
        )
    }

    /// What the hub says of a repository, as JSON.
    pub(super) fn info(&self, repo: &Repo) -> anyhow::Result<String> {
        let url = format!("{}/api/{}?blobs=true", self.endpoint, repo.api_url());
        let answer = self.get(&url, None).map_err(|failure| match failure {
            Failure::Passing(why) => anyhow!("cannot reach {}: {why}", self.endpoint),
            Failure::Final(error) => error,
        })?;
        let status = answer.status().as_u16();
        if status != 200 {
            return Err(self.refusal(status, &repo.url()));
        }
        let mut text = String::new();
        // Lists of files are short; whatever is longer is none.
        answer.into_body().into_reader().take(16 << 20).read_to_string(&mut text)?;
        Ok(text)
    }

    /// Writes `file` into `part`, behind what is in it already, and tells how many bytes are there.
    pub(super) fn download(
        &self,
        url: &str,
        file: &RemoteFile,
        part: &Path,
        progress: &dyn Fn(u64),
    ) -> anyhow::Result<()> {
        let mut out =
            Partial::open(part, file).with_context(|| format!("cannot write {}", part.display()))?;
        let mut failed = 0;
        while out.len < file.size {
            progress(out.len);
            let before = out.len;
            match self.attempt(url, file, &mut out, progress) {
                Ok(()) => {}
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(why)) => {
                    failed = if out.len > before { 1 } else { failed + 1 };
                    if failed > RETRIES {
                        bail!(
                            "{}: {why}; {} of {} bytes are there: the same command goes on from them",
                            file.name,
                            out.len,
                            file.size
                        );
                    }
                    std::thread::sleep(WAIT * 2u32.pow(failed - 1));
                }
            }
        }
        let found = out.finish().with_context(|| format!("cannot write {}", part.display()))?;
        if found != file.sha256 {
            fs::remove_file(part).with_context(|| format!("cannot remove {}", part.display()))?;
            bail!(
                "{} came with the SHA-256 {found} and not {} as {} has it: it was thrown away, try again",
                file.name,
                file.sha256,
                self.endpoint
            );
        }
        Ok(())
    }

    /// Asks for what is missing and takes as much of it as comes.
    fn attempt(
        &self,
        url: &str,
        file: &RemoteFile,
        out: &mut Partial,
        progress: &dyn Fn(u64),
    ) -> Result<(), Failure> {
        let answer = self.get(url, Some(out.len))?;
        let status = answer.status().as_u16();
        match status {
            206 => {
                let range =
                    answer.headers().get("content-range").and_then(|r| r.to_str().ok()).unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", out.len)) {
                    return Err(Failure::Final(anyhow!(
                        "{}: the server sent other bytes than it was asked for",
                        file.name
                    )));
                }
            }
            // The whole file, whatever was asked for.
            200 => out.restart().map_err(disk)?,
            408 | 429 | 500..=599 => {
                return Err(Failure::Passing(format!("the server answers with status {status}")));
            }
            _ => return Err(Failure::Final(self.refusal(status, &file.name))),
        }
        // Not a byte more than there should be.
        let mut body = answer.into_body().into_reader().take(file.size - out.len);
        let mut buffer = vec![0; 1 << 18];
        while out.len < file.size {
            match body.read(&mut buffer) {
                Ok(0) => return Err(Failure::Passing("the connection ended".into())),
                Ok(n) => out.write(&buffer[..n]).map_err(disk)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Passing(format!("the connection broke: {e}"))),
            }
            progress(out.len);
        }
        Ok(())
    }

    fn get(&self, url: &str, from: Option<u64>) -> Result<ureq::http::Response<ureq::Body>, Failure> {
        let mut request = self.agent.get(url);
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        if let Some(from) = from {
            request = request.header("range", format!("bytes={from}-"));
        }
        request.call().map_err(|e| match e {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Failure::Final(anyhow!("{url} is no address: {e}"))
            }
            e => Failure::Passing(e.to_string()),
        })
    }

    /// Why the hub does not give `what`.
    fn refusal(&self, status: u16, what: &str) -> anyhow::Error {
        let endpoint = &self.endpoint;
        match (status, &self.authorization) {
            (401 | 403 | 404, None) => {
                anyhow!("{endpoint} has no {what} for everybody ({status}): see its name, or set HF_TOKEN")
            }
            (401 | 403, Some(_)) => anyhow!("{endpoint} refuses {what} to the token in HF_TOKEN ({status})"),
            (404, Some(_)) => anyhow!("{endpoint} has no {what} ({status}): see its name and the revision"),
            _ => anyhow!("{endpoint} answers with status {status} when asked for {what}: try again later"),
        }
    }
}

fn disk(error: io::Error) -> Failure {
    Failure::Final(anyhow::Error::new(error).context("cannot write what comes"))
}

/// SHA-256 in hex digits.
pub(super) fn hex(sum: Sha256) -> String {
    use std::fmt::Write as _;
    sum.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A file that grows, and the checksum of what is in it.
struct Partial {
    file: File,
    len: u64,
    sum: Sha256,
}

impl Partial {
    /// Opens it for this process alone, and reads what an earlier download has left.
    fn open(path: &Path, whole: &RemoteFile) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => io::Error::other("another download is at it"),
            TryLockError::Error(e) => e,
        })?;
        let mut partial = Self { len: 0, sum: Sha256::new(), file: file.try_clone()? };
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => {
                    partial.sum.update(&buffer[..n]);
                    partial.len += n as u64;
                }
            }
        }
        if partial.len > whole.size {
            partial.restart()?;
        }
        Ok(partial)
    }

    /// Forgets what is in it.
    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.len, self.sum) = (0, Sha256::new());
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.sum.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Its checksum, once it is on the disk.
    fn finish(self) -> io::Result<String> {
        self.file.sync_all()?;
        Ok(hex(self.sum))
    }
}
