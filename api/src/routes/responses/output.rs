//! What a model says, as items, and the events that tell of it.

use crate::{
    openai::{
        chat::ChatTokenLogprob,
        responses::answer::{OutputItem, OutputText, Part, ReasoningText, ResponseEvent, Status},
    },
    routes::new_item_id,
    tools::Piece,
};

/// The items so far. Whole and streamed answers are made here alike; those that are whole tell nobody.
#[derive(Debug, Default)]
pub(super) struct Output {
    items: Vec<OutputItem>,
    /// The last item may yet grow.
    open: bool,
}

/// Hears of what happens; numbers it.
pub(super) type Tell<'t> = &'t mut dyn FnMut(ResponseEvent<'_>);

impl Output {
    /// Adds pieces; `logprobs` are of the text among them.
    pub(super) fn say(&mut self, pieces: Vec<Piece>, logprobs: Vec<ChatTokenLogprob>, tell: Tell<'_>) {
        let mut logprobs = Some(logprobs);
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.text(&text, logprobs.take().unwrap_or_default(), tell),
                Piece::Reasoning(text) => self.reasoning(&text, tell),
                Piece::Call { id: call_id, name, .. } => {
                    let (id, status, arguments) = (new_item_id("fc"), Status::InProgress, String::new());
                    self.begin(OutputItem::FunctionCall { id, status, call_id, name, arguments }, tell);
                }
                Piece::Arguments { text, .. } => self.arguments(&text, tell),
            }
        }
        // Tokens that print nothing.
        if let Some(rest) = logprobs.filter(|rest| !rest.is_empty()) {
            self.text("", rest, tell);
        }
    }

    /// The end. An answer of nothing is an empty text.
    pub(super) fn finish(&mut self, complete: bool, tell: Tell<'_>) {
        if self.items.is_empty() {
            self.begin_text(tell);
        }
        self.end(if complete { Status::Completed } else { Status::Incomplete }, tell);
    }

    /// The items, once there are no more.
    pub(super) fn take_items(&mut self) -> Vec<OutputItem> {
        std::mem::take(&mut self.items)
    }

    fn text(&mut self, new: &str, new_logprobs: Vec<ChatTokenLogprob>, tell: Tell<'_>) {
        if !(self.open && matches!(self.items.last(), Some(OutputItem::Message { .. }))) {
            self.begin_text(tell);
        }
        let r#type = "response.output_text.delta";
        tell(ResponseEvent {
            r#type,
            delta: Some(new),
            logprobs: Some(&new_logprobs),
            ..self.place(IN_PART)
        });
        if let Some(OutputItem::Message { content, .. }) = self.items.last_mut() {
            content[0].text.push_str(new);
            content[0].logprobs.extend(new_logprobs);
        }
    }

    fn reasoning(&mut self, new: &str, tell: Tell<'_>) {
        if !(self.open && matches!(self.items.last(), Some(OutputItem::Reasoning { .. }))) {
            let (id, status) = (new_item_id("rs"), Status::InProgress);
            self.begin(OutputItem::Reasoning { id, summary: [], content: Vec::new(), status }, tell);
            if let Some(OutputItem::Reasoning { content, .. }) = self.items.last_mut() {
                content.push(ReasoningText { r#type: "reasoning_text", ..ReasoningText::default() });
            }
            self.part("response.content_part.added", tell);
        }
        let r#type = "response.reasoning_text.delta";
        tell(ResponseEvent { r#type, delta: Some(new), ..self.place(IN_PART) });
        if let Some(OutputItem::Reasoning { content, .. }) = self.items.last_mut() {
            content[0].text.push_str(new);
        }
    }

    fn arguments(&mut self, new: &str, tell: Tell<'_>) {
        let r#type = "response.function_call_arguments.delta";
        tell(ResponseEvent { r#type, delta: Some(new), ..self.place(None) });
        if let Some(OutputItem::FunctionCall { arguments, .. }) = self.items.last_mut() {
            arguments.push_str(new);
        }
    }

    fn begin_text(&mut self, tell: Tell<'_>) {
        let (id, status, role) = (new_item_id("msg"), Status::InProgress, "assistant");
        self.begin(OutputItem::Message { id, status, role, content: Vec::new() }, tell);
        if let Some(OutputItem::Message { content, .. }) = self.items.last_mut() {
            content.push(OutputText { r#type: "output_text", ..OutputText::default() });
        }
        self.part("response.content_part.added", tell);
    }

    /// Ends the item before and adds one.
    fn begin(&mut self, item: OutputItem, tell: Tell<'_>) {
        self.end(Status::Completed, tell);
        self.open = true;
        self.items.push(item);
        self.item("response.output_item.added", tell);
    }

    /// Ends the last item, if it is not ended yet.
    fn end(&mut self, reached: Status, tell: Tell<'_>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let Some(item) = self.items.last_mut() else { return };
        let (OutputItem::Message { status, .. }
        | OutputItem::Reasoning { status, .. }
        | OutputItem::FunctionCall { status, .. }) = item;
        *status = reached;
        match self.items.last() {
            Some(OutputItem::Message { content, .. }) => tell(ResponseEvent {
                r#type: "response.output_text.done",
                text: Some(&content[0].text),
                logprobs: Some(&content[0].logprobs),
                ..self.place(IN_PART)
            }),
            Some(OutputItem::Reasoning { content, .. }) => tell(ResponseEvent {
                r#type: "response.reasoning_text.done",
                text: Some(&content[0].text),
                ..self.place(IN_PART)
            }),
            Some(OutputItem::FunctionCall { name, arguments, .. }) => tell(ResponseEvent {
                r#type: "response.function_call_arguments.done",
                name: Some(name),
                arguments: Some(arguments),
                ..self.place(None)
            }),
            None => {}
        }
        self.part("response.content_part.done", tell);
        self.item("response.output_item.done", tell);
    }

    /// An event about the last item.
    fn item(&self, r#type: &'static str, tell: Tell<'_>) {
        let output_index = Some(self.items.len() - 1);
        let item = self.items.last();
        tell(ResponseEvent { r#type, output_index, item, ..ResponseEvent::default() });
    }

    /// An event about the last item's part, if it has one.
    fn part(&self, r#type: &'static str, tell: Tell<'_>) {
        let part = match self.items.last() {
            Some(OutputItem::Message { content, .. }) => content.first().map(Part::Text),
            Some(OutputItem::Reasoning { content, .. }) => content.first().map(Part::Reasoning),
            Some(OutputItem::FunctionCall { .. }) | None => None,
        };
        if part.is_some() {
            tell(ResponseEvent { r#type, part, ..self.place(IN_PART) });
        }
    }

    /// Where something happens: in the last item.
    fn place(&self, content_index: Option<usize>) -> ResponseEvent<'_> {
        let item_id = self.items.last().map(|item| {
            let (OutputItem::Message { id, .. }
            | OutputItem::Reasoning { id, .. }
            | OutputItem::FunctionCall { id, .. }) = item;
            id.as_str()
        });
        let output_index = self.items.len().checked_sub(1);
        ResponseEvent { output_index, item_id, content_index, ..ResponseEvent::default() }
    }
}

/// Items of text have one part.
const IN_PART: Option<usize> = Some(0);

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pieces() -> Vec<Piece> {
        let call = |index, name: &str| Piece::Call { index, id: format!("call_{index}"), name: name.into() };
        vec![
            Piece::Reasoning("hm".into()),
            Piece::Reasoning(" so".into()),
            Piece::Text("Let".into()),
            Piece::Text(" me.".into()),
            call(0, "f"),
            Piece::Arguments { index: 0, text: "{\"a\":".into() },
            Piece::Arguments { index: 0, text: "1}".into() },
            call(1, "g"),
            Piece::Arguments { index: 1, text: "{".into() },
        ]
    }

    /// The events as JSON, and the items.
    fn told(pieces: Vec<Piece>, complete: bool) -> (Vec<Value>, Vec<OutputItem>) {
        let (mut output, mut events) = (Output::default(), Vec::new());
        let mut tell = |event: ResponseEvent<'_>| events.push(serde_json::to_value(&event).unwrap());
        for piece in pieces {
            output.say(vec![piece], Vec::new(), &mut tell);
        }
        output.finish(complete, &mut tell);
        (events, output.take_items())
    }

    #[test]
    fn each_item_opens_grows_and_closes() {
        let (events, items) = told(pieces(), false);
        let types: Vec<_> =
            events.iter().map(|e| e["type"].as_str().unwrap().trim_start_matches("response.")).collect();
        assert_eq!(
            types,
            [
                "output_item.added",
                "content_part.added",
                "reasoning_text.delta",
                "reasoning_text.delta",
                "reasoning_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "content_part.added",
                "output_text.delta",
                "output_text.delta",
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
                "output_item.added",
                "function_call_arguments.delta",
                "function_call_arguments.done",
                "output_item.done",
            ]
        );
        let items = serde_json::to_value(&items).unwrap();
        let done: Vec<&Value> =
            events.iter().filter(|e| e["type"] == "response.output_item.done").map(|e| &e["item"]).collect();
        assert_eq!(items.as_array().unwrap().iter().collect::<Vec<_>>(), done);
        assert_eq!(items[0]["content"], json!([{"type": "reasoning_text", "text": "hm so"}]));
        assert_eq!(items[1]["content"][0]["text"], "Let me.");
        assert_eq!((&items[2]["arguments"], &items[2]["call_id"]), (&json!("{\"a\":1}"), &json!("call_0")));
        let states: Vec<_> = (0..4).map(|i| items[i]["status"].as_str().unwrap()).collect();
        assert_eq!(states, ["completed", "completed", "completed", "incomplete"]);
        // An item's events name it.
        for event in &events {
            if let Some(id) = event.get("item_id") {
                assert_eq!(id, &items[event["output_index"].as_u64().unwrap() as usize]["id"]);
            }
        }
    }

    #[test]
    fn nothing_is_an_empty_text() {
        let (events, items) = told(Vec::new(), true);
        assert_eq!(events.len(), 5);
        let items = serde_json::to_value(&items).unwrap();
        let text = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        assert_eq!((&items[0]["content"], &items[0]["status"]), (&json!([text]), &json!("completed")));
    }
}
