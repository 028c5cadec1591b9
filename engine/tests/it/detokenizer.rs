//! Streaming detokenisation against the standard library's lossy conversion of the whole.

use m40llm_engine::text::Detokenizer;
use proptest::prelude::*;

fn streamed(pieces: &[Vec<u8>]) -> (String, String) {
    let mut detokenizer = Detokenizer::default();
    let pushed: String = pieces.iter().map(|piece| detokenizer.push(piece)).collect();
    assert!(detokenizer.held() < 4);
    (pushed, detokenizer.finish())
}

#[test]
fn a_character_comes_out_whole_with_its_last_byte() {
    let mut detokenizer = Detokenizer::default();
    for (bytes, text, held) in [
        (&b"a\xF0"[..], "a", 1),
        (b"\x9F\xA6", "", 3),
        (b"\x99!", "🦙!", 0),
        (b"\xC3", "", 1),
        (b"\xA9", "é", 0),
        (b"", "", 0),
    ] {
        assert_eq!(detokenizer.push(bytes), text);
        assert_eq!(detokenizer.held(), held);
    }
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn bytes_that_can_never_be_valid_are_replaced_at_once() {
    let mut detokenizer = Detokenizer::default();
    assert_eq!(detokenizer.push(b"\xFFa\xE2\x82b\xC0\x80"), "\u{FFFD}a\u{FFFD}b\u{FFFD}\u{FFFD}");
    assert_eq!(detokenizer.push(b"\xE2\x82"), "");
    assert_eq!(detokenizer.push(b"\xE2"), "\u{FFFD}");
    assert_eq!(detokenizer.finish(), "\u{FFFD}");
    assert_eq!(detokenizer.held(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_in_any_pieces_equal_the_lossy_whole(
        pieces in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..6),
                prop::collection::vec(prop::sample::select(vec![0xF0, 0x9F, 0xE2, 0x82, 0xAC, 0xC3, 0x80, 0xED, 0xA0, b'a']), 0..4),
            ],
            0..12,
        ),
    ) {
        let (pushed, rest) = streamed(&pieces);
        let whole = pieces.concat();
        prop_assert_eq!(pushed + &rest, String::from_utf8_lossy(&whole));
    }

    #[test]
    fn valid_text_is_never_replaced_nor_held_longer_than_a_character(text in "\\PC{0,40}", cut in 1_usize..5) {
        let pieces: Vec<Vec<u8>> = text.as_bytes().chunks(cut).map(<[u8]>::to_vec).collect();
        let mut detokenizer = Detokenizer::default();
        let mut read = 0;
        let mut out = String::new();
        for piece in &pieces {
            out += &detokenizer.push(piece);
            read += piece.len();
            let whole = (0..=read).rev().find(|end| text.is_char_boundary(*end)).unwrap();
            prop_assert_eq!(&out, &text[..whole]);
        }
        prop_assert_eq!(detokenizer.finish(), "");
    }
}
