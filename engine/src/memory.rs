//! How much context fits: the KV pool's size from the model, the configuration and the memory there is.

use crate::{
    config::{EngineConfig, KvType},
    error::EngineError,
    model::ModelConfig,
    sched::{BLOCK_TOKENS, blocks_for},
};

/// The pool and the context it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Longest sequence, in tokens.
    pub ctx_size: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Bytes of keys and values a token takes over all layers.
    pub token_bytes: usize,
}

/// Bytes of keys and values one token takes over all layers.
pub fn kv_bytes_per_token(model: &ModelConfig, kv_type: KvType) -> usize {
    let s = &model.shape;
    2 * s.layers * s.kv_heads * kv_type.bytes(s.head_dim)
}

/// Sizes the pool: every sequence of a full batch at full length if the memory for it holds that (pages
/// never touched cost nothing), else what it holds. That memory is `config.kv_memory`, or the backend's
/// `room`, in bytes.
pub fn plan(model: &ModelConfig, config: &EngineConfig, room: u64) -> Result<Plan, EngineError> {
    let token_bytes = kv_bytes_per_token(model, config.kv_type);
    let memory = config.kv_memory.unwrap_or(room);
    let tokens = (memory / token_bytes as u64) as usize / BLOCK_TOKENS * BLOCK_TOKENS;
    let ctx_size = match config.ctx_size {
        Some(0) => return Err(EngineError::Config("ctx-size must be at least 1".into())),
        Some(asked) if asked > tokens => {
            return Err(EngineError::Config(format!(
                "ctx-size {asked} needs {} MB for keys and values; the {} MB there are for it hold {tokens} tokens: \
                 lower --ctx-size or choose a smaller --kv-type",
                (asked as u64).saturating_mul(token_bytes as u64).div_ceil(1_000_000),
                memory / 1_000_000
            )));
        }
        Some(asked) => asked,
        None => model.ctx_train.min(tokens),
    };
    if ctx_size == 0 {
        return Err(EngineError::Config("there is no memory for keys and values".into()));
    }
    let kv_blocks = blocks_for(ctx_size).saturating_mul(config.max_batch).min(tokens / BLOCK_TOKENS);
    Ok(Plan { ctx_size, kv_blocks, token_bytes })
}

/// Bytes of memory this process may still take: the system's, or its control group's if that is less.
pub fn available() -> u64 {
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
    });
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .map(|max| max.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    // Where neither can be read, plan for a small machine.
    [system, group].into_iter().flatten().min().unwrap_or(4 << 30)
}
