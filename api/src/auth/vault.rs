//! A state directory: the ledger and the secrets that sign its keys.

use std::{path::PathBuf, sync::Arc};

use super::{
    AuthError, Key, NewKey, SigningSecret,
    ledger::{Ledger, UsageFilter, UsageRecord},
    now, random_hex,
    secret::{SecretFile, Secrets, Stamp},
    token,
};

/// Where keys are kept, and what signs them.
#[derive(Debug, Clone)]
pub struct VaultConfig {
    /// The state directory.
    pub dir: PathBuf,
    /// Secrets to use in place of the directory's file.
    pub signing_secret: Option<SigningSecret>,
}

/// An open state directory.
#[derive(Debug)]
pub struct Vault {
    ledger: Ledger,
    secrets: Arc<Secrets>,
    /// Absent when the secrets come from the environment.
    file: Option<(SecretFile, Option<Stamp>)>,
}

impl Vault {
    /// Opens the state directory; makes what is missing in it.
    pub fn open(config: &VaultConfig) -> Result<Self, AuthError> {
        let mut ledger = Ledger::open(&config.dir)?;
        if let Some(secret) = &config.signing_secret {
            return Ok(Self { ledger, secrets: Arc::new(Secrets::given(secret)?), file: None });
        }
        let file = SecretFile::in_dir(&config.dir);
        // Two processes that begin together must not make two secrets.
        let secrets = Arc::new(ledger.exclusively(|_| file.load_or_create())?);
        let stamp = file.stamp().ok();
        Ok(Self { ledger, secrets, file: Some((file, stamp)) })
    }

    /// Makes a key; returns what is stored of it, and its text, which is not.
    pub fn create(&mut self, new: NewKey) -> Result<(Key, String), AuthError> {
        let NewKey { name, scopes, lifetime, limits } = new.checked()?;
        let created = now();
        let key = Key {
            id: format!("key_{}", random_hex(12)?),
            name,
            scopes,
            created,
            expires: lifetime.map(|seconds| created + seconds),
            revoked: None,
            limits,
        };
        self.refresh_secrets()?;
        let text = token::sign(&key, &self.secrets)?;
        self.ledger.exclusively(|connection| Ledger::insert(connection, &key))?;
        Ok((key, text))
    }

    /// Takes a key back.
    pub fn revoke(&mut self, id: &str) -> Result<Key, AuthError> {
        self.ledger.revoke(id)
    }

    /// All keys in the order in which they were made.
    pub fn keys(&self) -> Result<Vec<Key>, AuthError> {
        self.ledger.keys()
    }

    /// The accounts.
    pub fn usage(&self, filter: &UsageFilter) -> Result<Vec<UsageRecord>, AuthError> {
        self.ledger.usage(filter)
    }

    /// A new secret signs from now on; keys of the old ones stay valid unless `drop_old`. Returns how many
    /// secrets are valid now.
    pub fn rotate(&mut self, drop_old: bool) -> Result<usize, AuthError> {
        self.change_secrets(|file| file.rotate(drop_old))
    }

    /// Keys that the current secret has not signed are no longer valid. Returns how many secrets are.
    pub fn drop_old_secrets(&mut self) -> Result<usize, AuthError> {
        self.change_secrets(SecretFile::drop_old)
    }

    fn change_secrets(
        &mut self,
        change: impl FnOnce(&SecretFile) -> Result<Secrets, AuthError>,
    ) -> Result<usize, AuthError> {
        let Some((file, stamp)) = &mut self.file else {
            return Err(AuthError::Secret(
                "the signing secret comes from M40LLM_SIGNING_SECRET: put a new one in front of it there"
                    .into(),
            ));
        };
        self.secrets = Arc::new(self.ledger.exclusively(|_| change(file))?);
        *stamp = file.stamp().ok();
        Ok(self.secrets.count())
    }

    /// Reads the secrets' file when it is another than before; true when it was.
    pub(crate) fn refresh_secrets(&mut self) -> Result<bool, AuthError> {
        let Some((file, stamp)) = &mut self.file else { return Ok(false) };
        let current = file.stamp().ok();
        if current == *stamp {
            return Ok(false);
        }
        self.secrets = Arc::new(file.load()?);
        *stamp = current;
        Ok(true)
    }

    /// The valid secrets.
    pub fn secrets(&self) -> &Arc<Secrets> {
        &self.secrets
    }

    #[cfg(feature = "server")]
    pub(crate) fn ledger(&mut self) -> &mut Ledger {
        &mut self.ledger
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{Scope, token::verify};

    fn new(name: &str) -> NewKey {
        NewKey { name: name.into(), ..NewKey::default() }
    }

    #[test]
    fn a_key_is_made_once_and_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let config = VaultConfig { dir: dir.path().join("state"), signing_secret: None };
        let mut vault = Vault::open(&config).unwrap();
        let (key, text) = vault.create(NewKey { lifetime: Some(60), ..new("laptop") }).unwrap();
        assert_eq!((key.scopes.as_slice(), key.expires), (&[Scope::Inference][..], Some(key.created + 60)));
        let claims = verify(&text, vault.secrets(), now()).unwrap();
        assert_eq!((&claims.jti, claims.sub.as_str(), claims.exp), (&key.id, "laptop", key.expires));
        assert_eq!(vault.keys().unwrap(), [key]);
        let signature = text.rsplit('.').next().unwrap().as_bytes().to_vec();
        for file in std::fs::read_dir(&config.dir).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!bytes.windows(signature.len()).any(|window| window == signature));
        }
    }

    #[test]
    fn a_rotation_is_seen_by_who_has_the_directory_open() {
        let dir = tempfile::tempdir().unwrap();
        let config = VaultConfig { dir: dir.path().to_owned(), signing_secret: None };
        let (mut one, mut two) = (Vault::open(&config).unwrap(), Vault::open(&config).unwrap());
        let (_, old) = one.create(new("old")).unwrap();
        assert!(!two.refresh_secrets().unwrap());
        assert_eq!(one.rotate(false).unwrap(), 2);
        let (_, fresh) = two.create(new("fresh")).unwrap();
        assert!(verify(&old, two.secrets(), now()).is_ok());
        one.drop_old_secrets().unwrap();
        assert!(two.refresh_secrets().unwrap());
        assert!(verify(&old, two.secrets(), now()).is_err() && verify(&fresh, two.secrets(), now()).is_ok());
    }

    #[test]
    fn secrets_of_the_environment_are_rotated_there() {
        let dir = tempfile::tempdir().unwrap();
        let secret = SigningSecret::new(&"s".repeat(32)).unwrap();
        let config = VaultConfig { dir: dir.path().to_owned(), signing_secret: Some(secret) };
        let mut vault = Vault::open(&config).unwrap();
        assert!(vault.create(new("a")).is_ok());
        assert!(vault.rotate(false).unwrap_err().to_string().contains("M40LLM_SIGNING_SECRET"));
        assert!(!dir.path().join(crate::auth::secret::FILE).exists());
    }
}
