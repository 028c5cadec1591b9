//! The model's tokens as a trie of bytes, which masks are computed over.

use std::sync::Arc;

use llguidance::{
    ParserFactory, TokenParser,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};

use crate::text::Tokenizer;

/// What a mask of one token may cost; a grammar that wants more fails its request. At some
/// 14 units a microsecond this is 14 ms of the lexer.
const STEP_LEXER_FUEL: u64 = 200_000;
/// The same for the parser. Masks of JSON schemas take some hundreds of items; those of an ambiguous grammar cost the
/// more the more ambiguous it is, seen up to 2 microseconds each: about 20 ms then.
/// A row holds as many, so that what compiling takes is not given up at the first token: all choices that fit their text do.
const STEP_ITEMS: usize = 10_000;
/// States of one request's lexer, 1 to 2 KB each.
const LEXER_STATES: usize = 25_000;
/// What compiling may cost, at some 50 units a microsecond.
const COMPILE_FUEL: u64 = 1_000_000;
/// Symbols in a grammar's productions.
const GRAMMAR_SIZE: usize = 100_000;

/// Compiles grammars for one vocabulary.
pub(super) struct Vocabulary(ParserFactory);

impl Vocabulary {
    pub(super) fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32).map(|id| word(tokenizer, id)).collect();
        let ends: Vec<u32> =
            (0..words.len() as u32).filter(|&id| tokenizer.is_end_of_generation(id)).collect();
        let info = TokRxInfo::new(words.len() as u32, INVALID_TOKEN);
        let mut trie = TokTrie::from(&info, &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        // A model may spell what the grammar forces in any tokens it likes, as it may elsewhere: what comes out
        // is the model's own distribution over the outputs that are allowed.
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new(&tokens, InferenceCapabilities::default(), &slices())
            .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            initial_lexer_fuel: COMPILE_FUEL,
            step_lexer_fuel: STEP_LEXER_FUEL,
            step_max_items: STEP_ITEMS,
            max_items_in_row: STEP_ITEMS,
            max_lexer_states: LEXER_STATES,
            max_grammar_size: GRAMMAR_SIZE,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self(factory))
    }

    pub(super) fn compile(&self, grammar: TopLevelGrammar) -> Result<TokenParser, String> {
        self.0.create_parser(grammar).map_err(|error| format!("{error:#}"))
    }
}

/// Texts that strings are made of: their tokens' masks are computed once, not at every step.
fn slices() -> Vec<String> {
    llguidance::earley::SlicedBiasComputer::general_slices()
}

/// A token as grammars see it: its bytes, or its name where it stands for no text.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if bytes.is_empty() || !tokenizer.is_named(id) {
        return bytes.to_vec();
    }
    let mut name = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    name.extend_from_slice(bytes);
    name
}
