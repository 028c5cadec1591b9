//! What `docs/device_selection.md` shows.

use std::{collections::BTreeMap, fs, path::Path};

pub(crate) fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/device_selection.md");
    fs::read_to_string(path).expect("docs/device_selection.md")
}

/// A command of the page and what is shown of its answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Shown {
    pub(crate) command: String,
    pub(crate) answer: String,
}

/// The page's ```` ```console ```` blocks by the heading above them.
pub(crate) fn shown(page: &str) -> BTreeMap<String, Vec<Shown>> {
    let mut found: BTreeMap<String, Vec<Shown>> = BTreeMap::new();
    let (mut heading, mut inside) = ("", false);
    for line in page.lines() {
        if let Some(name) = line.strip_prefix("### ") {
            heading = name;
        } else if line.starts_with("```") {
            inside = line == "```console";
        } else if inside {
            let all = found.entry(heading.to_owned()).or_default();
            match (line.strip_prefix("$ "), all.last_mut()) {
                (Some(command), _) => {
                    all.push(Shown { command: command.to_owned(), answer: String::new() });
                }
                (None, Some(shown)) => shown.answer.extend([line, "\n"]),
                (None, None) => panic!("{line:?} answers no command"),
            }
        }
    }
    found
}

/// The words of a command, of which one may be in quotes.
pub(crate) fn words(command: &str) -> Vec<String> {
    let parts = command.split('"').enumerate();
    parts
        .flat_map(|(i, part)| {
            let quoted = i % 2 == 1;
            let words: Vec<_> = if quoted { vec![part] } else { part.split_whitespace().collect() };
            words.into_iter().map(str::to_owned)
        })
        .collect()
}
