//! `POST /v1/embeddings`.

use axum::{Extension, Json, extract::State, response::IntoResponse};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use m40llm_engine::Event;

use super::{
    WorkFailures,
    body::{Work, beside},
};
use crate::{
    app::AppState,
    error::ApiError,
    observe::RequestLog,
    openai::embeddings::{Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage, Vector},
    stream::Sequences,
    validate,
};

/// Inputs of one request that the engine has at a time, or as many as its queue holds: a long list leaves room in it.
const AT_ONCE: usize = 32;

/// Turn texts into vectors.
///
/// The model's hidden states after its last layer become one vector a text: their mean, or that of the last token where
/// the file says so (`pooling_type`). Each vector has the length 1.
#[utoipa::path(
    post, path = "/v1/embeddings", operation_id = "createEmbedding", tag = "OpenAI",
    request_body = EmbeddingRequest,
    responses((status = 200, description = "The vectors.", body = EmbeddingList), WorkFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn create(
    State(state): State<AppState>,
    Extension(log): Extension<RequestLog>,
    Work { caller, value, bytes }: Work<EmbeddingRequest>,
) -> Result<impl IntoResponse, ApiError> {
    let model = state.admit(value.model.as_deref())?;
    let job = {
        let model = model.clone();
        beside(bytes, move || validate::embeddings(value, &model)).await?
    };
    let mut vectors = vec![Vec::new(); job.requests.len()];
    let at_once = AT_ONCE.min(state.config().max_queue);
    let sequences =
        Sequences::submit_in_turn(&state, caller, &log, &model, job.requests, 1, "input", at_once)?;
    let predicted = sequences.predicted();
    let usage = sequences
        .each(|i, event| {
            if let Event::Embedding(vector) = event {
                vectors[i] = vector;
            }
        })
        .await?;
    let data = vectors.into_iter().enumerate().map(|(index, mut vector)| {
        normalise(&mut vector);
        let embedding = if job.base64 { encoded(&vector) } else { Vector::Numbers(vector) };
        Embedding { object: "embedding", index, embedding }
    });
    let answer = EmbeddingList {
        object: "list",
        data: data.collect(),
        model: state.config().model_id.clone(),
        usage: EmbeddingUsage { prompt_tokens: usage.prompt_tokens, total_tokens: usage.prompt_tokens },
    };
    Ok((predicted, Json(answer)))
}

/// Gives a vector the length 1. One of zeros stays as it is.
fn normalise(vector: &mut [f32]) {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length > 0.0 {
        for x in vector {
            *x = (f64::from(*x) / length) as f32;
        }
    }
}

fn encoded(vector: &[f32]) -> Vector {
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    Vector::Base64(STANDARD.encode(bytes))
}
