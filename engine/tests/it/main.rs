//! The engine's integration tests: one binary, one module a subject.

mod detokenizer;
mod stop;
mod template;
mod tokenizer;
mod vocabularies;
