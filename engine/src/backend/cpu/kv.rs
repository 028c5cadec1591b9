//! The paged cache of keys and values.
//!
//! One block holds [`BLOCK_TOKENS`] tokens of one sequence for every layer, and blocks lie one after the
//! other, so that memory is committed in proportion to the blocks ever used: the whole is an anonymous
//! mapping, which costs nothing before it is written.
//!
//! Within a block: `[layer][keys, values][kv_head]`, each such piece with
//! - keys transposed, `[head_dim][BLOCK_TOKENS]`: a score is then a sum of whole vectors over tokens and
//!   needs no horizontal additions;
//! - values as they are, `[BLOCK_TOKENS][head_dim]`.
//!
//! `Q8` keeps one byte a number, then the f16 scales, one per token and [`GROUP`] numbers along the head
//! (the last group may be narrower): keys `[groups][BLOCK_TOKENS]`, values `[BLOCK_TOKENS][groups]`.

use half::{f16, slice::HalfFloatSliceExt};
use memmap2::MmapMut;

use crate::{backend::Shape, config::KvType, error::EngineError, sched::BLOCK_TOKENS};

/// Numbers along a head that share a scale in `Q8`.
pub(super) const GROUP: usize = 32;

/// Keys and values of all sequences. Blocks are named by the scheduler.
pub(super) struct KvCache {
    map: MmapMut,
    kv_type: KvType,
    layers: usize,
    heads: usize,
    head_dim: usize,
    /// Bytes of one head's keys (or values) in a block.
    piece: usize,
}

/// Bytes one head's keys, or values, take in a block.
fn piece_bytes(kv_type: KvType, head_dim: usize) -> usize {
    BLOCK_TOKENS
        * match kv_type {
            KvType::F16 => 2 * head_dim,
            KvType::F32 => 4 * head_dim,
            KvType::Q8 => head_dim + 2 * head_dim.div_ceil(GROUP),
        }
}

/// Which of the two a piece holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Keys,
    Values,
}

impl KvCache {
    /// Reserves `blocks` blocks; the system commits them when they are written.
    pub(super) fn new(shape: &Shape, blocks: usize, kv_type: KvType) -> Result<Self, EngineError> {
        let piece = piece_bytes(kv_type, shape.head_dim);
        let bytes = [shape.layers, 2, shape.kv_heads, piece]
            .into_iter()
            .try_fold(blocks, usize::checked_mul)
            .filter(|&n| n > 0 && isize::try_from(n).is_ok())
            .ok_or_else(|| EngineError::Backend(format!("a KV cache of {blocks} blocks is out of range")))?;
        let map = MmapMut::map_anon(bytes).map_err(|e| {
            EngineError::Backend(format!(
                "cannot reserve {bytes} bytes for the KV cache ({e}); lower --ctx-size or --max-batch"
            ))
        })?;
        Ok(Self {
            map,
            kv_type,
            layers: shape.layers,
            heads: shape.kv_heads,
            head_dim: shape.head_dim,
            piece,
        })
    }

    /// Copies a block, all layers of it.
    pub(super) fn copy(&mut self, from: u32, to: u32) {
        let bytes = self.layers * 2 * self.heads * self.piece;
        let from = from as usize * bytes;
        self.map.copy_within(from..from + bytes, to as usize * bytes);
    }

    /// How numbers are stored.
    pub(super) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    fn offset(&self, block: u32, layer: usize, half: Half, head: usize) -> usize {
        debug_assert!(layer < self.layers && head < self.heads);
        (((block as usize * self.layers + layer) * 2 + usize::from(half == Half::Values)) * self.heads + head)
            * self.piece
    }

    /// One head's keys in a block, as laid out above.
    pub(super) fn keys(&self, block: u32, layer: usize, head: usize) -> &[u8] {
        let at = self.offset(block, layer, Half::Keys, head);
        &self.map[at..at + self.piece]
    }

    /// One head's values in a block, as laid out above.
    pub(super) fn values(&self, block: u32, layer: usize, head: usize) -> &[u8] {
        let at = self.offset(block, layer, Half::Values, head);
        &self.map[at..at + self.piece]
    }

    /// A view that several threads may write through.
    pub(super) fn writer(&mut self) -> KvWriter<'_> {
        KvWriter { base: self.map.as_mut_ptr(), cache: self }
    }

    /// Reads one token's key back, `[head_dim]`.
    pub(super) fn load_key(&self, block: u32, layer: usize, head: usize, slot: usize, out: &mut [f32]) {
        let piece = self.keys(block, layer, head);
        for (d, value) in out.iter_mut().enumerate() {
            let scale = || d / GROUP * BLOCK_TOKENS + slot;
            *value = self.number(piece, d * BLOCK_TOKENS + slot, scale);
        }
    }

    /// Reads one token's value back, `[head_dim]`.
    pub(super) fn load_value(&self, block: u32, layer: usize, head: usize, slot: usize, out: &mut [f32]) {
        let piece = self.values(block, layer, head);
        let groups = self.head_dim.div_ceil(GROUP);
        for (d, value) in out.iter_mut().enumerate() {
            *value = self.number(piece, slot * self.head_dim + d, || slot * groups + d / GROUP);
        }
    }

    /// The number at `index` of a piece; `scale` is its scale's index, where there are scales.
    fn number(&self, piece: &[u8], index: usize, scale: impl Fn() -> usize) -> f32 {
        let half_at = |byte: usize| f16::from_ne_bytes([piece[byte], piece[byte + 1]]).to_f32();
        match self.kv_type {
            KvType::F16 => half_at(2 * index),
            KvType::F32 => f32::from_ne_bytes(std::array::from_fn(|i| piece[4 * index + i])),
            KvType::Q8 => f32::from(piece[index] as i8) * half_at(BLOCK_TOKENS * self.head_dim + 2 * scale()),
        }
    }
}

/// Writes tokens into the cache, from several threads at once.
#[derive(Clone, Copy)]
pub(super) struct KvWriter<'a> {
    base: *mut u8,
    cache: &'a KvCache,
}

// SAFETY: the pointer is to the cache's mapping, which the borrow keeps alive; concurrent writes go to
// different tokens, as `KvWriter::store` demands of its callers.
unsafe impl Send for KvWriter<'_> {}
// SAFETY: as for `Send`.
unsafe impl Sync for KvWriter<'_> {}

impl KvWriter<'_> {
    /// Stores one token's key and value of one head, `[head_dim]` each, at `slot` of `block`.
    ///
    /// Half precision saturates at its largest finite number, so that a masked key or value times zero
    /// is always zero.
    ///
    /// # Safety
    /// `block` is one of the cache's, and no other thread reads or writes this token of this head.
    pub(super) unsafe fn store(
        self,
        block: u32,
        layer: usize,
        head: usize,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let cache = self.cache;
        assert!(slot < BLOCK_TOKENS && key.len() == cache.head_dim && value.len() == cache.head_dim);
        let keys = cache.offset(block, layer, Half::Keys, head);
        let values = cache.offset(block, layer, Half::Values, head);
        assert!(keys.max(values) + cache.piece <= cache.map.len());
        let groups = cache.head_dim.div_ceil(GROUP);
        for g in 0..groups {
            let first = g * GROUP;
            let last = (first + GROUP).min(cache.head_dim);
            // SAFETY: both pieces lie inside the mapping (asserted), the indices inside a piece by its
            // layout, and nobody else touches this token.
            unsafe {
                let strided = Run {
                    piece: self.base.add(keys),
                    first: first * BLOCK_TOKENS + slot,
                    stride: BLOCK_TOKENS,
                };
                strided.store(cache, &key[first..last], g * BLOCK_TOKENS + slot);
                let dense =
                    Run { piece: self.base.add(values), first: slot * cache.head_dim + first, stride: 1 };
                dense.store(cache, &value[first..last], slot * groups + g);
            }
        }
    }
}

/// Where up to [`GROUP`] numbers go: every `stride`-th of a piece, from `first`.
struct Run {
    piece: *mut u8,
    first: usize,
    stride: usize,
}

impl Run {
    /// # Safety
    /// The run and the scale lie inside the piece, and nobody else accesses them.
    unsafe fn store(&self, cache: &KvCache, numbers: &[f32], scale_at: usize) {
        match cache.kv_type {
            KvType::F32 => {
                // SAFETY: the caller's promise.
                unsafe { self.scatter(numbers) }
            }
            KvType::F16 => {
                let limit = f16::MAX.to_f32();
                let mut clamped = [0f32; GROUP];
                let mut halves = [f16::ZERO; GROUP];
                for (c, n) in clamped.iter_mut().zip(numbers) {
                    *c = n.clamp(-limit, limit);
                }
                halves.convert_from_f32_slice(&clamped);
                // SAFETY: the caller's promise.
                unsafe { self.scatter(&halves[..numbers.len()]) }
            }
            KvType::Q8 => {
                let largest = numbers.iter().fold(0f32, |m, n| m.max(n.abs())).min(f16::MAX.to_f32() * 127.0);
                let scale = f16::from_f32(largest / 127.0);
                let inverse = if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() };
                let mut bytes = [0i8; GROUP];
                for (b, n) in bytes.iter_mut().zip(numbers) {
                    *b = (n * inverse).round().clamp(-127.0, 127.0) as i8;
                }
                // SAFETY: the caller's promise; scales begin after the piece's bytes.
                unsafe {
                    self.scatter(&bytes[..numbers.len()]);
                    let scales = self.piece.add(BLOCK_TOKENS * cache.head_dim).cast::<[u8; 2]>();
                    scales.add(scale_at).write(scale.to_ne_bytes());
                }
            }
        }
    }

    /// # Safety
    /// As for `store`.
    unsafe fn scatter<T: Copy>(&self, numbers: &[T]) {
        let out = self.piece.cast::<T>();
        for (i, &n) in numbers.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { out.add(self.first + i * self.stride).write_unaligned(n) };
        }
    }
}
