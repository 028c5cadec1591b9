//! What a model said, told apart: text, reasoning and the calls of tools.
//!
//! The engine gives text; a [`Reader`] makes [`Piece`]s of it as it comes, for whole answers and streams alike, so
//! that both say the same. A [`Turn`] joins a choice's pieces with its tokens, and [`Said`] is what it came to.

mod call;
mod family;
mod generic;
mod grammar;
mod hermes;
mod llama;
mod reader;
#[cfg(test)]
mod reader_tests;
mod thoughts;
mod turn;

pub(crate) use family::{Family, Format};
pub(crate) use generic::rewrite;
pub(crate) use grammar::{Calling, Mark};
pub(crate) use reader::{Calls, Reader, Reading, THINK, Thinks};
pub(crate) use turn::{Said, Turn};

/// A call's id, unique.
fn new_id() -> String {
    format!("call_{}", uuid::Uuid::new_v4().simple())
}

/// A part of what a model said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// For the user.
    Text(String),
    /// Thought before the answer.
    Reasoning(String),
    /// A call begins. Calls are numbered from 0 in their choice.
    Call {
        /// Which call.
        index: usize,
        /// Unique.
        id: String,
        /// The function.
        name: String,
    },
    /// More of a call's arguments: JSON as the model wrote it.
    Arguments {
        /// Which call.
        index: usize,
        /// What is new.
        text: String,
    },
}
