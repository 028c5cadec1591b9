//! `m40llm man`: the help as manual pages.

use clap::CommandFactory as _;
use clap_mangen::Man;

use super::{Cli, print};
use crate::config::ConfigError;

/// Print a manual page
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm man > ~/.local/share/man/man1/m40llm.1
  m40llm man run > ~/.local/share/man/man1/m40llm-run.1
  m40llm man keys create | man -l -")]
pub(crate) struct Args {
    /// Of this command, such as `run` or `keys create` [default: of m40llm itself]
    #[arg(value_name = "COMMAND")]
    command: Vec<String>,
}

/// Prints the page, for `man` to set.
pub(crate) fn execute(args: &Args) -> anyhow::Result<()> {
    // Building it gives each command the name of its page, such as m40llm-keys-create.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut name = "m40llm".to_owned();
    for part in &args.command {
        let found = command.find_subcommand(part).cloned();
        command =
            found.ok_or_else(|| ConfigError(format!("{name} has no command {part:?}: see {name} --help")))?;
        name = format!("{name}-{part}");
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    Ok(print(&String::from_utf8(page)?)?)
}
