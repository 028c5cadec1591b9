//! Integration tests of the engine: one binary, one module a subject.

mod detokenizer;
mod engine;
mod gguf;
mod logits;
mod stop;
mod support;
mod template;
mod tokenizer;
mod vocabularies;
