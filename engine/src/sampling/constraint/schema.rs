//! JSON schemas: what of them is enforced, and nothing else gets by.
//!
//! The compiler sees a schema as it is written here: keywords that it enforces, in an order that keeps those together
//! which it must see together; notes are left out. A keyword that is on neither list is refused by name and place,
//! also one that nobody knows: it may be a misspelt bound.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::ConstraintError;

/// Schemas within schemas, so deep.
const DEPTH: usize = 64;
/// Schemas in a document.
const SCHEMAS: usize = 4000;
/// Longest JSON pointer to one of them, in bytes: a pointer is kept for each.
const POINTER: usize = 4096;

/// Keywords that say nothing about what is valid.
const NOTES: [&str; 12] = [
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "contentEncoding",
    "contentMediaType",
    // OpenAPI's hint on which property tells the alternatives of oneOf apart.
    "discriminator",
];

/// Names that `format` may have.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];

/// Between two parts of a JSON text: nothing, a space, or a new line with an indentation. So nobody is sent
/// whitespace without end.
const WHITESPACE: &str = r" |\n {0,24}";
/// What may follow a backslash in a string. A character has one spelling, so that a key cannot come twice under
/// two names; therefore no `\u`.
const ESCAPES: &str = "nrbtf\\\"";

/// The schema as the compiler gets it.
pub(super) fn enforced(schema: &Value) -> Result<Value, ConstraintError> {
    Audit::default().document(schema)
}

/// The same, where a `format` that is not enforced is a note.
pub(super) fn without_notes(schema: &Value) -> Result<Value, ConstraintError> {
    Audit { notes_formats: true, ..Audit::default() }.document(schema)
}

/// What the compiler's words on a schema mean to whoever wrote it.
pub(super) fn explained(schema: &Value, words: &str) -> ConstraintError {
    let blamed = |keywords: &[&str]| find(schema, "#", keywords).unwrap_or_else(|| "#".into());
    if words.contains("oneOf constraints") {
        let what = "oneOf is enforced only where its alternatives exclude each other by type, by a constant, or by a \
                    constant property that they require; anyOf always is";
        return refused(&blamed(&["oneOf"]), what);
    }
    if words.contains("min/maxProperties") {
        let what = "minProperties and maxProperties are enforced only where all `properties` are required";
        return refused(&blamed(&["minProperties", "maxProperties"]), what);
    }
    if words.contains("patternProperty") {
        let what = format!("patternProperties must not overlap: {words}");
        return refused(&blamed(&["patternProperties"]), what);
    }
    refused("#", format!("the schema does not compile: {words}"))
}

/// Where one of the keywords stands first.
fn find(value: &Value, at: &str, keywords: &[&str]) -> Option<String> {
    match value {
        Value::Object(map) if keywords.iter().any(|&keyword| map.contains_key(keyword)) => {
            Some(at.to_owned())
        }
        Value::Object(map) => {
            map.iter().find_map(|(key, value)| find(value, &format!("{at}/{}", escaped(key)), keywords))
        }
        Value::Array(items) => {
            items.iter().enumerate().find_map(|(i, item)| find(item, &format!("{at}/{i}"), keywords))
        }
        _ => None,
    }
}

fn refused(at: &str, what: impl Into<String>) -> ConstraintError {
    ConstraintError::Schema { at: at.into(), what: what.into() }
}

/// A key in a JSON pointer.
fn escaped(key: &str) -> String {
    key.replace('~', "~0").replace('/', "~1")
}

/// Where a schema stands in its document.
struct Place {
    pointer: String,
    depth: usize,
}

impl Place {
    fn root() -> Self {
        Self { pointer: "#".into(), depth: 0 }
    }

    fn at(&self, key: &str) -> Self {
        Self { pointer: format!("{}/{}", self.pointer, escaped(key)), depth: self.depth }
    }

    fn refuse(&self, what: impl Into<String>) -> ConstraintError {
        refused(&self.pointer, what)
    }
}

#[derive(Default)]
struct Audit {
    /// Pointers of all schemas.
    places: HashSet<String>,
    /// Where a reference stands, and the pointer it leads to.
    references: Vec<(String, String)>,
    /// Formats that are not enforced are left out.
    notes_formats: bool,
}

impl Audit {
    fn document(&mut self, schema: &Value) -> Result<Value, ConstraintError> {
        let mut root = match self.schema(&Place::root(), schema)? {
            Value::Object(keywords) => keywords,
            Value::Bool(true) => Map::new(),
            _ => return Err(refused("#", "false allows no value")),
        };
        for (at, target) in &self.references {
            if !self.places.contains(target) {
                let what = format!("$ref leads to {target}, where this document has no schema");
                return Err(refused(at, what));
            }
        }
        let options = json!({"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES});
        root.insert("x-guidance".into(), options);
        Ok(Value::Object(root))
    }

    fn schema(&mut self, place: &Place, schema: &Value) -> Result<Value, ConstraintError> {
        // One long name above thousands of schemas would be kept in each of their pointers.
        if place.pointer.len() > POINTER {
            let what = format!("the names on the way to a schema may have {POINTER} bytes together");
            return Err(refused("#", what));
        }
        if place.depth > DEPTH {
            return Err(place.refuse(format!("schemas may be nested {DEPTH} deep")));
        }
        self.places.insert(place.pointer.clone());
        if self.places.len() > SCHEMAS {
            return Err(refused("#", format!("the document holds more than {SCHEMAS} schemas")));
        }
        let keywords = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(keywords) => keywords,
            _ => return Err(place.refuse("a schema must be an object, true or false")),
        };
        // The compiler reads what stands between two of the `combined` by itself, and would not see that
        // `additionalProperties` is for the `properties` on their other side.
        let (mut simple, mut combined) = (Map::new(), Map::new());
        for (keyword, value) in keywords {
            let inner = Place { depth: place.depth + 1, ..place.at(keyword) };
            match keyword.as_str() {
                "allOf" | "anyOf" | "oneOf" => {
                    combined.insert(keyword.clone(), self.list(&inner, value)?);
                }
                "const" => {
                    constant(&inner, value)?;
                    combined.insert(keyword.clone(), value.clone());
                }
                "enum" => {
                    for value in nonempty(&inner, value)? {
                        constant(&inner, value)?;
                    }
                    combined.insert(keyword.clone(), value.clone());
                }
                "$ref" => {
                    let target = reference(&inner, value)?;
                    self.references.push((inner.pointer, target));
                    combined.insert(keyword.clone(), value.clone());
                }
                _ => {
                    if let Some(value) = self.simple(place, keywords, keyword, value)? {
                        simple.insert(keyword.clone(), value);
                    }
                }
            }
        }
        simple.extend(combined);
        Ok(Value::Object(simple))
    }

    /// A keyword that stands for itself; `None`: it is left out, as it says nothing.
    fn simple(
        &mut self,
        place: &Place,
        keywords: &Map<String, Value>,
        keyword: &str,
        value: &Value,
    ) -> Result<Option<Value>, ConstraintError> {
        let inner = Place { depth: place.depth + 1, ..place.at(keyword) };
        let is_root = place.depth == 0;
        Ok(Some(match keyword {
            "type" => types(&inner, value)?,
            "properties" | "patternProperties" | "$defs" | "definitions" => self.map(&inner, value)?,
            "required" => strings(&inner, value)?,
            "items" if value.is_array() => self.list(&inner, value)?,
            "items" | "additionalProperties" => self.schema(&inner, value)?,
            "prefixItems" if keywords.contains_key("additionalItems") => {
                return Err(inner.refuse("prefixItems goes with items, not with additionalItems"));
            }
            "prefixItems" if keywords.get("items").is_some_and(Value::is_array) => {
                return Err(inner.refuse("prefixItems goes with items that are one schema, not a list"));
            }
            "prefixItems" => self.list(&inner, value)?,
            "additionalItems" if keywords.get("items").is_some_and(Value::is_array) => {
                self.schema(&inner, value)?
            }
            "additionalItems" => {
                return Err(inner.refuse("additionalItems is enforced only beside items that are a list"));
            }
            "minProperties" => {
                let required = keywords.get("required").and_then(Value::as_array).map_or(0, Vec::len);
                let least = count(&inner, value)?;
                // Further keys may come twice, and would be counted twice.
                if least.as_u64() > Some(required as u64 + 1) {
                    let what = format!(
                        "minProperties is enforced up to {}, one more than `required` names",
                        required + 1
                    );
                    return Err(inner.refuse(what));
                }
                least
            }
            "minItems" | "maxItems" | "maxProperties" | "minLength" | "maxLength" => count(&inner, value)?,
            "minimum" | "maximum" => number(&inner, value)?,
            "exclusiveMinimum" | "exclusiveMaximum" => {
                let bound = number(&inner, value)?;
                let whole = keywords.get("type") == Some(&json!("integer"));
                if whole { bound } else { exclusive(keyword == "exclusiveMinimum", &bound) }
            }
            "multipleOf" => {
                let step = number(&inner, value)?;
                if step.as_f64().is_none_or(|step| step <= 0.0) {
                    return Err(inner.refuse("multipleOf must be greater than 0"));
                }
                step
            }
            "pattern" => value.as_str().map(Value::from).ok_or_else(|| inner.refuse("must be a string"))?,
            "format" => match value.as_str() {
                Some(name) if FORMATS.contains(&name) => value.clone(),
                Some(_) if self.notes_formats => return Ok(None),
                _ => {
                    let what = format!("format {value} is not enforced; {} are", FORMATS.join(", "));
                    return Err(inner.refuse(what));
                }
            },
            "uniqueItems" if *value == Value::Bool(false) => return Ok(None),
            // What libraries write for keys that are strings, as all are.
            "propertyNames"
                if *value == json!({"type": "string"}) || *value == json!({}) || *value == json!(true) =>
            {
                return Ok(None);
            }
            "$schema" | "$id" if is_root && value.is_string() => return Ok(None),
            _ if NOTES.contains(&keyword) || keyword.starts_with("x-") => return Ok(None),
            _ => return Err(inner.refuse(format!("{keyword} is not enforced"))),
        }))
    }

    fn list(&mut self, place: &Place, value: &Value) -> Result<Value, ConstraintError> {
        let schemas = nonempty(place, value)?.iter().enumerate();
        schemas.map(|(i, schema)| self.schema(&place.at(&i.to_string()), schema)).collect()
    }

    fn map(&mut self, place: &Place, value: &Value) -> Result<Value, ConstraintError> {
        let Value::Object(schemas) = value else {
            return Err(place.refuse("must be an object of schemas"));
        };
        let inner =
            schemas.iter().map(|(key, schema)| Ok((key.clone(), self.schema(&place.at(key), schema)?)));
        inner.collect::<Result<Map<_, _>, _>>().map(Value::Object)
    }
}

fn nonempty<'v>(place: &Place, value: &'v Value) -> Result<&'v [Value], ConstraintError> {
    match value {
        Value::Array(values) if !values.is_empty() => Ok(values),
        _ => Err(place.refuse("must be an array of one value at least")),
    }
}

fn types(place: &Place, value: &Value) -> Result<Value, ConstraintError> {
    let known = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
    let valid = match value {
        Value::Array(names) => !names.is_empty() && names.iter().all(known),
        name => known(name),
    };
    let what = || format!("must be one of {}, or an array of them", TYPES.join(", "));
    if valid { Ok(value.clone()) } else { Err(place.refuse(what())) }
}

fn strings(place: &Place, value: &Value) -> Result<Value, ConstraintError> {
    match value {
        Value::Array(names) if names.iter().all(Value::is_string) => Ok(value.clone()),
        _ => Err(place.refuse("must be an array of strings")),
    }
}

/// A whole number that is not negative; 3.0 is one.
fn count(place: &Place, value: &Value) -> Result<Value, ConstraintError> {
    let whole = value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(n));
    whole.map(|n| Value::from(n as u64)).ok_or_else(|| place.refuse("must be a whole number, 0 or more"))
}

/// A number whose digits f64 keeps.
fn number(place: &Place, value: &Value) -> Result<Value, ConstraintError> {
    const EXACT: f64 = (1u64 << 53) as f64;
    match value.as_f64() {
        None => Err(place.refuse("must be a number")),
        Some(n) if n.abs() >= EXACT => {
            Err(place.refuse("numbers of 2^53 and beyond are not enforced to the digit"))
        }
        Some(_) => Ok(value.clone()),
    }
}

/// The exclusive bound of a range of numbers, as llguidance (1.9) keeps it. Between such a bound that is whole and another with the
/// same digits before the point, it allows the bound itself, written without a fraction: 1 for what is above 1 and at most
/// 1.5. So the bound is the next number that f64 has, or at zero one that is written in few digits.
fn exclusive(below: bool, bound: &Value) -> Value {
    let Some(n) = bound.as_f64().filter(|n| n.fract() == 0.0) else { return bound.clone() };
    match (below, n) {
        (true, 0.0) => Value::from(1e-15),
        (false, 0.0) => Value::from(-1e-15),
        (true, n) if n > 0.0 => Value::from(n.next_up()),
        (false, n) if n < 0.0 => Value::from(n.next_down()),
        _ => bound.clone(),
    }
}

/// A value that can be written as it is meant.
fn constant(place: &Place, value: &Value) -> Result<(), ConstraintError> {
    match value {
        Value::Number(_) => number(place, value).map(|_| ()),
        Value::Array(values) => values.iter().try_for_each(|value| constant(place, value)),
        Value::Object(map) => map.values().try_for_each(|value| constant(place, value)),
        _ => Ok(()),
    }
}

/// The pointer that a reference into its own document leads to.
fn reference(place: &Place, value: &Value) -> Result<String, ConstraintError> {
    let text = value.as_str().unwrap_or_default();
    match text.strip_prefix('#').map(unquoted) {
        Some(Some(pointer)) if pointer.is_empty() || pointer.starts_with('/') => Ok(format!("#{pointer}")),
        _ => Err(place.refuse("$ref must lead into this document, such as \"#/$defs/name\"")),
    }
}

/// Percent-encoding taken away.
fn unquoted(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;
