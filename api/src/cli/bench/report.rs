//! What is printed of it.

use std::{collections::BTreeMap, fmt::Write as _};

use m40llm_engine::Engine;
use serde::Serialize;

/// What `--json` prints; who reads it relies on the fields and their order; new ones come last.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) device: String,
    pub(super) model: String,
    pub(super) quant: String,
    pub(super) copy_gb_per_s: f64,
    pub(super) results: Vec<Measured>,
    /// TFLOP/s of large products alone, by what multiplies; of a device only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) products_tflops: Option<BTreeMap<&'static str, f64>>,
}

#[derive(Debug, Serialize)]
pub(super) struct Measured {
    pub(super) test: &'static str,
    pub(super) n_tokens: usize,
    pub(super) batch: usize,
    pub(super) depth: usize,
    pub(super) tokens_per_s: f64,
    pub(super) gb_per_s: f64,
    pub(super) share_of_copy: f64,
    /// Of decoding, the part of the time in which the device waited for the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) host_share: Option<f64>,
}

/// A table in Markdown, as llama-bench prints one: `pp` reads a prompt, `tg` writes text.
pub(super) fn table(report: &Report, engine: &Engine) -> String {
    let info = engine.info();
    let size = info.size_bytes as f64 / f64::from(1 << 20);
    let parameters = info.parameters as f64 / 1e6;
    let loaded = info.load_speed().map_or_else(String::new, |speed| format!("loaded {speed}\n"));
    let mut products = String::new();
    for (by, tflops) in report.products_tflops.iter().flatten() {
        // Writing to a String cannot fail.
        let _ = writeln!(products, "{by} {tflops:.1} TFLOP/s");
    }
    let mut out = format!(
        "{}\ncopy {:.1} GB/s\n{products}{loaded}\n\
         | model | quant | size MiB | params M | test | batch | t/s | GB/s | of copy | host |\n\
         | --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n",
        report.device, report.copy_gb_per_s
    );
    for m in &report.results {
        let kind = if m.test == "prompt" { "pp" } else { "tg" };
        let depth = if m.depth > 0 { format!(" @ d{}", m.depth) } else { String::new() };
        let host = m.host_share.map_or_else(String::new, |share| format!("{:.1} %", share * 100.0));
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "| {} | {} | {size:.1} | {parameters:.1} | {kind}{}{depth} | {} | {:.2} | {:.2} | {:.0} % | {host} |",
            report.model,
            report.quant,
            m.n_tokens,
            m.batch,
            m.tokens_per_s,
            m.gb_per_s,
            m.share_of_copy * 100.0
        );
    }
    out
}
