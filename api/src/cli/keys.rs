//! `m40llm keys`: makes keys, lists them, takes them back, and says what they used. Works on the state
//! directory itself, whether a server runs on it or not.

use std::{collections::BTreeMap, fmt::Write as _};

use m40llm::auth::{
    self, AuthError, Key, KeyLimits, NewKey, Priority, Scope, Vault,
    ledger::{Amounts, UsageFilter, UsageRecord},
    view::{CreatedKey, DailyUsage, KeyInfo, a_day},
};
use serde_json::json;

use super::print;
use crate::config::{ConfigError, StateArgs};

/// Make, list and revoke API keys, and see what they used
///
/// A running server takes changes over within a second. With the first key that is made, it begins to ask
/// for keys.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm keys create --name laptop
  m40llm keys create --name ci --expires 30d --rpm 60 --tpm 100000
  m40llm keys create --name grafana --scope metrics
  m40llm keys revoke key_0123456789abcdef01234567
  m40llm keys usage --csv --since 2026-01-01 > usage.csv")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    state: StateArgs,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a key and print it, this once: it is kept nowhere
    Create(Create),
    /// List all keys, also those that are revoked or expired
    List,
    /// Take a key back, for ever
    Revoke {
        /// The key's id, as `keys list` shows it
        id: String,
    },
    /// What each key used
    Usage(Usage),
    /// Sign keys with a new secret from now on; keys of the old ones stay valid unless they are dropped
    RotateSecret {
        /// All keys made before are no longer valid
        #[arg(long)]
        drop_old: bool,
    },
    /// End a rotation: keys that the newest secret has not signed are no longer valid
    DropOldSecrets,
}

#[derive(Debug, clap::Args)]
struct Create {
    /// What you call it
    #[arg(long, value_parser = auth::key::name)]
    name: String,
    /// What it may do, may be given several times: inference, metrics or admin [default: inference]
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<Scope>,
    /// For how long it is valid, such as 90s, 15m, 12h or 30d [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = auth::key::lifetime)]
    expires: Option<u64>,
    /// Most requests a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rpm: Option<u32>,
    /// Most tokens a minute, of prompts and output together
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tpm: Option<u32>,
    /// Most requests at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    concurrency: Option<u32>,
    /// A model it may use, may be given several times [default: all]
    #[arg(long = "model", value_name = "ID")]
    models: Vec<String>,
    /// Longest prompt and output together, in tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_context: Option<u32>,
    /// Who goes first when requests wait: low, normal or high [default: normal]
    #[arg(long, value_name = "PRIORITY")]
    priority: Option<Priority>,
}

#[derive(Debug, clap::Args)]
struct Usage {
    /// Print a line for each key, day and model
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// From this UTC day on, such as 2026-01-31
    #[arg(long, value_name = "DAY", value_parser = a_day)]
    since: Option<String>,
    /// Up to this UTC day, inclusive
    #[arg(long, value_name = "DAY", value_parser = a_day)]
    until: Option<String>,
}

/// Does what the command line says.
pub(crate) fn execute(args: Args) -> anyhow::Result<()> {
    let Args { command, state, json } = args;
    let mut vault = Vault::open(&state.resolve()?)?;
    let text = match command {
        Command::Create(new) => create(&mut vault, new, json)?,
        Command::List if json => {
            let now = auth::now();
            pretty(&vault.keys()?.iter().map(|key| KeyInfo::of(key, now)).collect::<Vec<_>>())?
        }
        Command::List => list(&vault.keys()?),
        Command::Revoke { id } => {
            let key = vault.revoke(&id)?;
            let revoked = || format!("revoked {}\n", key.id);
            if json { pretty(&KeyInfo::of(&key, auth::now()))? } else { revoked() }
        }
        Command::Usage(Usage { csv, since, until }) => {
            let filter = UsageFilter { key: None, since, until };
            let (keys, records) = (vault.keys()?, vault.usage(&filter)?);
            match (csv, json) {
                (true, _) => table_of_days(&keys, &records),
                (false, true) => pretty(&totals_json(&keys, &records))?,
                (false, false) => totals(&keys, &records),
            }
        }
        Command::RotateSecret { drop_old } => {
            let valid = vault.rotate(drop_old)?;
            secrets("keys are signed with a new secret", valid, json)?
        }
        Command::DropOldSecrets => secrets("older secrets are dropped", vault.drop_old_secrets()?, json)?,
    };
    Ok(print(&text)?)
}

fn create(vault: &mut Vault, new: Create, json: bool) -> anyhow::Result<String> {
    let new = NewKey {
        name: new.name,
        scopes: new.scopes,
        lifetime: new.expires,
        limits: KeyLimits {
            rpm: new.rpm,
            tpm: new.tpm,
            concurrency: new.concurrency,
            models: new.models,
            max_context: new.max_context,
            priority: new.priority.unwrap_or_default(),
        },
    };
    let (key, text) = vault.create(new).map_err(|error| match error {
        AuthError::Invalid(allowed) => ConfigError(allowed).into(),
        error => anyhow::Error::from(error),
    })?;
    if json {
        return pretty(&CreatedKey { key: text, info: KeyInfo::of(&key, auth::now()) });
    }
    // On stderr, so that `KEY=$(m40llm keys create --name x)` holds the key and nothing else.
    eprintln!(
        "made {} ({}), valid {}; it is shown this once",
        key.id,
        scopes(&key),
        key.expires.map_or("for ever".to_owned(), |time| format!("until {}", auth::utc(time)))
    );
    Ok(text + "\n")
}

/// How many secrets are valid after `what`.
fn secrets(what: &str, valid: usize, json: bool) -> anyhow::Result<String> {
    if json {
        return pretty(&json!({"valid_secrets": valid}));
    }
    let are = if valid == 1 { "secret is" } else { "secrets are" };
    Ok(format!("{what}; {valid} {are} valid\n"))
}

fn pretty(value: &impl serde::Serialize) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

fn scopes(key: &Key) -> String {
    key.scopes.iter().map(|scope| scope.name()).collect::<Vec<_>>().join(",")
}

/// Keys in columns.
fn list(keys: &[Key]) -> String {
    let now = auth::now();
    let number = |limit: Option<u32>| limit.map_or("-".to_owned(), |n| n.to_string());
    let rows = keys.iter().map(|key| {
        vec![
            key.id.clone(),
            key.status(now).name().to_owned(),
            scopes(key),
            auth::utc(key.created),
            key.expires.map_or("never".to_owned(), auth::utc),
            number(key.limits.rpm),
            number(key.limits.tpm),
            key.name.clone(),
        ]
    });
    columns(&["ID", "STATUS", "SCOPES", "CREATED", "EXPIRES", "RPM", "TPM", "NAME"], rows)
}

/// Each key's use in all, also of those that used nothing, in the order of the keys.
fn by_key<'a>(keys: &'a [Key], records: &[UsageRecord]) -> Vec<(&'a Key, Amounts)> {
    let mut sums: BTreeMap<&str, Amounts> = BTreeMap::new();
    for record in records {
        *sums.entry(&record.key).or_default() += record.amounts;
    }
    keys.iter().map(|key| (key, sums.get(key.id.as_str()).copied().unwrap_or_default())).collect()
}

fn totals(keys: &[Key], records: &[UsageRecord]) -> String {
    let rows = by_key(keys, records).into_iter().map(|(key, used)| {
        vec![
            key.id.clone(),
            used.requests.to_string(),
            used.prompt_tokens.to_string(),
            used.cached_tokens.to_string(),
            used.completion_tokens.to_string(),
            format!("{:.3}", used.device_seconds()),
            key.name.clone(),
        ]
    });
    columns(&["ID", "REQUESTS", "PROMPT", "CACHED", "COMPLETION", "DEVICE-S", "NAME"], rows)
}

fn totals_json(keys: &[Key], records: &[UsageRecord]) -> serde_json::Value {
    let rows = by_key(keys, records).into_iter().map(|(key, used)| {
        json!({
            "id": key.id,
            "name": key.name,
            "requests": used.requests,
            "prompt_tokens": used.prompt_tokens,
            "cached_tokens": used.cached_tokens,
            "completion_tokens": used.completion_tokens,
        })
    });
    rows.collect()
}

fn table_of_days(keys: &[Key], records: &[UsageRecord]) -> String {
    let mut out = "id,name,day,model,requests,prompt_tokens,cached_tokens,completion_tokens,device_seconds\n"
        .to_owned();
    for record in records {
        let name = keys.iter().find(|key| key.id == record.key).map_or("", |key| &key.name);
        let DailyUsage {
            day,
            model,
            requests,
            prompt_tokens,
            cached_tokens,
            completion_tokens,
            device_seconds,
        } = record.into();
        let _ = writeln!(
            out,
            "{},{},{day},{},{requests},{prompt_tokens},{cached_tokens},{completion_tokens},{device_seconds}",
            record.key,
            quoted(name),
            quoted(&model),
        );
    }
    out
}

/// A field of a CSV line.
fn quoted(field: &str) -> String {
    if field.contains([',', '"']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.to_owned() }
}

/// Left-aligned columns, two spaces apart; the last, which may be any text, is not padded.
fn columns(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let head = head.iter().map(|&title| title.to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..rows[0].len() - 1).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(out, "{cell:width$}  ");
        }
        out += row.last().map_or("", String::as_str);
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(quoted("plain name"), "plain name");
        assert_eq!(quoted("a,\"b\""), "\"a,\"\"b\"\"\"");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["é".to_owned(), "1".to_owned()], vec!["long".to_owned(), "2".to_owned()]];
        assert_eq!(columns(&["A", "B"], rows.into_iter()), "A     B\né     1\nlong  2\n");
    }
}
