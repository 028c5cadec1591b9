//! The vocabulary of a GGUF: what each id is and stands for, and which ids are special.
//!
//! Source: the GGUF specification, `tokenizer.ggml.*`. Where files leave things out, the defaults are
//! those that GGUF runtimes have settled on.

use std::collections::HashSet;

use super::{TextError, bpe};
use crate::gguf::Metadata;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Undefined,
    Normal,
    /// The stand-in for text that has no token.
    Unknown,
    /// Structure, never text: BOS, turn markers.
    Control,
    /// Text that is always one token.
    UserDefined,
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
}

/// How tokens are spelt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet, one character a byte.
    ByteLevel,
    /// Text with `▁` for a space, and byte tokens.
    SentencePiece,
}

/// All tokens.
#[derive(Debug)]
pub(super) struct Vocab {
    kinds: Vec<Kind>,
    /// All tokens' bytes, one after another; token `i` is `bytes[ends[i - 1]..ends[i]]`.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
    end_of_generation: HashSet<u32>,
}

/// Tokens that end a turn or the text in the models that have them, whatever the file says of them.
const END_OF_GENERATION: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Control tokens after which code models have nothing more to say: padding, the next repository, the
/// next file.
const END_OF_CODE: [&str; 11] = [
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<PAD>",
    "[PAD]",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<REPO>",
    "<reponame>",
    "<|file_sep|>",
];

impl Vocab {
    /// Reads and checks everything but merges and scores.
    pub(super) fn from_metadata(metadata: &Metadata, spelling: Spelling) -> Result<Self, TextError> {
        let tokens = tokens(metadata)?;
        let mut kinds = kinds(metadata, tokens.len())?;
        let mut bytes = Vec::with_capacity(tokens.iter().map(String::len).sum());
        let mut ends = Vec::with_capacity(tokens.len());
        let mut end_of_generation = HashSet::new();
        for (id, token) in tokens.iter().enumerate() {
            if ends_generation(token, kinds[id]) {
                kinds[id] = Kind::Control;
                end_of_generation.insert(id as u32);
            }
            token_bytes(token, kinds[id], spelling, &mut bytes)
                .map_err(|what| TextError::Metadata(format!("{TOKENS}[{id}] {what}")))?;
            ends.push(bytes.len());
        }
        // SentencePiece models of the llama family number these the same way.
        let default =
            |id: u32| (spelling == Spelling::SentencePiece && (id as usize) < tokens.len()).then_some(id);
        let special = |name: &str| special_id(metadata, name, tokens.len());
        let bos = special("bos")?.or(default(1));
        let eos = special("eos")?.or(default(2));
        let unknown = special("unknown")?.or(default(0));
        for id in [eos, special("eot")?, special("eom")?].into_iter().flatten() {
            end_of_generation.insert(id);
        }
        Ok(Self { kinds, bytes, ends, bos, eos, unknown, end_of_generation })
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    /// What the token stands for; nothing for unused ids and those out of range.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(end) = self.ends.get(id) else { return &[] };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start..*end]
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Undefined)
    }

    pub(super) fn is_end_of_generation(&self, id: u32) -> bool {
        self.end_of_generation.contains(&id)
    }
}

/// The tokens as the file spells them, at least one.
pub(super) fn tokens(metadata: &Metadata) -> Result<&[String], TextError> {
    metadata
        .strings(TOKENS)?
        .filter(|tokens| !tokens.is_empty() && tokens.len() < u32::MAX as usize)
        .ok_or_else(|| TextError::Metadata(format!("{TOKENS} is missing or empty: there is no vocabulary")))
}

fn kinds(metadata: &Metadata, tokens: usize) -> Result<Vec<Kind>, TextError> {
    let Some(types) = metadata.u64s(TYPES)? else { return Ok(vec![Kind::Normal; tokens]) };
    if types.len() != tokens {
        let what = format!("{TYPES} has {} entries, {TOKENS} has {tokens}", types.len());
        return Err(TextError::Metadata(what));
    }
    let kind = |(index, number): (usize, &u64)| match number {
        0 => Ok(Kind::Undefined),
        1 => Ok(Kind::Normal),
        2 => Ok(Kind::Unknown),
        3 => Ok(Kind::Control),
        4 => Ok(Kind::UserDefined),
        5 => Ok(Kind::Unused),
        6 => Ok(Kind::Byte),
        _ => Err(TextError::Metadata(format!("{TYPES}[{index}] is {number}, not 0 to 6"))),
    };
    types.iter().enumerate().map(kind).collect()
}

/// `tokenizer.ggml.{name}_token_id`, which must be in the vocabulary.
pub(super) fn special_id(metadata: &Metadata, name: &str, tokens: usize) -> Result<Option<u32>, TextError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    match metadata.u64(&key)? {
        Some(id) if id >= tokens as u64 => {
            Err(TextError::Metadata(format!("{key} is {id}, but {TOKENS} has {tokens} entries")))
        }
        id => Ok(id.map(|id| id as u32)),
    }
}

fn ends_generation(token: &str, kind: Kind) -> bool {
    // In some vocabularies `</s>` is a piece of HTML like any other.
    let html = token == "</s>" && kind == Kind::Normal;
    (END_OF_GENERATION.contains(&token) && !html) || (END_OF_CODE.contains(&token) && kind == Kind::Control)
}

fn token_bytes(token: &str, kind: Kind, spelling: Spelling, bytes: &mut Vec<u8>) -> Result<(), String> {
    match (kind, spelling) {
        (Kind::Unused, _) => {}
        (Kind::Control | Kind::Unknown | Kind::UserDefined, _) => bytes.extend_from_slice(token.as_bytes()),
        (Kind::Byte, _) => {
            bytes.push(named_byte(token).ok_or_else(|| format!("is {token:?}, not <0x00> to <0xFF>"))?);
        }
        (_, Spelling::ByteLevel) => bpe::spelt_bytes(token, bytes),
        (_, Spelling::SentencePiece) => bytes.extend_from_slice(token.replace('▁', " ").as_bytes()),
    }
    Ok(())
}

/// The byte that `<0x0A>` names.
pub(super) fn named_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}
