//! Models: open, ask, tokenize, free.

use std::{
    ffi::{CString, c_char},
    path::Path,
    ptr,
};

use super::{
    handles::MODELS,
    memory::{self, Buffer},
    status::{Failure, Status, guard},
    types::{M40LLM_NO_TOKEN, ModelInfo, ModelOptions, text_flags},
};
use crate::handle::Engine;

/// An open model. Any thread may use it, several at once.
#[derive(Debug)]
pub struct ModelHandle(());

/// What a model's handle stands for.
pub(super) struct Model {
    pub(super) engine: Engine,
    name: Option<CString>,
    architecture: CString,
    quantization: CString,
    backend: CString,
}

impl Model {
    fn new(engine: Engine) -> Self {
        let info = engine.info();
        Self {
            name: info.name.as_deref().map(c_string),
            architecture: c_string(&info.architecture),
            quantization: c_string(&info.quantization),
            backend: c_string(&info.backend),
            engine,
        }
    }

    /// Its strings live as long as `self`.
    fn info(&self) -> ModelInfo {
        let info = self.engine.info();
        let tokenizer = self.engine.tokenizer();
        ModelInfo {
            size: size_of::<ModelInfo>(),
            name: self.name.as_ref().map_or(ptr::null(), |name| name.as_ptr()),
            architecture: self.architecture.as_ptr(),
            quantization: self.quantization.as_ptr(),
            backend: self.backend.as_ptr(),
            parameters: info.parameters,
            size_bytes: info.size_bytes,
            kv_bytes: info.kv_bytes,
            kv_tokens: info.kv_tokens as u64,
            ctx_size: info.ctx_size as u64,
            ctx_train: info.ctx_train as u64,
            vocab_size: info.vocab_size as u32,
            embedding_length: info.embedding_length as u32,
            layers: info.layers as u32,
            bos: tokenizer.bos().unwrap_or(M40LLM_NO_TOKEN),
            eos: tokenizer.eos().unwrap_or(M40LLM_NO_TOKEN),
            reserved: 0,
        }
    }
}

/// C's strings end at a NUL, so one within goes.
fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

/// Opens a GGUF file (of a split one, the first part) and stores a handle, to be freed with
/// m40llm_model_free. Takes seconds; options may be NULL. The file must not change while it is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_model_open(
    path: *const c_char,
    options: *const ModelOptions,
    model: *mut *mut ModelHandle,
) -> Status {
    guard(|| {
        memory::require(model, "model")?;
        // SAFETY: the head of the header asks for a string, and for a struct of the size it says.
        let (path, options) =
            unsafe { (memory::string(path, "path")?, memory::read_options(options, "options")?) };
        let path = path.ok_or_else(|| Failure::invalid("path is NULL"))?;
        // SAFETY: likewise, its string.
        let config = unsafe { options.to_config() }?;
        let engine = Engine::load(Path::new(path), &config, |_| {})
            .map_err(|error| Failure::from(error).about(&format!("cannot open {path}")))?;
        // SAFETY: likewise, a place for a handle.
        unsafe { memory::store(model, MODELS.insert(Model::new(engine)), "model") }
    })
}

/// Fills info, whose size the caller has set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_model_info(model: *const ModelHandle, info: *mut ModelInfo) -> Status {
    guard(|| {
        let model = MODELS.get(model)?;
        // SAFETY: the head of the header asks for a struct of the size it says.
        unsafe { memory::write_struct(info, &model.info(), "info") }
    })
}

/// Frees a model's handle. Sessions made with it go on, and keep the model's memory until they are freed.
/// NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_model_free(model: *mut ModelHandle) -> Status {
    guard(|| MODELS.remove(model).map(drop))
}

/// Token ids of a text of length bytes; flags are M40LLM_ADD_SPECIAL and M40LLM_PARSE_SPECIAL.
/// Stores in count how many there are. When they are more than capacity, that is all it does, and the call
/// returns M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, tokens may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_tokenize(
    model: *const ModelHandle,
    text: *const c_char,
    length: usize,
    flags: u32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Status {
    guard(|| {
        let model = MODELS.get(model)?;
        let (add_special, parse_special) = text_flags(flags)?;
        // SAFETY: the head of the header asks for `length` bytes.
        let text = unsafe { memory::text(text, length, "text") }?;
        let ids = model.engine.tokenizer().encode(text, add_special, parse_special);
        let buffer = Buffer { start: tokens, capacity, count, names: ["tokens", "count"] };
        // SAFETY: likewise, room for `capacity` ids and for a count.
        unsafe { memory::fill(&buffer, &ids, None) }
    })
}

/// The text of count token ids, special tokens printed. Stores in length its bytes, without the NUL that
/// ends it. When length + 1 is more than capacity, that is all it does, and the call returns
/// M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, text may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn m40llm_detokenize(
    model: *const ModelHandle,
    tokens: *const u32,
    count: usize,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> Status {
    guard(|| {
        let model = MODELS.get(model)?;
        // SAFETY: the head of the header asks for `count` ids.
        let ids = unsafe { memory::array(tokens, count, "tokens") }?;
        check_ids(&model.engine, ids)?;
        let bytes = model.engine.tokenizer().decode(ids).into_bytes();
        let buffer = Buffer { start: text.cast::<u8>(), capacity, count: length, names: ["text", "length"] };
        // SAFETY: likewise, room for `capacity` bytes and for a length.
        unsafe { memory::fill(&buffer, &bytes, Some(0)) }
    })
}

/// An error that names the first id outside the vocabulary.
pub(super) fn check_ids(engine: &Engine, ids: &[u32]) -> Result<(), Failure> {
    let size = engine.info().vocab_size;
    match ids.iter().position(|&id| id as usize >= size) {
        Some(at) => Err(Failure::invalid(format!("tokens[{at}] is {}, ids are 0 to {}", ids[at], size - 1))),
        None => Ok(()),
    }
}
