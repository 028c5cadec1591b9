//! Typed reading of `tokenizer.*` metadata.

use super::TextError;
use crate::gguf::{Metadata, Value};

fn wrong(key: &str, wanted: &str) -> TextError {
    TextError::Metadata(format!("{key} is not {wanted}"))
}

pub(super) fn str<'m>(metadata: &'m Metadata, key: &str) -> Result<Option<&'m str>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::String(value)) => Ok(Some(value)),
        Some(_) => Err(wrong(key, "a string")),
    }
}
pub(super) fn bool(metadata: &Metadata, key: &str) -> Result<Option<bool>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(wrong(key, "a truth value")),
    }
}
pub(super) fn u64(metadata: &Metadata, key: &str) -> Result<Option<u64>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::U64(value)) => Ok(Some(*value)),
        Some(Value::I64(value)) => u64::try_from(*value).map(Some).map_err(|_| wrong(key, "an unsigned integer")),
        Some(_) => Err(wrong(key, "an unsigned integer")),
    }
}
pub(super) fn strings<'m>(metadata: &'m Metadata, key: &str) -> Result<Option<&'m [String]>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Strings(value)) => Ok(Some(value)),
        Some(_) => Err(wrong(key, "a list of strings")),
    }
}
pub(super) fn u64s(metadata: &Metadata, key: &str) -> Result<Option<Vec<u64>>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::U64s(value)) => Ok(Some(value.clone())),
        Some(Value::I64s(value)) => value
            .iter()
            .map(|v| u64::try_from(*v).map_err(|_| wrong(key, "a list of unsigned integers")))
            .collect::<Result<_, _>>()
            .map(Some),
        Some(_) => Err(wrong(key, "a list of unsigned integers")),
    }
}
pub(super) fn f64s(metadata: &Metadata, key: &str) -> Result<Option<Vec<f64>>, TextError> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::F64s(value)) => Ok(Some(value.clone())),
        Some(Value::I64s(value)) => Ok(Some(value.iter().map(|v| *v as f64).collect())),
        Some(Value::U64s(value)) => Ok(Some(value.iter().map(|v| *v as f64).collect())),
        Some(_) => Err(wrong(key, "a list of numbers")),
    }
}
