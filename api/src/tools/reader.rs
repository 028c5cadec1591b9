//! A choice's text to pieces, as it comes.

use super::Piece;

/// How the outputs of a request are to be read; makes a [`Reader`] for each choice.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading;

impl Reading {
    /// A reader for one choice.
    pub(crate) fn reader(&self) -> Reader {
        Reader
    }
}

/// Tells a choice's text apart. The pieces, joined, do not depend on how the text was cut.
#[derive(Debug)]
pub(crate) struct Reader;

impl Reader {
    /// Adds text; returns what is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        if text.is_empty() { Vec::new() } else { vec![Piece::Text(text.to_owned())] }
    }

    /// What was held back, at the end of the output.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        Vec::new()
    }

    /// Whether it ended in a call that is whole.
    pub(crate) fn called(&self) -> bool {
        false
    }

    /// Whether text is held back that may yet become a piece.
    pub(crate) fn holds(&self) -> bool {
        false
    }
}
