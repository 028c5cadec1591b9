//! Cache-aligned scratch memory.

/// Numbers in a cache line; widths are padded to it.
pub(super) const LINE: usize = 16;

/// One cache line of f32.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([f32; LINE]);

/// Cache-aligned f32 memory.
pub(super) struct Buffer(Vec<Line>);

impl Buffer {
    /// Zeroes.
    pub(super) fn new(numbers: usize) -> Self {
        Self(vec![Line([0.0; LINE]); numbers.div_ceil(LINE)])
    }

    /// All of it, a multiple of [`LINE`] numbers.
    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        let lines = &mut self.0;
        // SAFETY: `Line` is 16 f32 without padding.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE) }
    }
}
