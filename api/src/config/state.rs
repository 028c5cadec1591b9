//! Where keys are kept, and the secret that signs them.

use std::path::PathBuf;

use m40llm::auth::{SigningSecret, vault::VaultConfig};

use super::{ConfigError, layers::Layers, values::state_dir};

/// Flags of `keys`.
#[derive(Debug, clap::Args)]
pub(crate) struct StateArgs {
    /// Where keys and accounts are kept [default: m40llm in `XDG_STATE_HOME`, else ~/.local/state/m40llm]
    #[arg(long, global = true, value_name = "DIR", value_parser = state_dir)]
    state_dir: Option<PathBuf>,
    /// Read the state directory's path from this TOML file, as `run` does
    #[arg(long, global = true, value_name = "FILE.toml")]
    config: Option<PathBuf>,
}

impl StateArgs {
    /// All layers taken together.
    pub(crate) fn resolve(self) -> Result<VaultConfig, ConfigError> {
        Layers::read(self.config.as_deref())?.vault(self.state_dir)
    }
}

impl Layers {
    /// Where keys are kept. The secret that signs them is a variable only: flags show in process lists, and
    /// files of settings are passed around.
    pub(super) fn vault(&self, flag: Option<PathBuf>) -> Result<VaultConfig, ConfigError> {
        const SECRET: &str = "M40LLM_SIGNING_SECRET";
        let dir = match self.pick(flag, "state-dir", state_dir)? {
            Some(dir) => dir,
            None => self.default_state_dir()?,
        };
        let secret = self.variable(SECRET).filter(|v| !v.is_empty());
        let signing_secret = secret.map(|secret| {
            let secret = secret.to_str().ok_or_else(|| "text is allowed".to_owned());
            secret.and_then(SigningSecret::new)
        });
        let signing_secret = signing_secret
            .transpose()
            .map_err(|allowed| ConfigError(format!("the environment variable {SECRET}: {allowed}")))?;
        Ok(VaultConfig { dir, signing_secret })
    }

    fn default_state_dir(&self) -> Result<PathBuf, ConfigError> {
        // A relative path counts as none, says the XDG specification.
        let path = |name: &str| self.variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = path("XDG_STATE_HOME").or_else(|| path("HOME").map(|home| home.join(".local/state")));
        base.map(|base| base.join("m40llm")).ok_or_else(|| {
            ConfigError(
                "neither XDG_STATE_HOME nor HOME says where keys are kept: give --state-dir DIR".to_owned(),
            )
        })
    }
}
