//! `json.dumps` as Python writes it, which is what templates' `tojson` prints.

use std::fmt::Write as _;

use minijinja::{Error, ErrorKind, Value, value::ValueKind};

/// The arguments of `json.dumps`.
#[derive(Debug)]
pub(super) struct Style {
    pub(super) ascii: bool,
    pub(super) sorted: bool,
    pub(super) indent: Option<usize>,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
}

/// An indent beyond this is no layout.
const MAX_INDENT: usize = 64;

/// `value` as JSON.
pub(super) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(value, style, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => number(f64::try_from(value.clone())?, out),
        ValueKind::String => string(value.as_str().unwrap_or_default(), style.ascii, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            block(items.len(), ['[', ']'], style, depth, out, |index, out| {
                write(&items[index], style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sorted {
                keys.sort();
            }
            block(keys.len(), ['{', '}'], style, depth, out, |index, out| {
                key(&keys[index], style, out)?;
                out.push_str(&style.key_separator);
                write(&value.get_item(&keys[index])?, style, depth + 1, out)
            })?;
        }
        kind => {
            let what = format!("tojson: {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    }
    Ok(())
}

fn block(
    len: usize,
    [open, close]: [char; 2],
    style: &Style,
    depth: usize,
    out: &mut String,
    mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(open);
    for index in 0..len {
        if index > 0 {
            out.push_str(&style.item_separator);
        }
        new_line(style, depth + 1, out);
        item(index, out)?;
    }
    if len > 0 {
        new_line(style, depth, out);
    }
    out.push(close);
    Ok(())
}

fn new_line(style: &Style, depth: usize, out: &mut String) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent.min(MAX_INDENT) * depth));
    }
}

/// Keys that are not strings are written as strings.
fn key(key: &Value, style: &Style, out: &mut String) -> Result<(), Error> {
    if key.kind() == ValueKind::String {
        return write(key, style, 0, out);
    }
    out.push('"');
    write(key, style, 0, out)?;
    out.push('"');
    Ok(())
}

/// The shortest digits that read back the same, as Python's `repr` lays them out.
fn number(number: f64, out: &mut String) {
    if number.is_nan() {
        out.push_str("NaN");
    } else if number.is_infinite() {
        out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" });
    } else {
        let text = format!("{number:?}");
        match text.split_once('e') {
            None => out.push_str(&text),
            Some((digits, exponent)) => {
                let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
                let _ = write!(out, "{digits}e{sign}{exponent:0>2}");
            }
        }
    }
}

fn string(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}
