//! The m40llm binary.
fn main() {}
