//! Where `pull` fetches from and what it shares with other programs: Hugging Face's own variables.

use std::{fmt, path::PathBuf};

use super::{
    ConfigError,
    layers::{Environment, environment},
};

/// What `pull` works with.
#[derive(Debug)]
pub(crate) struct HubConfig {
    /// The hub's address, without a slash at its end.
    pub(crate) endpoint: String,
    /// What opens repositories that are not for everybody.
    pub(crate) token: Option<Token>,
    /// The cache of this and other programs; absent where no variable tells where it is.
    pub(crate) cache: Option<PathBuf>,
}

/// An access token, which is never shown.
pub(crate) struct Token(pub(crate) String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

const ENDPOINT: &str = "https://huggingface.co";

/// The hub as the environment has it.
pub(crate) fn hub() -> Result<HubConfig, ConfigError> {
    hub_with(&(Box::new(environment) as Environment))
}

fn hub_with(env: &Environment) -> Result<HubConfig, ConfigError> {
    let value = |name: &str| env(name).filter(|v| !v.is_empty());
    let wrong =
        |name: &str, allowed: &str| ConfigError(format!("the environment variable {name}: {allowed}"));
    let endpoint = match value("HF_ENDPOINT") {
        None => ENDPOINT.to_owned(),
        Some(endpoint) => endpoint
            .to_str()
            .filter(|e| is_endpoint(e))
            .map(|e| e.trim_end_matches('/').to_owned())
            .ok_or_else(|| wrong("HF_ENDPOINT", "an address such as https://huggingface.co is allowed"))?,
    };
    let token = value("HF_TOKEN").map(|token| {
        let token = token.to_str().map(str::trim).filter(|t| t.bytes().all(|b| b.is_ascii_graphic()));
        // The value itself is in no message.
        token.map(|t| Token(t.to_owned())).ok_or_else(|| wrong("HF_TOKEN", "a token such as hf_… is allowed"))
    });
    let path = |name: &str| value(name).map(PathBuf::from);
    let cache = path("HF_HUB_CACHE")
        .or_else(|| path("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface/hub")));
    Ok(HubConfig { endpoint, token: token.transpose()?, cache })
}

fn is_endpoint(s: &str) -> bool {
    let rest = s.strip_prefix("https://").or_else(|| s.strip_prefix("http://"));
    rest.is_some_and(|r| !r.is_empty() && r.bytes().all(|b| b.is_ascii_graphic() && !b"?#@\"\\".contains(&b)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn hub_of(env: &'static [(&'static str, &'static str)]) -> Result<HubConfig, ConfigError> {
        let env: Environment =
            Box::new(|name| env.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()));
        hub_with(&env)
    }

    #[test]
    fn other_programs_variables_mean_what_they_mean_there() {
        let hub = hub_of(&[("HOME", "/home/u"), ("HF_ENDPOINT", "")]).expect("a hub");
        assert_eq!(hub.endpoint, "https://huggingface.co");
        assert_eq!(hub.cache.as_deref(), Some(Path::new("/home/u/.cache/huggingface/hub")));
        assert!(hub.token.is_none());
        let cache = |env| hub_of(env).expect("a hub").cache.expect("a cache");
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/h/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/u")]), Path::new("/x/huggingface/hub"));
        assert_eq!(hub_of(&[]).expect("a hub").cache, None);
        let mirror = hub_of(&[("HF_ENDPOINT", "http://mirror.lan:8080/hf/")]).expect("a hub");
        assert_eq!(mirror.endpoint, "http://mirror.lan:8080/hf");
    }

    #[test]
    fn a_wrong_endpoint_is_named_and_a_token_never_shown() {
        for endpoint in
            ["huggingface.co", "ftp://a", "https://", "https://a?b", "https://user@a", "https://a b"]
        {
            let env: Environment = Box::new(move |name| (name == "HF_ENDPOINT").then(|| endpoint.into()));
            let error = hub_with(&env).expect_err(endpoint).0;
            assert!(error.contains("HF_ENDPOINT") && error.contains("https://huggingface.co"), "{error}");
        }
        let hub = hub_of(&[("HF_TOKEN", " hf_secret\n")]).expect("a hub");
        assert_eq!(hub.token.as_ref().expect("a token").0, "hf_secret");
        assert!(!format!("{hub:?}").contains("hf_secret"));
        let error = hub_of(&[("HF_TOKEN", "hf_sec ret")]).expect_err("a space").0;
        assert!(error.contains("HF_TOKEN") && !error.contains("ret"), "{error}");
    }
}
