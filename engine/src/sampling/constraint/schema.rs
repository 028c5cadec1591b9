//! JSON schemas: what of them is enforced.

use serde_json::Value;

use super::ConstraintError;

/// The schema with options.
pub(super) fn enforced(schema: &Value) -> Result<Value, ConstraintError> {
    Ok(schema.clone())
}
