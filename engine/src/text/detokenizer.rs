//! Token bytes to text, never half a character.

/// Holds back what is not whole UTF-8 yet.
#[derive(Debug, Default)]
pub struct Detokenizer {}

impl Detokenizer {
    /// Adds bytes; returns the text that is whole now. U+FFFD appears only for bytes that can never
    /// become valid.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        unimplemented!()
    }
    /// What is left at the end, lossily.
    pub fn finish(&mut self) -> String {
        unimplemented!()
    }
    /// Bytes held back now.
    pub fn held(&self) -> usize {
        unimplemented!()
    }
}
