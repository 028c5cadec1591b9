//! The only reader of settings: flags, `M40LLM_*` environment variables and the TOML file.
//!
//! A setting has one name: the flag `--ctx-size` is the variable `M40LLM_CTX_SIZE` and the TOML key
//! `ctx-size`. A flag wins over the environment, the environment over the file. One parser a setting
//! serves all three, so that they allow the same values and refuse with the same words.
//!
//! | module | holds |
//! | --- | --- |
//! | `model`, `serve`, `state` | the flags of every command that loads a model, of `run`, of `keys`, and what they come to |
//! | `layers` | the environment and the file under the flags |
//! | `file` | the TOML file, checked whole |
//! | `values` | one parser a kind of setting |
//! | `reload` | the file read again while the server runs |
//! | `hub` | what `pull` is told by the environment |

mod file;
mod hub;
mod layers;
mod model;
#[cfg(feature = "server")]
mod reload;
mod serve;
mod state;
#[cfg(test)]
mod tests;
mod values;

use std::path::PathBuf;

use layers::Layers;

pub(crate) use hub::{HubConfig, hub};
pub(crate) use model::{ModelArgs, ModelConfig};
#[cfg(feature = "server")]
pub(crate) use reload::{Reloaded, Reloader};
#[cfg(feature = "server")]
pub(crate) use serve::{ServeArgs, ServeConfig};
pub(crate) use state::StateArgs;
#[cfg(feature = "server")]
pub(crate) use values::LogFormat;
pub(crate) use values::{Addr, addr, pem_file, prompt_format};

/// The command line or the configuration is wrong: exit code 2. One line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(pub String);

/// The address that `health` asks: its flag, else `M40LLM_ADDR`, else the default.
pub(crate) fn health_addr(flag: Option<Addr>) -> Result<Addr, ConfigError> {
    let layers = Layers::environment();
    Ok(layers.pick(flag, "addr", addr)?.unwrap_or_default())
}

/// The certificate that `health` expects: its flag, else `M40LLM_TLS_CERT`.
#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "TLS comes with the server"))]
pub(crate) fn health_cert(flag: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    let layers = Layers::environment();
    layers.pick(flag, "tls-cert", pem_file)
}

/// Folds a message into one line.
pub(crate) fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}
