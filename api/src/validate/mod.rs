//! Wire types to engine requests. Every 400 about a field is made here, with its `param`.

mod anthropic;
mod chat;
mod completions;
mod embeddings;
mod form;
mod format;
mod messages;
mod names;
mod output;
mod responses;
mod tools;

pub(crate) use anthropic::anthropic;
pub(crate) use chat::{ChatJob, chat};
pub(crate) use completions::{CompletionJob, completions};
pub(crate) use embeddings::embeddings;
pub(crate) use form::Form;
pub(crate) use messages::render;
pub(crate) use responses::responses;
pub(crate) use tools::told;
use {format::Formats, names::Names};

use std::{ops::RangeInclusive, time::Duration};

use m40llm_engine::{
    SamplingParams,
    text::{PromptFormat, Tokenizer},
};

use crate::{
    error::{ApiError, shorten},
    openai::{LogitBias, Stop, StreamOptions},
};

/// OpenAI's bound on choices.
const MAX_CHOICES: i64 = 128;
/// Stop strings that one request may have.
const MAX_STOPS: usize = 16;
/// OpenAI's bound on alternatives.
const MAX_TOP_LOGPROBS: i64 = 20;

/// The fields that say how a token is chosen, as they came.
#[derive(Debug, Default)]
pub(crate) struct Sampling<'a> {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) logit_bias: Option<&'a LogitBias>,
    pub(crate) seed: Option<i64>,
}

impl Sampling<'_> {
    /// Checked; `vocab` bounds the ids of `logit_bias`.
    pub(crate) fn check(&self, vocab: usize) -> Result<SamplingParams, ApiError> {
        let default = SamplingParams::default();
        let mut top_k = match integer("top_k", self.top_k, -1..=i64::from(u32::MAX))? {
            Some(k) => usize::try_from(k).unwrap_or(0),
            None => default.top_k,
        };
        let top_p = float("top_p", self.top_p, 0.0..=1.0, default.top_p)?;
        if top_p <= 0.0 {
            // The smallest set that is not empty: the best token.
            top_k = 1;
        }
        let repetition_penalty = float("repetition_penalty", self.repetition_penalty, 0.0..=100.0, 1.0)?;
        if repetition_penalty <= 0.0 {
            return Err(ApiError::invalid("repetition_penalty", "it must be a number above 0, at most 100"));
        }
        Ok(SamplingParams {
            temperature: float("temperature", self.temperature, 0.0..=2.0, default.temperature)?,
            top_k,
            top_p,
            min_p: float("min_p", self.min_p, 0.0..=1.0, default.min_p)?,
            repetition_penalty,
            presence_penalty: float("presence_penalty", self.presence_penalty, -2.0..=2.0, 0.0)?,
            frequency_penalty: float("frequency_penalty", self.frequency_penalty, -2.0..=2.0, 0.0)?,
            logit_bias: self.logit_bias.map_or(Ok(Vec::new()), |bias| logit_bias(bias, vocab))?,
            // A seed is only a label: all 64 bits count.
            seed: self.seed.map(|seed| seed as u64),
        })
    }
}

fn logit_bias(bias: &LogitBias, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    bias.iter()
        .map(|(key, &value)| {
            let id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab).ok_or_else(|| {
                let key = shorten(key);
                ApiError::invalid(
                    "logit_bias",
                    format!(
                        "{key:?} is not a token id; keys must be integers from 0 to {}",
                        vocab.saturating_sub(1)
                    ),
                )
            })?;
            Ok((id, float("logit_bias", Some(value), -100.0..=100.0, 0.0)?))
        })
        .collect()
}

/// A number within `range`, or `default`.
fn float(param: &str, value: Option<f64>, range: RangeInclusive<f64>, default: f32) -> Result<f32, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value as f32),
        Some(value) => Err(ApiError::invalid(
            param,
            format!("{value} is out of range; it must be a number from {} to {}", range.start(), range.end()),
        )),
    }
}

/// An integer within `range`, if any.
pub(crate) fn integer(
    param: &str,
    value: Option<i64>,
    range: RangeInclusive<i64>,
) -> Result<Option<i64>, ApiError> {
    match value {
        Some(value) if !range.contains(&value) => Err(ApiError::invalid(
            param,
            if *range.end() == i64::from(u32::MAX) {
                format!("{value} is out of range; it must be an integer of at least {}", range.start())
            } else {
                format!(
                    "{value} is out of range; it must be an integer from {} to {}",
                    range.start(),
                    range.end()
                )
            },
        )),
        value => Ok(value),
    }
}

/// The limit on generated tokens from both of its fields; `max_completion_tokens` wins.
pub(crate) fn max_tokens(
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    least: i64,
) -> Result<Option<usize>, ApiError> {
    let any = least..=i64::from(u32::MAX);
    let old = integer("max_tokens", max_tokens, any.clone())?;
    let new = integer("max_completion_tokens", max_completion_tokens, any)?;
    Ok(new.or(old).map(|n| n as usize))
}

/// How long a request waits for its first token.
pub(crate) fn max_wait(milliseconds: Option<i64>) -> Result<Option<Duration>, ApiError> {
    let milliseconds = integer("max_wait_ms", milliseconds, 0..=i64::from(u32::MAX))?;
    Ok(milliseconds.map(|n| Duration::from_millis(n as u64)))
}

/// The stop strings, empty ones left out.
pub(crate) fn stop(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let stops = stop.map_or_else(Vec::new, |stop| stop.0);
    if stops.len() > MAX_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!("{} strings were given; at most {MAX_STOPS} are allowed", stops.len()),
        ));
    }
    Ok(stops.into_iter().filter(|s| !s.is_empty()).collect())
}

/// Whether a stream reports its usage.
fn include_usage(stream: bool, options: Option<StreamOptions>) -> Result<bool, ApiError> {
    match options {
        Some(_) if !stream => {
            Err(ApiError::invalid("stream_options", "it is only allowed with `stream: true`"))
        }
        options => Ok(options.and_then(|o| o.include_usage).unwrap_or(false)),
    }
}

/// How many choices; together with the prompts not more than the queue holds.
fn choices(n: Option<i64>) -> Result<usize, ApiError> {
    Ok(integer("n", n, 1..=MAX_CHOICES)?.unwrap_or(1) as usize)
}

/// The seed of choice `j`.
fn seed_of(seed: Option<u64>, j: usize) -> Option<u64> {
    seed.map(|seed| seed.wrapping_add(j as u64))
}

/// Refuses ids that the model does not have. `name` makes the `param` of an index.
pub(crate) fn token_ids(
    ids: &[u32],
    tokenizer: &Tokenizer,
    name: impl Fn(usize) -> String,
) -> Result<(), ApiError> {
    let vocab = tokenizer.vocab_size();
    match ids.iter().position(|&id| id as usize >= vocab) {
        Some(i) => Err(ApiError::invalid(
            name(i),
            format!(
                "token id {} is out of range; the model has ids from 0 to {}",
                ids[i],
                vocab.saturating_sub(1)
            ),
        )),
        None => Ok(()),
    }
}

/// `prompt_format` by name.
pub(crate) fn prompt_format(name: &str) -> Result<PromptFormat, ApiError> {
    Ok(match name {
        "auto" => PromptFormat::Auto,
        "raw" => PromptFormat::Raw,
        "llama3-chat" => PromptFormat::Llama3Chat,
        "qwen-chat" => PromptFormat::QwenChat,
        "template" => PromptFormat::Template,
        _ => {
            return Err(ApiError::invalid(
                "prompt_format",
                format!(
                    "{:?} is unknown; it must be auto, raw, llama3-chat, qwen-chat or template",
                    shorten(name)
                ),
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(error: &ApiError) -> String {
        error.body().error.param.unwrap_or_default()
    }

    #[test]
    fn defaults_are_the_engines() {
        assert_eq!(Sampling::default().check(10).unwrap(), SamplingParams::default());
    }

    #[test]
    fn ranges_name_their_field() {
        let check = |sampling: Sampling<'_>| param(&sampling.check(10).unwrap_err());
        assert_eq!(check(Sampling { temperature: Some(2.1), ..Sampling::default() }), "temperature");
        assert_eq!(check(Sampling { temperature: Some(-0.1), ..Sampling::default() }), "temperature");
        assert_eq!(check(Sampling { top_p: Some(1.1), ..Sampling::default() }), "top_p");
        assert_eq!(check(Sampling { top_k: Some(-2), ..Sampling::default() }), "top_k");
        assert_eq!(check(Sampling { min_p: Some(-1.0), ..Sampling::default() }), "min_p");
        assert_eq!(
            check(Sampling { presence_penalty: Some(3.0), ..Sampling::default() }),
            "presence_penalty"
        );
        assert_eq!(
            check(Sampling { frequency_penalty: Some(-3.0), ..Sampling::default() }),
            "frequency_penalty"
        );
        assert_eq!(
            check(Sampling { repetition_penalty: Some(0.0), ..Sampling::default() }),
            "repetition_penalty"
        );
        let bias = LogitBias::from([("10".to_owned(), 1.0)]);
        assert_eq!(check(Sampling { logit_bias: Some(&bias), ..Sampling::default() }), "logit_bias");
        let bias = LogitBias::from([("9".to_owned(), 100.5)]);
        assert_eq!(check(Sampling { logit_bias: Some(&bias), ..Sampling::default() }), "logit_bias");
    }

    #[test]
    fn edges_pass() {
        let bias = LogitBias::from([("9".to_owned(), -100.0)]);
        let sampling = Sampling {
            temperature: Some(2.0),
            top_p: Some(1.0),
            top_k: Some(-1),
            min_p: Some(1.0),
            seed: Some(-1),
            logit_bias: Some(&bias),
            ..Sampling::default()
        };
        let params = sampling.check(10).unwrap();
        assert_eq!((params.top_k, params.seed), (0, Some(u64::MAX)));
        assert_eq!(params.logit_bias, [(9, -100.0)]);
        assert_eq!(Sampling { top_p: Some(0.0), ..Sampling::default() }.check(1).unwrap().top_k, 1);
        assert_eq!(seed_of(Some(u64::MAX), 2), Some(1));
    }

    #[test]
    fn both_limits_may_come() {
        assert_eq!(max_tokens(Some(3), Some(5), 1).unwrap(), Some(5));
        assert_eq!(max_tokens(Some(3), None, 1).unwrap(), Some(3));
        assert_eq!(max_tokens(None, None, 1).unwrap(), None);
        assert_eq!(max_tokens(Some(0), None, 0).unwrap(), Some(0));
        assert_eq!(param(&max_tokens(Some(0), None, 1).unwrap_err()), "max_tokens");
        assert_eq!(param(&max_tokens(Some(1), Some(-1), 1).unwrap_err()), "max_completion_tokens");
    }

    #[test]
    fn waiting_has_a_bound_of_whole_milliseconds() {
        assert_eq!(max_wait(None).unwrap(), None);
        assert_eq!(max_wait(Some(1500)).unwrap(), Some(Duration::from_millis(1500)));
        assert_eq!(param(&max_wait(Some(-1)).unwrap_err()), "max_wait_ms");
    }

    #[test]
    fn stops_have_a_bound() {
        assert_eq!(stop(None).unwrap(), Vec::<String>::new());
        assert_eq!(stop(Some(Stop(vec!["a".into(), String::new()]))).unwrap(), ["a"]);
        assert!(stop(Some(Stop(vec!["a".into(); 16]))).is_ok());
        assert_eq!(param(&stop(Some(Stop(vec!["a".into(); 17]))).unwrap_err()), "stop");
    }

    #[test]
    fn usage_is_for_streams() {
        let usage = StreamOptions { include_usage: Some(true) };
        assert_eq!(param(&include_usage(false, Some(usage)).unwrap_err()), "stream_options");
        assert!(include_usage(true, Some(usage)).unwrap());
    }
}
