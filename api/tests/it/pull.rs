//! `m40llm pull` against a stand-in for the hub and for the host of files that it redirects to.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use futures_util::{StreamExt as _, stream};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::cli::{m40llm, refused, stderr, stdout};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "owner/Tiny-GGUF";
const TOKEN: &str = "hf_thisIsASecret";
/// Bytes after which a connection is cut.
const CUT: usize = 100_000;

/// What it was asked, on either host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    path: String,
    range: String,
    authorization: String,
}

#[derive(Default)]
struct Hub {
    files: BTreeMap<String, Bytes>,
    /// Names that are listed with the checksum of something else.
    lies: Vec<String>,
    /// Files on the disk of a server that knows no ranges.
    no_ranges: bool,
    /// The token that opens it, if any.
    token: Option<&'static str>,
    /// How many further transfers are cut.
    cuts: AtomicUsize,
    /// How many further transfers are refused for now.
    busy: AtomicUsize,
    asked: Mutex<Vec<Asked>>,
    files_host: Mutex<String>,
}

impl Hub {
    fn note(&self, path: &str, headers: &HeaderMap) {
        let text = |name| headers.get(name).map_or("", |v| v.to_str().unwrap()).to_owned();
        let asked = Asked {
            path: path.to_owned(),
            range: text(header::RANGE),
            authorization: text(header::AUTHORIZATION),
        };
        self.asked.lock().unwrap().push(asked);
    }

    /// The requests for the contents of files, as the ranges they asked for.
    fn ranges(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().filter(|a| a.path.starts_with("/blob/")).map(|a| a.range.clone()).collect()
    }

    fn closed(&self, headers: &HeaderMap) -> bool {
        let shown = headers.get(header::AUTHORIZATION).map_or("", |v| v.to_str().unwrap());
        self.token.is_some_and(|token| shown != format!("Bearer {token}"))
    }
}

async fn info(
    State(hub): State<Arc<Hub>>,
    UrlPath((owner, repo, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.note("/api", &headers);
    if hub.closed(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if format!("{owner}/{repo}") != REPO || revision != "main" {
        return StatusCode::NOT_FOUND.into_response();
    }
    let mut siblings = vec![json!({"rfilename": "README.md", "blobId": "0", "size": 9})];
    siblings.extend(hub.files.iter().map(|(name, content)| {
        let said = if hub.lies.contains(name) { Bytes::from_static(b"something else") } else { content.clone() };
        let sum = format!("{:x}", Sha256::digest(said));
        json!({"rfilename": name, "size": content.len(), "lfs": {"sha256": sum, "size": content.len(), "pointerSize": 1}})
    }));
    axum::Json(json!({"id": REPO, "sha": COMMIT, "siblings": siblings})).into_response()
}

/// The hub sends for files to another host, as the real one does.
async fn resolve(
    State(hub): State<Arc<Hub>>,
    UrlPath(path): UrlPath<String>,
    headers: HeaderMap,
) -> Response {
    hub.note("/resolve", &headers);
    let Some(name) = path.strip_prefix(&format!("{REPO}/resolve/{COMMIT}/")) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if hub.closed(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let name = name.replace(' ', "%20");
    let location = format!("{}/blob/{name}?signature=x", hub.files_host.lock().unwrap());
    (StatusCode::FOUND, [(header::LOCATION, location)]).into_response()
}

async fn blob(State(hub): State<Arc<Hub>>, UrlPath(name): UrlPath<String>, headers: HeaderMap) -> Response {
    hub.note(&format!("/blob/{name}"), &headers);
    let counted =
        |n: &AtomicUsize| n.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
    if counted(&hub.busy) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let Some(content) = hub.files.get(&name) else { return StatusCode::NOT_FOUND.into_response() };
    let from = headers.get(header::RANGE).filter(|_| !hub.no_ranges).map(|range| {
        let range = range.to_str().unwrap().strip_prefix("bytes=").unwrap();
        range.strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    let rest = content.slice(from.unwrap_or(0)..);
    let length = rest.len().to_string();
    let body = if counted(&hub.cuts) {
        let some = rest.slice(..rest.len().min(CUT));
        // An error in the midst of a body has the connection closed, once what came before it is sent.
        let broken = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Err(std::io::Error::other("cut"))
        };
        Body::from_stream(stream::iter([Ok(some)]).chain(stream::once(broken)))
    } else {
        Body::from(rest)
    };
    let total = content.len();
    match from {
        None => (StatusCode::OK, [(header::CONTENT_LENGTH, length)], body).into_response(),
        Some(from) => {
            let range = format!("bytes {from}-{}/{total}", total - 1);
            let headers = [(header::CONTENT_LENGTH, length), (header::CONTENT_RANGE, range)];
            (StatusCode::PARTIAL_CONTENT, headers, body).into_response()
        }
    }
}

/// A hub that answers, and a user's home.
struct World {
    hub: Arc<Hub>,
    endpoint: String,
    home: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl World {
    fn new(hub: Hub) -> Self {
        let hub = Arc::new(hub);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let app = Router::new()
            .route("/api/models/{owner}/{repo}/revision/{revision}", get(info))
            .route("/blob/{*name}", get(blob))
            .route("/{*path}", get(resolve))
            .with_state(hub.clone());
        let serve = |app: Router| -> SocketAddr {
            let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
            let addr = listener.local_addr().unwrap();
            runtime.spawn(async move { axum::serve(listener, app).await.unwrap() });
            addr
        };
        let endpoint = format!("http://{}", serve(app.clone()));
        // Another host by its name, as far as a client can tell.
        *hub.files_host.lock().unwrap() = format!("http://localhost:{}", serve(app).port());
        Self { hub, endpoint, home: tempfile::tempdir().unwrap(), _runtime: runtime }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = m40llm(&["pull"]);
        for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        for variable in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"] {
            command.env_remove(variable);
        }
        command
            .args(arguments)
            .env("HF_ENDPOINT", format!("{}/", self.endpoint))
            .env("HOME", self.home.path());
        command
    }

    fn pull(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn dir(&self) -> PathBuf {
        self.home.path().join("models")
    }

    fn pull_to_dir(&self, target: &str) -> Output {
        self.pull(&[target, "--to", self.dir().to_str().unwrap()])
    }
}

/// The path that it printed, and nothing else on either stream.
fn path(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{}", stderr(output));
    assert_eq!(stderr(output), "", "no terminal, no bar");
    let line = stdout(output).strip_suffix('\n').unwrap();
    assert!(!line.contains('\n'), "{line}");
    PathBuf::from(line)
}

/// Content that says where it is from.
fn bytes(len: usize, seed: u32) -> Bytes {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8).collect()
}

fn hub(files: &[(&str, Bytes)]) -> Hub {
    Hub { files: files.iter().map(|(name, b)| ((*name).to_owned(), b.clone())).collect(), ..Hub::default() }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_quantisation_is_fetched_into_a_directory_and_works() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/tests/goldens/tiny-llama.gguf");
    let model = Bytes::from(fs::read(model).unwrap());
    let world = World::new(hub(&[("tiny-Q4_K_M.gguf", model.clone()), ("tiny-Q8_0.gguf", bytes(1000, 1))]));
    let path = path(&world.pull_to_dir(REPO));
    assert_eq!(path, world.dir().join("tiny-Q4_K_M.gguf"));
    assert!(fs::read(&path).unwrap() == model);
    let inspected = m40llm(&["inspect", path.to_str().unwrap()]).output().unwrap();
    assert!(inspected.status.success() && stdout(&inspected).contains("llama"));
    // There already: nothing is fetched, and it is said again where.
    assert_eq!(self::path(&world.pull_to_dir("owner/Tiny-GGUF:q4_k_m")), path);
    assert_eq!(world.hub.ranges(), ["bytes=0-"]);
    assert_eq!(names(&world.dir()), ["tiny-Q4_K_M.gguf"]);
}

#[test]
fn a_connection_that_breaks_is_made_again_from_where_it_was() {
    let content = bytes(350_000, 2);
    let world =
        World::new(Hub { cuts: 3.into(), busy: 1.into(), ..hub(&[("dir/a b-Q8_0.gguf", content.clone())]) });
    let path = path(&world.pull_to_dir(REPO));
    assert!(fs::read(&path).unwrap() == content);
    let ranges = world.hub.ranges();
    // One that was refused for now, three that were cut, and the rest.
    assert_eq!((ranges.len(), &*ranges[0], &*ranges[1]), (5, "bytes=0-", "bytes=0-"), "{ranges:?}");
    let from: Vec<usize> = ranges.iter().map(|r| r[6..r.len() - 1].parse().unwrap()).collect();
    assert!(from[1..].windows(2).all(|w| w[0] < w[1] && w[1] - w[0] <= CUT), "{from:?}");
}

#[test]
fn an_interrupted_download_goes_on_with_the_same_command() {
    let content = bytes(CUT + 50_000, 3);
    let world = World::new(Hub { cuts: 1.into(), ..hub(&[("m-Q8_0.gguf", content.clone())]) });
    world.hub.busy.store(0, Ordering::SeqCst);
    // After the cut nothing comes any more.
    let mut child = world.command(&[REPO, "--to", world.dir().to_str().unwrap()]);
    let stopped = {
        let hub = world.hub.clone();
        std::thread::spawn(move || {
            while hub.ranges().is_empty() {
                std::thread::sleep(Duration::from_millis(1));
            }
            hub.busy.store(1000, Ordering::SeqCst);
        })
    };
    let output = child.output().unwrap();
    stopped.join().unwrap();
    refused(&output, 1, &["m-Q8_0.gguf", "503", "of 150000 bytes", "the same command"]);
    let part = names(&world.dir());
    assert!(
        part.len() == 1 && part[0].starts_with("m-Q8_0.gguf.") && part[0].strip_suffix(".part").is_some(),
        "{part:?}"
    );
    let so_far = fs::metadata(world.dir().join(&part[0])).unwrap().len();
    assert!(so_far > 0 && so_far <= CUT as u64, "{so_far}");

    world.hub.busy.store(0, Ordering::SeqCst);
    world.hub.asked.lock().unwrap().clear();
    let path = path(&world.pull_to_dir(REPO));
    assert!(fs::read(path).unwrap() == content);
    assert_eq!(world.hub.ranges(), [format!("bytes={so_far}-")]);
    assert_eq!(names(&world.dir()), ["m-Q8_0.gguf"]);
}

#[test]
fn a_server_without_ranges_is_asked_for_everything_again() {
    let content = bytes(250_000, 4);
    let world = World::new(Hub { cuts: 1.into(), no_ranges: true, ..hub(&[("m.gguf", content.clone())]) });
    assert!(fs::read(path(&world.pull_to_dir(REPO))).unwrap() == content);
    assert_eq!(world.hub.ranges().len(), 2);
}

#[test]
fn a_wrong_checksum_is_no_file() {
    let mut hub = hub(&[("m.gguf", bytes(1000, 5))]);
    hub.lies.push("m.gguf".to_owned());
    let world = World::new(hub);
    refused(&world.pull_to_dir(REPO), 1, &["m.gguf", "SHA-256", "thrown away"]);
    assert_eq!(names(&world.dir()), [""; 0]);
    refused(&world.pull(&[REPO]), 1, &["SHA-256"]);
}

#[test]
fn the_cache_is_the_one_of_other_programs() {
    let content = bytes(1000, 6);
    let sum = format!("{:x}", Sha256::digest(&content));
    let world = World::new(hub(&[("Q8_0/m.gguf", content.clone())]));
    let output = world.pull(&[REPO]);
    let repo = world.home.path().join(".cache/huggingface/hub/models--owner--Tiny-GGUF");
    assert_eq!(path(&output), repo.join("snapshots").join(COMMIT).join("Q8_0/m.gguf"));
    assert!(fs::read(path(&output)).unwrap() == content);
    let link = fs::read_link(path(&output)).unwrap();
    assert_eq!(link, Path::new("../../../blobs").join(&sum), "relative: a cache may move");
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(names(&repo.join("blobs")), [sum]);
    // What another program has fetched, or this one, is not fetched again.
    assert_eq!(path(&world.pull(&[REPO])), path(&output));
    assert_eq!(world.hub.ranges().len(), 1);
    let elsewhere = world.home.path().join("cache");
    let output = world.command(&[REPO]).env("HF_HUB_CACHE", &elsewhere).output().unwrap();
    assert!(path(&output).starts_with(elsewhere));
}

#[test]
fn all_parts_of_a_split_file_come() {
    let parts =
        [("q/m-Q8_0-00001-of-00002.gguf", bytes(300, 7)), ("q/m-Q8_0-00002-of-00002.gguf", bytes(200, 8))];
    let world = World::new(hub(&parts));
    let first = path(&world.pull_to_dir("owner/Tiny-GGUF:Q8_0"));
    assert_eq!(first, world.dir().join("m-Q8_0-00001-of-00002.gguf"));
    for (name, content) in &parts {
        assert!(fs::read(world.dir().join(&name[2..])).unwrap() == *content, "{name}");
    }
    let cached = path(&world.pull(&["owner/Tiny-GGUF:q/m-Q8_0-00002-of-00002.gguf"]));
    assert_eq!(names(cached.parent().unwrap()), parts.each_ref().map(|(name, _)| &name[2..]));
    let missing = World::new(hub(&parts[1..]));
    refused(&missing.pull_to_dir(REPO), 1, &["1 of the 2 parts"]);
}

#[test]
fn the_token_is_shown_to_the_hub_alone() {
    let world = World::new(Hub { token: Some(TOKEN), ..hub(&[("m.gguf", bytes(1000, 9))]) });
    refused(&world.pull_to_dir(REPO), 1, &[REPO, "401", "HF_TOKEN"]);
    let dir = world.dir();
    let arguments = [REPO, "--to", dir.to_str().unwrap()];
    let wrong = world.command(&arguments).env("HF_TOKEN", "hf_wrong").output().unwrap();
    refused(&wrong, 1, &["HF_TOKEN", "401"]);
    assert!(!stderr(&wrong).contains("hf_wrong"));
    let output = world.command(&arguments).env("HF_TOKEN", TOKEN).output().unwrap();
    assert!(path(&output).exists());
    let asked = world.hub.asked.lock().unwrap();
    let at = |prefix: &str| asked.iter().rfind(|a| a.path.starts_with(prefix)).unwrap().authorization.clone();
    let bearer = format!("Bearer {TOKEN}");
    assert_eq!((at("/api"), at("/resolve"), at("/blob/")), (bearer.clone(), bearer, String::new()));
}

#[test]
fn what_cannot_be_had_is_said_in_one_line() {
    let world = World::new(hub(&[("a-Q8_0.gguf", bytes(9, 1)), ("b-Q5_0.gguf", bytes(9, 2))]));
    for wrong in ["", "Tiny-GGUF", "a/b/c", "owner/Tiny-GGUF:", "../Tiny-GGUF"] {
        refused(&world.pull(&[wrong]), 2, &["OWNER/REPO:QUANT"]);
    }
    refused(&world.pull(&[REPO, "--revision", "a b"]), 2, &["--revision"]);
    refused(&world.pull_to_dir(REPO), 1, &["choose", "a-Q8_0.gguf, b-Q5_0.gguf"]);
    refused(&world.pull_to_dir("owner/Tiny-GGUF:Q2_K"), 1, &["a-Q8_0.gguf, b-Q5_0.gguf"]);
    refused(&world.pull_to_dir("owner/Tiny-GGUF:c.gguf"), 1, &["a-Q8_0.gguf"]);
    refused(&world.pull_to_dir("owner/Other"), 1, &["owner/Other", "404"]);
    refused(&world.pull(&[REPO, "--revision", "v9"]), 1, &["404"]);
    let wrong = world.command(&[REPO]).env("HF_ENDPOINT", "hub").output().unwrap();
    refused(&wrong, 2, &["HF_ENDPOINT", "https://huggingface.co"]);
    let nobody = world.command(&[REPO]).env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap();
    refused(&nobody, 1, &["cannot reach http://127.0.0.1:1"]);
    let homeless = world.command(&[REPO]).env_remove("HOME").output().unwrap();
    refused(&homeless, 2, &["--to DIR"]);
}

#[test]
fn nothing_is_overwritten_and_nothing_leaves_its_directory() {
    let world = World::new(hub(&[("m.gguf", bytes(1000, 1)), ("../../evil.gguf", bytes(10, 2))]));
    fs::create_dir_all(world.dir()).unwrap();
    fs::write(world.dir().join("m.gguf"), "mine").unwrap();
    refused(&world.pull_to_dir(REPO), 1, &["m.gguf", "another file"]);
    assert_eq!(fs::read_to_string(world.dir().join("m.gguf")).unwrap(), "mine");
    refused(&world.pull_to_dir("owner/Tiny-GGUF:../../evil.gguf"), 1, &["choose"]);
    assert_eq!(names(world.home.path()), ["models"]);
}
