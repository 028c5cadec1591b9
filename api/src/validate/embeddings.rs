//! Embedding requests.

use m40llm_engine::GenerateRequest;

use super::{completions::sources, integer};
use crate::{
    app::Model,
    error::{ApiError, shorten},
    openai::embeddings::EmbeddingRequest,
};

/// OpenAI's bound on inputs.
const MAX_INPUTS: usize = 2048;

/// An embedding request, ready to run.
pub(crate) struct EmbeddingJob {
    /// One for each input.
    pub(crate) requests: Vec<GenerateRequest>,
    /// Vectors are wanted as base64.
    pub(crate) base64: bool,
}

/// Checks every field and tokenises the inputs.
pub(crate) fn embeddings(request: EmbeddingRequest, model: &Model) -> Result<EmbeddingJob, ApiError> {
    let pooling = model.engine.info().pooling.ok_or_else(|| {
        ApiError::invalid(
            "model",
            "its `pooling_type` is not one of none, mean and last token: it cannot embed here",
        )
    })?;
    let base64 = base64(request.encoding_format.as_deref())?;
    let info = model.engine.info();
    dimensions(request.dimensions, info.embedding_length)?;
    let tokenizer = model.engine.tokenizer();
    let inputs = sources(request.input, tokenizer, "input")?;
    if inputs.len() > MAX_INPUTS {
        return Err(ApiError::invalid(
            "input",
            format!("{} inputs were given; at most {MAX_INPUTS} are allowed", inputs.len()),
        ));
    }
    let requests = inputs.iter().map(|source| {
        if source.is_empty() {
            return Err(ApiError::invalid("input", "an input must not be an empty string"));
        }
        Ok(GenerateRequest {
            prompt: source.encode(tokenizer, None),
            max_tokens: Some(0),
            embedding: Some(pooling),
            ..GenerateRequest::default()
        })
    });
    Ok(EmbeddingJob { requests: requests.collect::<Result<_, _>>()?, base64 })
}

fn base64(format: Option<&str>) -> Result<bool, ApiError> {
    match format {
        None | Some("float") => Ok(false),
        Some("base64") => Ok(true),
        Some(other) => Err(ApiError::invalid(
            "encoding_format",
            format!("{:?} is unknown; it must be `float` or `base64`", shorten(other)),
        )),
    }
}

/// A vector can only be cut where the model was trained for that, which no metadata tells.
fn dimensions(wanted: Option<i64>, own: usize) -> Result<(), ApiError> {
    match integer("dimensions", wanted, 1..=i64::from(u32::MAX))? {
        Some(n) if n as usize != own => Err(ApiError::invalid(
            "dimensions",
            format!(
                "the loaded model has vectors of {own} numbers, which cannot be cut to {n}; leave it out"
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_models_own_length_is_allowed() {
        assert!(dimensions(None, 576).is_ok() && dimensions(Some(576), 576).is_ok());
        for other in [0, 1, 575, 577] {
            assert_eq!(dimensions(Some(other), 576).unwrap_err().body().error.param.unwrap(), "dimensions");
        }
    }

    #[test]
    fn formats_are_two() {
        assert!(!base64(None).unwrap() && !base64(Some("float")).unwrap() && base64(Some("base64")).unwrap());
        assert_eq!(base64(Some("int8")).unwrap_err().body().error.param.unwrap(), "encoding_format");
    }
}
