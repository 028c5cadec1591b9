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
        let ratio =
            |of: fn(&Callers) -> f64| median(pairs.iter().map(|(without, with)| of(with) / of(without)));
        Self {
            kind,
            rejected_per_s: if rejected.is_empty() { 0.0 } else { median(rejected.iter().copied()) },
            request_ratio: ratio(|callers| callers.request.p50),
            first_ratio: ratio(|callers| callers.first.p50),
            token_ratio: ratio(|callers| callers.token.p50),
            pairs,
        }
    }
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
            "\n| company | rejected/s | requests | request p50 µs, without | with | ratio | of the pairs | first token, ratio | token, ratio |"
        );
        println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
        for c in &self.company {
            let p50 = |of: fn(&(Callers, Callers)) -> &Callers| {
                median(c.pairs.iter().map(|pair| of(pair).request.p50))
            };
            let ratios = c.pairs.iter().map(|(without, with)| with.request.p50 / without.request.p50);
            let (least, most) = ratios
                .fold((f64::INFINITY, 0.0_f64), |(least, most), ratio| (least.min(ratio), most.max(ratio)));
            println!(
                "| {} | {:.0} | {} | {:.0} | {:.0} | {:.2} | {least:.2} to {most:.2} | {:.2} | {:.2} |",
                serde_json::to_value(c.kind).unwrap_or_default().as_str().unwrap_or_default(),
                c.rejected_per_s,
                c.pairs.iter().map(|(without, with)| without.requests + with.requests).sum::<usize>(),
                p50(|pair| &pair.0),
                p50(|pair| &pair.1),
                c.request_ratio,
                c.first_ratio,
                c.token_ratio
            );
        }
        let missed = self.missed();
        println!(
            "\n{}",
            if missed.is_empty() {
                "all within bounds".to_owned()
            } else {
                format!("out of bounds: {}", missed.join("; "))
            }
        );
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
