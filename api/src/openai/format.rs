//! What an answer must be: OpenAI's `response_format`, and the fields of other servers for it.

use serde::Deserialize;
use serde_json::Value as Json;
use utoipa::ToSchema;

use super::object_only;

/// The shape of the answer.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[schema(example = "json_object")]
    pub r#type: String,
    /// With `json_schema`.
    pub json_schema: Option<JsonSchemaFormat>,
}
object_only!(ResponseFormat);

/// A JSON schema by name.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct JsonSchemaFormat {
    /// 1 to 64 letters, digits, `_` and `-`.
    #[schema(required, value_type = String, example = "person", pattern = "^[a-zA-Z0-9_-]{1,64}$")]
    pub name: Option<String>,
    /// For the model's eyes in other servers; it is not shown to it here.
    pub description: Option<String>,
    /// The schema. Keywords that are not enforced are refused.
    #[schema(required, value_type = Object)]
    pub schema: Option<Json>,
    /// Schemas are enforced either way.
    pub strict: Option<bool>,
}
object_only!(JsonSchemaFormat);

/// vLLM's field for the same: one of them.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(remote = "Self")]
pub struct StructuredOutputs {
    /// A JSON schema, also written as a string.
    #[schema(value_type = Option<Object>)]
    pub json: Option<Json>,
    /// A regular expression.
    pub regex: Option<String>,
    /// Texts of which the answer is one.
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark's notation.
    pub grammar: Option<String>,
    /// Any JSON object.
    pub json_object: Option<bool>,
}
object_only!(StructuredOutputs);
