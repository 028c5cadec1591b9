//! What lies under the flags: the environment, and the file under that.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use super::{
    ConfigError,
    file::{Values, read_file},
};

/// A variable's value by its name.
pub(super) type Environment = Box<dyn Fn(&str) -> Option<OsString>>;

/// The layers under the flags.
pub(super) struct Layers {
    pub(super) env: Environment,
    pub(super) file: Option<Values>,
}

#[expect(clippy::disallowed_methods, reason = "this is the place where the environment is read")]
pub(super) fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

impl Layers {
    /// Without a file.
    pub(super) fn environment() -> Self {
        Self { env: Box::new(environment), file: None }
    }

    /// The file is the one that the flag or `M40LLM_CONFIG` names.
    pub(super) fn read(config: Option<&Path>) -> Result<Self, ConfigError> {
        Self::read_with(config, Box::new(environment))
    }

    pub(super) fn read_with(config: Option<&Path>, env: Environment) -> Result<Self, ConfigError> {
        let path = config.map(Path::to_owned);
        let path = path.or_else(|| env("M40LLM_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from));
        let file = path.map(|path| read_file(&path)).transpose()?;
        Ok(Self { env, file })
    }

    /// The flag, else the environment (where an empty variable counts as absent), else the file.
    pub(super) fn pick<T>(
        &self,
        flag: Option<T>,
        key: &str,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.pick_also(flag, key, None, parse)
    }

    /// As [`Layers::pick`], where other programs read the variable `also` for the same.
    pub(super) fn pick_also<T>(
        &self,
        flag: Option<T>,
        key: &str,
        also: Option<&str>,
        parse: fn(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        if flag.is_some() {
            return Ok(flag);
        }
        let variable = format!("M40LLM_{}", key.to_uppercase().replace('-', "_"));
        for variable in [Some(variable.as_str()), also].into_iter().flatten() {
            let Some(value) = (self.env)(variable).filter(|v| !v.is_empty()) else { continue };
            let Some(value) = value.to_str() else {
                return Err(ConfigError(format!("the environment variable {variable} is not UTF-8")));
            };
            return parse(value).map(Some).map_err(|allowed| {
                ConfigError(format!("the environment variable {variable} is {value:?}: {allowed}"))
            });
        }
        let value = self.file.iter().flatten().find(|(k, _)| *k == key);
        // The file was checked whole when it was read.
        value.map(|(_, v)| parse(v).map_err(ConfigError)).transpose()
    }

    /// A variable of the environment.
    pub(super) fn variable(&self, name: &str) -> Option<OsString> {
        (self.env)(name)
    }
}
