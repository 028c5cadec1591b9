//! The right-hand side of a product: f32 rows and, made on demand, their 8-bit form.
//!
//! Each group of 32 columns becomes `x ≈ dx * q` with `dx = max|x| / 127` and `q` rounded to nearest
//! even, so |x - dx q| <= dx / 2 for each element.

use super::super::pool::{Pool, SharedMut};

/// Columns that share one activation scale.
pub(super) const GROUP: usize = 32;
/// Columns a SIMD kernel reads at a time; 8-bit rows are padded to it with zeros.
pub(super) const CHUNK: usize = 256;
/// Groups in a chunk, and lanes of the canonical sum.
pub(super) const LANES: usize = CHUNK / GROUP;

/// A cache line; gives buffers their alignment.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(super) struct Line(pub(super) [u8; 64]);

impl Line {
    pub(super) const ZERO: Self = Self([0; 64]);
}

/// One row's 256 columns as the row-times-vector kernels read them.
///
/// `q`: first halves of groups 0-3, their second halves, then the same of groups 4-7.
/// `scale` and `sub_sum`, entries `4 i ..`: of groups `i` and `4 + i`, two each, which are the lanes that
/// the canonical sum adds first (see the parent module).
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) q: [i8; CHUNK],
    /// `[dx_i, s_i, dx_{4+i}, s_{4+i}]`, `s` being `dx` times the group's sum of `q`.
    pub(super) scale: [f32; 16],
    /// `dx` times the sums of the groups' halves: `[a_i, b_i, a_{4+i}, b_{4+i}]`.
    pub(super) sub_sum: [f32; 16],
}

/// How the 8-bit form lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Signed bytes in order.
    Signed,
    /// The same plus 128, unsigned, for instructions that want the other factor signed.
    Unsigned,
    /// [`Chunk`]s.
    Chunks,
}

/// Rows beyond which no kernel asks for [`Form::Chunks`].
pub(super) const MAX_CHUNK_ROWS: usize = 8;

/// f32 rows `[rows, cols]` and their 8-bit form, in memory taken once.
#[derive(Debug)]
pub struct Activations {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
    form: Option<Form>,
    q: Vec<Line>,
    /// Per row and group: `dx`.
    dx: Vec<f32>,
    /// Per row and group: `dx` times the sum of `q`.
    sums: Vec<f32>,
    /// The same for each half group.
    sub_sums: Vec<f32>,
}

/// The 8-bit form, for reading.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quantized<'a> {
    /// Bytes or chunks, by the form asked for.
    pub(super) q: &'a [Line],
    /// Lines from one row to the next.
    pub(super) q_stride: usize,
    pub(super) dx: &'a [f32],
    pub(super) sums: &'a [f32],
    pub(super) sub_sums: &'a [f32],
    /// Groups from one row to the next, a multiple of [`LANES`].
    pub(super) groups: usize,
}

impl Activations {
    /// Room for `max_rows` rows of up to `max_cols` columns.
    pub fn new(max_rows: usize, max_cols: usize) -> Self {
        let chunks = max_cols.div_ceil(CHUNK);
        let chunk_lines = size_of::<Chunk>() / size_of::<Line>();
        let lines =
            (max_rows * CHUNK / size_of::<Line>()).max(max_rows.min(MAX_CHUNK_ROWS) * chunk_lines) * chunks;
        let groups = max_rows * chunks * LANES;
        Self {
            rows: 0,
            cols: 0,
            values: vec![0.0; max_rows * max_cols],
            form: None,
            q: vec![Line::ZERO; lines],
            dx: vec![0.0; groups],
            sums: vec![0.0; groups],
            sub_sums: vec![0.0; 2 * groups],
        }
    }

    /// Hands out `[rows, cols]` to be filled; what was there is forgotten.
    ///
    /// # Panics
    /// When the rows do not fit in what `new` made room for.
    pub fn set(&mut self, rows: usize, cols: usize) -> &mut [f32] {
        assert!(
            rows * cols <= self.values.len(),
            "{rows}x{cols} activations in room for {}",
            self.values.len()
        );
        (self.rows, self.cols, self.form) = (rows, cols, None);
        &mut self.values[..rows * cols]
    }

    /// The f32 rows.
    pub fn f32(&self) -> &[f32] {
        &self.values[..self.rows * self.cols]
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// A row's length.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The 8-bit values and group scales of a row, `q` in column order and one scale per 32 columns,
    /// exactly as the kernels use them; for tests and error analysis. `cols` is a multiple of 32.
    pub fn quantized_row(&self, row: usize) -> (Vec<i8>, Vec<f32>) {
        let values = &self.f32()[row * self.cols..(row + 1) * self.cols];
        let mut q = vec![0; self.cols];
        let mut scales = Vec::with_capacity(self.cols / GROUP);
        for (x, q) in values.as_chunks::<GROUP>().0.iter().zip(q.as_chunks_mut::<GROUP>().0) {
            scales.push(quantize_group(x, q));
        }
        (q, scales)
    }

    /// Makes the 8-bit form unless it is there.
    pub(super) fn quantize(&mut self, form: Form, pool: &Pool) {
        if self.form == Some(form) {
            return;
        }
        self.form = Some(form);
        let (rows, cols) = (self.rows, self.cols);
        debug_assert!(cols.is_multiple_of(GROUP), "quantised weights have whole blocks");
        let stride = self.q_stride(form);
        let groups = cols.div_ceil(CHUNK) * LANES;
        let q = SharedMut::new(&mut self.q[..rows * stride]);
        let dx = SharedMut::new(&mut self.dx[..rows * groups]);
        let sums = SharedMut::new(&mut self.sums[..rows * groups]);
        let sub_sums = SharedMut::new(&mut self.sub_sums[..rows * groups * 2]);
        let values = &self.values;
        let one = |row: usize, _| {
            // SAFETY: the four buffers were sliced to `rows` such parts above, and each row is one item.
            let mut target = unsafe {
                Target {
                    q: q.part(row * stride, stride),
                    dx: dx.part(row * groups, groups),
                    sums: sums.part(row * groups, groups),
                    sub_sums: sub_sums.part(2 * row * groups, 2 * groups),
                }
            };
            quantize_row(form, &values[row * cols..(row + 1) * cols], &mut target);
        };
        if rows * cols < 16 * 1024 {
            (0..rows).for_each(|row| one(row, 0));
        } else {
            pool.for_each(rows, one);
        }
    }

    /// The 8-bit form made last.
    pub(super) fn quantized(&self) -> Quantized<'_> {
        let form = self.form.expect("quantize was called");
        Quantized {
            q: &self.q,
            q_stride: self.q_stride(form),
            dx: &self.dx,
            sums: &self.sums,
            sub_sums: &self.sub_sums,
            groups: self.cols.div_ceil(CHUNK) * LANES,
        }
    }

    fn q_stride(&self, form: Form) -> usize {
        let chunk = if form == Form::Chunks { size_of::<Chunk>() } else { CHUNK };
        self.cols.div_ceil(CHUNK) * chunk / size_of::<Line>()
    }
}

/// Where one row's 8-bit form goes.
struct Target<'a> {
    q: &'a mut [Line],
    dx: &'a mut [f32],
    sums: &'a mut [f32],
    sub_sums: &'a mut [f32],
}

fn quantize_row(form: Form, values: &[f32], target: &mut Target<'_>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just found.
        unsafe { quantize_row_avx2(form, values, target) };
        return;
    }
    quantize_row_any(form, values, target);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_row_avx2(form: Form, values: &[f32], target: &mut Target<'_>) {
    quantize_row_any(form, values, target);
}

#[inline(always)]
fn quantize_row_any(form: Form, values: &[f32], target: &mut Target<'_>) {
    let (groups, _) = values.as_chunks::<GROUP>();
    let bytes = lines_as_bytes(target.q);
    for g in 0..target.dx.len() {
        let mut q = [0i8; GROUP];
        let dx = if let Some(x) = groups.get(g) { quantize_group(x, &mut q) } else { 0.0 };
        let half = |h: usize| q[16 * h..16 * h + 16].iter().map(|&q| i32::from(q)).sum::<i32>();
        let (a, b) = (half(0), half(1));
        let sum = dx * (a + b) as f32;
        let sub = [dx * a as f32, dx * b as f32];
        target.dx[g] = dx;
        target.sums[g] = sum;
        target.sub_sums[2 * g..2 * g + 2].copy_from_slice(&sub);
        match form {
            Form::Signed | Form::Unsigned => {
                let flip = if form == Form::Unsigned { 0x80 } else { 0 };
                for (to, q) in bytes[g * GROUP..(g + 1) * GROUP].iter_mut().zip(q) {
                    *to = q.cast_unsigned() ^ flip;
                }
            }
            Form::Chunks => {
                let chunk = &mut bytes[g / LANES * size_of::<Chunk>()..][..size_of::<Chunk>()];
                put_in_chunk(chunk, g % LANES, &q, [dx, sum], sub);
            }
        }
    }
}

/// Writes a group's part of a [`Chunk`].
#[inline(always)]
fn put_in_chunk(chunk: &mut [u8], lane: usize, q: &[i8; GROUP], scale: [f32; 2], sub: [f32; 2]) {
    let at = lane / 4 * 128 + lane % 4 * 16;
    for i in 0..16 {
        chunk[at + i] = q[i].cast_unsigned();
        chunk[at + 64 + i] = q[16 + i].cast_unsigned();
    }
    let mut put = |base: usize, pair: [f32; 2]| {
        let at = base + 4 * (lane % 4 * 4 + lane / 4 * 2);
        chunk[at..at + 4].copy_from_slice(&pair[0].to_ne_bytes());
        chunk[at + 4..at + 8].copy_from_slice(&pair[1].to_ne_bytes());
    };
    put(CHUNK, scale);
    put(CHUNK + 64, sub);
}

/// Quantises 32 values and returns their scale.
#[inline(always)]
fn quantize_group(x: &[f32; GROUP], q: &mut [i8; GROUP]) -> f32 {
    // Adding and taking away 1.5 * 2^23 rounds to nearest even without a library call.
    const ROUND: f32 = 12_582_912.0;
    let mut largest = [0f32; 8];
    for part in x.as_chunks::<8>().0 {
        for (l, x) in largest.iter_mut().zip(part) {
            *l = if x.abs() > *l { x.abs() } else { *l };
        }
    }
    let largest = largest.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    // A subnormal maximum has no finite inverse; such a group counts as zero.
    let inverse = if inverse < f32::INFINITY { inverse } else { 0.0 };
    for (q, x) in q.iter_mut().zip(x) {
        let rounded = (x * inverse + ROUND) - ROUND;
        *q = rounded as i32 as i8;
    }
    largest / 127.0
}

/// The same memory as bytes.
pub(super) fn lines_as_bytes(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: `Line` is 64 plain bytes without padding, and u8 has no alignment.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

/// The same memory as bytes, for reading.
pub(super) fn lines_as_u8(lines: &[Line]) -> &[u8] {
    // SAFETY: as in `lines_as_bytes`.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}
