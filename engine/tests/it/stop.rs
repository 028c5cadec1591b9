//! The stop matcher against a search of the whole text.

use m40llm_engine::text::{StopMatcher, StopOutcome};
use proptest::prelude::*;

fn matcher(stops: &[&str]) -> StopMatcher {
    StopMatcher::new(&stops.iter().map(ToString::to_string).collect::<Vec<_>>())
}

fn text(text: &str) -> StopOutcome {
    StopOutcome::Text(text.to_owned())
}

fn stopped(text: &str) -> StopOutcome {
    StopOutcome::Stopped(text.to_owned())
}

#[test]
fn holds_back_only_what_may_begin_a_stop_string() {
    let mut stop = matcher(&["\n\nUser:", "</s>"]);
    assert_eq!(stop.push("Hello <"), text("Hello "));
    assert_eq!(stop.held(), 1);
    assert_eq!(stop.push("b>\n"), text("<b>"));
    assert_eq!(stop.push("\n"), text(""));
    assert_eq!(stop.push("\nUser"), text("\n"));
    assert_eq!(stop.held(), "\n\nUser".len());
    assert_eq!(stop.push("s"), text("\n\nUsers"));
    assert_eq!(stop.push(" x</"), text(" x"));
    assert_eq!(stop.push("s>tail"), stopped(""));
    assert_eq!(stop.push("more"), stopped(""));
    assert_eq!(stop.finish(), "");
}

#[test]
fn what_was_held_comes_out_at_the_end() {
    let mut stop = matcher(&["abc"]);
    assert_eq!(stop.push("xab"), text("x"));
    assert_eq!(stop.finish(), "ab");
    assert_eq!(stop.finish(), "");
}

#[test]
fn the_first_completed_wins_and_of_those_the_longest() {
    assert_eq!(matcher(&["abcd", "bc"]).push("xabcd"), stopped("xa"));
    assert_eq!(matcher(&["c", "abc", "bc"]).push("xabcd"), stopped("x"));
    assert_eq!(matcher(&["é"]).push("caf\u{e9}!"), stopped("caf"));
}

#[test]
fn empty_stop_strings_and_none_change_nothing() {
    let mut stop = matcher(&["", ""]);
    assert_eq!(stop.push("anything"), text("anything"));
    assert_eq!(stop.held(), 0);
    assert_eq!(matcher(&[]).push(""), text(""));
}

#[test]
fn long_stop_strings_that_nearly_match_cost_linear_time() {
    let near = "a".repeat(200_000);
    let stop = near.clone() + "b";
    let mut stop = matcher(&[&stop, &stop[1..], &stop[2..]]);
    let start = std::time::Instant::now();
    for _ in 0..400_000 {
        assert!(matches!(stop.push("a"), StopOutcome::Text(_)));
    }
    assert_eq!(stop.push("b"), stopped(""));
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

/// Text before the first match in the whole, and the stop string, by the matcher's rule: first completed,
/// then longest.
fn naive<'s>(text: &str, stops: &'s [String]) -> Option<(String, &'s str)> {
    let ends = |end: &usize| {
        let ending = |s: &&str| !s.is_empty() && text[..*end].ends_with(s);
        stops.iter().map(String::as_str).filter(ending).max_by_key(|s| s.len())
    };
    let mut boundaries = (0..=text.len()).filter(|at| text.is_char_boundary(*at));
    boundaries.find_map(|end| ends(&end).map(|stop| (text[..end - stop.len()].to_owned(), stop)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5000))]

    #[test]
    fn any_pieces_stop_where_the_whole_text_does(
        pieces in prop::collection::vec("[abé]{0,5}", 0..12),
        stops in prop::collection::vec("[abé]{0,4}", 0..16),
    ) {
        let whole = pieces.concat();
        let mut stop = StopMatcher::new(&stops);
        let mut out = String::new();
        let mut matched = false;
        let mut read = String::new();
        for piece in &pieces {
            read += piece;
            match stop.push(piece) {
                StopOutcome::Text(text) => {
                    out += &text;
                    // Nothing is held back without need: what is held begins a stop string …
                    let held = &read[out.len()..];
                    prop_assert_eq!(stop.held(), held.len());
                    prop_assert!(held.is_empty() || stops.iter().any(|s| s.starts_with(held)));
                    // … and nothing that begins one is handed out.
                    for start in (0..out.len()).filter(|at| read.is_char_boundary(*at)) {
                        prop_assert!(!stops.iter().any(|s| s.starts_with(&read[start..])));
                    }
                }
                StopOutcome::Stopped(text) => {
                    out += &text;
                    matched = true;
                    break;
                }
            }
        }
        out += &stop.finish();
        if let Some((text, by)) = naive(&whole, &stops) {
            prop_assert!(matched && out == text, "{:?} is not {:?}", out, text);
            prop_assert_eq!(stop.matched(), stops.iter().position(|s| s == by));
        } else {
            prop_assert!(!matched && out == whole, "{:?} is not {:?}", out, whole);
            prop_assert_eq!(stop.matched(), None);
        }
    }
}
