//! The key-value section, typed access with errors that name the key.

use std::collections::BTreeMap;

use super::GgufError;

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
        unimplemented!()
    }
    /// A number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, GgufError> {
        unimplemented!()
    }
    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        unimplemented!()
    }
    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        unimplemented!()
    }
    /// A list of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        unimplemented!()
    }
    /// A list of numbers, integers widened.
    pub fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>, GgufError> {
        unimplemented!()
    }
    /// A list of unsigned integers (non-negative signed ones pass); a single integer is a list of one.
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>, GgufError> {
        unimplemented!()
    }
}
