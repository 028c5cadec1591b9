//! Kernels in plain Rust: rows are unpacked into a panel once, then every column is multiplied with it.
//!
//! The AVX2 kernels share all but the dot products; there the compiler vectorises the unpacking.

use half::{f16, slice::HalfFloatSliceExt};

use super::{
    Matrix, TILE_ROWS,
    activations::{Activations, GROUP, LANES, Line, lines_as_bytes, lines_as_u8},
    blocks,
};
use crate::gguf::DType;

/// Bytes of panel that a column of weights takes at most: 32 rows of f32.
pub(super) const PANEL_BYTES_PER_COL: usize = 4 * TILE_ROWS;

/// A panel of quantised rows, cut out of the scratch memory.
struct Panel<'a> {
    q: &'a mut [i8],
    d: &'a mut [f32],
    m: &'a mut [f32],
}

/// Groups with a scale of their own in a row.
fn scales_in_row(weight: &Matrix<'_>) -> usize {
    weight.cols / if blocks::has_sub_groups(weight.dtype) { 16 } else { 32 }
}

fn cut<'a>(weight: &Matrix<'_>, rows: usize, panel: &'a mut [Line]) -> Panel<'a> {
    let scales = rows * scales_in_row(weight);
    let (q, rest) = panel.split_at_mut((rows * weight.cols).div_ceil(64));
    let (d, rest) = rest.split_at_mut(scales.div_ceil(16));
    let m = &mut rest[..scales.div_ceil(16)];
    let q = lines_as_bytes(q);
    // SAFETY: i8 and u8 have the same layout.
    let q = unsafe { std::slice::from_raw_parts_mut(q.as_mut_ptr().cast::<i8>(), q.len()) };
    Panel { q, d: &mut lines_as_f32(d)[..scales], m: &mut lines_as_f32(m)[..scales] }
}

/// The same memory as f32.
fn lines_as_f32(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a line is aligned for f32 and a multiple of its size, and any bits are an f32.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines) / 4) }
}

/// Unpacks `rows` rows from `row0` on.
#[inline(always)]
pub(super) fn prepare(weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    let cols = weight.cols;
    if blocks::is_float(weight.dtype) {
        let out = lines_as_f32(panel);
        for r in 0..rows {
            to_f32(weight.dtype, weight.row(row0 + r), &mut out[r * cols..(r + 1) * cols]);
        }
        return;
    }
    let scales = scales_in_row(weight);
    let panel = cut(weight, rows, panel);
    panel.m.fill(0.0);
    for r in 0..rows {
        let (q, at) = (&mut panel.q[r * cols..(r + 1) * cols], r * scales..(r + 1) * scales);
        blocks::unpack_row(weight.dtype, weight.row(row0 + r), q, &mut panel.d[at.clone()], &mut panel.m[at]);
    }
}

fn to_f32(dtype: DType, row: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => out.iter_mut().zip(row.as_chunks().0).for_each(|(o, b)| *o = f32::from_le_bytes(*b)),
        DType::BF16 => out
            .iter_mut()
            .zip(row.as_chunks().0)
            .for_each(|(o, b)| *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)),
        _ => {
            let mut part = [f16::ZERO; 64];
            for (out, row) in out.chunks_mut(64).zip(row.chunks(128)) {
                part.iter_mut().zip(row.as_chunks().0).for_each(|(p, b)| *p = f16::from_le_bytes(*b));
                part[..out.len()].convert_to_f32_slice(out);
            }
        }
    }
}

/// The dot product of a weight row with an activation row, for one family.
pub(super) trait Dot {
    /// Floats.
    fn floats(w: &[f32], x: &[f32]) -> f32;
    /// Bytes with a scale (`d`, and `m` when there are minima) per 32 columns; `sums` as in `Quantized`.
    fn groups(w: Row<'_>, x: &[u8], dx: &[f32], sums: &[f32]) -> f32;
    /// The same per 16 columns.
    fn sub_groups(w: Row<'_>, x: &[u8], dx: &[f32], sub_sums: &[f32]) -> f32;
}

/// A row of a panel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) q: &'a [i8],
    pub(super) d: &'a [f32],
    pub(super) m: &'a [f32],
}

/// Multiplies the panel with column `col` into `out[row]`.
#[inline(always)]
pub(super) fn column<D: Dot>(
    weight: &Matrix<'_>,
    rows: usize,
    panel: &mut [Line],
    x: &Activations,
    col: usize,
    out: &mut [f32],
) {
    let cols = weight.cols;
    if blocks::is_float(weight.dtype) {
        let x = &x.f32()[col * cols..(col + 1) * cols];
        let panel = lines_as_f32(panel);
        for (out, row) in out[..rows].iter_mut().zip(panel.chunks_exact(cols)) {
            *out = D::floats(row, x);
        }
        return;
    }
    let panel = cut(weight, rows, panel);
    let x = x.quantized();
    let bytes = &lines_as_u8(&x.q[col * x.q_stride..(col + 1) * x.q_stride])[..cols];
    let scales = scales_in_row(weight);
    let groups = col * x.groups..col * x.groups + cols / GROUP;
    let (dx, sums) = (&x.dx[groups.clone()], &x.sums[groups.clone()]);
    let sub_sums = &x.sub_sums[2 * groups.start..2 * groups.end];
    for (r, out) in out[..rows].iter_mut().enumerate() {
        let own = r * scales..(r + 1) * scales;
        let row = Row { q: &panel.q[r * cols..(r + 1) * cols], d: &panel.d[own.clone()], m: &panel.m[own] };
        *out = if blocks::has_sub_groups(weight.dtype) {
            D::sub_groups(row, bytes, dx, sub_sums)
        } else {
            D::groups(row, bytes, dx, sums)
        };
    }
}

/// Plain Rust; multiplications and additions round apart, since a fused one is a library call here.
pub(super) struct Plain;

impl Dot for Plain {
    fn floats(w: &[f32], x: &[f32]) -> f32 {
        let mut acc = [0f32; 16];
        let (w_parts, w_rest) = w.as_chunks::<16>();
        let (x_parts, x_rest) = x.as_chunks::<16>();
        for (w, x) in w_parts.iter().zip(x_parts) {
            for l in 0..16 {
                acc[l] += w[l] * x[l];
            }
        }
        for (acc, (w, x)) in acc.iter_mut().zip(w_rest.iter().zip(x_rest)) {
            *acc += w * x;
        }
        tree_of_columns(&acc)
    }

    fn groups(w: Row<'_>, x: &[u8], dx: &[f32], sums: &[f32]) -> f32 {
        let mut e = [[0f32; 2]; LANES];
        let bytes = w.q.as_chunks::<GROUP>().0.iter().zip(x.as_chunks::<GROUP>().0);
        for (g, (q, x)) in bytes.enumerate() {
            let lane = &mut e[g % LANES];
            lane[0] += dot_bytes(q, x) as f32 * (w.d[g] * dx[g]);
            lane[1] += w.m[g] * sums[g];
        }
        tree(e.map(|[d, m]| d + m))
    }

    fn sub_groups(w: Row<'_>, x: &[u8], dx: &[f32], sub_sums: &[f32]) -> f32 {
        let mut e = [[0f32; 2]; 2 * LANES];
        let bytes = w.q.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0);
        for (g, (q, x)) in bytes.enumerate() {
            let lane = &mut e[g % (2 * LANES)];
            lane[0] += dot_bytes(q, x) as f32 * (w.d[g] * dx[g / 2]);
            lane[1] += w.m[g] * sub_sums[g];
        }
        let e = e.map(|[d, m]| d + m);
        tree(std::array::from_fn(|l| e[2 * l] + e[2 * l + 1]))
    }
}

/// The exact integer sum over one group; `x` are signed bytes.
#[inline(always)]
fn dot_bytes<const N: usize>(w: &[i8; N], x: &[u8; N]) -> i32 {
    w.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x.cast_signed())).sum()
}

/// The canonical sum of eight lanes.
#[inline(always)]
pub(super) fn tree(e: [f32; LANES]) -> f32 {
    ((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7]))
}

/// The canonical sum of the 16 lanes of float types.
#[inline(always)]
pub(super) fn tree_of_columns(acc: &[f32; 16]) -> f32 {
    let quad = |i: usize| (acc[4 * i] + acc[4 * i + 1]) + (acc[4 * i + 2] + acc[4 * i + 3]);
    (quad(0) + quad(2)) + (quad(1) + quad(3))
}
