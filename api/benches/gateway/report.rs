//! Figures, their bounds, and how they are shown.

use serde::Serialize;

use crate::attack::Kind;

/// Bounds, on two cores that the client shares with the server.
const DELAY_P50_US: f64 = 1000.0;
const DELAY_P99_US: f64 = 5000.0;
const KB_A_STREAM: f64 = 60.0;
/// How much longer a good caller may wait in bad company.
const RATIO: f64 = 1.10;

/// How values spread, in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// Of nanoseconds; `None` without any.
    pub(crate) fn of(mut values: Vec<u64>) -> Option<Self> {
        values.sort_unstable();
        let last = values.len().checked_sub(1)?;
        let at = |share: f64| values[(last as f64 * share) as usize] as f64 / 1000.0;
        Some(Self { p50: at(0.5), p99: at(0.99), max: at(1.0) })
    }
}

/// Many streams at once.
#[derive(Debug, Serialize)]
pub(crate) struct Streams {
    #[serde(rename = "streams")]
    pub(crate) count: usize,
    /// With a key that is checked, limited and accounted for.
    pub(crate) keyed: bool,
    /// Tokens in a step of the source.
    pub(crate) batch: usize,
    pub(crate) tokens_per_s: f64,
    pub(crate) wanted_per_s: f64,
    /// From the source's thread to the client's read.
    pub(crate) delay: Spread,
    pub(crate) kb_a_stream: f64,
    /// Until all streams had their first token.
    pub(crate) opened_s: f64,
    pub(crate) server_cores: f64,
    pub(crate) client_cores: f64,
}

/// Good callers in one run.
#[derive(Debug, Serialize)]
pub(crate) struct Callers {
    pub(crate) requests: usize,
    /// From asking to the first token.
    pub(crate) first: Spread,
    /// From the source's thread to the client's read.
    pub(crate) token: Spread,
    /// From asking to the last byte.
    pub(crate) request: Spread,
}

/// Good callers without and with bad company.
#[derive(Debug, Serialize)]
pub(crate) struct Company {
    pub(crate) kind: Kind,
    /// What the server refused or closed a second, the median over the runs with it.
    pub(crate) rejected_per_s: f64,
    /// The median over the pairs of the medians' ratio.
    pub(crate) request_ratio: f64,
    pub(crate) first_ratio: f64,
    pub(crate) token_ratio: f64,
    /// Of each pair, without and with.
    pub(crate) pairs: Vec<(Callers, Callers)>,
}

impl Company {
    pub(crate) fn new(kind: Kind, rejected: &[f64], pairs: Vec<(Callers, Callers)>) -> Self {
        let [request_ratio, first_ratio, token_ratio] =
            MEASURES.map(|(_, of)| median(pairs.iter().map(|pair| ratio(pair, of))));
        let rejected_per_s = if rejected.is_empty() { 0.0 } else { median(rejected.iter().copied()) };
        Self { kind, rejected_per_s, request_ratio, first_ratio, token_ratio, pairs }
    }

    /// A line of the table.
    fn line(&self, name: &str, of: Measure) {
        let kind = serde_json::to_value(self.kind).unwrap_or_default();
        let ratios = || self.pairs.iter().map(|pair| ratio(pair, of));
        let (least, most) = (ratios().fold(f64::INFINITY, f64::min), ratios().fold(0.0, f64::max));
        let without =
            |at: fn(Spread) -> f64| median(self.pairs.iter().map(|(callers, _)| at(of(callers)))) / 1e3;
        let with =
            |at: fn(Spread) -> f64| median(self.pairs.iter().map(|(_, callers)| at(of(callers)))) / 1e3;
        println!(
            "| {} | {:.0} | {name} | {:.2} | {:.2} | {:.2} | {least:.2} to {most:.2} | {:.2} | {:.2} |",
            kind.as_str().unwrap_or_default(),
            self.rejected_per_s,
            without(|s| s.p50),
            with(|s| s.p50),
            median(ratios()),
            without(|s| s.p99),
            with(|s| s.p99),
        );
    }
}

/// One of a caller's figures.
type Measure = fn(&Callers) -> Spread;

const MEASURES: [(&str, Measure); 3] = [
    ("request", |callers| callers.request),
    ("first token", |callers| callers.first),
    ("token", |callers| callers.token),
];

/// Of the medians with and without.
fn ratio((without, with): &(Callers, Callers), of: Measure) -> f64 {
    of(with).p50 / of(without).p50
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// All that was measured.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) streams: Vec<Streams>,
    pub(crate) company: Vec<Company>,
}

impl Report {
    /// On the standard output.
    pub(crate) fn print(&self, json: bool) {
        if json {
            println!("{}", serde_json::to_string_pretty(self).unwrap_or_default());
            return;
        }
        println!(
            "| streams | keys | tokens/s | in steps of | token p50 ms | p99 ms | max ms | KB a stream | server, cores | client, cores |"
        );
        println!("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
        for s in &self.streams {
            let Spread { p50, p99, max } = s.delay;
            println!(
                "| {} | {} | {:.0} | {} | {:.2} | {:.2} | {:.1} | {:.1} | {:.2} | {:.2} |",
                s.count,
                if s.keyed { "yes" } else { "no" },
                s.tokens_per_s,
                s.batch,
                p50 / 1e3,
                p99 / 1e3,
                max / 1e3,
                s.kb_a_stream,
                s.server_cores,
                s.client_cores
            );
        }
        println!(
            "\n| company | rejected/s | a good caller's | p50 ms, without | with | ratio | of the pairs | p99 ms, without | with |"
        );
        println!("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
        for company in &self.company {
            for (name, of) in MEASURES {
                company.line(name, of);
            }
        }
    }

    /// What is out of its bounds, in words.
    pub(crate) fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        let mut hold = |what: &str, value: f64, bound: f64| {
            // Not a number is no success.
            if value.is_nan() || value > bound {
                missed.push(format!("{what} is {value:.2}, the bound {bound:.2}"));
            }
        };
        for s in &self.streams {
            hold("a token's p50 in µs", s.delay.p50, DELAY_P50_US);
            hold("a token's p99 in µs", s.delay.p99, DELAY_P99_US);
            hold("KB a stream", s.kb_a_stream, KB_A_STREAM);
            hold("the share of tokens that did not come", 1.0 - s.tokens_per_s / s.wanted_per_s, 0.01);
        }
        for c in &self.company {
            hold(&format!("a good caller's request beside {:?}", c.kind), c.request_ratio, RATIO);
            if c.kind == Kind::WrongKeys {
                hold("wrong keys that did not come, of 1,000 a second", 1000.0 - c.rejected_per_s, 50.0);
            }
        }
        missed
    }
}
