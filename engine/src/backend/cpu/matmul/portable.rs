//! Kernels in plain Rust: rows are unpacked into a panel once, then every column is multiplied with it.
//!
//! Compiled twice: as it is, and with AVX2 and FMA switched on, where the compiler vectorises it.

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

/// Multiplies the panel with column `col` into `out[row]`.
#[inline(always)]
pub(super) fn column<const FMA: bool>(
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
            *out = dot_f32::<FMA>(row, x);
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
        let q = &panel.q[r * cols..(r + 1) * cols];
        let (d, m) = (&panel.d[r * scales..(r + 1) * scales], &panel.m[r * scales..(r + 1) * scales]);
        *out = if blocks::has_sub_groups(weight.dtype) {
            dot_sub_groups::<FMA>(q, bytes, d, m, dx, sub_sums)
        } else {
            dot_groups::<FMA>(q, bytes, d, m, dx, sums)
        };
    }
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The exact integer sum over one group; `x` are signed bytes.
#[inline(always)]
fn dot_bytes(w: &[i8], x: &[u8]) -> i32 {
    w.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x.cast_signed())).sum()
}

#[inline(always)]
fn dot_groups<const FMA: bool>(q: &[i8], x: &[u8], d: &[f32], m: &[f32], dx: &[f32], sums: &[f32]) -> f32 {
    let (mut acc_d, mut acc_m) = ([0f32; LANES], [0f32; LANES]);
    let bytes = q.as_chunks::<GROUP>().0.iter().zip(x.as_chunks::<GROUP>().0);
    for (g, (q, x)) in bytes.enumerate() {
        let lane = g % LANES;
        acc_d[lane] = fma::<FMA>(dot_bytes(q, x) as f32, d[g] * dx[g], acc_d[lane]);
        acc_m[lane] = fma::<FMA>(m[g], sums[g], acc_m[lane]);
    }
    tree(std::array::from_fn(|l| acc_d[l] + acc_m[l]))
}

#[inline(always)]
fn dot_sub_groups<const FMA: bool>(q: &[i8], x: &[u8], d: &[f32], m: &[f32], dx: &[f32], sub_sums: &[f32]) -> f32 {
    let (mut acc_d, mut acc_m) = ([0f32; 2 * LANES], [0f32; 2 * LANES]);
    let bytes = q.as_chunks::<16>().0.iter().zip(x.as_chunks::<16>().0);
    for (g, (q, x)) in bytes.enumerate() {
        let lane = g % (2 * LANES);
        acc_d[lane] = fma::<FMA>(dot_bytes(q, x) as f32, d[g] * dx[g / 2], acc_d[lane]);
        acc_m[lane] = fma::<FMA>(m[g], sub_sums[g], acc_m[lane]);
    }
    tree(std::array::from_fn(|l| (acc_d[2 * l] + acc_m[2 * l]) + (acc_d[2 * l + 1] + acc_m[2 * l + 1])))
}

/// The canonical sum of eight lanes.
#[inline(always)]
fn tree(e: [f32; LANES]) -> f32 {
    ((e[0] + e[4]) + (e[2] + e[6])) + ((e[1] + e[5]) + (e[3] + e[7]))
}

#[inline(always)]
fn dot_f32<const FMA: bool>(w: &[f32], x: &[f32]) -> f32 {
    let mut acc = [0f32; 16];
    let (w_parts, w_rest) = w.as_chunks::<16>();
    let (x_parts, x_rest) = x.as_chunks::<16>();
    for (w, x) in w_parts.iter().zip(x_parts) {
        for l in 0..16 {
            acc[l] = fma::<FMA>(w[l], x[l], acc[l]);
        }
    }
    for (l, (w, x)) in w_rest.iter().zip(x_rest).enumerate() {
        acc[l] = fma::<FMA>(*w, *x, acc[l]);
    }
    // The order of the AVX-512 kernels' reduction, see `reduce` there.
    let pair = |l: usize| acc[4 * l] + acc[4 * l + 1];
    let other = |l: usize| acc[4 * l + 2] + acc[4 * l + 3];
    let quad = |l: usize| pair(l) + other(l);
    (quad(0) + quad(2)) + (quad(1) + quad(3))
}
