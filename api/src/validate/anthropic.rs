//! Anthropic's requests to chat requests.

use serde_json::{Map, Value as Json, json};

use super::{ChatJob, Names, chat};
use crate::{
    anthropic::{Block, MessagesRequest, Tool, ToolChoice},
    app::{Model, ServerConfig},
    error::{ApiError, shorten},
    openai::{
        Stop, TextOr,
        chat::{ChatMessage, ChatRequest, Content, ContentPart, FunctionCall, ToolCall},
    },
};

/// What chat requests call these fields.
const FIELDS: &[(&str, &str)] = &[
    ("stop", "stop_sequences"),
    ("tool_choice.function", "tool_choice"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
];

/// A checked request. Those that are only counted need no `max_tokens`.
pub(crate) fn anthropic(
    request: MessagesRequest,
    model: &Model,
    config: &ServerConfig,
) -> Result<ChatJob, ApiError> {
    let (request, names) = convert(request)?;
    let mut job = chat(request, model, config).map_err(|error| names.tell(error))?;
    job.form = job.form.map(|form| form.renamed(&names));
    Ok(job)
}

/// The chat request, and the names of fields.
fn convert(request: MessagesRequest) -> Result<(ChatRequest, Names), ApiError> {
    let response_format = match request.output_config.and_then(|output| output.format) {
        Some(format) => {
            let format = response_format(&format)?;
            let format = serde_json::from_value(format);
            Some(format.map_err(|error| ApiError::invalid("output_config.format", error))?)
        }
        None => None,
    };
    let thinks = match request.thinking.as_ref().map(|thinking| thinking.r#type.as_str()) {
        Some("enabled") => Some(true),
        Some("disabled") => Some(false),
        _ => None,
    };
    let mut conversation = Conversation::default();
    if let Some(system) = request.system {
        let text = texts(system, "system")?;
        conversation.say("system", "system", text);
    }
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages", "it must hold at least one message"));
    }
    for (i, message) in request.messages.into_iter().enumerate() {
        let origin = format!("messages[{i}]");
        conversation.add(&message.role, &origin, message.content)?;
    }
    let Conversation { messages, origins } = conversation;
    if messages.last().is_some_and(|last| last.role == "assistant") {
        return Err(ApiError::invalid(
            "messages",
            "the last one is the assistant's, and answers cannot be prefilled; it must be the user's",
        ));
    }
    let parallel =
        request.tool_choice.as_ref().and_then(|choice| choice.disable_parallel_tool_use).map(|no| !no);
    let chat = ChatRequest {
        messages,
        max_tokens: request.max_tokens,
        max_wait_ms: request.max_wait_ms,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        seed: request.seed,
        stop: request.stop_sequences.map(Stop),
        stream: request.stream,
        tools: request.tools.map(tools).transpose()?,
        tool_choice: request.tool_choice.map(tool_choice).transpose()?,
        parallel_tool_calls: parallel,
        response_format,
        chat_template_kwargs: thinks.map(|yes| Map::from_iter([("enable_thinking".to_owned(), yes.into())])),
        ..ChatRequest::default()
    };
    Ok((chat, Names::new(FIELDS, "input_schema", origins)))
}

/// `output_config.format` in a chat request's words.
fn response_format(format: &Json) -> Result<Json, ApiError> {
    if format.get("type").and_then(Json::as_str) != Some("json_schema") {
        return Err(ApiError::invalid("output_config.format.type", "it must be `json_schema`"));
    }
    let schema = format.get("schema").filter(|schema| schema.is_object());
    let schema =
        schema.ok_or_else(|| ApiError::invalid("output_config.format.schema", "it must be an object"))?;
    Ok(json!({"type": "json_schema", "json_schema": {"name": "output", "strict": true, "schema": schema}}))
}

/// The functions in a chat request's words.
fn tools(tools: Vec<Tool>) -> Result<Vec<Json>, ApiError> {
    let one = |(i, tool): (usize, Tool)| {
        if let Some(kind) = tool.r#type.filter(|kind| kind != "custom") {
            return Err(ApiError::invalid(
                format!("tools[{i}].type"),
                format!("{:?} is not supported; only `custom` is", shorten(&kind)),
            ));
        }
        let schema = tool.input_schema.filter(Json::is_object);
        let schema = schema
            .ok_or_else(|| ApiError::invalid(format!("tools[{i}].input_schema"), "it must be an object"))?;
        let mut function = Map::from_iter([("name".to_owned(), tool.name.into())]);
        function.extend(tool.description.map(|text| ("description".to_owned(), text.into())));
        function.insert("parameters".to_owned(), schema);
        function.extend(tool.strict.map(|strict| ("strict".to_owned(), strict.into())));
        Ok(json!({"type": "function", "function": function}))
    };
    tools.into_iter().enumerate().map(one).collect()
}

/// The choice in a chat request's words.
fn tool_choice(choice: ToolChoice) -> Result<Json, ApiError> {
    match choice.r#type.as_str() {
        "auto" | "none" => Ok(choice.r#type.into()),
        "any" => Ok("required".into()),
        "tool" => {
            let name =
                choice.name.ok_or_else(|| ApiError::invalid("tool_choice.name", "this field is required"))?;
            Ok(json!({"type": "function", "function": {"name": name}}))
        }
        other => Err(ApiError::invalid(
            "tool_choice.type",
            format!("{:?} is unknown; it must be auto, any, tool or none", shorten(other)),
        )),
    }
}

/// Turns, as they become messages.
#[derive(Default)]
struct Conversation {
    messages: Vec<ChatMessage>,
    /// Where each message came from.
    origins: Vec<String>,
}

impl Conversation {
    fn add(&mut self, role: &str, origin: &str, content: TextOr<Block>) -> Result<(), ApiError> {
        if !["user", "assistant", "system"].contains(&role) {
            return Err(ApiError::invalid(
                format!("{origin}.role"),
                format!("{:?} is unknown; it must be user, assistant or system", shorten(role)),
            ));
        }
        let blocks = match content {
            TextOr::Text(text) => {
                self.say(role, origin, vec![text]);
                return Ok(());
            }
            TextOr::Parts(blocks) => blocks,
        };
        if blocks.is_empty() {
            self.say(role, origin, Vec::new());
        }
        for (j, block) in blocks.into_iter().enumerate() {
            self.block(role, origin, format!("{origin}.content[{j}]"), block)?;
        }
        Ok(())
    }

    fn block(&mut self, role: &str, origin: &str, place: String, block: Block) -> Result<(), ApiError> {
        let missing = |field: &str| ApiError::invalid(format!("{place}.{field}"), "this field is required");
        match (block.r#type.as_str(), role) {
            ("text", _) => {
                let text = block.text.ok_or_else(|| missing("text"))?;
                self.say(role, origin, vec![text]);
            }
            ("tool_use", "assistant") => {
                let id = Some(block.id.ok_or_else(|| missing("id"))?);
                let name = block.name.ok_or_else(|| missing("name"))?;
                let arguments = Some(block.input.ok_or_else(|| missing("input"))?);
                let call = ToolCall {
                    id,
                    r#type: Some("function".into()),
                    function: FunctionCall { name, arguments },
                };
                self.turn(role, origin).tool_calls.get_or_insert_default().push(call);
            }
            ("tool_result", "user") => {
                let id = block.tool_use_id.ok_or_else(|| missing("tool_use_id"))?;
                let content = block.content.unwrap_or(TextOr::Parts(Vec::new()));
                let texts = texts(content, &format!("{place}.content"))?;
                self.origins.push(place);
                self.messages.push(ChatMessage {
                    role: "tool".into(),
                    content: Some(Content::Text(texts.join("\n"))),
                    tool_call_id: Some(id),
                    ..ChatMessage::default()
                });
            }
            ("thinking", "assistant") => {
                let thoughts = block.thinking.ok_or_else(|| missing("thinking"))?;
                self.turn(role, origin).reasoning_content.get_or_insert_default().push_str(&thoughts);
            }
            // Nothing a model here could read.
            ("redacted_thinking", "assistant") => {}
            (kind @ ("tool_use" | "thinking" | "redacted_thinking" | "tool_result"), _) => {
                return Err(ApiError::invalid(
                    format!("{place}.type"),
                    format!("`{kind}` is not a block of the role {role}"),
                ));
            }
            (kind, _) => return Err(unsupported(&place, kind)),
        }
        Ok(())
    }

    fn say(&mut self, role: &str, origin: &str, texts: Vec<String>) {
        let part = |text| ContentPart { r#type: "text".into(), text: Some(text), refusal: None };
        let turn = self.turn(role, origin);
        match turn.content.get_or_insert_with(|| Content::Parts(Vec::new())) {
            Content::Parts(parts) => parts.extend(texts.into_iter().map(part)),
            Content::Text(text) => *text += &texts.concat(),
        }
    }

    /// The last message when it is of this role, else a new one.
    fn turn(&mut self, role: &str, origin: &str) -> &mut ChatMessage {
        if self.messages.last().is_none_or(|last| last.role != role) {
            self.origins.push(origin.to_owned());
            self.messages.push(ChatMessage { role: role.to_owned(), ..ChatMessage::default() });
        }
        let last = self.messages.len() - 1;
        &mut self.messages[last]
    }
}

fn unsupported(place: &str, kind: &str) -> ApiError {
    ApiError::invalid(place, format!("blocks of type {:?} are not supported", shorten(kind)))
}

/// The texts of blocks that may be nothing else.
fn texts(content: TextOr<Block>, place: &str) -> Result<Vec<String>, ApiError> {
    let blocks = match content {
        TextOr::Text(text) => return Ok(vec![text]),
        TextOr::Parts(blocks) => blocks,
    };
    let one = |(j, block): (usize, Block)| match (block.r#type.as_str(), block.text) {
        ("text", Some(text)) => Ok(text),
        ("text", None) => Err(ApiError::invalid(format!("{place}[{j}].text"), "this field is required")),
        (kind, _) => Err(unsupported(&format!("{place}[{j}]"), kind)),
    };
    blocks.into_iter().enumerate().map(one).collect()
}

#[cfg(test)]
#[path = "anthropic_tests.rs"]
mod tests;
