//! Where files go: a directory, or the cache that programs of Hugging Face share.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use hf_hub::{Cache, CacheRepo, Repo};
use sha2::{Digest as _, Sha256};

use super::{listing::RemoteFile, transfer::hex};

/// Where files go.
#[derive(Debug)]
pub(super) enum Place {
    /// Into it, by their names.
    Directory(PathBuf),
    /// Blobs by their checksums, and links to them by commit and name.
    Cache(CacheRepo),
}

impl Place {
    /// A repository's part of the cache at `path`.
    pub(super) fn cache(path: PathBuf, repo: Repo) -> Self {
        Self::Cache(Cache::new(path).repo(repo))
    }

    /// The path of `file`, whose bytes `download` writes into the path it is given unless they are there. That
    /// path outlives a download that fails, so that the next one goes on from there.
    pub(super) fn fetch(
        &self,
        file: &RemoteFile,
        commit: &str,
        download: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let whole = match self {
            Self::Directory(dir) => dir.join(file.base_name()),
            Self::Cache(repo) => repo.blob_path(&file.sha256),
        };
        let dir = whole.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
        if !self.is_there(&whole, file)? {
            // Another version's beginning is none of this one's: it has another name.
            let part = dir.join(format!("{}.{}.part", file.base_name(), &file.sha256[..8]));
            download(&part)?;
            fs::rename(&part, &whole).with_context(|| format!("cannot write {}", whole.display()))?;
        }
        match self {
            Self::Directory(_) => Ok(whole),
            Self::Cache(repo) => {
                let link = repo.pointer_path(commit).join(&file.name);
                link_to(&whole, &link, file.name.split('/').count())
                    .with_context(|| format!("cannot write {}", link.display()))?;
                Ok(link)
            }
        }
    }

    /// In the cache: this commit is what the revision stands for.
    pub(super) fn remember(&self, commit: &str) -> anyhow::Result<()> {
        match self {
            Self::Directory(_) => Ok(()),
            Self::Cache(repo) => repo.create_ref(commit).context("cannot write into the cache"),
        }
    }

    /// Whether the file is there already. Another one of its name is an error: nothing is overwritten.
    fn is_there(&self, whole: &Path, file: &RemoteFile) -> anyhow::Result<bool> {
        let Ok(found) = fs::metadata(whole) else { return Ok(false) };
        match self {
            // A blob's name is its checksum, and it has it only once that was compared.
            Self::Cache(_) => Ok(found.len() == file.size),
            Self::Directory(_) => {
                let same = found.len() == file.size && {
                    let sum = checksum(whole);
                    sum.with_context(|| format!("cannot read {}", whole.display()))? == file.sha256
                };
                if !same {
                    bail!(
                        "{} is there and is another file: move it away, or choose another --to",
                        whole.display()
                    );
                }
                Ok(true)
            }
        }
    }
}

fn checksum(path: &Path) -> io::Result<String> {
    let (mut file, mut sum, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(sum)),
            n => sum.update(&buffer[..n]),
        }
    }
}

/// A link as the cache has them: relative, so that the cache may move. `depth` is how many parts the name has.
fn link_to(blob: &Path, link: &Path, depth: usize) -> io::Result<()> {
    if let Some(dir) = link.parent() {
        fs::create_dir_all(dir)?;
    }
    let up = "../".repeat(depth + 1);
    let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
    match fs::read_link(link) {
        Ok(there) if there == target => Ok(()),
        Ok(_) => fs::remove_file(link).and_then(|()| std::os::unix::fs::symlink(target, link)),
        Err(_) => std::os::unix::fs::symlink(target, link),
    }
}
