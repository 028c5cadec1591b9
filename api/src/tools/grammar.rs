//! What an output with calls must be, as a Lark grammar.
//!
//! Where a call must be made the output is calls and nothing else. Where one may be, it is free text up to a call's
//! marker, or up to `{"name": "f", "arguments":` at its beginning; from there on it is a call of that function.

use std::fmt::{self, Write as _};

use m40llm_engine::text::Tokenizer;
use serde_json::Value as Json;

use super::{Format, THINK, Thinks};

/// What the grammar is made of.
pub(crate) struct Calling<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) format: &'static Format,
    /// Functions with their arguments, as expressions of the grammar.
    pub(crate) functions: Vec<(&'a str, String)>,
    pub(crate) must: bool,
    pub(crate) several: bool,
    pub(crate) thinks: Option<Thinks>,
    /// What the output must be where it is no call, if that matters; an expression too.
    pub(crate) answer: Option<String>,
}

/// A marker: a token of its own, or text like other text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Token(u32),
    Text(&'static str),
}

impl Mark {
    pub(crate) fn of(text: &'static str, tokenizer: &Tokenizer) -> Self {
        match tokenizer.encode(text, false, true)[..] {
            [id] if tokenizer.is_named(id) => Self::Token(id),
            _ => Self::Text(text),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(id) => write!(f, "<[{id}]>"),
            Self::Text(text) => f.write_str(&quoted(text)),
        }
    }
}

/// As a literal, which Lark writes as JSON does.
fn quoted(text: &str) -> String {
    Json::from(text).to_string()
}

impl Calling<'_> {
    /// The grammar.
    pub(crate) fn lark(&self) -> String {
        let rest = if self.must || self.answer.is_some() { self.bounded() } else { self.free() };
        let mut out = String::new();
        match self.thinks {
            Some(Thinks::Already) => {
                let _ = writeln!(out, "start: thoughts SPACE? rest\nrest: {rest}");
            }
            Some(Thinks::Maybe) => {
                let open = Mark::of(THINK.0, self.tokenizer);
                let _ = writeln!(out, "start: ({open} thoughts SPACE?)? rest\nrest: {rest}");
            }
            None => {
                let _ = writeln!(out, "start: {rest}");
            }
        }
        self.rules(&mut out);
        out
    }

    /// Calls only, or the answer.
    fn bounded(&self) -> String {
        let call = if self.format.bare { "body" } else { "call" };
        let calls = match (self.functions.is_empty(), self.several && self.format.several) {
            (true, _) => None,
            (_, true) => Some(format!(r#"{call} ("\n" {call})*"#)),
            (_, false) => Some(call.to_owned()),
        };
        let answer = self.answer.as_ref().filter(|_| !self.must).map(|_| "answer".to_owned());
        calls.into_iter().chain(answer).collect::<Vec<_>>().join(" | ")
    }

    /// Text, and calls if the model likes.
    fn free(&self) -> String {
        let calls = if self.several && self.format.several { "told* TEXT" } else { "TEXT | told" };
        format!("bare | {calls}")
    }

    fn rules(&self, out: &mut String) {
        let format = self.format;
        let (open, close) = (Mark::of(format.open, self.tokenizer), Mark::of(format.close, self.tokenizer));
        let space = if format.space.is_empty() { String::new() } else { quoted(format.space) };
        let close = if format.close.is_empty() { String::new() } else { close.to_string() };
        let each = |call: &dyn Fn(usize) -> String| {
            (0..self.functions.len()).map(call).collect::<Vec<_>>().join(" | ")
        };
        if !self.functions.is_empty() {
            let _ = writeln!(out, "call: {open} {space} body {space} {close}");
            let _ = writeln!(out, "body: {}", each(&|i| format!(r#"head{i} args{i} "}}""#)));
            let bare = each(&|i| format!(r#"bare{i} SPACE? args{i} SPACE? "}}""#));
            let _ = writeln!(out, "bare: ({bare}) (SPACE? \"```\")?");
            let _ = writeln!(out, "told: until_open {space} body {space} {close}");
            until(out, "until_open", open, format.open);
        }
        for (i, (name, arguments)) in self.functions.iter().enumerate() {
            let head = quoted(&format!(r#"{{"name": "{name}", "{}": "#, format.arguments));
            let _ = writeln!(out, "head{i}: {head}\nargs{i}: {arguments}");
            let key = format.arguments;
            let space = r"[ \n\t]*";
            let bare = format!(r#"\{{{space}"name"{space}:{space}"{name}"{space},{space}"{key}"{space}:"#);
            let _ = writeln!(out, "bare{i}[lazy]: /(```(json)?)?{space}{bare}/");
        }
        if let Some(answer) = &self.answer {
            let _ = writeln!(out, "answer: {answer}");
        }
        if self.thinks.is_some() {
            until(out, "thoughts", Mark::of(THINK.1, self.tokenizer), THINK.1);
        }
        out.push_str("SPACE: /[ \\n\\t]{1,16}/\nTEXT: /(?s:.*)/\n");
    }
}

/// A rule for text that ends with the first `mark`, spelt out or not. As it is lazy, what follows the mark follows
/// the grammar, and is not text any more.
fn until(out: &mut String, name: &str, mark: Mark, spelt: &str) {
    let token = if let Mark::Token(_) = mark { format!("TEXT {mark} | ") } else { String::new() };
    let _ = writeln!(out, "{name}: {token}{name}_spelt\n{name}_spelt[lazy]: TEXT {}", quoted(spelt));
}

#[cfg(test)]
mod tests {
    use m40llm_engine::{Constraint, Engine, EngineConfig, Grammar};
    use serde_json::json;

    use super::*;
    use crate::tools::Family;

    /// Two functions; `f` takes a string `s`, `g` nothing.
    struct Tried {
        engine: Engine,
        constraint: Constraint,
    }

    impl Tried {
        fn new(family: Family, change: impl FnOnce(&mut Calling<'_>)) -> Self {
            let engine = Engine::from_source(&EngineConfig::default(), |_| {}).unwrap();
            let schema = |properties: Json, required: Json| {
                let schema = json!({"type": "object", "properties": properties, "required": required,
                    "additionalProperties": false});
                Grammar::json(&schema).unwrap()
            };
            let f = schema(json!({"s": {"type": "string"}}), json!(["s"]));
            let mut calling = Calling {
                tokenizer: engine.tokenizer(),
                format: family.format(),
                functions: vec![("f", f), ("g", schema(json!({}), json!([])))],
                must: false,
                several: true,
                thinks: None,
                answer: None,
            };
            change(&mut calling);
            let lark = calling.lark();
            let constraint = engine.constrain(&Grammar::Lark(lark.clone()));
            Self { constraint: constraint.unwrap_or_else(|e| panic!("{e}: {lark}")), engine }
        }

        /// It may be all of the output.
        fn takes(&self, text: &str) {
            let tokens = self.engine.tokenizer().encode(text, false, true);
            let (fits, ends) = self.constraint.allows(&tokens);
            assert!(ends, "{text:?} fits up to {fits} of {}", tokens.len());
        }

        /// It may begin the output up to the last character of `text`, and that not.
        fn refuses(&self, text: &str) {
            let tokens = self.engine.tokenizer().encode(text, false, true);
            let (fits, ends) = self.constraint.allows(&tokens);
            assert!(fits + 1 == tokens.len() && !ends, "{text:?}: {fits} of {} fit", tokens.len());
        }
    }

    const F: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"<tool_call>\"}}\n</tool_call>";
    const G: &str = "<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

    #[test]
    fn calls_that_must_be_made() {
        for family in [Family::Hermes, Family::Generic] {
            let several = Tried::new(family, |calling| calling.must = true);
            several.takes(F);
            several.takes(&format!("{G}\n{F}"));
            several.refuses("H");
            several.refuses("<tool_call>\n{\"name\": \"h");
            several.refuses("<tool_call>\n{\"name\": \"g\", \"arguments\": {\"");
            several.refuses("<tool_call>\n{\"name\": \"f\", \"arguments\": {}");
            let one = Tried::new(family, |calling| (calling.must, calling.several) = (true, false));
            one.takes(F);
            one.refuses(&format!("{G}\n"));
        }
    }

    #[test]
    fn calls_that_may_be_made() {
        let several = Tried::new(Family::Hermes, |_| ());
        for text in
            ["", "Hi <tool_cal", "{\"name\": \"h\"", "{\"name\": \"f\", \"age\": 3}", "```json\n{}\n```"]
        {
            several.takes(text);
        }
        several.takes(&format!("Let me see.\n{F}\n{G}\nSo."));
        several.refuses("Hi <tool_call>\nx");
        several.refuses("Hi <tool_call>\n{\"name\": \"f\", \"arguments\": {\"t");
        let one = Tried::new(Family::Hermes, |calling| calling.several = false);
        one.takes("Hi.");
        one.takes(&format!("Hi.\n{G}"));
        one.refuses(&format!("{G}\n"));
    }

    #[test]
    fn calls_that_are_the_whole_output() {
        for family in [Family::Hermes, Family::Llama] {
            let key = family.format().arguments;
            let free = Tried::new(family, |_| ());
            free.takes(&format!("{{\"name\": \"f\", \"{key}\": {{\"s\": \"a\"}}}}"));
            free.takes(&format!(
                "```json\n{{\n  \"name\": \"f\",\n  \"{key}\": {{\n    \"s\": \"a\"\n  }}\n}}\n```"
            ));
            free.refuses(&format!("{{\"name\": \"f\", \"{key}\": {{\"t"));
            free.refuses(&format!("```json\n{{\n  \"name\": \"g\",\n  \"{key}\": []").replace(']', ""));
        }
        let must = Tried::new(Family::Llama, |calling| calling.must = true);
        must.takes("{\"name\": \"f\", \"parameters\": {\"s\": \"a\"}}");
        must.refuses("<");
        // One call, whatever is asked for.
        must.refuses("{\"name\": \"g\", \"parameters\": {}}\n");
        let free = Tried::new(Family::Llama, |_| ());
        free.takes("I ask.\n<|python_tag|>{\"name\": \"g\", \"parameters\": {}}");
        free.refuses("<|python_tag|>p");
    }

    #[test]
    fn thoughts_come_first() {
        let already = Tried::new(Family::Hermes, |calling| {
            (calling.must, calling.thinks) = (true, Some(Thinks::Already));
        });
        already.takes(&format!("I call {G}.\n</think>\n\n{F}"));
        already.refuses("so\n</think>\n\nH");
        let maybe = Tried::new(Family::Hermes, |calling| {
            (calling.must, calling.thinks) = (true, Some(Thinks::Maybe));
        });
        maybe.takes(F);
        maybe.takes(&format!("<think>\n\n</think>\n\n{F}"));
        maybe.refuses("H");
        let free = Tried::new(Family::Hermes, |calling| calling.thinks = Some(Thinks::Maybe));
        free.takes(&format!("<think>\nso\n</think>\n\nHi. {F}"));
    }

    #[test]
    fn an_answer_may_have_its_own_form() {
        let form = || Some(Grammar::json(&json!({"type": "array", "items": {"type": "integer"}})).unwrap());
        let either = Tried::new(Family::Hermes, |calling| calling.answer = form());
        either.takes("[1, 2]");
        either.takes(F);
        either.refuses("H");
        let thinking = Tried::new(Family::Hermes, |calling| {
            calling.functions.clear();
            (calling.answer, calling.thinks) = (form(), Some(Thinks::Already));
        });
        thinking.takes("so</think>[1]");
        thinking.refuses("so</think>x");
    }
}
