//! Chat requests.

use m40llm_engine::GenerateRequest;
use serde_json::Value as Json;

use super::{
    Form, Formats, MAX_TOP_LOGPROBS, Sampling, choices, include_usage, integer, max_tokens, max_wait,
    output::Output, render, seed_of, stop, tools::tools,
};
use crate::{
    app::{Model, ServerConfig},
    error::ApiError,
    openai::chat::ChatRequest,
    tools::Reading,
};

/// A chat request, ready to run.
pub(crate) struct ChatJob {
    /// One for each choice.
    pub(crate) requests: Vec<GenerateRequest>,
    /// What the choices must be, if that matters.
    pub(crate) form: Option<Form>,
    /// Chunks are wanted.
    pub(crate) stream: bool,
    /// And their usage.
    pub(crate) include_usage: bool,
    /// Log-probabilities are wanted.
    pub(crate) logprobs: bool,
    /// How the output is told apart.
    pub(crate) reading: Reading,
}

/// Checks every field, renders the conversation in the server's prompt format and tokenises it.
pub(crate) fn chat(request: ChatRequest, model: &Model, config: &ServerConfig) -> Result<ChatJob, ApiError> {
    let tokenizer = model.engine.tokenizer();
    let sampling = Sampling {
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        min_p: request.min_p,
        presence_penalty: request.presence_penalty,
        frequency_penalty: request.frequency_penalty,
        repetition_penalty: request.repetition_penalty,
        logit_bias: request.logit_bias.as_ref(),
        seed: request.seed,
    }
    .check(tokenizer.vocab_size())?;
    let answer = Formats::from(&request).answer()?;
    let n = choices(request.n)?;
    if n > config.max_queue {
        return Err(ApiError::invalid(
            "n",
            format!("{n} choices are too many; the queue holds {}", config.max_queue),
        ));
    }
    let stream = request.stream.unwrap_or(false);
    let include_usage = include_usage(stream, request.stream_options)?;
    let max_tokens = max_tokens(request.max_tokens, request.max_completion_tokens, 1)?;
    let max_wait = max_wait(request.max_wait_ms)?;
    let stop = stop(request.stop)?;
    let logprobs = logprobs(request.logprobs, request.top_logprobs)?;
    refuse_legacy_functions(request.functions.as_ref(), request.function_call.as_ref())?;
    let tools = tools(request.tools, request.tool_choice.as_ref(), request.parallel_tool_calls)?;

    let template = model.chat_template(config.prompt_format)?;
    let kwargs = request.chat_template_kwargs.as_ref();
    let text = render(request.messages, tools.told.as_deref(), kwargs, template)?;
    let prompt = tokenizer.encode(&text, true, true);
    let output = Output::new(tokenizer, template, &text, &tools, answer)?;

    let requests = (0..n)
        .map(|j| {
            let mut sampling = sampling.clone();
            sampling.seed = seed_of(sampling.seed, j);
            GenerateRequest {
                prompt: prompt.clone(),
                max_tokens,
                sampling,
                stop: stop.clone(),
                printed: output.printed.clone(),
                max_wait,
                logprobs,
                ..GenerateRequest::default()
            }
        })
        .collect();
    let Output { form, reading, .. } = output;
    Ok(ChatJob { requests, form, stream, include_usage, logprobs: logprobs.is_some(), reading })
}

/// The number of alternatives, when log-probabilities are wanted.
fn logprobs(wanted: Option<bool>, top: Option<i64>) -> Result<Option<usize>, ApiError> {
    let top = integer("top_logprobs", top, 0..=MAX_TOP_LOGPROBS)?;
    match (wanted.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
        (false, Some(1..)) => {
            Err(ApiError::invalid("top_logprobs", "it is only allowed with `logprobs: true`"))
        }
        (false, _) => Ok(None),
    }
}

/// The fields that `tools` and `tool_choice` replaced would constrain the output too.
fn refuse_legacy_functions(functions: Option<&Json>, call: Option<&Json>) -> Result<(), ApiError> {
    let given = |value: Option<&Json>| value.is_some_and(|v| !v.is_null());
    if given(functions) {
        return Err(ApiError::invalid("functions", "this old field is not supported; use `tools`"));
    }
    if given(call) {
        return Err(ApiError::invalid("function_call", "this old field is not supported; use `tool_choice`"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn param<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        result.unwrap_err().body().error.param.unwrap()
    }

    #[test]
    fn alternatives_need_logprobs() {
        assert_eq!(logprobs(None, None).unwrap(), None);
        assert_eq!(logprobs(Some(true), None).unwrap(), Some(0));
        assert_eq!(logprobs(Some(true), Some(20)).unwrap(), Some(20));
        assert_eq!(logprobs(Some(false), Some(0)).unwrap(), None);
        assert_eq!(param(logprobs(Some(true), Some(21))), "top_logprobs");
        assert_eq!(param(logprobs(Some(false), Some(2))), "top_logprobs");
    }

    #[test]
    fn legacy_functions_are_refused() {
        assert_eq!(param(refuse_legacy_functions(Some(&json!([])), None)), "functions");
        assert_eq!(param(refuse_legacy_functions(None, Some(&json!("auto")))), "function_call");
        assert!(refuse_legacy_functions(Some(&json!(null)), None).is_ok());
    }
}
