//! SentencePiece vocabularies (`tokenizer.ggml.model` = `llama`): merging by score.
//!
//! Source: Kudo and Richardson 2018, BPE mode: of all neighbouring pairs whose join is a token, the one
//! with the best score is joined first, the leftmost of equals; what is no token in the end is spelt in
//! byte tokens.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
};

/// What encoding needs of the vocabulary.
#[derive(Debug)]
pub(super) struct Spm {
    /// Tokens that text may become, with their scores; `▁` stands for a space.
    pub(super) pieces: HashMap<String, (u32, f32)>,
    /// The token of each byte, where there is one.
    pub(super) bytes: Vec<Option<u32>>,
    /// For bytes without a token.
    pub(super) unknown: Option<u32>,
}

/// A run of the text, in a list linked by indices. `len` is zero once it was joined to its left.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// Two neighbours whose join is a token. Stale when their joint length has changed since.
#[derive(Debug)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}

impl Spm {
    /// Appends the ids of `text`, with a space before it when `prefix` is set. O(n log n).
    pub(super) fn encode(&self, text: &str, prefix: bool, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + 3);
        if prefix {
            escaped.push('▁');
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { '▁' } else { c }));

        let mut symbols = symbols(&escaped);
        let mut pairs = BinaryHeap::new();
        for left in 0..symbols.len().saturating_sub(1) {
            pairs.extend(self.pair(&escaped, &symbols, left, left + 1));
        }
        while let Some(pair) = pairs.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            symbols[pair.left].len = pair.len;
            symbols[pair.left].next = right.next;
            symbols[pair.right].len = 0;
            if right.next != NONE {
                symbols[right.next].prev = pair.left;
                pairs.extend(self.pair(&escaped, &symbols, pair.left, right.next));
            }
            if left.prev != NONE {
                pairs.extend(self.pair(&escaped, &symbols, left.prev, pair.left));
            }
        }
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            self.emit(&escaped[symbol.start..symbol.start + symbol.len], out);
        }
    }

    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let len = symbols[left].len + symbols[right].len;
        let start = symbols[left].start;
        let (_, score) = self.pieces.get(&text[start..start + len])?;
        Some(Pair { score: *score, left, right, len })
    }

    fn emit(&self, piece: &str, out: &mut Vec<u32>) {
        match self.pieces.get(piece) {
            Some((id, _)) => out.push(*id),
            None => {
                out.extend(piece.bytes().filter_map(|byte| self.bytes[usize::from(byte)].or(self.unknown)));
            }
        }
    }
}

/// One symbol a character.
fn symbols(text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = text
        .char_indices()
        .enumerate()
        .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), prev: i.wrapping_sub(1), next: i + 1 })
        .collect();
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
    symbols
}
