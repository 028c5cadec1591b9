//! Objects to the bytes of a stream.

use axum::body::Bytes;
use serde::Serialize;

/// How a stream's objects are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Server-sent events: `data: {…}` and a blank line.
    Sse,
    /// A line for each.
    Ndjson,
}

/// Bytes on their way to the client.
#[derive(Debug)]
pub struct Frames {
    framing: Framing,
    pub(super) buffer: Vec<u8>,
    /// What was last taken was so long, and so will be what comes.
    usual: usize,
}

impl Frames {
    /// Nothing yet.
    pub fn new(framing: Framing) -> Self {
        Self { framing, buffer: Vec::new(), usual: 0 }
    }

    /// Adds an object.
    pub fn push(&mut self, object: &impl Serialize) {
        self.framed(|buffer| {
            let start = buffer.len();
            // Only maps with keys that are no strings fail, and the wire types have none.
            if serde_json::to_writer(&mut *buffer, object).is_err() {
                buffer.truncate(start);
                buffer.extend_from_slice(b"null");
            }
            escape(buffer, start);
        });
    }

    /// Adds an object with a line before it that says what it is.
    pub fn event(&mut self, name: &str, object: &impl Serialize) {
        for part in ["event: ", name, "\n"] {
            self.buffer.extend_from_slice(part.as_bytes());
        }
        self.push(object);
    }

    /// Adds text that holds no line break.
    pub fn raw(&mut self, line: &str) {
        self.framed(|buffer| buffer.extend_from_slice(line.as_bytes()));
    }

    fn framed(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let (before, after): (&[u8], &[u8]) = match self.framing {
            Framing::Sse => (b"data: ", b"\n\n"),
            Framing::Ndjson => (b"", b"\n"),
        };
        if self.buffer.is_empty() {
            self.buffer.reserve(self.usual);
        }
        self.buffer.extend_from_slice(before);
        write(&mut self.buffer);
        self.buffer.extend_from_slice(after);
    }

    /// Adds a line that SSE clients pass over.
    pub fn comment(&mut self, text: &str) {
        for part in [": ", text, "\n\n"] {
            self.buffer.extend_from_slice(part.as_bytes());
        }
    }

    /// Takes what there is.
    pub fn take(&mut self) -> Bytes {
        // A little more, as numbers grow.
        self.usual = self.buffer.len() + 16;
        std::mem::take(&mut self.buffer).into()
    }
}

/// Escapes what some clients take for line breaks, from `start` on. In JSON these characters only occur in
/// strings.
fn escape(json: &mut Vec<u8>, start: usize) {
    let new = &json[start..];
    if new.is_ascii() {
        return;
    }
    let text = String::from_utf8_lossy(new);
    if text.contains(['\u{85}', '\u{2028}', '\u{2029}']) {
        let escaped =
            text.replace('\u{85}', "\\u0085").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029");
        json.truncate(start);
        json.extend_from_slice(escaped.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_breaks_of_other_worlds_are_escaped() {
        let mut frames = Frames::new(Framing::Sse);
        frames.push(&serde_json::json!({"a": "x\u{85}y\u{2028}z\u{2029}\n"}));
        let text = String::from_utf8(frames.take().into()).unwrap();
        assert_eq!(text, "data: {\"a\":\"x\\u0085y\\u2028z\\u2029\\n\"}\n\n");
        let json: serde_json::Value = serde_json::from_str(text["data: ".len()..].trim_end()).unwrap();
        assert_eq!(json["a"], "x\u{85}y\u{2028}z\u{2029}\n");
    }

    #[test]
    fn framings() {
        let mut frames = Frames::new(Framing::Ndjson);
        frames.push(&1);
        frames.push(&"é");
        assert_eq!(frames.take(), "1\n\"é\"\n");
        let mut frames = Frames::new(Framing::Sse);
        frames.comment("keep-alive");
        frames.raw("[DONE]");
        assert_eq!(frames.take(), ": keep-alive\n\ndata: [DONE]\n\n");
        assert_eq!(frames.take(), "");
    }
}
