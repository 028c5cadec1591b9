//! Recorded outputs, cut at every place: however they come, they are read the same.

use super::{Calls, Family, Piece, Reader, Reading, Thinks};

/// What an output came to: text, reasoning, and calls with their arguments.
#[derive(Debug, PartialEq, Eq, Clone, Default)]
struct Read {
    text: String,
    reasoning: String,
    calls: Vec<(String, String)>,
    called: bool,
}

impl Read {
    fn take(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Text(text) => self.text.push_str(&text),
                Piece::Reasoning(text) => self.reasoning.push_str(&text),
                Piece::Call { index, name, id } => {
                    assert!(id.starts_with("call_") && index == self.calls.len());
                    self.calls.push((name, String::new()));
                }
                Piece::Arguments { index, text } => {
                    assert!(index + 1 == self.calls.len() && !text.is_empty());
                    self.calls[index].1.push_str(&text);
                }
            }
        }
    }
}

fn read<'a>(mut reader: Reader, parts: impl IntoIterator<Item = &'a str>) -> Read {
    let mut read = Read::default();
    for part in parts {
        read.take(reader.push(part));
    }
    read.take(reader.finish());
    read.called = reader.called();
    read
}

/// Reads `text` whole, a character at a time, and in two and three parts cut at every place; all must agree.
fn every_way(reading: &Reading, text: &str) -> Read {
    let whole = read(reading.reader(), [text]);
    let bounds: Vec<usize> = text.char_indices().map(|(i, _)| i).chain([text.len()]).collect();
    let characters = bounds.windows(2).map(|w| &text[w[0]..w[1]]);
    assert_eq!(read(reading.reader(), characters), whole, "{text:?} by characters");
    for &a in &bounds {
        assert_eq!(read(reading.reader(), [&text[..a], &text[a..]]), whole, "{text:?} cut at {a}");
        let b = bounds[(a * 7 + 3) % bounds.len()].max(a);
        let parts = [&text[..a], &text[a..b], &text[b..]];
        assert_eq!(read(reading.reader(), parts), whole, "{text:?} cut at {a} and {b}");
    }
    whole
}

fn reading(family: Family, thinks: Option<Thinks>) -> Reading {
    let names: Vec<String> = vec!["get_weather".into(), "add".into()];
    let calls =
        Calls { format: family.format(), names: names.into(), marker_is_text: family != Family::Llama };
    Reading { calls: Some(calls), thinks }
}

fn hermes(text: &str) -> Read {
    let generic = every_way(&reading(Family::Generic, None), text);
    let hermes = every_way(&reading(Family::Hermes, None), text);
    assert_eq!(hermes, generic);
    hermes
}

fn llama(text: &str) -> Read {
    every_way(&reading(Family::Llama, None), text)
}

fn text(text: &str) -> Read {
    Read { text: text.into(), ..Read::default() }
}

fn call(before: &str, name: &str, arguments: &str) -> Read {
    Read {
        text: before.into(),
        calls: vec![(name.into(), arguments.into())],
        called: true,
        ..Read::default()
    }
}

#[test]
fn without_tools_all_is_text() {
    let raw = "  <tool_call>\n{\"name\": \"add\", \"arguments\": {}} <think> \n";
    assert_eq!(every_way(&Reading::default(), raw), text(raw));
}

#[test]
fn a_call_of_qwens() {
    let raw = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Z\u{fc}rich }\\\"{\", \"n\": [1, {}]}}\n</tool_call>";
    assert_eq!(hermes(raw), call("", "get_weather", "{\"city\": \"Z\u{fc}rich }\\\"{\", \"n\": [1, {}]}"));
}

#[test]
fn text_before_calls_and_several_calls() {
    let raw = "Let me see. <b>\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": 2}}\n</tool_call>\n\
               <tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>\n";
    let mut expected = call("Let me see. <b>", "add", "{\"a\": 1, \"b\": 2}");
    expected.calls.push(("add".into(), "{}".into()));
    assert_eq!(hermes(raw), expected);
    // Text behind a call is text, without the spaces between.
    let raw = "<tool_call>{\"name\":\"add\",\"arguments\":{}}</tool_call>\n\nThat is it. \n";
    let mut expected = call("", "add", "{}");
    expected.text = "That is it. \n".into();
    assert_eq!(hermes(raw), expected);
}

#[test]
fn calls_written_otherwise() {
    for raw in [
        "<tool_call>\n{\"arguments\": {\"a\": 1}, \"name\": \"add\"}\n</tool_call>",
        "<tool_call>{\"name\":\"add\",\"arguments\":\"{\\\"a\\\": 1}\"}</tool_call>",
        "<tool_call>\n{\"type\": \"function\", \"name\": \"add\", \"parameters\": {\"a\": 1}}",
        " {\"name\": \"add\", \"arguments\": {\"a\": 1}}\n",
        "{\"name\": \"add\", \"arguments\": {\"a\": 1}} </tool_call>",
        "```json\n{\n  \"name\": \"add\",\n  \"arguments\": {\"a\": 1}\n}\n```\n",
        "```\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}",
    ] {
        assert_eq!(hermes(raw), call("", "add", "{\"a\": 1}"), "{raw}");
    }
    assert_eq!(hermes("<tool_call>{\"name\": \"add\"}</tool_call>"), call("", "add", "{}"));
}

#[test]
fn what_only_looks_like_a_call_is_text_as_it_came() {
    for raw in [
        "<tool_call>\nnot json\n</tool_call>",
        "<tool_call>\n{\"name\": \"unknown\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"add\", \"arguments\": [1]}\n</tool_call>",
        "<tool_call>\n{\"city\": 1}",
        "a <tool_cal b <tool",
        "a\n ",
        "{\"answer\": {\"name\": \"add\"}}",
        "{\"name\": \"ad",
        "```js",
        "```json\n{\"a\": 1}\n```",
        "```python\n{\"name\": \"add\", \"arguments\": {}}\n```",
        "``",
        "",
        " \n",
    ] {
        assert_eq!(hermes(raw), text(raw), "{raw}");
    }
    let raw = "So: \n<tool_call>\nx \n <tool_call> y\n";
    assert_eq!(hermes(raw), text(raw));
    // And a call behind it is still one.
    let raw = "<tool_call>x\n<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    assert_eq!(hermes(raw), call("<tool_call>x", "add", "{}"));
}

#[test]
fn calls_that_were_cut_off() {
    let raw = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": \"xy";
    let mut expected = call("", "add", "{\"a\": \"xy");
    expected.called = false;
    assert_eq!(hermes(raw), expected);
    // Before its arguments a call has not begun, and its marker is no text.
    assert_eq!(hermes("Well, \n<tool_call>\n{\"name\": \"ad"), text("Well,"));
    // After them it is whole.
    let raw = "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>\n<tool_c";
    for end in [raw.find("</").unwrap(), raw.find("call>\n<").unwrap(), raw.len()] {
        assert_eq!(hermes(&raw[..end]), call("", "add", "{}"), "{:?}", &raw[..end]);
    }
}

#[test]
fn calls_of_llamas() {
    let raw = "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}";
    let expected = call("", "get_weather", "{\"city\": \"Paris\"}");
    assert_eq!(llama(raw), expected);
    assert_eq!(llama(&format!("<|python_tag|>{raw}")), expected);
    assert_eq!(llama(&format!("\n{raw}\n")), expected);
    let mut with_text = expected;
    with_text.text = "I look it up:".into();
    assert_eq!(llama(&format!("I look it up:\n<|python_tag|>{raw}")), with_text);
    // The marker is no text of this family's, so it is not printed.
    assert_eq!(llama("So: <|python_tag|>print(1)"), text("So: print(1)"));
    assert_eq!(llama("{\"name\": \"Bob\", \"age\": 3}"), text("{\"name\": \"Bob\", \"age\": 3}"));
}

#[test]
fn thoughts_are_told_apart() {
    let think = |thinks, raw: &str| every_way(&Reading { calls: None, thinks: Some(thinks) }, raw);
    let expected = Read { text: "Four. \n".into(), reasoning: "2 + 2\n\n<b>".into(), ..Read::default() };
    assert_eq!(think(Thinks::Maybe, "\n<think>\n2 + 2\n\n<b>\n</think>\n\nFour. \n"), expected);
    assert_eq!(think(Thinks::Already, "\n2 + 2\n\n<b>\n</think>\n\nFour. \n"), expected);
    assert_eq!(think(Thinks::Already, "<think>\n2 + 2\n\n<b></think>Four. \n"), expected);
    // None, or none that is text.
    assert_eq!(think(Thinks::Maybe, " Four <think> \n"), text(" Four <think> \n"));
    assert_eq!(think(Thinks::Maybe, "<think>\n\n</think>\n\nFour."), text("Four."));
    assert_eq!(think(Thinks::Maybe, "<thi"), text("<thi"));
    // Cut off.
    let cut = Read { reasoning: "so </thin".into(), ..Read::default() };
    assert_eq!(think(Thinks::Already, "so </thin"), cut);
}

#[test]
fn calls_after_thoughts() {
    let raw = "<think>\nI call <tool_call> now.\n</think>\n\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    let mut expected = call("", "add", "{\"a\": 1}");
    expected.reasoning = "I call <tool_call> now.".into();
    assert_eq!(every_way(&reading(Family::Hermes, Some(Thinks::Maybe)), raw), expected);
    let raw = raw.replace("<think>", "").replace("<tool_call>\n{", "{");
    assert_eq!(every_way(&reading(Family::Hermes, Some(Thinks::Already)), &raw), expected);
}

#[test]
fn arguments_come_as_they_are_written() {
    let reading = reading(Family::Hermes, None);
    let mut reader = reading.reader();
    assert_eq!(reader.push("<tool_call>\n{\"name\": \"add\", \"arg"), []);
    assert!(reader.holds() && !reader.is_in_text());
    let pieces = reader.push("uments\": {\"a\"");
    assert!(
        matches!(&pieces[..], [Piece::Call { index: 0, name, .. }, Piece::Arguments { index: 0, text }]
            if name == "add" && text == "{\"a\""),
        "{pieces:?}"
    );
    assert_eq!(reader.push(": 12"), [Piece::Arguments { index: 0, text: ": 12".into() }]);
    assert!(!reader.called());
    assert_eq!(reader.push("}}\n</tool"), [Piece::Arguments { index: 0, text: "}".into() }]);
    assert_eq!(reader.push("_call>"), []);
    assert!(reader.called() && reader.is_in_text());
}
