//! The gateway alone, a token source in the engine's place: what it adds to a token, what a stream costs, and
//! what bad company does to a good caller.
//!
//! `make bench-gateway` runs all of it. The server, the load and the attack are processes of their own on one
//! machine; a token's text carries the time of its sending, so that what is measured is the way from the
//! worker's thread to the client's `read`, the client's part included.
//!
//! Without `--bench`, as `cargo test` calls it, small numbers run once: whether it works, not how fast.

mod attack;
mod client;
mod report;
mod scenario;
mod server;
#[path = "../../tests/it/source.rs"]
mod source;
mod system;

use std::{net::SocketAddr, time::Duration};

use clap::{Parser, Subcommand};

use crate::{attack::Kind, report::Report, scenario::Load};

/// Measure the gateway with a token source in the engine's place
#[derive(Debug, Parser)]
#[command(name = "gateway")]
struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    /// Measure; set by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Fail when a figure is out of its bounds
    #[arg(long)]
    check: bool,
    /// Streams at once; 0 leaves them out
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// Tokens a second, all streams together
    #[arg(long, default_value_t = 20_000)]
    rate: usize,
    /// Tokens in a step of the source
    #[arg(long, default_value_t = 20)]
    batch: usize,
    /// Seconds of each measurement of streams
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Pairs of runs, without and with bad company
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Seconds of each run of a pair
    #[arg(long, default_value_t = 3.0)]
    pair_seconds: f64,
    /// Only these kinds of company; all when absent
    #[arg(long)]
    company: Vec<Kind>,
}

/// What another process of this program does.
#[derive(Debug, Subcommand)]
#[command(hide = true)]
enum Part {
    Server(server::Options),
    Attack {
        #[arg(long)]
        kind: Kind,
        #[arg(long)]
        addr: SocketAddr,
        /// The secret that the server's keys are signed with, by name
        #[arg(long)]
        kid: String,
    },
}

fn main() -> anyhow::Result<()> {
    let mut given = std::env::args();
    let measure = given.any(|arg| ["--bench", "server", "attack"].contains(&arg.as_str()));
    if !measure {
        // The arguments are meant for tests of another kind.
        return smoke();
    }
    let args = Args::parse();
    match args.part {
        Some(Part::Server(options)) => return server::run(&options),
        Some(Part::Attack { kind, addr, kid }) => return attack::run(kind, addr, &kid),
        None => system::allow_many_files(),
    }
    let mut report = Report::default();
    if args.streams > 0 {
        let load = Load {
            streams: args.streams,
            rate: args.rate,
            batch: args.batch,
            time: Duration::from_secs_f64(args.seconds),
        };
        for keyed in [false, true] {
            report.streams.push(scenario::streams(&load, keyed)?);
        }
    }
    let kinds = if args.company.is_empty() { Kind::ALL.to_vec() } else { args.company.clone() };
    if args.pairs > 0 {
        for kind in kinds {
            report.company.push(scenario::pairs(
                kind,
                args.pairs,
                Duration::from_secs_f64(args.pair_seconds),
            )?);
        }
    }
    report.print(args.json);
    let missed = report.missed();
    anyhow::ensure!(!args.check || missed.is_empty(), "out of bounds: {}", missed.join("; "));
    Ok(())
}

/// Every part once, with small numbers.
fn smoke() -> anyhow::Result<()> {
    system::allow_many_files();
    let load = Load { streams: 20, rate: 2000, batch: 10, time: Duration::from_secs(1) };
    let mut report = Report::default();
    for keyed in [false, true] {
        report.streams.push(scenario::streams(&load, keyed)?);
    }
    for kind in Kind::ALL {
        report.company.push(scenario::pairs(kind, 1, Duration::from_millis(200))?);
    }
    report.print(false);
    Ok(())
}
