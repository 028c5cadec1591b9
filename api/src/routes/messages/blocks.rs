//! What a model says, as content blocks, and the events that tell of it.

use serde_json::{Value as Json, json};

use crate::{
    anthropic::{ContentBlock, Delta, MessageEvent},
    tools::Piece,
};

/// The blocks so far. Whole and streamed answers are made here alike; those that are whole tell nobody.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    made: Vec<ContentBlock>,
    /// The last block may yet grow.
    open: bool,
    /// The last block's arguments, when it is a call.
    arguments: String,
}

/// Hears of what happens.
pub(super) type Tell<'t> = &'t mut dyn FnMut(MessageEvent<'_>);

impl Blocks {
    pub(super) fn say(&mut self, pieces: Vec<Piece>, tell: Tell<'_>) {
        for piece in pieces {
            match piece {
                Piece::Text(new) => {
                    if !(self.open && matches!(self.made.last(), Some(ContentBlock::Text { .. }))) {
                        self.begin(ContentBlock::Text { text: String::new() }, tell);
                    }
                    self.grow(Delta::Text { r#type: "text_delta", text: &new }, tell);
                    if let Some(ContentBlock::Text { text }) = self.made.last_mut() {
                        text.push_str(&new);
                    }
                }
                Piece::Reasoning(new) => {
                    if !(self.open && matches!(self.made.last(), Some(ContentBlock::Thinking { .. }))) {
                        self.begin(ContentBlock::Thinking { thinking: String::new(), signature: "" }, tell);
                    }
                    self.grow(Delta::Thinking { r#type: "thinking_delta", thinking: &new }, tell);
                    if let Some(ContentBlock::Thinking { thinking, .. }) = self.made.last_mut() {
                        thinking.push_str(&new);
                    }
                }
                Piece::Call { id, name, .. } => {
                    let id = id.replacen("call_", "toolu_", 1);
                    self.begin(ContentBlock::ToolUse { id, name, input: json!({}) }, tell);
                }
                Piece::Arguments { text, .. } => {
                    self.grow(Delta::InputJson { r#type: "input_json_delta", partial_json: &text }, tell);
                    self.arguments.push_str(&text);
                }
            }
        }
    }

    /// The end. An answer of nothing is an empty text.
    pub(super) fn finish(&mut self, tell: Tell<'_>) {
        if self.made.is_empty() {
            self.begin(ContentBlock::Text { text: String::new() }, tell);
        }
        self.end(tell);
    }

    /// The blocks, once there are no more.
    pub(super) fn take(&mut self) -> Vec<ContentBlock> {
        std::mem::take(&mut self.made)
    }

    /// Ends the block before and adds one.
    fn begin(&mut self, block: ContentBlock, tell: Tell<'_>) {
        self.end(tell);
        self.open = true;
        self.made.push(block);
        let index = Some(self.made.len() - 1);
        let content_block = self.made.last();
        tell(MessageEvent { r#type: "content_block_start", index, content_block, ..MessageEvent::default() });
    }

    fn grow(&self, delta: Delta<'_>, tell: Tell<'_>) {
        let index = Some(self.made.len().saturating_sub(1));
        tell(MessageEvent {
            r#type: "content_block_delta",
            index,
            delta: Some(delta),
            ..MessageEvent::default()
        });
    }

    /// Ends the last block, if it is not ended yet.
    fn end(&mut self, tell: Tell<'_>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let arguments = std::mem::take(&mut self.arguments);
        if let Some(ContentBlock::ToolUse { input, .. }) = self.made.last_mut()
            && let Ok(object @ Json::Object(_)) = serde_json::from_str(&arguments)
        {
            *input = object;
        }
        let index = Some(self.made.len() - 1);
        tell(MessageEvent { r#type: "content_block_stop", index, ..MessageEvent::default() });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// The events as JSON, and the blocks.
    fn told(pieces: Vec<Piece>) -> (Vec<Value>, Value) {
        let (mut blocks, mut events) = (Blocks::default(), Vec::new());
        let mut tell = |event: MessageEvent<'_>| events.push(serde_json::to_value(&event).unwrap());
        for piece in pieces {
            blocks.say(vec![piece], &mut tell);
        }
        blocks.finish(&mut tell);
        (events, serde_json::to_value(blocks.take()).unwrap())
    }

    #[test]
    fn each_block_starts_grows_and_stops() {
        let call = |index, name: &str| Piece::Call { index, id: format!("call_{index}"), name: name.into() };
        let (events, blocks) = told(vec![
            Piece::Reasoning("hm".into()),
            Piece::Text("Let".into()),
            Piece::Text(" me.".into()),
            call(0, "f"),
            Piece::Arguments { index: 0, text: "{\"b\":".into() },
            Piece::Arguments { index: 0, text: "1,\"a\":2}".into() },
            call(1, "g"),
            Piece::Arguments { index: 1, text: "{\"cut".into() },
        ]);
        let short: Vec<_> = events
            .iter()
            .map(|event| {
                format!(
                    "{} {}",
                    event["type"].as_str().unwrap().trim_start_matches("content_block_"),
                    event["index"]
                )
            })
            .collect();
        assert_eq!(
            short,
            [
                "start 0", "delta 0", "stop 0", "start 1", "delta 1", "delta 1", "stop 1", "start 2",
                "delta 2", "delta 2", "stop 2", "start 3", "delta 3", "stop 3"
            ]
        );
        assert_eq!(
            blocks,
            json!([
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Let me."},
                {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {"b": 1, "a": 2}},
                {"type": "tool_use", "id": "toolu_1", "name": "g", "input": {}},
            ])
        );
        assert_eq!(
            events[7]["content_block"],
            json!({"type": "tool_use", "id": "toolu_0", "name": "f", "input": {}})
        );
        assert_eq!(events[8]["delta"], json!({"type": "input_json_delta", "partial_json": "{\"b\":"}));
    }

    #[test]
    fn nothing_is_an_empty_text() {
        let (events, blocks) = told(Vec::new());
        assert_eq!((events.len(), blocks), (2, json!([{"type": "text", "text": ""}])));
    }
}
