//! What a device spent its time on, kernel by kernel.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex},
};

use serde_json::json;

/// A trace that the worker writes and others read.
pub type SharedTrace = Arc<Mutex<KernelTrace>>;

/// Launches kept one by one; the totals go on past it.
const MOST_LAUNCHES: usize = 200_000;

/// One kernel's launches taken together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct KernelTotal {
    /// Launches.
    pub launches: u64,
    /// Microseconds in all.
    pub time_us: f64,
    /// Bytes that all launches had to read and write at least.
    pub bytes: u64,
}

/// One launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelLaunch {
    /// The kernel.
    pub name: &'static str,
    /// Microseconds since the trace began.
    pub start_us: f64,
    /// Microseconds.
    pub time_us: f64,
    /// Bytes it had to read and write at least.
    pub bytes: u64,
}

/// Times of kernels, measured by the device's own events around each launch. A traced step is slower: its
/// launches are not captured in a graph, and do not overlap.
#[derive(Debug, Clone, Default)]
pub struct KernelTrace {
    totals: BTreeMap<&'static str, KernelTotal>,
    launches: Vec<KernelLaunch>,
}

impl KernelTrace {
    /// Takes a launch in.
    pub fn add(&mut self, launch: KernelLaunch) {
        let total = self.totals.entry(launch.name).or_default();
        total.launches += 1;
        total.time_us += launch.time_us;
        total.bytes += launch.bytes;
        if self.launches.len() < MOST_LAUNCHES {
            self.launches.push(launch);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Each kernel's totals, the one that took longest first.
    pub fn totals(&self) -> Vec<(&'static str, KernelTotal)> {
        let mut totals: Vec<_> = self.totals.iter().map(|(&name, &total)| (name, total)).collect();
        totals.sort_by(|a, b| b.1.time_us.total_cmp(&a.1.time_us));
        totals
    }

    /// The totals as a table for people.
    pub fn table(&self) -> String {
        let totals = self.totals();
        let all: f64 = totals.iter().map(|(_, t)| t.time_us).sum();
        let mut table = format!(
            "{:<34} {:>9} {:>12} {:>10} {:>7} {:>9}\n",
            "kernel", "launches", "total ms", "mean µs", "share", "GB/s"
        );
        for (name, total) in totals {
            let _ = writeln!(
                table,
                "{name:<34} {:>9} {:>12.3} {:>10.2} {:>6.1}% {:>9.1}",
                total.launches,
                total.time_us / 1e3,
                total.time_us / total.launches as f64,
                100.0 * total.time_us / all,
                total.bytes as f64 / total.time_us / 1e3,
            );
        }
        table
    }

    /// The launches in the Trace Event Format that Chrome's `about:tracing` and Perfetto open.
    pub fn chrome(&self) -> String {
        let events: Vec<_> = self
            .launches
            .iter()
            .map(|l| {
                json!({"name": l.name, "ph": "X", "pid": 0, "tid": 0, "ts": l.start_us, "dur": l.time_us,
                       "args": {"bytes": l.bytes}})
            })
            .collect();
        json!({"traceEvents": events, "displayTimeUnit": "ns"}).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_add_up_and_the_longest_comes_first() {
        let mut trace = KernelTrace::default();
        for (name, time_us) in [("short", 1.0), ("long", 5.0), ("short", 2.0)] {
            trace.add(KernelLaunch { name, start_us: 0.0, time_us, bytes: 3000 });
        }
        let totals = trace.totals();
        assert_eq!(totals[0].0, "long");
        assert_eq!(totals[1], ("short", KernelTotal { launches: 2, time_us: 3.0, bytes: 6000 }));
        let table = trace.table();
        assert!(table.lines().nth(2).unwrap().contains("37.5%"), "{table}");
        let chrome: serde_json::Value = serde_json::from_str(&trace.chrome()).unwrap();
        assert_eq!(chrome["traceEvents"][1]["dur"], 5.0);
    }
}
