//! Completion requests.

use m40llm_engine::{
    GenerateRequest,
    text::{FillInMiddle, Tokenizer},
};

use super::{
    Form, Formats, MAX_CHOICES, MAX_TOP_LOGPROBS, Sampling, choices, format::Answer, include_usage, integer,
    max_tokens, max_wait, seed_of, stop, token_ids,
};
use crate::{
    app::Model,
    error::ApiError,
    openai::completions::{CompletionRequest, Prompt},
};

/// OpenAI's default limit on generated tokens.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A completion request, ready to run.
#[expect(clippy::struct_excessive_bools, reason = "each is a field of the request, none excludes another")]
pub(crate) struct CompletionJob {
    /// `best_of` for each prompt, prompt after prompt.
    pub(crate) requests: Vec<GenerateRequest>,
    /// What the outputs must be, if that matters.
    pub(crate) form: Option<Form>,
    /// What the prompts are, in their order.
    pub(crate) prompts: Vec<Source>,
    /// Choices returned for each prompt.
    pub(crate) n: usize,
    /// Choices generated for each prompt.
    pub(crate) best_of: usize,
    /// The prompt goes before the output.
    pub(crate) echo: bool,
    /// Chunks are wanted.
    pub(crate) stream: bool,
    /// And their usage.
    pub(crate) include_usage: bool,
    /// Log-probabilities are wanted.
    pub(crate) logprobs: bool,
}

/// A prompt as the request had it.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl Source {
    /// There is no text in it. (Lists of token ids are not empty.)
    pub(super) fn is_empty(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_empty())
    }

    /// What `echo` prints.
    pub(crate) fn text(&self, tokenizer: &Tokenizer) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Tokens(ids) => tokenizer.decode(ids),
        }
    }

    /// What the engine reads, with a `suffix` around a gap. An empty text is its beginning- or end-of-text token alone.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, suffix: Option<&str>) -> Vec<u32> {
        let gap = suffix.and_then(|suffix| match self {
            Self::Text(text) => tokenizer.encode_gap(&tokenizer.encode(text, false, false), suffix),
            Self::Tokens(ids) => tokenizer.encode_gap(ids, suffix),
        });
        if let Some(ids) = gap {
            return ids;
        }
        match self {
            Self::Text(text) => {
                let mut ids = tokenizer.encode(text, true, true);
                if ids.is_empty() {
                    ids.extend(tokenizer.bos().or(tokenizer.eos()));
                }
                ids
            }
            Self::Tokens(ids) => ids.clone(),
        }
    }
}

/// Checks every field and tokenises the prompts. `most` bounds the sequences of one request.
pub(crate) fn completions(
    request: CompletionRequest,
    model: &Model,
    most: usize,
) -> Result<CompletionJob, ApiError> {
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
    let form = Formats::from(&request).answer()?.map(Answer::form);
    let stream = request.stream.unwrap_or(false);
    let include_usage = include_usage(stream, request.stream_options)?;
    let n = choices(request.n)?;
    let best_of = best_of(request.best_of, n, stream)?;
    let limit = max_tokens(request.max_tokens, request.max_completion_tokens, 0)?;
    let max_wait = max_wait(request.max_wait_ms)?;
    let stop = stop(request.stop)?;
    let logprobs = integer("logprobs", request.logprobs, 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize);
    let suffix = request.suffix.filter(|suffix| !suffix.is_empty());
    let echo = request.echo.unwrap_or(false);
    let marks = suffix.as_ref().map(|_| gap_marks(tokenizer, echo && logprobs.is_some())).transpose()?;
    let prompts = sources(request.prompt, tokenizer, "prompt")?;
    if prompts.len().saturating_mul(best_of) > most {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "{} prompts with {best_of} choices each are too many; at most {most} sequences fit the queue",
                prompts.len()
            ),
        ));
    }

    let mut requests = Vec::with_capacity(prompts.len() * best_of);
    for source in &prompts {
        let prompt = source.encode(tokenizer, suffix.as_deref());
        let limit = limit.unwrap_or_else(|| default_limit(prompt.len(), model.engine.info().ctx_size));
        for j in 0..best_of {
            let mut sampling = sampling.clone();
            sampling.seed = seed_of(sampling.seed, j);
            requests.push(GenerateRequest {
                prompt: prompt.clone(),
                max_tokens: Some(limit),
                sampling,
                stop: stop.clone(),
                stop_tokens: marks.map_or_else(Vec::new, |marks| marks.ids().to_vec()),
                max_wait,
                // Several candidates are ranked by them.
                logprobs: logprobs.or((best_of > n).then_some(0)),
                prompt_logprobs: logprobs.filter(|_| echo),
                ..GenerateRequest::default()
            });
        }
    }
    Ok(CompletionJob {
        requests,
        form,
        prompts,
        n,
        best_of,
        echo,
        stream,
        include_usage,
        logprobs: logprobs.is_some(),
    })
}

/// The tokens that mark the gap before a `suffix`, if the model has them and nothing else speaks against it.
fn gap_marks(tokenizer: &Tokenizer, scores_prompt: bool) -> Result<FillInMiddle, ApiError> {
    if scores_prompt {
        return Err(ApiError::invalid(
            "suffix",
            "with it the prompt cannot be scored, as the model reads it in another order; leave out `echo` or `logprobs`",
        ));
    }
    tokenizer.fill_in_middle().ok_or_else(|| {
        ApiError::invalid("suffix", "the loaded model has no tokens for filling in the middle; leave it out")
    })
}

/// A limit that nobody asked for makes no prompt too long; a full context still has no room for a token.
fn default_limit(prompt: usize, ctx_size: usize) -> usize {
    DEFAULT_MAX_TOKENS.min(ctx_size.saturating_sub(prompt)).max(1)
}

fn best_of(best_of: Option<i64>, n: usize, stream: bool) -> Result<usize, ApiError> {
    let best_of = integer("best_of", best_of, 1..=MAX_CHOICES)?.map_or(n, |b| b as usize);
    if best_of < n {
        return Err(ApiError::invalid("best_of", format!("{best_of} is less than n, which is {n}")));
    }
    if stream && best_of > n {
        return Err(ApiError::invalid("best_of", "more than n is not possible with `stream: true`"));
    }
    Ok(best_of)
}

/// The prompts of the field `param`, at least one.
pub(super) fn sources(prompt: Prompt, tokenizer: &Tokenizer, param: &str) -> Result<Vec<Source>, ApiError> {
    let sources: Vec<Source> = match prompt {
        Prompt::Texts(texts) => texts.into_iter().map(Source::Text).collect(),
        Prompt::Tokens(lists) => {
            let single = lists.len() == 1;
            for (i, ids) in lists.iter().enumerate() {
                let name = |j| if single { format!("{param}[{j}]") } else { format!("{param}[{i}][{j}]") };
                if ids.is_empty() {
                    return Err(ApiError::invalid(param, "a list of token ids must not be empty"));
                }
                token_ids(ids, tokenizer, name)?;
            }
            lists.into_iter().map(Source::Tokens).collect()
        }
    };
    if sources.is_empty() {
        return Err(ApiError::invalid(param, "it must not be an empty list"));
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_limit_fits_the_context() {
        assert_eq!(default_limit(100, 2048), 16);
        assert_eq!(default_limit(2040, 2048), 8);
        // One too many: the engine refuses it as too long.
        assert_eq!(default_limit(2048, 2048), 1);
        assert_eq!(default_limit(9999, 2048), 1);
    }

    #[test]
    fn best_of_is_at_least_n() {
        let param = |result: Result<usize, ApiError>| result.unwrap_err().body().error.param.unwrap();
        assert_eq!(best_of(None, 3, true).unwrap(), 3);
        assert_eq!(best_of(Some(5), 3, false).unwrap(), 5);
        assert_eq!(best_of(Some(3), 3, true).unwrap(), 3);
        assert_eq!(param(best_of(Some(2), 3, false)), "best_of");
        assert_eq!(param(best_of(Some(5), 3, true)), "best_of");
        assert_eq!(param(best_of(Some(0), 1, false)), "best_of");
    }
}
