//! Chat templates in a Hugging-Face-compatible minijinja environment.

use minijinja::{Environment, Error, ErrorKind, Value};
use serde_json::Value as Json;

use super::{TextError, Tokenizer, jinja, messages, pretokenizer::Pre};
use crate::gguf::{self, Metadata};

/// `--prompt-format`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptFormat {
    /// The model's own template, else one this engine knows for its tokenizer.
    #[default]
    Auto,
    /// No template: text as it is.
    Raw,
    /// `templates/llama3.jinja`.
    Llama3Chat,
    /// `templates/chatml.jinja`.
    QwenChat,
    /// The model's own template, or an error.
    Template,
}

const LLAMA3: &str = include_str!("../../../templates/llama3.jinja");
const CHATML: &str = include_str!("../../../templates/chatml.jinja");

const TEMPLATE: &str = "tokenizer.chat_template";
/// Some files carry a second template for requests with tools.
const TOOL_TEMPLATE: &str = "tokenizer.chat_template.tool_use";

/// What only a rendered prompt holds, in the families that have it.
const MARKERS: [&str; 14] = [
    "<|im_start|>",
    "<|start_header_id|>",
    "<|header_start|>",
    "<start_of_turn>",
    "<|turn>",
    "[INST]",
    "<|user|>",
    "<|assistant|>",
    "<|start|>",
    "<|message|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|start_of_role|>",
    "<｜User｜>",
    "<｜Assistant｜>",
];

/// A compiled chat template with the model's `bos_token` and `eos_token`.
#[derive(Debug)]
pub struct ChatTemplate {
    default: Compiled,
    with_tools: Option<Compiled>,
    bos_token: String,
    eos_token: String,
}

#[derive(Debug)]
struct Compiled {
    environment: Environment<'static>,
    source: String,
}

impl Compiled {
    fn new(source: &str) -> Result<Self, TextError> {
        let environment =
            jinja::environment(source).map_err(|error| TextError::Template(one_line(&error)))?;
        Ok(Self { environment, source: source.to_owned() })
    }
}

impl ChatTemplate {
    /// The template that `format` chooses for this model; `None` for `Raw`. An error says what to choose.
    ///
    /// `Auto` takes the model's own template; without one, Llama 3's for its tokenizer and `ChatML` for
    /// vocabularies with `<|im_start|>`. A template that does not compile is an error, never replaced.
    pub fn choose(
        format: PromptFormat,
        metadata: &Metadata,
        tokenizer: &Tokenizer,
    ) -> Result<Option<Self>, TextError> {
        let own = own_source(metadata)?;
        let source = match format {
            PromptFormat::Raw => return Ok(None),
            PromptFormat::Llama3Chat => LLAMA3,
            PromptFormat::QwenChat => CHATML,
            PromptFormat::Template => {
                own.ok_or_else(|| no_template("choose raw, llama3-chat or qwen-chat"))?
            }
            PromptFormat::Auto => match own {
                Some(own) => own,
                None => guess(metadata)?,
            },
        };
        let is_own = own == Some(source);
        let with_tools = match metadata.str(TOOL_TEMPLATE)? {
            Some(tools) if is_own => Some(Compiled::new(tools)?),
            _ => None,
        };
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id).to_owned()).unwrap_or_default();
        Ok(Some(Self {
            default: Compiled::new(source)?,
            with_tools,
            bos_token: text(tokenizer.bos()),
            eos_token: text(tokenizer.eos()),
        }))
    }

    /// A template that is not the model's, for tests and tools.
    pub fn from_source(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TextError> {
        Ok(Self {
            default: Compiled::new(source)?,
            with_tools: None,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// Renders `messages` (objects with `role`, `content`, `tool_calls`, … as OpenAI has them) and
    /// `tools`; `extra` holds further template variables (`chat_template_kwargs`).
    ///
    /// What clients may write in several ways is brought into the one that templates expect: text parts
    /// are joined, `arguments` strings that hold a JSON object are parsed (keys stay in order), empty
    /// `tool_calls` go, `developer` is `system` where the template does not know it, and absent content
    /// is empty, unless the message calls tools and the template tests content for being none.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&[Json]>,
        add_generation_prompt: bool,
        extra: Option<&serde_json::Map<String, Json>>,
    ) -> Result<String, TextError> {
        let tools = tools.filter(|tools| !tools.is_empty());
        let compiled = self.with_tools.as_ref().filter(|_| tools.is_some()).unwrap_or(&self.default);
        let mut values = Vec::with_capacity(messages.len());
        for message in messages {
            let message = messages::normalised(message, &compiled.source).map_err(TextError::Rejected)?;
            values.push(jinja::value(&message));
        }
        let tools = tools.map(|tools| tools.iter().map(jinja::value).collect::<Vec<_>>());
        // As Hugging Face calls templates: what was not given is none, not undefined.
        let mut context = vec![
            ("messages", Value::from(values)),
            ("tools", Value::from(tools)),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
        ];
        context.extend(extra.into_iter().flatten().map(|(key, json)| (key.as_str(), jinja::value(json))));
        let template = compiled.environment.get_template(jinja::NAME);
        template
            .and_then(|template| template.render(Value::from_pairs(context)))
            .map_err(|error| refusal(&error))
    }

    /// True when `prompt` already holds the template's markers (`<|im_start|>`, `<|start_header_id|>`, …).
    pub fn is_rendered(&self, prompt: &str) -> bool {
        MARKERS.iter().any(|marker| prompt.contains(marker) && self.default.source.contains(marker))
    }

    /// True when the template's text, or that of the one for tools, holds `words`.
    pub fn mentions(&self, words: &str) -> bool {
        let mut sources = self.with_tools.iter().chain([&self.default]).map(|compiled| &compiled.source);
        sources.any(|source| source.contains(words))
    }

    /// True when the template knows the role `developer`.
    pub fn knows_developer(&self) -> bool {
        messages::knows_developer(&self.default.source)
    }
}

/// The model's own template for requests without tools.
fn own_source(metadata: &Metadata) -> Result<Option<&str>, TextError> {
    let source = match metadata.get(TEMPLATE) {
        // A list of one is a template; longer ones do not say which is which.
        Some(gguf::Value::Strings(list)) if list.len() == 1 => Some(list[0].as_str()),
        Some(gguf::Value::Strings(list)) => {
            let what =
                format!("{TEMPLATE} is a list of {}; supported is a string or a list of one", list.len());
            return Err(TextError::Metadata(what));
        }
        _ => metadata.str(TEMPLATE)?,
    };
    let source = match source {
        None => metadata.str("tokenizer.chat_template.default")?,
        some => some,
    };
    Ok(source.filter(|source| !source.trim().is_empty()))
}

/// One of ours, by the vocabulary.
fn guess(metadata: &Metadata) -> Result<&'static str, TextError> {
    let byte_level = metadata.str("tokenizer.ggml.model")? == Some("gpt2");
    let pre = metadata.str("tokenizer.ggml.pre")?.and_then(Pre::named);
    let tokens = metadata.strings("tokenizer.ggml.tokens")?.unwrap_or_default();
    if byte_level && pre == Some(Pre::Llama3) {
        Ok(LLAMA3)
    } else if tokens.iter().any(|token| token == "<|im_start|>") {
        Ok(CHATML)
    } else {
        Err(no_template(
            "and its vocabulary is neither Llama 3's nor ChatML's: choose raw, llama3-chat or qwen-chat",
        ))
    }
}

fn no_template(advice: &str) -> TextError {
    TextError::Metadata(format!("the model has no {TEMPLATE}; {advice} as --prompt-format"))
}

/// What the caller did wrong, in the template's own words where it has some.
fn refusal(error: &Error) -> TextError {
    TextError::Rejected(match error.kind() {
        ErrorKind::OutOfFuel => "rendering takes more work or memory than a chat may".to_owned(),
        _ => jinja::raised(error).map_or_else(|| one_line(error), str::to_owned),
    })
}

fn one_line(error: &Error) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
