//! `--trace-kernels`: what the device spent its time on, told when the command ends.

use std::{
    path::{Path, PathBuf},
    sync::PoisonError,
};

use m40llm_engine::trace::{KernelTrace, SharedTrace};

use crate::config::ModelConfig;

/// A trace under way. Dropped at the end of the command, it writes the file and prints the table.
pub(super) struct Tracing {
    path: PathBuf,
    trace: SharedTrace,
}

impl Tracing {
    /// Turns tracing on where the settings ask for it.
    pub(super) fn start(config: &mut ModelConfig) -> Option<Self> {
        let path = config.trace_file.clone()?;
        let trace = SharedTrace::default();
        config.engine.trace = Some(SharedTrace::clone(&trace));
        Some(Self { path, trace })
    }

    fn finish(&self) -> std::io::Result<()> {
        let trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        write(&self.path, &trace)?;
        eprint!("{}", report(&trace));
        Ok(())
    }
}

fn write(path: &Path, trace: &KernelTrace) -> std::io::Result<()> {
    std::fs::write(path, trace.chrome())
}

fn report(trace: &KernelTrace) -> String {
    if trace.totals().is_empty() {
        return "--trace-kernels: no kernels ran on a device\n".to_owned();
    }
    trace.table()
}

impl Drop for Tracing {
    fn drop(&mut self) {
        if let Err(e) = self.finish() {
            eprintln!("m40llm: --trace-kernels: cannot write {}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use m40llm_engine::trace::KernelLaunch;

    #[test]
    fn the_end_writes_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let tracing = Tracing { path: path.clone(), trace: SharedTrace::default() };
        assert!(report(&KernelTrace::default()).contains("no kernels"));
        let launch = KernelLaunch { name: "gemv_q4_k", start_us: 1.0, time_us: 2.0, bytes: 3 };
        tracing.trace.lock().unwrap().add(launch);
        drop(tracing);
        assert!(std::fs::read_to_string(path).unwrap().contains("gemv_q4_k"));
    }
}
