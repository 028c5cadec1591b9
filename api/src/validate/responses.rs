//! Responses requests: to chat requests, and what the answer repeats of them.

use serde_json::{Map, Value as Json, json};

use super::{ChatJob, Names, chat};
use crate::{
    app::{Model, ServerConfig},
    error::{ApiError, shorten},
    openai::{
        TextOr,
        chat::{ChatMessage, ChatRequest, Content, ContentPart, FunctionCall, ToolCall},
        responses::{InputItem, Reasoning, ResponsesRequest, TextConfig, answer::Asked},
    },
};

/// What may be included: of most there is never anything.
const INCLUDABLE: [&str; 8] = [
    LOGPROBS,
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
];
const LOGPROBS: &str = "message.output_text.logprobs";

/// What chat requests call these fields.
const FIELDS: &[(&str, &str)] = &[
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("tool_choice.function", "tool_choice"),
    ("tool_choice.allowed_tools", "tool_choice"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
];

/// A checked request, and what its answer repeats.
pub(crate) fn responses(
    request: ResponsesRequest,
    model: &Model,
    config: &ServerConfig,
) -> Result<(ChatJob, Asked), ApiError> {
    refuse_what_is_stored(&request)?;
    let (request, asked, names) = convert(request)?;
    let mut job = chat(request, model, config).map_err(|error| names.tell(error))?;
    job.form = job.form.map(|form| form.renamed(&names));
    Ok((job, asked))
}

/// Nothing is kept from one request to the next.
fn refuse_what_is_stored(request: &ResponsesRequest) -> Result<(), ApiError> {
    for (param, value) in [
        ("previous_response_id", &request.previous_response_id),
        ("conversation", &request.conversation),
        ("prompt", &request.prompt),
    ] {
        if value.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(ApiError::invalid(
                param,
                "this server stores nothing; send the whole conversation in `input`",
            ));
        }
    }
    if request.background == Some(true) {
        let message =
            "this server stores nothing, so no answer can be fetched later; leave it out or send false";
        return Err(ApiError::invalid("background", message));
    }
    match request.truncation.as_deref() {
        None | Some("disabled") => Ok(()),
        Some(other) => Err(ApiError::invalid(
            "truncation",
            format!("{:?} is not supported; what is too long is refused (`disabled`)", shorten(other)),
        )),
    }
}

/// The chat request, what the answer repeats, and the names of fields.
fn convert(request: ResponsesRequest) -> Result<(ChatRequest, Asked, Names), ApiError> {
    let logprobs = include(request.include.as_deref())? || request.top_logprobs.is_some_and(|top| top > 0);
    let tools = request.tools.as_deref().map(tools).transpose()?;
    let tool_choice = request.tool_choice.as_ref().map(tool_choice);
    let response_format = request.text.as_ref().and_then(|text| text.format.as_ref()).map(format);
    let response_format = match response_format.transpose()? {
        Some(format) => {
            Some(serde_json::from_value(format).map_err(|error| ApiError::invalid("text.format", error))?)
        }
        None => None,
    };
    let effort = request.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref());
    let without_thoughts =
        (effort == Some("none")).then(|| Map::from_iter([("enable_thinking".into(), false.into())]));

    let mut conversation = Conversation::default();
    if let Some(text) = &request.instructions {
        conversation.say("instructions".into(), "system", Some(Content::Text(text.clone())));
    }
    match request.input {
        TextOr::Text(text) => conversation.say("input".into(), "user", Some(Content::Text(text))),
        TextOr::Parts(items) => {
            if items.is_empty() {
                return Err(ApiError::invalid("input", "it must hold at least one item"));
            }
            for (i, item) in items.into_iter().enumerate() {
                conversation.add(format!("input[{i}]"), item)?;
            }
        }
    }
    let (messages, origins) = conversation.finish();

    let asked = Asked {
        background: false,
        previous_response_id: None,
        store: false,
        instructions: request.instructions,
        max_output_tokens: request.max_output_tokens,
        max_tool_calls: request.max_tool_calls,
        metadata: request.metadata.unwrap_or_default(),
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        prompt_cache_key: request.prompt_cache_key,
        reasoning: request.reasoning.unwrap_or(Reasoning { effort: None, summary: None }),
        safety_identifier: request.safety_identifier,
        service_tier: "default",
        temperature: request.temperature.unwrap_or(1.0),
        text: repeated(request.text),
        tool_choice: request.tool_choice.filter(|choice| !choice.is_null()).unwrap_or_else(|| "auto".into()),
        tools: request.tools.unwrap_or_default(),
        top_logprobs: request.top_logprobs.unwrap_or(0),
        top_p: request.top_p.unwrap_or(1.0),
        truncation: "disabled",
        user: request.user,
    };
    let chat = ChatRequest {
        messages,
        max_completion_tokens: request.max_output_tokens,
        max_wait_ms: request.max_wait_ms,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        seed: request.seed,
        stream: request.stream,
        logprobs: logprobs.then_some(true),
        top_logprobs: request.top_logprobs,
        tools,
        tool_choice,
        parallel_tool_calls: request.parallel_tool_calls,
        response_format,
        chat_template_kwargs: without_thoughts,
        ..ChatRequest::default()
    };
    Ok((chat, asked, Names::new(FIELDS, "parameters", origins)))
}

/// Whether log-probabilities are to be included.
fn include(include: Option<&[String]>) -> Result<bool, ApiError> {
    let include = include.unwrap_or_default();
    for (i, what) in include.iter().enumerate() {
        if !INCLUDABLE.contains(&what.as_str()) {
            return Err(ApiError::invalid(
                format!("include[{i}]"),
                format!("{:?} is unknown; it must be one of {}", shorten(what), INCLUDABLE.join(", ")),
            ));
        }
    }
    Ok(include.iter().any(|what| what == LOGPROBS))
}

/// The text's configuration as the answer repeats it.
fn repeated(text: Option<TextConfig>) -> TextConfig {
    let (format, verbosity) = text.map_or((None, None), |text| (text.format, text.verbosity));
    TextConfig {
        format: Some(format.filter(|format| !format.is_null()).unwrap_or_else(|| json!({"type": "text"}))),
        verbosity: Some(verbosity.unwrap_or_else(|| "medium".to_owned())),
    }
}

/// `text.format` as `response_format`: a schema's fields lie a level deeper there.
fn format(format: &Json) -> Result<Json, ApiError> {
    let Json::Object(fields) = format else {
        return Err(ApiError::invalid("text.format", "it must be an object"));
    };
    match fields.get("type") {
        Some(Json::String(kind)) if kind == "json_schema" => {
            Ok(json!({"type": "json_schema", "json_schema": without_type(fields)}))
        }
        Some(Json::String(_)) => Ok(format.clone()),
        Some(_) => Err(ApiError::invalid("text.format.type", "it must be a string")),
        None => Err(ApiError::invalid("text.format.type", "this field is required")),
    }
}

/// The fields but `type` and those that are null, in their order.
fn without_type(fields: &Map<String, Json>) -> Map<String, Json> {
    let others = fields.iter().filter(|(name, value)| *name != "type" && !value.is_null());
    others.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// The functions in a chat request's words.
fn tools(tools: &[Json]) -> Result<Vec<Json>, ApiError> {
    let one = |(i, tool): (usize, &Json)| {
        let kind = tool.get("type").and_then(Json::as_str);
        if let (Some("function"), Json::Object(fields)) = (kind, tool) {
            return Ok(json!({"type": "function", "function": without_type(fields)}));
        }
        let kind = kind.map_or("it".to_owned(), |kind| format!("{:?}", shorten(kind)));
        let what = format!("{kind} is not supported; only `function` is");
        Err(ApiError::invalid(format!("tools[{i}].type"), what))
    };
    tools.iter().enumerate().map(one).collect()
}

/// The choice in a chat request's words: names lie a level deeper there.
fn tool_choice(choice: &Json) -> Json {
    let named = |tool: &Json| json!({"type": "function", "function": {"name": tool["name"]}});
    match choice["type"].as_str() {
        Some("function") => named(choice),
        Some("allowed_tools") => {
            let tools: Option<Vec<_>> =
                choice["tools"].as_array().map(|tools| tools.iter().map(named).collect());
            json!({"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": tools}})
        }
        _ => choice.clone(),
    }
}

/// Items, as they become messages.
#[derive(Default)]
struct Conversation {
    messages: Vec<ChatMessage>,
    /// Where each message came from.
    origins: Vec<String>,
    /// What the assistant thought before what comes next.
    thoughts: Option<String>,
}

impl Conversation {
    fn add(&mut self, origin: String, item: InputItem) -> Result<(), ApiError> {
        let missing = |field: &str| ApiError::invalid(format!("{origin}.{field}"), "this field is required");
        match item.r#type.as_deref() {
            None | Some("message") => {
                let role = item.role.as_deref().ok_or_else(|| missing("role"))?;
                if !["user", "assistant", "system", "developer"].contains(&role) {
                    return Err(ApiError::invalid(
                        format!("{origin}.role"),
                        format!(
                            "{:?} is unknown; it must be user, assistant, system or developer",
                            shorten(role)
                        ),
                    ));
                }
                // As in chat, what was said may be nothing.
                let kinds = ["input_text", "output_text", "text"];
                let content =
                    item.content.map(|content| texts(content, &format!("{origin}.content"), &kinds));
                self.say(origin, role, content.transpose()?);
            }
            Some("function_call") => {
                let name = item.name.ok_or_else(|| missing("name"))?;
                let id = Some(item.call_id.ok_or_else(|| missing("call_id"))?);
                let function = FunctionCall { name, arguments: item.arguments };
                self.call(origin, ToolCall { id, r#type: Some("function".into()), function });
            }
            Some("function_call_output") => {
                let id = item.call_id.ok_or_else(|| missing("call_id"))?;
                let output = item.output.ok_or_else(|| missing("output"))?;
                let output =
                    texts(output, &format!("{origin}.output"), &["input_text", "output_text", "text"])?;
                self.say(origin, "tool", Some(output));
                if let Some(last) = self.messages.last_mut() {
                    last.tool_call_id = Some(id);
                }
            }
            Some("reasoning") => {
                // Summaries and what is encrypted are nothing a model here could read.
                let content = item.content.unwrap_or(Content::Parts(Vec::new()));
                match texts(content, &format!("{origin}.content"), &["reasoning_text"])? {
                    Content::Text(text) => self.think(&text),
                    Content::Parts(parts) => {
                        parts.iter().filter_map(|p| p.text.as_ref()).for_each(|t| self.think(t));
                    }
                }
            }
            Some("item_reference") => {
                let message = "this server stores nothing; send the item itself";
                return Err(ApiError::invalid(format!("{origin}.type"), message));
            }
            Some(other) => {
                return Err(ApiError::invalid(
                    format!("{origin}.type"),
                    format!(
                        "{:?} is not supported; it must be message, function_call, function_call_output or reasoning",
                        shorten(other)
                    ),
                ));
            }
        }
        Ok(())
    }

    fn think(&mut self, text: &str) {
        self.thoughts.get_or_insert_default().push_str(text);
    }

    fn say(&mut self, origin: String, role: &str, content: Option<Content>) {
        // Thoughts that no answer followed were in vain.
        let thoughts = self.thoughts.take().filter(|_| role == "assistant");
        self.origins.push(origin);
        self.messages.push(ChatMessage {
            role: role.to_owned(),
            content,
            reasoning_content: thoughts,
            ..ChatMessage::default()
        });
    }

    /// A call belongs to what the assistant said or called before it.
    fn call(&mut self, origin: String, call: ToolCall) {
        let follows =
            self.messages.last().is_some_and(|last| last.role == "assistant") && self.thoughts.is_none();
        if !follows {
            self.say(origin, "assistant", None);
        }
        if let Some(last) = self.messages.last_mut() {
            last.tool_calls.get_or_insert_default().push(call);
        }
    }

    fn finish(self) -> (Vec<ChatMessage>, Vec<String>) {
        (self.messages, self.origins)
    }
}

/// Parts of the types `kinds` as a chat message has them.
fn texts(content: Content, param: &str, kinds: &[&str]) -> Result<Content, ApiError> {
    let Content::Parts(parts) = content else { return Ok(content) };
    let one = |(i, part): (usize, ContentPart)| match (part.r#type.as_str(), part.text, part.refusal) {
        (kind, Some(text), _) if kinds.contains(&kind) => Ok(text),
        ("refusal", _, Some(text)) => Ok(text),
        (kind, None, _) if kinds.contains(&kind) => {
            Err(ApiError::invalid(format!("{param}[{i}].text"), "this field is required"))
        }
        (kind, ..) => Err(ApiError::invalid(
            format!("{param}[{i}]"),
            format!("parts of type {:?} are not supported; only {} is", shorten(kind), kinds[0]),
        )),
    };
    let text = |text| ContentPart { r#type: "text".into(), text: Some(text), refusal: None };
    let parts: Result<Vec<_>, _> = parts.into_iter().enumerate().map(|part| one(part).map(text)).collect();
    parts.map(Content::Parts)
}

#[cfg(test)]
#[path = "responses_tests.rs"]
mod tests;
