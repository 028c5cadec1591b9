//! The configuration file read again while the server runs.

use super::{ConfigError, ServeArgs, ServeConfig, file::Values, layers::Layers};

/// Keys whose new values the running server takes over. The others want a restart.
pub(crate) const RELOADABLE: &[&str] = &["default-concurrency", "default-rpm", "default-tpm", "log-level"];

/// Reads the file again, under the same flags and environment.
pub(crate) struct Reloader {
    args: ServeArgs,
    /// What the file said last.
    values: Values,
}

/// The file as it is now.
pub(crate) struct Reloaded {
    /// All layers taken together anew; only what [`RELOADABLE`] keys say of it may be used.
    pub config: ServeConfig,
    /// Keys that changed and are taken over.
    pub taken: Vec<&'static str>,
    /// Keys that changed and want a restart.
    pub restart: Vec<&'static str>,
}

impl Reloader {
    /// All layers taken together, and a way to do so again.
    pub(crate) fn start(args: ServeArgs) -> Result<(ServeConfig, Self), ConfigError> {
        let layers = Layers::read(args.model.config.as_deref())?;
        let config = args.clone().resolve_in(&layers)?;
        Ok((config, Self { args, values: layers.file.unwrap_or_default() }))
    }

    /// Reads the file again; `None` where there is none. A file with an error changes nothing.
    pub(crate) fn reload(&mut self) -> Result<Option<Reloaded>, ConfigError> {
        self.reload_in(Layers::read(self.args.model.config.as_deref())?)
    }

    fn reload_in(&mut self, layers: Layers) -> Result<Option<Reloaded>, ConfigError> {
        let config = self.args.clone().resolve_in(&layers)?;
        let Some(values) = layers.file else { return Ok(None) };
        let (taken, restart) = changed(&self.values, &values).partition(|key| RELOADABLE.contains(key));
        // A change that wants a restart is named again each time until there is one.
        self.values.retain(|(key, _)| !RELOADABLE.contains(key));
        self.values.extend(values.into_iter().filter(|(key, _)| RELOADABLE.contains(key)));
        Ok(Some(Reloaded { config, taken, restart }))
    }
}

/// Keys with another value, or in one of the two only.
fn changed(old: &Values, new: &Values) -> impl Iterator<Item = &'static str> {
    let differs = |of: &Values, other: &Values| -> Vec<&'static str> {
        of.iter().filter(|entry| !other.contains(entry)).map(|(key, _)| *key).collect()
    };
    let mut keys = differs(old, new);
    keys.extend(differs(new, old));
    keys.sort_unstable();
    keys.dedup();
    keys.into_iter()
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, path::Path};

    use tracing::level_filters::LevelFilter;

    use super::*;

    /// An environment with a home and nothing else.
    fn home(name: &str) -> Option<OsString> {
        (name == "HOME").then(|| "/home/u".into())
    }

    fn layers(path: &Path, toml: &str) -> Result<Layers, ConfigError> {
        std::fs::write(path, toml).expect("a file");
        Layers::read_with(Some(path), Box::new(home))
    }

    #[test]
    fn a_file_read_again_says_what_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("m40llm.toml");
        let first = "threads = 2\nmax-batch = 4\nlog-level = \"warn\"";
        let values = layers(&path, first).expect("a file").file.expect("a file");
        let mut reloader = Reloader { args: ServeArgs::default(), values };
        let mut reload = |toml: &str| {
            let reloaded =
                layers(&path, toml).and_then(|layers| reloader.reload_in(layers))?.expect("a file");
            Ok::<_, ConfigError>((reloaded.config.log_level, reloaded.taken, reloaded.restart))
        };
        assert_eq!(reload(first), Ok((LevelFilter::WARN, vec![], vec![])));
        // One key is taken, one changed, one gone, one new.
        let second = "threads = 3\nlog-level = \"debug\"\nmax-queue = 9";
        let restart = || vec!["max-batch", "max-queue", "threads"];
        assert_eq!(reload(second), Ok((LevelFilter::DEBUG, vec!["log-level"], restart())));
        assert_eq!(reload(second), Ok((LevelFilter::DEBUG, vec![], restart())), "still not in force");
        assert!(reload("log-level = \"loud\"").is_err_and(|e| e.0.contains("log-level")));
        assert_eq!(reload(first), Ok((LevelFilter::WARN, vec!["log-level"], vec![])));
        assert_eq!(reload("threads = 2\nmax-batch = 4"), Ok((LevelFilter::INFO, vec!["log-level"], vec![])));
    }

    #[test]
    fn default_limits_are_taken_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("m40llm.toml");
        let mut reloader = Reloader { args: ServeArgs::default(), values: Vec::new() };
        let mut reload = |toml: &str| {
            let layers = layers(&path, toml).expect("a file");
            let reloaded = reloader.reload_in(layers).expect("no error").expect("a file");
            assert!(reloaded.restart.is_empty());
            reloaded.config.default_limits
        };
        let limits = reload("default-rpm = 60\ndefault-tpm = 1000\ndefault-concurrency = 3");
        assert_eq!((limits.rpm, limits.tpm, limits.concurrency), (Some(60), Some(1000), Some(3)));
        assert_eq!(reload("log-level = \"info\"").rpm, None);
    }

    #[test]
    fn without_a_file_there_is_nothing_to_read() {
        let mut reloader = Reloader { args: ServeArgs::default(), values: Vec::new() };
        let none = Layers { env: Box::new(home), file: None };
        assert!(reloader.reload_in(none).expect("no error").is_none());
    }
}
