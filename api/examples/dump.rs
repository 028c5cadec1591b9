fn main() { print!("{}\n", m40llm::openapi().to_pretty_json().unwrap()); }
