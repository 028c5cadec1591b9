//! `m40llm openapi`: the OpenAPI document on stdout.

use super::print;

/// Print the OpenAPI document of the server
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m40llm openapi > openapi.json")]
pub(crate) struct Args {}

/// Prints the document that `/openapi.json` serves.
pub(crate) fn execute() -> anyhow::Result<()> {
    Ok(print(&document()?)?)
}

#[cfg(feature = "server")]
fn document() -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(&m40llm::openapi())? + "\n")
}

/// Without the server there are no handlers to make it from; a test holds this file equal to them.
#[cfg(not(feature = "server"))]
#[expect(clippy::unnecessary_wraps, reason = "the other build's can fail")]
fn document() -> anyhow::Result<String> {
    Ok(include_str!("../../../openapi/openapi.json").to_owned())
}
