//! The environment in which Hugging Face's `apply_chat_template` runs templates, in minijinja.
//!
//! Source: the chat templating documentation of Hugging Face `transformers`: jinja2 with
//! `trim_blocks`, `lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, its own `tojson`,
//! and the methods of Python's strings, lists and dictionaries.

use std::time::SystemTime;

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use minijinja_contrib::pycompat;
use serde_json::Value as Json;

use super::{clock, pyjson};

/// The name under which an environment holds its one template.
pub(super) const NAME: &str = "chat";

/// Bounds a rendering's time and, at 64 bytes a unit, its memory. A conversation of a thousand messages
/// takes about a tenth of it.
const FUEL: u64 = 4_000_000;

/// An environment that holds `source` as [`NAME`].
pub(super) fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: &str| clock::strftime(SystemTime::now(), format));
    environment.add_filter("tojson", to_json);
    // In Python strings can be iterated over and indexed, and templates test for that.
    environment
        .add_test("iterable", |value: &Value| value.kind() == ValueKind::String || value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_template_owned(NAME, without_generation_tags(source))?;
    Ok(environment)
}

/// JSON as a template value; keys keep their order.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(truth) => Value::from(*truth),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(unsigned), _) => Value::from(unsigned),
            (_, Some(signed)) => Value::from(signed),
            _ => Value::from(number.as_f64()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, json)| (key.as_str(), value(json)))),
    }
}

/// What `raise_exception` was given, when that is what failed.
pub(super) fn raised(error: &Error) -> Option<&str> {
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<Raised>().map(|raised| raised.0.as_str())
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// Python's methods; those that [`pycompat`] leaves out are here.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name, args) {
        (Some(text), "removeprefix", [affix]) => {
            let affix = affix.as_str().unwrap_or_default();
            Ok(Value::from(text.strip_prefix(affix).unwrap_or(text)))
        }
        (Some(text), "removesuffix", [affix]) => {
            let affix = affix.as_str().unwrap_or_default();
            Ok(Value::from(text.strip_suffix(affix).unwrap_or(text)))
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

#[allow(clippy::needless_pass_by_value, reason = "minijinja hands its arguments over")]
fn to_json(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = kwargs.get::<Option<usize>>("indent")?;
    let mut style = pyjson::Style {
        ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sorted: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item_separator: if indent.is_some() { "," } else { ", " }.to_owned(),
        key_separator: ": ".to_owned(),
    };
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators)
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings"))?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    kwargs.assert_all_used()?;
    pyjson::dumps(value, &style).map(Value::from)
}

/// `{% generation %}` marks what training learns from and prints nothing; it becomes `{% if true %}`.
/// Expressions and comments are passed over: what looks like the tag there is text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((start, end)) = next_tag(rest) {
        let (before, tag) = rest[..end].split_at(start);
        out.push_str(before);
        match tag.strip_prefix("{%").unwrap_or_default().trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", " if true ")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", " endif ")),
            _ => out.push_str(tag),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Where the next `{% … `, `{{ … ` or `{# … ` begins, and where what closes it does.
fn next_tag(text: &str) -> Option<(usize, usize)> {
    let (start, close) =
        text.match_indices('{').find_map(|(at, _)| match text.as_bytes().get(at + 1)? {
            b'%' => Some((at, "%}")),
            b'{' => Some((at, "}}")),
            b'#' => Some((at, "#}")),
            _ => None,
        })?;
    let len = text[start + 2..].find(close)?;
    Some((start, start + 2 + len))
}
