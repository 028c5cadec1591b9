//! The secrets that sign keys. The first of the list signs; the others are still valid, until they are
//! dropped.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, crypto};

use super::{AuthError, random_hex};

/// The file beside the database: one secret a line, the newest first.
pub const FILE: &str = "signing-secrets";

/// The shortest secret taken, in bytes: as long as the hash that it keys.
pub const MIN_BYTES: usize = 32;

/// Secrets from the environment, several separated by white space. Never printed.
#[derive(Clone)]
pub struct SigningSecret(String);

impl SigningSecret {
    /// Refuses what is too short to keep anybody out.
    pub fn new(text: &str) -> Result<Self, String> {
        let mut secrets = text.split_whitespace().peekable();
        if secrets.peek().is_none() || secrets.any(|secret| secret.len() < MIN_BYTES) {
            return Err(format!(
                "a secret of at least {MIN_BYTES} characters without spaces is allowed, or several with spaces \
                 between them, the one that signs first"
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningSecret(…)")
    }
}

/// One secret, by the id that tokens name it with.
#[derive(Debug)]
pub(crate) struct Secret {
    pub(crate) kid: String,
    pub(crate) encoding: EncodingKey,
    pub(crate) decoding: DecodingKey,
}

impl Secret {
    fn new(text: &str) -> Result<Self, AuthError> {
        let encoding = EncodingKey::from_secret(text.as_bytes());
        // An id that follows from the secret needs no place to be kept, and tells nothing that a signed
        // token does not tell.
        let kid = crypto::sign(b"m40llm key id", &encoding, Algorithm::HS256)
            .map_err(|e| AuthError::Secret(format!("the signing secret cannot be used: {e}")))?;
        let kid = kid.chars().take(12).collect();
        Ok(Self { kid, encoding, decoding: DecodingKey::from_secret(text.as_bytes()) })
    }
}

/// All valid secrets, at least one, the current one first.
#[derive(Debug)]
pub struct Secrets(Vec<Secret>);

impl Secrets {
    /// From the environment.
    pub fn given(secret: &SigningSecret) -> Result<Self, AuthError> {
        secret.0.split_whitespace().map(Secret::new).collect::<Result<_, _>>().map(Self)
    }

    /// The one that signs.
    pub(crate) fn current(&self) -> &Secret {
        &self.0[0]
    }

    /// The one that a token names.
    pub(crate) fn find(&self, kid: &str) -> Option<&Secret> {
        self.0.iter().find(|secret| secret.kid == kid)
    }

    /// How many are valid.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// What changes when the file does.
pub(crate) type Stamp = (u64, i64, i64, u64);

/// The secrets' file.
#[derive(Debug, Clone)]
pub(crate) struct SecretFile(PathBuf);

impl SecretFile {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self(dir.join(FILE))
    }

    /// Reads the file, and makes it when there is none. The caller keeps others from doing the same now.
    pub(crate) fn load_or_create(&self) -> Result<Secrets, AuthError> {
        match fs::metadata(&self.0) {
            Ok(_) => self.load(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.write(&[fresh()?])?;
                self.load()
            }
            Err(e) => Err(self.failed("read", &e)),
        }
    }

    /// Reads the file.
    pub(crate) fn load(&self) -> Result<Secrets, AuthError> {
        self.lines()?.iter().map(|line| Secret::new(line)).collect::<Result<_, _>>().map(Secrets)
    }

    /// A new secret signs from now on; the old ones stay valid unless they are dropped.
    pub(crate) fn rotate(&self, drop_old: bool) -> Result<Secrets, AuthError> {
        let mut lines = vec![fresh()?];
        if !drop_old {
            lines.extend(self.lines()?);
        }
        self.write(&lines)?;
        self.load()
    }

    /// Only the current secret stays valid.
    pub(crate) fn drop_old(&self) -> Result<Secrets, AuthError> {
        let mut lines = self.lines()?;
        lines.truncate(1);
        self.write(&lines)?;
        self.load()
    }

    /// Differs whenever the file does, as each write makes a new one.
    pub(crate) fn stamp(&self) -> io::Result<Stamp> {
        fs::metadata(&self.0).map(|m| (m.ino(), m.mtime(), m.mtime_nsec(), m.len()))
    }

    fn lines(&self) -> Result<Vec<String>, AuthError> {
        let read = || {
            let metadata = fs::metadata(&self.0)?;
            if metadata.permissions().mode() & 0o077 != 0 {
                fs::set_permissions(&self.0, fs::Permissions::from_mode(0o600))?;
            }
            fs::read_to_string(&self.0)
        };
        let text = read().map_err(|e| self.failed("read", &e))?;
        let lines: Vec<_> = text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        if lines.is_empty() || lines.iter().any(|line| line.len() < MIN_BYTES) {
            return Err(AuthError::Secret(format!(
                "{} does not hold a secret of at least {MIN_BYTES} characters on every line: restore it, or delete \
                 it and make new keys",
                self.0.display()
            )));
        }
        Ok(lines)
    }

    /// A new file takes the old one's place whole, or not at all.
    fn write(&self, lines: &[String]) -> Result<(), AuthError> {
        let beside = self.0.with_extension("new");
        let write = || {
            // What a crash has left there.
            match fs::remove_file(&beside) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
            for line in lines {
                writeln!(file, "{line}")?;
            }
            file.sync_all()?;
            fs::rename(&beside, &self.0)?;
            self.0.parent().map_or(Ok(()), |dir| fs::File::open(dir)?.sync_all())
        };
        write().map_err(|e| self.failed("write", &e))
    }

    fn failed(&self, what: &str, error: &io::Error) -> AuthError {
        AuthError::State(format!("cannot {what} {}: {error}", self.0.display()))
    }
}

/// 256 random bits as text.
fn fresh() -> Result<String, AuthError> {
    random_hex(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_private_and_rotates() {
        let dir = tempfile::tempdir().unwrap();
        let file = SecretFile::in_dir(dir.path());
        let path = dir.path().join(FILE);
        let first = file.load_or_create().unwrap();
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!((first.count(), mode()), (1, 0o600));
        assert_eq!(file.load_or_create().unwrap().current().kid, first.current().kid);

        let before = file.stamp().unwrap();
        let second = file.rotate(false).unwrap();
        assert_ne!(file.stamp().unwrap(), before);
        assert_eq!((second.count(), mode()), (2, 0o600));
        assert_ne!(second.current().kid, first.current().kid);
        assert!(second.find(&first.current().kid).is_some());

        let kept = file.drop_old().unwrap();
        assert_eq!((kept.count(), &kept.current().kid), (1, &second.current().kid));
        let third = file.rotate(true).unwrap();
        assert_eq!(third.count(), 1);
        assert!(third.find(&second.current().kid).is_none());
    }

    #[test]
    fn a_file_that_others_may_read_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let file = SecretFile::in_dir(dir.path());
        file.load_or_create().unwrap();
        let path = dir.path().join(FILE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        file.load().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_broken_file_is_an_error_and_no_new_secret() {
        let dir = tempfile::tempdir().unwrap();
        let file = SecretFile::in_dir(dir.path());
        for text in ["", "short\n"] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let error = file.load_or_create().unwrap_err().to_string();
            assert!(error.contains(FILE) && !error.contains("short"), "{error}");
        }
    }

    #[test]
    fn secrets_of_the_environment_are_long_and_never_shown() {
        let long = "x".repeat(MIN_BYTES);
        assert!(SigningSecret::new("").is_err() && SigningSecret::new("  ").is_err());
        assert!(
            SigningSecret::new("short").is_err() && SigningSecret::new(&format!("{long} short")).is_err()
        );
        let two = SigningSecret::new(&format!("{long} {long}y")).unwrap();
        assert!(!format!("{two:?}").contains('x'));
        let secrets = Secrets::given(&two).unwrap();
        assert_eq!(secrets.count(), 2);
        assert!(!format!("{secrets:?}").contains("xxxx"));
    }
}
