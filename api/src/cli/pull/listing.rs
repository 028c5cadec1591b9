//! What a repository holds, and which of it is meant.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, anyhow, bail};
use hf_hub::Repo;
use serde::Deserialize;

use super::transfer::Client;

/// Which of a repository's files.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The one that most people take.
    Usual,
    /// Of this quantisation.
    Quantization(String),
    /// Of this name.
    File(String),
}

/// What is taken when nothing else was said and there is more than one.
const USUAL: &str = "Q4_K_M";

/// GGUF files at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    /// Its hash: files of one download never come from two commits.
    pub(super) commit: String,
    files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    /// Its name, with the folders it is in.
    pub(super) name: String,
    /// Bytes.
    pub(super) size: u64,
    /// SHA-256, in lower-case hex digits.
    pub(super) sha256: String,
}

impl RemoteFile {
    /// Its name without folders.
    pub(super) fn base_name(&self) -> &str {
        base_name(&self.name)
    }
}

/// The hub's answer, as far as it matters.
#[derive(Debug, Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Asks the hub.
    pub(super) fn ask(client: &Client, repo: &Repo) -> anyhow::Result<Self> {
        let text = client.info(repo)?;
        let info: Info = serde_json::from_str(&text).with_context(|| {
            format!("{} does not answer as a hub does: see HF_ENDPOINT", client.endpoint())
        })?;
        // It becomes a part of paths and addresses.
        if info.sha.len() != 40 || !is_hex(&info.sha) {
            bail!("{} names no commit: see HF_ENDPOINT", client.endpoint());
        }
        let files =
            info.siblings.into_iter().filter(|file| is_file_name(&file.rfilename)).filter_map(|file| {
                let Lfs { sha256, size } = file.lfs?;
                let sha256 = sha256.to_ascii_lowercase();
                let is_checkable = sha256.len() == 64 && is_hex(&sha256);
                is_checkable.then_some(RemoteFile { name: file.rfilename, size, sha256 })
            });
        Ok(Self { commit: info.sha, files: files.collect() })
    }

    /// The file that is wanted: one, or all parts of a split one in their order.
    pub(super) fn choose(&self, repo: &str, wanted: &Wanted) -> anyhow::Result<Vec<&RemoteFile>> {
        let mut models: BTreeMap<String, Vec<&RemoteFile>> = BTreeMap::new();
        for file in &self.files {
            models.entry(whole_name(&file.name)).or_default().push(file);
        }
        if models.is_empty() {
            bail!("{repo} holds no GGUF file with a checksum: is there a repository with GGUF in its name?");
        }
        let is_model = |name: &&String| !base_name(name).to_ascii_lowercase().starts_with("mmproj");
        let named: Vec<&String> = match wanted {
            Wanted::File(file) => {
                let whole = whole_name(file);
                models.keys().filter(|name| **name == whole || base_name(name) == whole).collect()
            }
            Wanted::Quantization(quant) => {
                models.keys().filter(is_model).filter(|name| has(name, quant)).collect()
            }
            Wanted::Usual => {
                let all: Vec<_> = models.keys().filter(is_model).collect();
                if all.len() == 1 { all } else { all.into_iter().filter(|name| has(name, USUAL)).collect() }
            }
        };
        let list = |names: &mut dyn Iterator<Item = &String>| {
            names.map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        let [name] = named[..] else {
            let some = if named.is_empty() { list(&mut models.keys()) } else { list(&mut named.into_iter()) };
            bail!("choose a file of {repo} as OWNER/REPO:FILE.gguf; there are {some}");
        };
        let mut parts = models[name].clone();
        parts.sort_by(|a, b| a.name.cmp(&b.name));
        let total = split(&parts[0].name).map_or(1, |(_, _, total)| total);
        let complete =
            parts.iter().enumerate().all(|(i, p)| split(&p.name).is_none_or(|(_, n, _)| n == i + 1));
        if parts.len() == total && complete {
            Ok(parts)
        } else {
            Err(anyhow!("{repo} holds {} of the {total} parts of {name}: ask its owner", parts.len()))
        }
    }
}

fn is_hex(s: &str) -> bool {
    s.bytes().all(|b| b.is_ascii_hexdigit())
}

/// True for a GGUF file whose name may become a path here: nobody's server says where on this disk. Letters that
/// a terminal would act on are in no name that is shown.
fn is_file_name(name: &str) -> bool {
    let plain =
        |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', '%', '?', '#']);
    is_gguf(name) && !name.chars().any(char::is_control) && name.split('/').all(plain)
}

/// True for a name with the ending of GGUF files, which the hub has in small letters.
pub(super) fn is_gguf(name: &str) -> bool {
    name.strip_suffix(".gguf").is_some_and(|stem| !stem.is_empty())
}

fn base_name(name: &str) -> &str {
    name.rsplit_once('/').map_or(name, |(_, base)| base)
}

/// Of `X-00001-of-00003.gguf`: X, 1 and 3.
fn split(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, total) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (whole, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| (s.len() == 5).then(|| s.parse().ok()).flatten();
    Some((whole, digits(number)?, digits(total)?))
}

/// The name that all parts of a file share.
fn whole_name(name: &str) -> String {
    split(name).map_or_else(|| name.to_owned(), |(whole, ..)| format!("{whole}.gguf"))
}

/// Whether a file's name, or the folder it is in, names this quantisation: as a word, so that `Q4_K` is not
/// `Q4_K_M` and `Q4_NL` not `IQ4_NL`.
fn has(name: &str, quant: &str) -> bool {
    let (name, quant) = (name.to_ascii_lowercase(), quant.to_ascii_lowercase());
    let stem = Path::new(&name).with_extension("");
    let stem = stem.to_string_lossy();
    stem.match_indices(&quant).any(|(at, _)| {
        let before = stem[..at].chars().next_back();
        let after = stem[at + quant.len()..].chars().next();
        before.is_none_or(|c| !c.is_alphanumeric()) && after.is_none_or(|c| !c.is_alphanumeric() && c != '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        let file = |name: &&str| RemoteFile { name: (*name).to_owned(), size: 1, sha256: "0".repeat(64) };
        Listing { commit: String::new(), files: names.iter().map(file).collect() }
    }

    fn chosen(names: &[&str], wanted: &Wanted) -> Result<Vec<String>, String> {
        let listing = listing(names);
        let files = listing.choose("o/r", wanted).map_err(|e| e.to_string())?;
        Ok(files.iter().map(|f| f.name.clone()).collect())
    }

    fn quant(q: &str) -> Wanted {
        Wanted::Quantization(q.to_owned())
    }

    #[test]
    fn a_quantisation_is_a_word_of_the_name() {
        let names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "m.IQ4_NL.gguf", "m-q8_0.gguf", "mmproj-m-q8_0.gguf"];
        assert_eq!(chosen(&names, &quant("q4_k_s")), Ok(vec!["m-Q4_K_S.gguf".into()]));
        assert_eq!(chosen(&names, &quant("Q8_0")), Ok(vec!["m-q8_0.gguf".into()]), "no projector");
        assert_eq!(chosen(&names, &Wanted::Usual), Ok(vec!["m-Q4_K_M.gguf".into()]));
        for not_there in ["Q4_K", "Q4_NL", "Q5_0"] {
            let error = chosen(&names, &quant(not_there)).expect_err(not_there);
            assert!(error.contains("m-Q4_K_M.gguf, m-Q4_K_S.gguf"), "{error}");
        }
        assert_eq!(chosen(&["only-f16.gguf"], &Wanted::Usual), Ok(vec!["only-f16.gguf".into()]));
        let two = chosen(&["a-q8_0.gguf", "b-q8_0.gguf", "c-q2_k.gguf"], &quant("q8_0")).expect_err("two");
        assert!(two.ends_with("there are a-q8_0.gguf, b-q8_0.gguf"), "{two}");
        assert!(chosen(&["a-q8_0.gguf", "b-q2_k.gguf"], &Wanted::Usual).is_err());
        assert!(chosen(&[], &Wanted::Usual).expect_err("nothing").contains("no GGUF file"));
    }

    #[test]
    fn all_parts_of_a_split_file_are_taken_in_order() {
        let names = ["Q8_0/m-Q8_0-00002-of-00002.gguf", "Q8_0/m-Q8_0-00001-of-00002.gguf", "m-Q2_K.gguf"];
        let both = Ok(vec![names[1].to_owned(), names[0].to_owned()]);
        assert_eq!(chosen(&names, &quant("Q8_0")), both);
        for file in [names[0], "m-Q8_0-00001-of-00002.gguf"] {
            assert_eq!(chosen(&names, &Wanted::File(file.to_owned())), both, "{file}");
        }
        let error = chosen(&names[..1], &Wanted::Usual).expect_err("a part is missing");
        assert!(error.contains("1 of the 2 parts"), "{error}");
    }

    #[test]
    fn names_stay_inside_their_directory() {
        for good in ["a.gguf", "Q4/a-b.Q4.gguf", "a b.gguf"] {
            assert!(is_file_name(good), "{good}");
        }
        for bad in [
            "../a.gguf",
            "/a.gguf",
            "a/../../b.gguf",
            "a//b.gguf",
            "a\\b.gguf",
            "a\u{1b}[31m.gguf",
            ".gguf",
            "a.bin",
            "a%2f..%2fb.gguf",
        ] {
            assert!(!is_file_name(bad), "{bad:?}");
        }
    }
}
