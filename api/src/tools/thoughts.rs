//! How many of a choice's tokens were reasoning.

use super::Piece;

/// Counts as events come. A token counts for the piece that it settles; those that settle none, such as markers,
/// for what was said before them.
#[derive(Debug, Default)]
pub(crate) struct Thoughts {
    tokens: usize,
    /// The last piece was reasoning.
    open: bool,
    /// Tokens at the beginning, which may yet turn out to be reasoning.
    begun: usize,
}

impl Thoughts {
    /// An event of so many tokens has settled `pieces`.
    pub(crate) fn note(&mut self, tokens: usize, pieces: &[Piece]) {
        let (first, last) = (pieces.first(), pieces.last());
        if let Some(Piece::Reasoning(_)) = first {
            self.tokens += std::mem::take(&mut self.begun) + tokens;
        } else if first.is_some() {
            self.begun = 0;
        } else if self.open {
            self.tokens += tokens;
        } else if self.tokens == 0 {
            self.begun += tokens;
        }
        if last.is_some() {
            self.open = matches!(last, Some(Piece::Reasoning(_)));
        }
    }

    /// Tokens of reasoning so far.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_count_as_reasoning_and_answers_do_not() {
        let reasoning = || [Piece::Reasoning("r".into())];
        let text = || [Piece::Text("t".into())];
        let mut thoughts = Thoughts::default();
        for (tokens, pieces, total) in [
            (1, &[][..], 0),
            (1, &reasoning(), 2),
            (2, &reasoning(), 4),
            (1, &[], 5),
            (1, &text(), 5),
            (1, &[], 5),
            (1, &text(), 5),
        ] {
            thoughts.note(tokens, pieces);
            assert_eq!(thoughts.tokens(), total);
        }
        let mut none = Thoughts::default();
        none.note(3, &[]);
        none.note(1, &text());
        assert_eq!(none.tokens(), 0);
    }
}
