//! What is run and measured.

use std::{
    collections::VecDeque,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};

use crate::{
    attack::{Attack, Kind},
    client::{Client, Told},
    report::{Callers, Company, Spread, Streams},
    server::{Options, Server},
    system,
};

/// Streams under load.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// How many at once.
    pub(crate) streams: usize,
    /// Tokens a second, all together.
    pub(crate) rate: usize,
    /// Tokens in a step of the source.
    pub(crate) batch: usize,
    /// How long it is measured.
    pub(crate) time: Duration,
}

/// More time than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// What a request asks for when it is to go on until its connection is closed.
const ENDLESS: usize = 1_000_000;

/// Opens the streams, lets all of them run, and measures every token for a while.
pub(crate) fn streams(load: &Load, keyed: bool) -> anyhow::Result<Streams> {
    let options = Options {
        sequences: load.streams,
        step: (load.batch * 1_000_000 / load.rate) as u64,
        batch: load.batch,
        ..Options::default()
    };
    let mut server = Server::start(options, keyed)?;
    measure(&server, load).map_err(|error| server.blame(error))
}

fn measure(server: &Server, load: &Load) -> anyhow::Result<Streams> {
    // What the first requests make once is not what a stream costs.
    callers(server, 32, Duration::from_millis(500))?;
    let before = system::resident(server.pid())?;

    let mut client = Client::new(server.addr, server.key(), ENDLESS)?;
    let mut tokens = vec![0_usize; load.streams];
    let (began, mut silent) = (Instant::now(), load.streams);
    for id in 0..load.streams {
        client.open()?;
        client.ask(id)?;
        client.poll(Duration::from_micros(500), |id, _| silent -= usize::from(first(&mut tokens[id])))?;
    }
    while silent > 0 {
        ensure!(began.elapsed() < PATIENCE, "{silent} streams had no token");
        client.poll(Duration::from_millis(10), |id, _| silent -= usize::from(first(&mut tokens[id])))?;
    }
    let opened = began.elapsed();
    until(Duration::from_millis(500), |wait| client.poll(wait, |_, _| {}))?;

    tokens.fill(0);
    let mut delays = Vec::with_capacity((load.rate as f64 * load.time.as_secs_f64() * 1.2) as usize);
    let (server_cpu, client_cpu) = (system::cpu_time(server.pid())?, system::cpu_time(std::process::id())?);
    let started = Instant::now();
    until(load.time, |wait| {
        client.poll(wait, |id, told| {
            if let Told::Token(delay) = told {
                tokens[id] += 1;
                delays.push(delay);
            }
        })
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let cores = |pid, before: Duration| {
        system::cpu_time(pid).map(|now| now.saturating_sub(before).as_secs_f64() / seconds)
    };
    let (server_cores, client_cores) =
        (cores(server.pid(), server_cpu)?, cores(std::process::id(), client_cpu)?);
    let during = system::resident(server.pid())?;

    let least = tokens.iter().min().copied().unwrap_or_default();
    ensure!(least > 0, "a stream had no token in {seconds:.1} s");
    Ok(Streams {
        count: load.streams,
        keyed: server.key().is_some(),
        batch: load.batch,
        tokens_per_s: delays.len() as f64 / seconds,
        wanted_per_s: load.rate as f64,
        delay: Spread::of(delays).context("no tokens")?,
        kb_a_stream: during.saturating_sub(before) as f64 / 1000.0 / load.streams as f64,
        opened_s: opened.as_secs_f64(),
        server_cores,
        client_cores,
    })
}

/// Whether this is the first of its kind.
fn first(count: &mut usize) -> bool {
    *count += 1;
    *count == 1
}

/// Calls `step` with what is left of `time`, at most 10 ms, until it is over.
fn until(time: Duration, mut step: impl FnMut(Duration) -> std::io::Result<()>) -> std::io::Result<()> {
    let end = Instant::now() + time;
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        step(left.min(Duration::from_millis(10)))?;
    }
    Ok(())
}

/// How many good callers there are, what each asks for, and how long it rests after an answer.
const CALLERS: usize = 4;
const ANSWER: usize = 32;
const REST: Duration = Duration::from_millis(10);

/// Good callers, without and with bad company, in pairs of which every other begins with it.
pub(crate) fn pairs(kind: Kind, count: usize, time: Duration) -> anyhow::Result<Company> {
    let options = Options { sequences: 256, batch: 32, ..Options::default() };
    let mut server = Server::start(options, kind == Kind::WrongKeys)?;
    let run = || {
        callers(&server, CALLERS, time.min(Duration::from_millis(500)))?;
        let (mut pairs, mut rejected) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for pair in 0..count {
            let (mut without, mut with) = (None, None);
            for bad in [pair % 2 == 1, pair % 2 == 0] {
                let attack =
                    (bad && kind != Kind::Nothing).then(|| Attack::start(kind, &server)).transpose()?;
                // Until what there is to open is open, or what has ended is closed.
                thread::sleep(time.min(Duration::from_secs(if attack.is_some() { 2 } else { 1 })));
                let figures = callers(&server, CALLERS, time)?;
                rejected.extend(attack.map(Attack::end).transpose()?);
                *(if bad { &mut with } else { &mut without }) = Some(figures);
            }
            pairs.extend(without.zip(with));
        }
        anyhow::Ok((pairs, rejected))
    };
    let (pairs, rejected) = run().map_err(|error| server.blame(error))?;
    Ok(Company::new(kind, &rejected, pairs))
}

/// So many callers who ask, read, rest and ask again.
fn callers(server: &Server, count: usize, time: Duration) -> anyhow::Result<Callers> {
    let mut client = Client::new(server.addr, server.key(), ANSWER)?;
    let (mut firsts, mut tokens, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    // When each began to ask, and whether its first token is still to come.
    let mut asked = vec![(0, false); count];
    let mut resting: VecDeque<(Instant, usize)> = VecDeque::new();
    for _ in 0..count {
        resting.push_back((Instant::now(), client.open()?));
    }
    let end = Instant::now() + time;
    let patience = end + PATIENCE;
    // Answers that have begun are read to their end.
    while Instant::now() < end || resting.len() < count {
        ensure!(Instant::now() < patience, "an answer did not end");
        let mut wait = Duration::from_millis(10);
        while let Some(&(due, id)) = resting.front().filter(|_| Instant::now() < end) {
            wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                break;
            }
            resting.pop_front();
            asked[id] = (system::now(), true);
            client.ask(id)?;
        }
        client.poll(wait.min(Duration::from_millis(10)), |id, told| {
            let (since, waits) = &mut asked[id];
            match told {
                Told::Token(delay) => {
                    tokens.push(delay);
                    if std::mem::take(waits) {
                        firsts.push(system::now() - *since);
                    }
                }
                Told::End => {
                    requests.push(system::now() - *since);
                    resting.push_back((Instant::now() + REST, id));
                }
            }
        })?;
    }
    Ok(Callers {
        requests: requests.len(),
        first: Spread::of(firsts).context("no first token")?,
        token: Spread::of(tokens).context("no token")?,
        request: Spread::of(requests).context("no answer")?,
    })
}
