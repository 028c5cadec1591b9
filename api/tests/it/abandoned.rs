//! Clients that go away at any moment, over real sockets: nothing of theirs stays behind.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use m40llm_engine::EngineConfig;
use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::sockets::{PATIENCE, Server, post};

/// `TEST_ABANDONED`, for the full count.
#[expect(clippy::disallowed_methods, reason = "a count for tests is no setting of the program")]
fn count() -> u64 {
    std::env::var("TEST_ABANDONED").ok().and_then(|n| n.parse().ok()).unwrap_or(150)
}

/// A generator that anybody may start again from the number it printed (Steele, Lea and Flood, `SplitMix64`).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// One request, and at which of its phases its client goes.
struct Abandoned {
    text: String,
    /// Bytes that are sent of it.
    sent: usize,
    /// Goes with the first bytes of the answer.
    reads: bool,
    /// Goes after this at the latest.
    after: Duration,
}

impl Abandoned {
    fn new(dice: &mut Dice) -> Self {
        // Some begin alike, so that blocks are shared.
        let common = "once upon a time there was a ".repeat(dice.below(4) as usize);
        let prompt = format!("{common}{}", "and so on ".repeat(1 + dice.below(12) as usize));
        let text = post(
            "1.1",
            &json!({
                "prompt": prompt, "max_tokens": 1 + dice.below(200), "stream": dice.below(2) == 0,
                "n": 1 + dice.below(3) / 2 * 2, "logit_bias": {"2": -100},
            }),
        );
        // One in four is cut: in its head, or in its body.
        let sent = if dice.below(4) == 0 { dice.below(text.len() as u64) as usize } else { text.len() };
        let reads = sent == text.len() && dice.below(3) == 0;
        Self { text, sent, reads, after: Duration::from_millis(dice.below(1500)) }
    }
}

/// Whether a line of the metrics says that somebody's work or memory is still there. The request that asks is in flight.
fn is_left(line: &str) -> bool {
    let Some((name, value)) = line.split_once(' ') else { return false };
    match name {
        "m40llm_requests_in_flight" => value != "1",
        "m40llm_sequences_running"
        | "m40llm_sequences_waiting"
        | "m40llm_sequences_paused"
        | "m40llm_kv_blocks_used" => value != "0",
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_abandoned_at_any_moment_leave_every_gauge_at_zero() {
    let seed = RandomState::new().hash_one(0);
    println!("seed {seed}");
    let mut dice = Dice(seed);
    // Blocks for one context, between eight sequences: some may be preempted.
    let whole = Server::start(|_| {}).await;
    let info = whole.engine.info();
    let kv_memory = info.kv_bytes / (info.kv_tokens / info.ctx_size) as u64;
    let engine = EngineConfig { kv_memory: Some(kv_memory), ..Server::engine() };
    let server = Arc::new(Server::with(engine, |_| {}).await);
    let mut clients = JoinSet::new();
    for _ in 0..count() {
        if clients.len() >= 40 {
            clients.join_next().await.unwrap().unwrap();
        }
        let (abandoned, server) = (Abandoned::new(&mut dice), Arc::clone(&server));
        clients.spawn(async move {
            let mut stream = server.send(&abandoned.text[..abandoned.sent]).await;
            // Who reads goes with the first bytes of the answer, if they come in time.
            if abandoned.reads {
                let _ = timeout(abandoned.after, stream.read(&mut [0; 512])).await;
            } else {
                sleep(abandoned.after).await;
            }
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended.unwrap();
    }

    let since = Instant::now();
    let left = loop {
        let page = server.get("/metrics").await;
        let left: Vec<&str> = page.lines().filter(|line| is_left(line)).collect();
        if left.is_empty() || since.elapsed() > PATIENCE {
            break left.join(", ");
        }
        sleep(Duration::from_millis(20)).await;
    };
    let stats = server.engine.stats();
    println!("{stats:?}");
    assert!(left.is_empty(), "left behind: {left}");
    assert!(!server.engine.is_busy());
    assert!(stats.generated_tokens > 0, "none came as far as that: {stats:?}");
}
