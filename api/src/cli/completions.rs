//! `m40llm completions`: what a shell needs to complete commands and flags.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, print};

/// Print the completions for a shell
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm completions bash > ~/.local/share/bash-completion/completions/m40llm
  m40llm completions zsh > \"${fpath[1]}/_m40llm\"
  m40llm completions fish > ~/.config/fish/completions/m40llm.fish")]
pub(crate) struct Args {
    /// For which shell
    shell: Shell,
}

/// Prints the script.
pub(crate) fn execute(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "m40llm", &mut script);
    Ok(print(&String::from_utf8(script)?)?)
}
