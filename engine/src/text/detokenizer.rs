//! Token bytes to text, never half a character.

/// Holds back what is not whole UTF-8 yet.
///
/// Everything it yields, joined, equals `String::from_utf8_lossy` over all bytes pushed.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The first bytes of one character whose rest is still to come: at most three.
    held: Vec<u8>,
}

impl Detokenizer {
    /// Adds bytes; returns the text that is whole now. U+FFFD appears only for bytes that can never
    /// become valid.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::with_capacity(self.held.len());
        let mut rest = self.held.as_slice();
        let incomplete = loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    break 0;
                }
                Err(error) => {
                    let (valid, bad) = rest.split_at(error.valid_up_to());
                    // `valid` was just found to be UTF-8, so nothing is replaced here.
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(len) = error.error_len() else { break bad.len() };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &bad[len..];
                }
            }
        };
        self.held.drain(..self.held.len() - incomplete);
        text
    }

    /// What is left at the end, lossily.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned()
    }

    /// Bytes held back now.
    pub fn held(&self) -> usize {
        self.held.len()
    }
}
