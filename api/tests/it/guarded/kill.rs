//! `kill -9` at any moment: what the server has told of it keeps.

use std::{collections::BTreeMap, path::Path, thread, time::Duration};

use serde_json::{Value, json};

use super::{Server, ask, body, dir, status};
use crate::keys::{create, keys, keys_json};

/// What a client knows of its finished requests, or the accounts say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Tally {
    requests: u64,
    prompt: u64,
    completion: u64,
}

impl Tally {
    fn of(usage: &Value) -> Self {
        let field = |name: &str| usage[name].as_u64().unwrap_or_else(|| panic!("no {name}: {usage}"));
        Self { requests: 1, prompt: field("prompt_tokens"), completion: field("completion_tokens") }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            requests: self.requests + other.requests,
            prompt: self.prompt + other.prompt,
            completion: self.completion + other.completion,
        }
    }

    fn fits_in(self, other: Self) -> bool {
        self.requests <= other.requests && self.prompt <= other.prompt && self.completion <= other.completion
    }
}

/// The accounts by key.
fn accounts(dir: &Path) -> BTreeMap<String, Tally> {
    let usage = keys_json(dir, &["usage"]);
    let row = |row: &Value| {
        let requests = row["requests"].as_u64().expect("requests");
        (row["id"].as_str().expect("an id").to_owned(), Tally { requests, ..Tally::of(row) })
    };
    usage.as_array().expect("a list").iter().map(row).collect()
}

/// Numbers that look random and can be had again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// Requests one after another until the server is gone. What was finished, and the most that the one which was
/// not may have cost.
fn load(addr: &str, key: &str, seed: u64) -> (Tally, Tally) {
    let mut random = Random(seed);
    let mut finished = Tally::default();
    loop {
        let (stream, most) = (random.below(2) == 0, 1 + random.below(60));
        let mut request = json!({"prompt": "hello", "max_tokens": most, "stream": stream, "temperature": 0});
        if stream {
            request["stream_options"] = json!({"include_usage": true});
        }
        let answer = ask(addr, "POST", "/v1/completions", key, Some(&request)).unwrap_or_default();
        match usage_of(&answer, stream) {
            Some(usage) => finished = finished.plus(Tally::of(&usage)),
            None => return (finished, Tally { requests: 1, prompt: 64, completion: most }),
        }
    }
}

/// The usage of a whole answer; a stream is whole when its last event is there.
fn usage_of(answer: &str, stream: bool) -> Option<Value> {
    if answer.is_empty() {
        return None;
    }
    assert!(answer.len() < 12 || status(answer) == 200, "{answer}");
    if !stream {
        return Some(serde_json::from_str::<Value>(body(answer)).ok()?["usage"].clone());
    }
    answer.contains("data: [DONE]\n\n").then_some(())?;
    let mut events = answer.lines().filter_map(|line| line.strip_prefix("data: {"));
    let last = events
        .next_back()
        .map(|event| serde_json::from_str::<Value>(&format!("{{{event}")).expect("JSON"))?;
    Some(last["usage"].clone())
}

/// Keys made over HTTP until the server is gone: those that were told.
fn make_keys(addr: &str, admin: &str) -> Vec<String> {
    let mut made = Vec::new();
    loop {
        let answer =
            ask(addr, "POST", "/admin/keys", admin, Some(&json!({"name": "made"}))).unwrap_or_default();
        let Ok(key) = serde_json::from_str::<Value>(body(&answer)) else { return made };
        made.push(key["id"].as_str().unwrap_or_else(|| panic!("no id: {answer}")).to_owned());
        thread::sleep(Duration::from_millis(20));
    }
}

/// `TEST_KILLS`, for the full count.
#[expect(clippy::disallowed_methods, reason = "a count for tests is no setting of the program")]
fn kills() -> u64 {
    std::env::var("TEST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(5)
}

/// After `kill -9` at any moment the database opens; the accounts hold every request whose answer a client has
/// had whole, to the token, and at most the one more that each client was waiting for; every key that was told
/// of is there, and revoked ones are revoked.
#[test]
fn nothing_told_is_lost_by_kill_9() {
    const CLIENTS: usize = 4;
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(1, |d| d.as_nanos() as u64);
    println!("seed {seed}");
    let mut random = Random(seed);
    let dir = dir();
    let clients: Vec<_> = (0..CLIENTS).map(|_| create(dir.path(), &[])).collect();
    let (_, admin) = create(dir.path(), &["--scope", "admin"]);
    let (revoked, _) = create(dir.path(), &[]);
    assert_eq!(keys(dir.path(), &["revoke", &revoked]).status.code(), Some(0));
    let mut before = accounts(dir.path());
    let mut made: Vec<String> = Vec::new();
    let (mut finished_requests, mut with_extra) = (0, 0);
    for round in 0..kills() {
        let server = Server::start(dir.path(), &[]);
        let addr = server.addr.clone();
        let results: Vec<(Tally, Tally)> = thread::scope(|scope| {
            let running: Vec<_> = clients
                .iter()
                .map(|(_, key)| {
                    let (addr, seed) = (addr.clone(), random.below(u64::MAX));
                    scope.spawn(move || load(&addr, key, seed))
                })
                .collect();
            let maker = scope.spawn(|| make_keys(&addr, &admin));
            thread::sleep(Duration::from_millis(30 + random.below(400)));
            drop(server);
            made.extend(maker.join().expect("keys"));
            running.into_iter().map(|client| client.join().expect("a client")).collect()
        });

        let database = rusqlite::Connection::open(dir.path().join("keys.sqlite3")).expect("it opens");
        let check: String =
            database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a check");
        assert_eq!(check, "ok", "round {round}");
        let after = accounts(dir.path());
        for ((id, _), (finished, open)) in clients.iter().zip(&results) {
            let lower = before[id].plus(*finished);
            let recorded = after[id];
            assert!(
                lower.fits_in(recorded),
                "round {round}, {id}: {lower:?} finished, {recorded:?} recorded"
            );
            assert!(
                recorded.fits_in(lower.plus(*open)),
                "round {round}, {id}: {lower:?} + {open:?}, {recorded:?}"
            );
            if recorded.requests == lower.requests {
                assert_eq!(recorded, lower, "round {round}, {id}");
            } else {
                with_extra += 1;
            }
            finished_requests += finished.requests;
        }
        before = after;
        let listed = keys_json(dir.path(), &["list"]);
        let status = |id: &str| {
            let key = listed.as_array().expect("a list").iter().find(|key| key["id"] == id);
            key.unwrap_or_else(|| panic!("round {round}: {id} is lost"))["status"].clone()
        };
        assert_eq!(status(&revoked), "revoked");
        for id in made.iter().chain(clients.iter().map(|(id, _)| id)) {
            assert_eq!(status(id), "active");
        }
    }
    println!(
        "{} kills: {finished_requests} requests finished, {with_extra} recorded whose answers did not arrive, {} keys made",
        kills(),
        made.len()
    );
    assert!(finished_requests > kills() && !made.is_empty(), "there was no load");
}
