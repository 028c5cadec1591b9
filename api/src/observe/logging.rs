//! Log lines on stderr, as text or JSON, at a level that may change while the server runs.

use std::{any::Any, io, panic};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, Registry, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _};

use super::{
    otlp::{Collector, Exporter},
    spans::{Spans, ours},
};

/// How a line is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// An object a line.
    Json,
}

/// What is logged, how, and where spans go.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// The lines' form.
    pub format: LogFormat,
    /// The least serious level that is logged.
    pub level: LevelFilter,
    /// Who gets spans.
    pub collector: Option<Collector>,
}

/// Logging, once it is set up. Dropped, it sends the last spans.
#[derive(Debug)]
pub struct Logging {
    level: reload::Handle<LevelFilter, Registry>,
    exporter: Option<Exporter>,
}

/// Sets logging up for the whole process, of panics too. An error when the exporter's thread cannot be started, or logging
/// is set up already.
pub fn init_logging(config: LogConfig) -> io::Result<Logging> {
    let exporter = config.collector.map(Exporter::start).transpose()?;
    let (filter, level) = reload::Layer::new(config.level);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match config.format {
        LogFormat::Text => lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
    };
    let spans = exporter.clone().map(|exporter| Spans(exporter).with_filter(ours()));
    let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter)).with(spans);
    subscriber.try_init().map_err(io::Error::other)?;
    panic::set_hook(Box::new(log_panic));
    Ok(Logging { level, exporter })
}

/// A panic as a log line. Its place says what failed; a message that was put together at run time may hold
/// somebody's prompt, and is left out.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string);
    tracing::error!(at, thread = std::thread::current().name(), words = literal(panic.payload()), "panicked");
}

fn literal(payload: &(dyn Any + Send)) -> Option<&'static str> {
    payload.downcast_ref::<&'static str>().copied()
}

impl Logging {
    /// Logs at another level from now on. What `tell` logs about it is seen by whoever sees one of the two.
    pub fn set_level(&self, level: LevelFilter, tell: impl FnOnce()) {
        let before = self.level.clone_current().unwrap_or(level);
        // It fails only when the subscriber is gone, and then nothing is logged.
        let _ = self.level.reload(level.max(before));
        tell();
        let _ = self.level.reload(level);
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        if let Some(exporter) = &self.exporter {
            exporter.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panics_own_words_are_logged_only_when_they_are_ours() {
        let prompt = "a prompt";
        let put_together = panic::catch_unwind(|| panic!("not a boundary of {prompt}")).unwrap_err();
        assert_eq!(literal(&*put_together), None);
        let ours = panic::catch_unwind(|| panic!("on purpose")).unwrap_err();
        assert_eq!(literal(&*ours), Some("on purpose"));
    }
}
