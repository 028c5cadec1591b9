//! Tokenizers built from a GGUF's own metadata.

use std::collections::{HashMap, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};

use super::{
    TextError,
    bpe::Bpe,
    infill::FillInMiddle,
    pretokenizer::Pre,
    spm::Spm,
    vocab::{Kind, Spelling, TOKENS, Vocab, named_byte, tokens},
};
use crate::gguf::Metadata;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    encoder: Encoder,
    add_bos: bool,
    add_eos: bool,
    /// A space goes before text at the start and after a special token, and is taken away on decoding.
    space_prefix: bool,
    infill: Option<FillInMiddle>,
    /// Tokens that are cut out of text before it is encoded: those that always are …
    always: Specials,
    /// … and all, control tokens too, when special tokens are parsed.
    parsed: Specials,
}

#[derive(Debug)]
enum Encoder {
    Bpe(Box<Bpe>),
    Spm(Spm),
}

impl Tokenizer {
    /// Builds the tokenizer that `tokenizer.ggml.*` describes.
    ///
    /// Supported: `tokenizer.ggml.model` = `gpt2` (byte-level BPE, with the pre-tokenizers that the
    /// error for an unknown `tokenizer.ggml.pre` lists) and `llama` (SentencePiece). Anything else, and
    /// any array, id or merge that does not fit the vocabulary, is an error that names its key.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TextError> {
        match metadata.str(MODEL)? {
            Some("gpt2") => Self::byte_level(metadata),
            Some("llama") => Self::sentence_piece(metadata),
            Some(other) => Err(TextError::Metadata(format!(
                "{MODEL} is {other:?}; supported are gpt2 (byte-level BPE) and llama (SentencePiece)"
            ))),
            None => Err(TextError::Metadata(format!("{MODEL} is missing: the file has no tokenizer"))),
        }
    }

    fn byte_level(metadata: &Metadata) -> Result<Self, TextError> {
        // Files older than the key were all made for the same expressions.
        let name = metadata.str(PRE)?.unwrap_or("default");
        let pre = Pre::named(name).ok_or_else(|| {
            TextError::Metadata(format!("{PRE} is {name:?}; supported are {}", Pre::supported()))
        })?;
        let vocab = Vocab::from_metadata(metadata, Spelling::ByteLevel)?;
        let merges = metadata
            .strings(MERGES)?
            .ok_or_else(|| TextError::Metadata(format!("{MERGES} is missing, which {MODEL} gpt2 needs")))?;
        let texts = tokens(metadata)?;
        let (ordinary, reserved) = split_ordinary(texts, &vocab);
        let reserved: HashSet<&str> = reserved.into_iter().map(|(token, _)| token).collect();
        let bpe = Bpe::new(pre, ordinary.into_iter(), &reserved, merges)?;
        Self::assemble(metadata, vocab, Encoder::Bpe(Box::new(bpe)), pre.adds_bos(), false)
    }

    fn sentence_piece(metadata: &Metadata) -> Result<Self, TextError> {
        let vocab = Vocab::from_metadata(metadata, Spelling::SentencePiece)?;
        let texts = tokens(metadata)?;
        let scores = metadata
            .f64s(SCORES)?
            .ok_or_else(|| TextError::Metadata(format!("{SCORES} is missing, which {MODEL} llama needs")))?;
        if scores.len() != texts.len() {
            let what = format!("{SCORES} has {} entries, {TOKENS} has {}", scores.len(), texts.len());
            return Err(TextError::Metadata(what));
        }
        if let Some(bad) = scores.iter().position(|score| score.is_nan()) {
            return Err(TextError::Metadata(format!("{SCORES}[{bad}] is not a number")));
        }
        let (ordinary, _) = split_ordinary(texts, &vocab);
        let mut pieces = HashMap::with_capacity(ordinary.len());
        for (token, id) in ordinary {
            // Adding zero makes -0.0 and 0.0 equal in the total order that merging uses.
            pieces.entry(token.to_owned()).or_insert((id, scores[id as usize] as f32 + 0.0));
        }
        let mut bytes = vec![None; 256];
        for (id, token) in texts.iter().enumerate() {
            if let Some(byte) = named_byte(token) {
                bytes[usize::from(byte)] = Some(id as u32);
            }
        }
        let spm = Spm { pieces, bytes, unknown: vocab.unknown };
        Self::assemble(metadata, vocab, Encoder::Spm(spm), true, true)
    }

    /// The defaults are for files that do not say.
    fn assemble(
        metadata: &Metadata,
        vocab: Vocab,
        encoder: Encoder,
        default_bos: bool,
        default_prefix: bool,
    ) -> Result<Self, TextError> {
        let flag = |name: &str| metadata.bool(&format!("tokenizer.ggml.{name}"));
        let add_bos = flag("add_bos_token")?;
        let add_eos = flag("add_eos_token")?;
        for (wanted, id, name) in [(add_bos, vocab.bos, "bos"), (add_eos, vocab.eos, "eos")] {
            if wanted == Some(true) && id.is_none() {
                return Err(TextError::Metadata(format!(
                    "tokenizer.ggml.add_{name}_token is true, but tokenizer.ggml.{name}_token_id is missing"
                )));
            }
        }
        // The prefix is part of SentencePiece; byte-level files carry the key without meaning it.
        let prefix =
            matches!(encoder, Encoder::Spm(_)) && flag("add_space_prefix")?.unwrap_or(default_prefix);
        let specials = |kinds: &[Kind]| Specials::new(tokens(metadata)?, &vocab, kinds);
        Ok(Self {
            add_bos: add_bos.unwrap_or(default_bos),
            add_eos: add_eos.unwrap_or(false),
            space_prefix: prefix,
            always: specials(&[Kind::UserDefined])?,
            parsed: specials(&[Kind::UserDefined, Kind::Control, Kind::Unknown])?,
            infill: FillInMiddle::from_metadata(metadata)?,
            vocab,
            encoder,
        })
    }

    /// Ids of `text`; `add_special` adds BOS/EOS as the model wants them (BOS never doubled);
    /// `parse_special` recognises control tokens written out in the text.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<u32> {
        let mut ids = self.encode_plain(text, if parse_special { &self.parsed } else { &self.always }, true);
        if add_special {
            if let Some(bos) = self.vocab.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
                ids.insert(0, bos);
            }
            if let Some(eos) = self.vocab.eos.filter(|eos| self.add_eos && ids.last() != Some(eos)) {
                ids.push(eos);
            }
        }
        ids
    }

    /// The tokens that mark a gap in a text, if the model has them.
    pub fn fill_in_middle(&self) -> Option<FillInMiddle> {
        self.infill
    }

    /// Ids that ask for what stands between `before` and `after`; `None` where the model was not made to fill gaps.
    /// Special tokens written out in `after` are text: it is somebody's source, and may be about tokenizers.
    pub fn encode_gap(&self, before: &[u32], after: &str) -> Option<Vec<u32>> {
        let marks = self.infill?;
        let bos = self.vocab.bos.filter(|_| self.add_bos);
        let before = bos.and_then(|bos| before.strip_prefix(&[bos])).unwrap_or(before);
        // SentencePiece's space goes before a text's beginning, which this is not.
        let after = self.encode_plain(after, &self.always, false);
        let mut ids = Vec::with_capacity(before.len() + after.len() + 4);
        ids.extend(bos);
        ids.push(marks.prefix);
        ids.extend_from_slice(before);
        ids.push(marks.suffix);
        ids.extend(after);
        ids.push(marks.middle);
        Some(ids)
    }

    /// Ids of `text` and of the `specials` in it. At its beginning `after_special` says whether a space goes before.
    fn encode_plain(&self, text: &str, specials: &Specials, mut after_special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        specials.partition(text, &mut |part| match part {
            Part::Text(text) => {
                match &self.encoder {
                    Encoder::Bpe(bpe) => bpe.encode(text, &mut ids),
                    Encoder::Spm(spm) => spm.encode(text, self.space_prefix && after_special, &mut ids),
                }
                after_special = false;
            }
            Part::Special(id) => {
                ids.push(id);
                after_special = true;
            }
        });
        ids
    }

    /// The text of `ids`, special tokens printed, invalid UTF-8 replaced. The space that encoding puts
    /// before text is taken away again, so `decode(encode(s, false, _)) == s`.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        let mut after_special = true;
        for &id in ids {
            let token = self.token_bytes(id);
            let special = matches!(self.vocab.kind(id), Kind::Control | Kind::UserDefined | Kind::Unknown);
            let prefix = self.space_prefix && after_special && !special;
            bytes.extend_from_slice(if prefix { token.strip_prefix(b" ").unwrap_or(token) } else { token });
            after_special = special;
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes a token stands for (for a control token, its name). Empty for unused ids and ids out
    /// of range.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocab.bytes(id)
    }

    /// Ids below this are valid.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Control tokens: never printed in generated text.
    pub fn is_control(&self, id: u32) -> bool {
        matches!(self.vocab.kind(id), Kind::Control | Kind::Unknown)
    }

    /// Tokens that grammars know by their names, not as text: control tokens, and those of the file's own that are
    /// spelt like one (`<tool_call>` is either, by the file).
    pub fn is_named(&self, id: u32) -> bool {
        let name = self.token_bytes(id);
        let tagged = name.starts_with(b"<") && name.ends_with(b">");
        self.is_control(id) || (self.vocab.kind(id) == Kind::UserDefined && tagged)
    }

    /// Tokens that end a turn or the text (EOS, EOT, `<|im_end|>`, …).
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.vocab.is_end_of_generation(id)
    }

    /// Beginning of text.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.bos
    }

    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.eos
    }

    /// The text of BOS and EOS for templates; empty when there is none.
    pub fn token_text(&self, id: u32) -> &str {
        std::str::from_utf8(self.token_bytes(id)).unwrap_or_default()
    }
}

type Tokens<'m> = Vec<(&'m str, u32)>;

/// Tokens that text may become, and those that only stand for themselves.
fn split_ordinary<'m>(texts: &'m [String], vocab: &Vocab) -> (Tokens<'m>, Tokens<'m>) {
    let all = texts.iter().enumerate().map(|(id, token)| (token.as_str(), id as u32));
    all.filter(|(token, _)| !token.is_empty())
        .partition(|(_, id)| !matches!(vocab.kind(*id), Kind::Control | Kind::Unknown | Kind::Byte))
}

/// Finds special tokens written out in text, the leftmost first, the longest of those.
#[derive(Debug)]
struct Specials {
    names: Option<AhoCorasick>,
    ids: Vec<u32>,
}

enum Part<'t> {
    Text(&'t str),
    Special(u32),
}

impl Specials {
    fn new(texts: &[String], vocab: &Vocab, kinds: &[Kind]) -> Result<Self, TextError> {
        let found = texts.iter().enumerate().map(|(id, token)| (token, id as u32));
        let (names, ids): (Vec<_>, Vec<_>) =
            found.filter(|(token, id)| !token.is_empty() && kinds.contains(&vocab.kind(*id))).unzip();
        if ids.is_empty() {
            return Ok(Self { names: None, ids });
        }
        let names = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(names)
            .map_err(|error| TextError::Metadata(format!("the special tokens in {TOKENS}: {error}")))?;
        Ok(Self { names: Some(names), ids })
    }

    fn partition<'t>(&self, text: &'t str, part: &mut dyn FnMut(Part<'t>)) {
        let mut at = 0;
        for found in self.names.iter().flat_map(|names| names.find_iter(text)) {
            if at < found.start() {
                part(Part::Text(&text[at..found.start()]));
            }
            part(Part::Special(self.ids[found.pattern().as_usize()]));
            at = found.end();
        }
        if at < text.len() {
            part(Part::Text(&text[at..]));
        }
    }
}
