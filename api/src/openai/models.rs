//! `/v1/models`.

use serde::Serialize;
use utoipa::ToSchema;

/// The models served: one.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    #[schema(example = "list")]
    pub object: &'static str,
    /// The models.
    pub data: Vec<Model>,
}

/// A model that requests may name.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Model {
    /// What requests put into `model`.
    #[schema(example = "smollm2-135m-instruct-q4_1")]
    pub id: String,
    /// Always `model`.
    #[schema(example = "model")]
    pub object: &'static str,
    /// Unix seconds of the model file; the same at every start.
    #[schema(example = 1_730_000_000)]
    pub created: u64,
    /// Always `m40llm`.
    #[schema(example = "m40llm")]
    pub owned_by: &'static str,
    /// What is loaded.
    pub meta: ModelMeta,
}

/// The loaded model in numbers.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModelMeta {
    /// The longest sequence served, prompt and output together, in tokens.
    #[schema(example = 8192)]
    pub context_length: usize,
    /// The context the model was trained for, in tokens.
    #[schema(example = 8192)]
    pub context_length_train: usize,
    /// Weights, counted.
    #[schema(example = 134_515_008)]
    pub parameters: u64,
    /// The quantisation of the weights.
    #[schema(example = "Q4_1")]
    pub quantization: String,
    /// The architecture, as the file names it.
    #[schema(example = "llama")]
    pub architecture: String,
    /// The name in the file, when it has one.
    pub name: Option<String>,
    /// Bytes of weights.
    pub size_bytes: u64,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the embeddings.
    pub embedding_length: usize,
}
