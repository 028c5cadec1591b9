//! `/v1/embeddings`.

use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::{completions::Prompt, int, object_only};

/// Texts to turn into vectors. A `null` is the same as an absent field; unknown fields are ignored, as is `user`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(remote = "Self")]
#[schema(example = json!({"input": ["The sky is blue.", "Grass is green."]}))]
pub struct EmbeddingRequest {
    /// The loaded model's id; absent or empty means that one too. Another is a 404.
    pub model: Option<String>,
    /// A string, strings, token ids, or lists of token ids: up to 2048 of them, none empty, each within the context.
    pub input: Prompt,
    /// `float`, which is meant when it is absent, or `base64`: the numbers as little-endian f32.
    #[schema(example = "float")]
    pub encoding_format: Option<String>,
    /// The length of the vectors. Only the model's own is allowed: the models that are served were not trained to be cut.
    #[serde(default, deserialize_with = "int")]
    #[schema(minimum = 1, example = json!(null))]
    pub dimensions: Option<i64>,
}
object_only!(EmbeddingRequest);

/// Vectors, in the order of their texts.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingList {
    /// Always `list`.
    #[schema(example = "list")]
    pub object: &'static str,
    /// One for each input.
    pub data: Vec<Embedding>,
    /// The model that answered.
    pub model: String,
    /// Of the whole request.
    pub usage: EmbeddingUsage,
}

/// A text's vector.
#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// Always `embedding`.
    #[schema(example = "embedding")]
    pub object: &'static str,
    /// Which input.
    pub index: usize,
    /// Of length 1, so that a product of two is the cosine between them.
    #[schema(value_type = VectorSchema)]
    pub embedding: Vector,
}

/// A vector on the wire.
#[derive(Debug)]
pub enum Vector {
    /// As numbers.
    Numbers(Vec<f32>),
    /// As the base64 of little-endian f32.
    Base64(String),
}

/// Numbers, or with `encoding_format: "base64"` a string.
#[derive(ToSchema)]
#[schema(as = Vector)]
#[serde(untagged)]
#[allow(dead_code, reason = "only its schema is used")]
pub enum VectorSchema {
    /// Numbers.
    Numbers(Vec<f32>),
    /// Little-endian f32.
    Base64(String),
}

impl Serialize for Vector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Numbers(numbers) => numbers.serialize(serializer),
            Self::Base64(text) => text.serialize(serializer),
        }
    }
}

/// Token counts of all inputs.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    /// Tokens read.
    #[schema(example = 8)]
    pub prompt_tokens: usize,
    /// The same: nothing is generated.
    #[schema(example = 8)]
    pub total_tokens: usize,
}
