//! `m40llm pull`: fetches a GGUF file, or all parts of a split one, from a Hugging Face repository.
//!
//! `hf-hub` knows the hub: names, addresses and the cache that other programs share. The transfer is ours, as
//! that crate's compares no checksum, takes any answer for the range it asked for, and shows the token to whatever
//! host the hub redirects to.

mod listing;
mod place;
mod transfer;

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};

use self::{
    listing::{Listing, Wanted, is_gguf},
    place::Place,
    transfer::Client,
};
use super::print;
use crate::config::{self, ConfigError};

/// Fetch a GGUF file from a Hugging Face repository
///
/// What is fetched is checked against the repository's SHA-256, and an interrupted download goes on where it
/// ended. Prints the path, of a split file that of its first part, and nothing else on stdout.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  m40llm pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:qwen2.5-0.5b-instruct-q8_0.gguf --to models
  m40llm run \"$(m40llm pull bartowski/Llama-3.2-1B-Instruct-GGUF)\"

HF_ENDPOINT names another hub or a mirror, HF_TOKEN opens repositories that want one, HF_HUB_CACHE or HF_HOME
says where the cache is.")]
pub(crate) struct Args {
    /// The repository, then which of its files: a quantisation or a name [default: `Q4_K_M`, or the only one]
    #[arg(value_name = "OWNER/REPO[:QUANT|:FILE]")]
    target: String,
    /// Put the file into this directory [default: the cache of Hugging Face, shared with other programs]
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// A branch, a tag or a commit of the repository
    #[arg(long, value_name = "REVISION", default_value = "main")]
    revision: String,
}

/// Fetches what is not there yet and prints where it is.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let hub = config::hub()?;
    let (name, wanted) = parse(&args.target)?;
    if args.revision.is_empty() || !args.revision.bytes().all(is_plain) {
        return Err(ConfigError("--revision: a branch, a tag or a commit is allowed".into()).into());
    }
    let place = |repo: &Repo| match (&args.to, &hub.cache) {
        (Some(dir), _) => Ok(Place::Directory(dir.clone())),
        (None, Some(cache)) => Ok(Place::cache(cache.clone(), repo.clone())),
        (None, None) => {
            Err(ConfigError("neither HF_HOME nor HOME says where the cache is: give --to DIR".into()))
        }
    };
    let repo = Repo::with_revision(name.to_owned(), RepoType::Model, args.revision);
    let place = place(&repo)?;
    let client = Client::new(&hub);
    let listing = Listing::ask(&client, &repo)?;
    let mut paths = Vec::new();
    for file in listing.choose(name, &wanted)? {
        let bar = progress(file.base_name(), file.size);
        let path = place.fetch(file, &listing.commit, |part| {
            let url = client.url(name, &listing.commit, &file.name);
            client.download(&url, file, part, &|done| bar.set_position(done))
        });
        bar.finish_and_clear();
        paths.push(path?);
    }
    place.remember(&listing.commit)?;
    Ok(print(&format!("{}\n", paths.first().map(|p| p.display().to_string()).unwrap_or_default()))?)
}

/// The repository's name, and which file of it.
fn parse(target: &str) -> Result<(&str, Wanted), ConfigError> {
    let (name, file) = target.split_once(':').map_or((target, None), |(name, file)| (name, Some(file)));
    let is_part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let is_name = name.split_once('/').is_some_and(|(owner, repo)| is_part(owner) && is_part(repo));
    let wanted = match file {
        None => Some(Wanted::Usual),
        Some(file) if is_gguf(file) => Some(Wanted::File(file.to_owned())),
        Some(quant) => {
            let plain = !quant.is_empty()
                && quant.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
            plain.then(|| Wanted::Quantization(quant.to_owned()))
        }
    };
    match wanted {
        Some(wanted) if is_name => Ok((name, wanted)),
        _ => Err(ConfigError(format!(
            "{:?} is no OWNER/REPO, OWNER/REPO:QUANT or OWNER/REPO:FILE.gguf, such as \
             bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
            target.escape_debug().to_string()
        ))),
    }
}

/// What may stand in an address as it is.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_./".contains(&byte)
}

/// A bar on a terminal, else nothing.
fn progress(name: &str, size: u64) -> ProgressBar {
    let bar = if io::stderr().is_terminal() { ProgressBar::new(size) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(name.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_repository_and_perhaps_a_file() {
        let parsed = |target| parse(target).map(|(name, wanted)| format!("{name} {wanted:?}"));
        assert_eq!(parsed("o/r").as_deref(), Ok("o/r Usual"));
        assert_eq!(parsed("o-1/R.x_2:Q4_K_M").as_deref(), Ok("o-1/R.x_2 Quantization(\"Q4_K_M\")"));
        assert_eq!(parsed("o/r:dir/a b.gguf").as_deref(), Ok("o/r File(\"dir/a b.gguf\")"));
        for bad in [
            "",
            "r",
            "o/",
            "/r",
            "o/r/x",
            "o/r:",
            "../r",
            "o/..",
            "o/r:Q4 K",
            "o r/x",
            "https://h/o/r",
            "o/r?x",
        ] {
            let error = parse(bad).expect_err(bad).0;
            assert!(error.contains("OWNER/REPO:QUANT"), "{error}");
        }
    }
}
