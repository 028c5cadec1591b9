//! The m40llm binary: parses the command line, calls a command, maps its error to an exit code.
//!
//! 0: done; 2: the command line or the configuration is wrong; 1: anything else, with one line on
//! stderr that says what to do.
#![forbid(unsafe_code)]

mod cli;
mod config;

use std::{io, process::ExitCode};

use clap::Parser as _;
use m40llm_engine::EngineError;

fn main() -> ExitCode {
    // clap prints its own errors and ends with 2.
    let arguments = cli::Cli::parse();
    match cli::execute(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output has seen enough (`m40llm … | head`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("m40llm: {}", config::one_line(&format!("{error:#}")));
            ExitCode::from(if is_usage(&error) { 2 } else { 1 })
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|e| e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

fn is_usage(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|e| e.is::<config::ConfigError>() || matches!(e.downcast_ref(), Some(EngineError::Config(_))))
}
