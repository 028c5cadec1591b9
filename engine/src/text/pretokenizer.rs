//! Pre-tokenizers: how byte-level BPE vocabularies cut text into words before merging.
//!
//! Sources: the `pre_tokenizer` section of each model family's published tokenizer.json, and for
//! `default` the expressions that GGUF runtimes apply when a file names none.
//!
//! The published expressions end in `\s+(?!\S)|\s+`: a run of white space gives its last character to
//! the word after it. That look-ahead is the only thing a finite automaton cannot do, and it can be
//! done after matching; so every search here takes time linear in the text.

use std::ops::Range;

use regex_automata::{Input, meta::Regex};

/// `tokenizer.ggml.pre`, as far as this engine knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pre {
    Llama3,
    Qwen2,
    Smollm,
    Gpt2,
    Default,
}

/// Names that mean exactly the same expressions, merging and BOS rule.
const NAMES: [(&str, Pre); 7] = [
    ("llama-bpe", Pre::Llama3),
    ("llama3", Pre::Llama3),
    ("llama-v3", Pre::Llama3),
    ("qwen2", Pre::Qwen2),
    ("smollm", Pre::Smollm),
    ("gpt-2", Pre::Gpt2),
    ("default", Pre::Default),
];

/// GPT-2's own, without its white space alternatives.
const GPT2_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";
/// Llama 3's and Qwen 2's differ only in how many digits make a word.
const LLAMA3_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+";

impl Pre {
    /// The pre-tokenizer of that name.
    pub(super) fn named(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, pre)| *pre)
    }

    /// For error messages.
    pub(super) fn supported() -> String {
        NAMES.map(|(name, _)| name).join(", ")
    }

    /// A word that is a token as it stands is not merged up from its characters.
    pub(super) fn ignores_merges(self) -> bool {
        self == Pre::Llama3
    }

    /// Whether text begins with BOS when the file does not say.
    pub(super) fn adds_bos(self) -> bool {
        self == Pre::Llama3
    }

    fn stages(self) -> Vec<Stage> {
        match self {
            Pre::Llama3 => vec![Stage::words(LLAMA3_WORDS)],
            Pre::Qwen2 => vec![Stage::words(QWEN2_WORDS)],
            Pre::Gpt2 => vec![Stage::words(GPT2_WORDS)],
            Pre::Smollm => vec![Stage::isolate(r"\p{N}"), Stage::words(GPT2_WORDS)],
            Pre::Default => vec![
                Stage::isolate(r"[\p{P}\$\+<=>\^~\|]+"),
                Stage::words(GPT2_WORDS),
                Stage::isolate(r"\p{N}+"),
                Stage::isolate("[0-9][0-9][0-9]"),
            ],
        }
    }
}

/// Cuts text into words.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    stages: Vec<Stage>,
}

impl PreTokenizer {
    pub(super) fn new(pre: Pre) -> Self {
        Self { stages: pre.stages() }
    }

    /// Calls `word` with each word in turn; together they are the whole of `text`.
    pub(super) fn split<'t>(&self, text: &'t str, word: &mut dyn FnMut(&'t str)) {
        cut(&self.stages, text, word);
    }
}

/// Each stage cuts every piece that the stage before it left.
fn cut<'t>(stages: &[Stage], text: &'t str, word: &mut dyn FnMut(&'t str)) {
    match stages.split_first() {
        None => word(text),
        Some((stage, rest)) => stage.split(text, &mut |piece| cut(rest, piece, word)),
    }
}

/// One expression: its matches become pieces, and so does what lies between them.
#[derive(Debug)]
struct Stage {
    regex: Regex,
}

/// In a stage with white space, the second pattern is `\s+`.
const WHITE_SPACE: usize = 1;

impl Stage {
    fn words(pattern: &str) -> Self {
        Self::new(&[pattern, r"\s+"])
    }

    fn isolate(pattern: &str) -> Self {
        Self::new(&[pattern])
    }

    fn new(patterns: &[&str]) -> Self {
        // The patterns are the constants above: a test builds every one of them.
        Self { regex: Regex::new_many(patterns).expect("a built-in expression compiles") }
    }

    fn split<'t>(&self, text: &'t str, piece: &mut dyn FnMut(&'t str)) {
        let mut at = 0;
        while let Some(found) = self.find(text, at) {
            if at < found.start {
                piece(&text[at..found.start]);
            }
            piece(&text[found.clone()]);
            at = found.end;
        }
        if at < text.len() {
            piece(&text[at..]);
        }
    }

    /// The next match, never empty (no pattern matches the empty string).
    fn find(&self, text: &str, from: usize) -> Option<Range<usize>> {
        let found = self.regex.search(&Input::new(text).range(from..))?;
        let mut range = found.range();
        if found.pattern().as_usize() == WHITE_SPACE && range.end < text.len() {
            // `\s+(?!\S)`: the run is maximal, so what follows is not white space.
            let last = text[range.clone()].chars().next_back().map_or(0, char::len_utf8);
            if last < range.len() {
                range.end -= last;
            }
        }
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::{NAMES, Pre, PreTokenizer};

    fn words(pre: Pre, text: &str) -> Vec<&str> {
        let mut words = Vec::new();
        PreTokenizer::new(pre).split(text, &mut |word| words.push(word));
        words
    }

    #[test]
    fn every_expression_compiles_and_loses_nothing() {
        for (_, pre) in NAMES {
            let text = "I'LL  don't\r\n\n\tx 1234567 é\u{301}!!\n ٣ 　y  ";
            assert_eq!(words(pre, text).concat(), text);
        }
    }

    #[test]
    fn digits_go_by_the_family() {
        assert_eq!(words(Pre::Llama3, "12345"), ["123", "45"]);
        assert_eq!(words(Pre::Qwen2, "123"), ["1", "2", "3"]);
        assert_eq!(words(Pre::Smollm, "a 12"), ["a", " ", "1", "2"]);
        assert_eq!(words(Pre::Gpt2, "a 12345"), ["a", " 12345"]);
        assert_eq!(words(Pre::Default, "12345"), ["123", "45"]);
    }

    #[test]
    fn a_run_of_white_space_lends_its_end_to_the_next_word() {
        assert_eq!(words(Pre::Gpt2, "a   b"), ["a", "  ", " b"]);
        assert_eq!(words(Pre::Gpt2, "a\n\nb"), ["a", "\n", "\n", "b"]);
        assert_eq!(words(Pre::Llama3, "a\t\tb  \n  c  "), ["a", "\t", "\tb", "  \n", " ", " c", "  "]);
    }

    #[test]
    fn contractions_in_capitals() {
        assert_eq!(words(Pre::Llama3, "I'LL"), ["I", "'LL"]);
        assert_eq!(words(Pre::Gpt2, "I'LL"), ["I", "'", "LL"]);
    }
}
