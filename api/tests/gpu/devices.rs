//! `docs/device_selection.md` on the device that is here: it shows an M40 and an H100, whose names and numbers are put aside.

use std::process::{Command, Output};

use serde_json::Value;

use crate::page::{Shown, page, shown, words};

fn m40llm(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_m40llm")).args(arguments).output().expect("the binary starts")
}

/// The text with the card's name, UUIDs and numbers put aside, and with one card where several of a kind are listed.
fn general(text: &str, name: &str) -> String {
    let mut out = String::new();
    for word in text.replace(name, "CARD").split_inclusive([' ', '\n', ';']) {
        let uuid = word.strip_prefix("GPU-").is_some_and(|rest| rest.trim_end().len() == 36);
        let rest = if uuid { &word[40..] } else { word };
        out += if uuid { "UUID" } else { "" };
        let mut inside = false;
        for c in rest.chars() {
            let number = c.is_ascii_digit() || inside && c == '.';
            if !(number && inside) {
                out.push(if number { 'N' } else { c });
            }
            inside = number;
        }
    }
    while out.contains("N CARD (N), N CARD (N)") {
        out = out.replace("N CARD (N), N CARD (N)", "N CARD (N)");
    }
    out
}

#[test]
fn a_text_is_made_general() {
    let text = "0  X 80GB  GPU-5f2c4a1e-0000-1111-2222-333344445555\n 24.0 GB free; lists 0 X 80GB (9.0), 1 X 80GB (9.0); GPU-0: 9.0.\n";
    assert_eq!(general(text, "X 80GB"), "N  CARD  UUID\n N GB free; lists N CARD (N); GPU-N: N\n");
}

#[test]
fn the_page_shows_what_this_card_says() {
    let json = m40llm(&["devices", "--json"]);
    let report: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    let device = &report["devices"][0];
    let name = device["name"].as_str().unwrap_or_else(|| panic!("these tests need a CUDA device: {report}"));
    let target = device["compute_capability"] == "5.2";
    let (heading, shown_name) =
        if target { ("A Tesla M40", "Tesla M40 24GB") } else { ("An H100", "NVIDIA H100 80GB HBM3") };
    let shown = &shown(&page())[heading];
    assert_eq!(shown.len(), if target { 2 } else { 3 }, "{shown:?}");
    // A UUID that begins with the page's digit would be taken: another digit, then.
    let uuid = device["uuid"].as_str().expect("a UUID");
    let other = if uuid.starts_with("GPU-0") { "GPU-1" } else { "GPU-0" };
    for Shown { command, answer } in shown {
        // The model is not there; the device is chosen before it is looked for.
        let words = words(&command.replace("GPU-0", other));
        let arguments: Vec<_> = words[1..].iter().map(String::as_str).collect();
        let output = m40llm(&arguments);
        let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat();
        let said = said.replace("ECC off", "ECC on");
        let (said, answer) = (general(&said, name), general(answer, shown_name));
        // A virtual machine does not tell the lanes; who else uses the card, and what it is set to, is its own affair.
        let fixed = |line: &&str| {
            !line.contains("PCIe") && !line.contains("has ECC on") && !line.contains("in use by others")
        };
        let kept: Vec<_> = said.lines().filter(fixed).collect();
        assert_eq!(kept, answer.lines().filter(fixed).collect::<Vec<_>>(), "{command}");
    }
}
