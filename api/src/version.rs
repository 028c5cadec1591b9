//! Which build this is.

use std::sync::LazyLock;

/// The package's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The commit, where the build was told: a variable of its environment, so that the same source builds the same binary
/// with and without git, and a new commit alone compiles nothing anew.
pub const REVISION: Option<&str> = match option_env!("M40LLM_REVISION") {
    Some(revision) if !revision.is_empty() => {
        assert!(is_word(revision), "M40LLM_REVISION may hold letters, digits, '.', '-', '_' and '+'");
        Some(revision)
    }
    _ => None,
};

/// It becomes a label of a metric, where quotes and line ends would want escaping.
const fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    let mut i = 0;
    while i < bytes.len() {
        if !(bytes[i].is_ascii_alphanumeric() || matches!(bytes[i], b'.' | b'-' | b'_' | b'+')) {
            return false;
        }
        i += 1;
    }
    true
}

/// As `--version` prints it: `0.1.0`, or `0.1.0 (1a2b3c4d5e6f)`.
pub static FULL_VERSION: LazyLock<String> = LazyLock::new(|| full(REVISION));

fn full(revision: Option<&str>) -> String {
    revision.map_or_else(|| VERSION.to_owned(), |revision| format!("{VERSION} ({revision})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_stands_behind_the_version() {
        assert_eq!(full(None), VERSION);
        assert_eq!(full(Some("1a2b3c4d5e6f")), format!("{VERSION} (1a2b3c4d5e6f)"));
        assert!(is_word("1a2b3c4d5e6f-dirty") && is_word("v1.2.3-4_g1a2b+x"));
        assert!(!is_word("a\"b") && !is_word("a\nb") && !is_word("a b"));
    }
}
