//! The JSON of a call, read as it comes.

/// What is known of a call from its beginning.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// More must come.
    More,
    /// It is no call of a tool that was given.
    Not,
    /// The function, and where the object of its arguments begins.
    Open { name: String, at: usize },
    /// A call that could only be told when all of it was there, and where it ends.
    Whole { name: String, arguments: String, end: usize },
}

/// Reads the beginning of `{"name": …, "arguments": {…}}`, whose arguments may also be called `parameters`, be a
/// string that holds them, come first or be missing. `is_tool` says which names are those of tools.
pub(super) fn head(text: &str, is_tool: impl Fn(&str) -> bool) -> Head {
    read(text, is_tool).unwrap_or_else(|broken| broken)
}

fn read(text: &str, is_tool: impl Fn(&str) -> bool) -> Result<Head, Head> {
    let mut at = skip(text, 0);
    at = expect(text, at, b'{')?;
    let (mut name, mut arguments) = (None::<String>, None::<String>);
    loop {
        at = skip(text, at);
        let key;
        (key, at) = string(text, at)?;
        at = expect(text, skip(text, at), b':')?;
        at = skip(text, at);
        match key.as_str() {
            "name" => {
                let value;
                (value, at) = string(text, at)?;
                if !is_tool(&value) {
                    return Err(Head::Not);
                }
                name = Some(value);
            }
            // Some models repeat what kind of tool it is.
            "type" | "id" => (_, at) = string(text, at)?,
            "arguments" | "parameters" => match (byte(text, at)?, name.take()) {
                (b'{', Some(name)) => return Ok(Head::Open { name, at }),
                (b'"', known) => {
                    let value;
                    (value, at) = string(text, at)?;
                    (name, arguments) = (known, Some(value));
                }
                (b'{', None) => {
                    let length = Scanner::default().end(&text[at..]).ok_or(Head::More)?;
                    arguments = Some(text[at..at + length].to_owned());
                    at += length;
                }
                _ => return Err(Head::Not),
            },
            _ => return Err(Head::Not),
        }
        at = skip(text, at);
        match byte(text, at)? {
            b',' => at += 1,
            b'}' => {
                let arguments = arguments.unwrap_or_else(|| "{}".to_owned());
                return name.map(|name| Head::Whole { name, arguments, end: at + 1 }).ok_or(Head::Not);
            }
            _ => return Err(Head::Not),
        }
    }
}

fn skip(text: &str, at: usize) -> usize {
    text.len() - text[at..].trim_start_matches([' ', '\t', '\n', '\r']).len()
}

fn byte(text: &str, at: usize) -> Result<u8, Head> {
    text.as_bytes().get(at).copied().ok_or(Head::More)
}

fn expect(text: &str, at: usize, wanted: u8) -> Result<usize, Head> {
    if byte(text, at)? == wanted { Ok(at + 1) } else { Err(Head::Not) }
}

/// A JSON string and where it ends.
fn string(text: &str, at: usize) -> Result<(String, usize), Head> {
    let inner = expect(text, at, b'"')?;
    let mut escaped = false;
    let length = text[inner..]
        .bytes()
        .position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        })
        .ok_or(Head::More)?;
    let end = inner + length + 1;
    let value = serde_json::from_str(&text[at..end]).map_err(|_| Head::Not)?;
    Ok((value, end))
}

/// Finds the end of a JSON object by its braces.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scanner {
    /// Reads on; returns the length up to the brace that closes the object, once it is there.
    pub(super) fn end(&mut self, text: &str) -> Option<usize> {
        for (i, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                b'{' | b'[' if !self.in_string => self.depth += 1,
                b'}' | b']' if !self.in_string => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(i + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Head {
        head(text, |name| name == "f")
    }

    #[test]
    fn a_call_is_known_where_its_arguments_begin() {
        let text = "\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}";
        let at = text.find("{\"a").unwrap();
        assert_eq!(read(text), Head::Open { name: "f".into(), at });
        for end in 0..at {
            assert_eq!(read(&text[..end]), Head::More, "{:?}", &text[..end]);
        }
        let text = r#"{"type":"function","name":"f","parameters":{"#;
        assert_eq!(read(text), Head::Open { name: "f".into(), at: text.len() - 1 });
    }

    #[test]
    fn other_orders_and_shapes_are_known_at_their_end() {
        let whole = |arguments: &str, text: &str| {
            let end = text.trim_end().len();
            assert_eq!(read(text), Head::Whole { name: "f".into(), arguments: arguments.into(), end });
        };
        whole(r#"{"a":"}"}"#, r#"{"arguments":{"a":"}"},"name":"f"} "#);
        whole(r#"{"a":"é"}"#, r#"{"name":"f","arguments":"{\"a\":\"\u00e9\"}"}"#);
        whole("{}", r#"{"name":"f"}"#);
    }

    #[test]
    fn what_is_no_call_is_told_at_once() {
        for text in
            ["x", "[", r#"{"a"#.trim_end_matches('a').trim_end_matches('"'), r#"{"city":"#, r#"{"name":"g""#]
        {
            let expected = if text == "{" { Head::More } else { Head::Not };
            assert_eq!(read(text), expected, "{text}");
        }
        assert_eq!(read(r#"{"name":"f","arguments":[1]}"#), Head::Not);
        assert_eq!(read(r#"{"arguments":{}}"#), Head::Not);
    }

    #[test]
    fn braces_in_strings_do_not_count() {
        let text = r#"{"a":["}\"}",{}]}rest"#;
        assert_eq!(Scanner::default().end(text), Some(text.len() - 4));
        let mut scanner = Scanner::default();
        assert_eq!(scanner.end(r#"{"a\"#), None);
        assert_eq!(scanner.end(r#""}"}"#), Some(4));
    }
}
