//! Cache-aligned scratch memory.

/// Numbers in a cache line; widths are padded to it.
pub(super) const LINE: usize = 16;

/// Cache-aligned f32 memory. The system commits pages of it as they are touched.
pub(super) struct Buffer {
    /// One line more than asked for, so that an aligned part can be cut out.
    lines: Vec<[f32; LINE]>,
}

impl Buffer {
    /// Zeroes.
    pub(super) fn new(numbers: usize) -> Self {
        Self { lines: vec![[0.0; LINE]; numbers.div_ceil(LINE) + 1] }
    }

    /// All of it, a multiple of [`LINE`] numbers.
    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        let all = self.lines.as_flattened_mut();
        let skip = all.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        let len = all.len() - LINE;
        &mut all[skip..skip + len]
    }
}
