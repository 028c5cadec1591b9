//! Deserialisers as lenient as the clients in the field need them.

use std::{fmt, marker::PhantomData};

use serde::{Deserialize, Deserializer, de};

/// An optional integer; an integral float passes for one. Beyond `i64`, it saturates, for the range
/// checks to refuse.
pub(crate) fn int<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    deserializer.deserialize_option(Integer { wrap: false })
}

/// As [`int`], but integers of 64 bits without a sign keep their bits: a seed is only a label.
pub(crate) fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    deserializer.deserialize_option(Integer { wrap: true })
}

/// An optional number, written as an integer or not.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    deserializer.deserialize_option(Number)
}

struct Integer {
    wrap: bool,
}

impl<'de> de::Visitor<'de> for Integer {
    type Value = Option<i64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an integer")
    }
    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value))
    }
    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(if self.wrap { value as i64 } else { i64::try_from(value).unwrap_or(i64::MAX) }))
    }
    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        if value.fract() == 0.0 {
            Ok(Some(value as i64))
        } else {
            Err(E::invalid_value(de::Unexpected::Float(value), &self))
        }
    }
}

struct Number;

impl<'de> de::Visitor<'de> for Number {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number")
    }
    fn visit_none<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }
    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }
    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value))
    }
}

/// A string, or a list of parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextOr<T> {
    /// The text.
    Text(String),
    /// The parts.
    Parts(Vec<T>),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = TextOr<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of objects")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text.to_owned()))
            }
            fn visit_string<E: de::Error>(self, text: String) -> Result<TextOr<T>, E> {
                Ok(TextOr::Text(text))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, parts: A) -> Result<TextOr<T>, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(parts)).map(TextOr::Parts)
            }
        }
        deserializer.deserialize_any(Visitor(PhantomData))
    }
}

/// `Deserialize` from JSON objects only, for structs with `#[serde(remote = "Self")]`: serde's derive
/// would also take an array as the fields in order, which no client means.
macro_rules! object_only {
    ($type:ty) => {
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl<'de> serde::de::Visitor<'de> for Visitor {
                    type Value = $type;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }
                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        map: A,
                    ) -> Result<Self::Value, A::Error> {
                        <$type>::deserialize(serde::de::value::MapAccessDeserializer::new(map))
                    }
                }
                deserializer.deserialize_map(Visitor)
            }
        }
    };
}
pub(crate) use object_only;

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(remote = "Self")]
    struct Fields {
        #[serde(default, deserialize_with = "super::int")]
        n: Option<i64>,
        #[serde(default, deserialize_with = "super::number")]
        t: Option<f64>,
        #[serde(default, deserialize_with = "super::seed")]
        s: Option<i64>,
    }
    object_only!(Fields);

    fn parse(json: &str) -> Result<Fields, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn null_is_absent_and_integral_floats_are_integers() {
        let none = Fields { n: None, t: None, s: None };
        assert_eq!(parse("{}").unwrap(), none);
        assert_eq!(parse(r#"{"n":null,"t":null,"s":null,"other":[1]}"#).unwrap(), none);
        assert_eq!(
            parse(r#"{"n":3.0,"t":1,"s":7.0}"#).unwrap(),
            Fields { n: Some(3), t: Some(1.0), s: Some(7) }
        );
        assert_eq!(parse(r#"{"n":1e30,"s":18446744073709551615}"#).unwrap().n, Some(i64::MAX));
        assert_eq!(parse(r#"{"s":18446744073709551615}"#).unwrap().s, Some(-1));
    }

    #[test]
    fn wrong_types_are_named() {
        assert!(parse(r#"{"n":3.5}"#).unwrap_err().contains("an integer"));
        assert!(parse(r#"{"n":"3"}"#).unwrap_err().contains("an integer"));
        assert!(parse(r#"{"t":"hot"}"#).unwrap_err().contains("a number"));
        assert!(parse(r#"{"t":true}"#).unwrap_err().contains("a number"));
        assert!(parse("[1, 2, 3]").unwrap_err().contains("an object"));
    }
}
