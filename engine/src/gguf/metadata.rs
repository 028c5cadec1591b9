//! The key-value section, typed access with errors that name the key.

use std::collections::BTreeMap;

use super::{GgufError, reader::quoted};

/// A metadata value. Arrays are homogeneous, as the format has them.
#[allow(missing_docs, reason = "the names are the format's own")]
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(String),
    U64s(Vec<u64>),
    I64s(Vec<i64>),
    F64s(Vec<f64>),
    Bools(Vec<bool>),
    Strings(Vec<String>),
}

/// All keys of a file. `get` of an absent key is `Ok(None)`; of a wrong type, an error naming the key.
#[derive(Debug, Clone, Default)]
pub struct Metadata(pub(crate) BTreeMap<String, Value>);

impl Metadata {
    /// For tests and tools that make models.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, Value)>) -> Self {
        Self(pairs.into_iter().collect())
    }
    /// The raw value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }
    /// All keys and values, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }
    /// An unsigned integer (a non-negative signed one passes).
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.read(key, "an unsigned integer", |value| match value {
            Value::U64(n) => Some(*n),
            Value::I64(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }
    /// A number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.read(key, "a number", |value| match value {
            Value::U64(n) => Some(*n as f64),
            Value::I64(n) => Some(*n as f64),
            Value::F64(n) => Some(*n),
            _ => None,
        })
    }
    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.read(key, "a bool", |value| match value {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }
    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.read(key, "a string", |value| match value {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }
    /// A list of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.read(key, "a list of strings", |value| match value {
            Value::Strings(s) => Some(s.as_slice()),
            _ => None,
        })
    }
    /// A list of numbers, integers widened.
    pub fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        self.read(key, "a list of numbers", |value| match value {
            Value::U64s(list) => Some(list.iter().map(|n| *n as f64).collect()),
            Value::I64s(list) => Some(list.iter().map(|n| *n as f64).collect()),
            Value::F64s(list) => Some(list.clone()),
            _ => None,
        })
    }
    /// A list of unsigned integers (non-negative signed ones pass); a single integer is a list of one.
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>, GgufError> {
        self.read(key, "a list of unsigned integers", |value| match value {
            Value::U64(n) => Some(vec![*n]),
            Value::I64(n) => u64::try_from(*n).ok().map(|n| vec![n]),
            Value::U64s(list) => Some(list.clone()),
            Value::I64s(list) => list.iter().map(|n| u64::try_from(*n).ok()).collect(),
            _ => None,
        })
    }

    /// `take` of the key's value; where it takes nothing, an error that says what was `wanted`.
    fn read<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        match take(value) {
            Some(taken) => Ok(Some(taken)),
            None => Err(GgufError(format!(
                "metadata key {} must be {wanted}, it is {}",
                quoted(key),
                value.describe()
            ))),
        }
    }
}

impl Value {
    /// Its kind, and its content where that is short.
    fn describe(&self) -> String {
        match self {
            Value::U64(n) => n.to_string(),
            Value::I64(n) => n.to_string(),
            Value::F64(n) => n.to_string(),
            Value::Bool(b) => b.to_string(),
            Value::String(s) => format!("the string {}", quoted(s)),
            Value::U64s(list) => format!("a list of {} unsigned integers", list.len()),
            Value::I64s(list) => format!("a list of {} signed integers", list.len()),
            Value::F64s(list) => format!("a list of {} floats", list.len()),
            Value::Bools(list) => format!("a list of {} bools", list.len()),
            Value::Strings(list) => format!("a list of {} strings", list.len()),
        }
    }
}
