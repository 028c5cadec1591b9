//! Panels of 32 weight rows times many activation rows: what prompts spend their time in.
//!
//! A panel has one [`Record`] a group of 32 columns, in the order in which the canonical sum visits them
//! (lane by lane). In it a vector holds four columns of 16 rows, so a dot product's lanes are rows.

use std::arch::x86_64::*;

use super::{
    super::{
        Matrix, TILE_COLS, TILE_ROWS, Tile,
        activations::{Activations, CHUNK, GROUP, LANES, Line, Quantized},
    },
    unpack::Format,
};

/// The lanes in the order that adds up to the canonical tree with a stack of partial sums.
const LANE_ORDER: [usize; LANES] = [0, 4, 2, 6, 1, 5, 3, 7];

/// One group of 32 columns of 32 rows; `[..][2]` are rows 0-15 and 16-31.
#[repr(C, align(64))]
struct Record {
    /// Signed weights, four columns of 16 rows a vector.
    q: [[[i8; 64]; 2]; 8],
    /// For each half: -128 times its (or with groups, the whole) sum of weights, since activations
    /// come with 128 added.
    start: [[[i32; 16]; 2]; 2],
    /// Scales of the group or of its halves.
    d: [[[f32; 16]; 2]; 2],
    /// Minima likewise.
    m: [[[f32; 16]; 2]; 2],
}

/// Where a group's record lies, among `groups`.
fn place(group: usize, groups: usize) -> usize {
    let lane = group % LANES;
    let before: usize = LANE_ORDER.iter().take_while(|&&l| l != lane).map(|&l| in_lane(l, groups)).sum();
    before + group / LANES
}

/// How many groups a lane has.
fn in_lane(lane: usize, groups: usize) -> usize {
    (groups + LANES - 1 - lane) / LANES
}

/// Unpacks `rows` rows from `row0` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn fill<F: Format>(weight: &Matrix<'_>, row0: usize, rows: usize, panel: &mut [Line]) {
    let groups = weight.cols / GROUP;
    assert!(size_of_val(panel) >= groups * size_of::<Record>());
    let records = panel.as_mut_ptr().cast::<Record>();
    for chunk in 0..weight.cols.div_ceil(CHUNK) {
        let valid = (groups - chunk * LANES).min(LANES);
        let places: [usize; LANES] =
            std::array::from_fn(|l| if l < valid { place(chunk * LANES + l, groups) } else { 0 });
        for side in 0..2 {
            let count = rows.saturating_sub(16 * side).min(16);
            // SAFETY: features as ours; rows have this chunk; places are below `groups`.
            unsafe {
                fill_chunk::<F>(
                    weight,
                    row0 + 16 * side,
                    count,
                    chunk,
                    valid,
                    |l| records.add(places[l]),
                    side,
                );
            };
        }
    }
}

/// Sixteen rows of one chunk; rows from `count` on get scales of zero.
///
/// # Safety
/// `record` yields valid pointers for lanes below `valid`; the rows have these groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn fill_chunk<F: Format>(
    weight: &Matrix<'_>,
    row0: usize,
    count: usize,
    chunk: usize,
    valid: usize,
    record: impl Fn(usize) -> *mut Record,
    side: usize,
) {
    let zero = _mm512_setzero_si512();
    let offset = _mm512_set1_epi8(F::OFFSET);
    let stride = weight.dtype.row_bytes(weight.cols);
    let first = weight.bytes.as_ptr().wrapping_add(row0 * stride + chunk * F::CHUNK);
    let row = |r: usize| first.wrapping_add(r * stride);
    for r in 0..count {
        // The row that comes sixteen later, of this panel or the next: rows come in turns, which no hardware foresees.
        for line in 0..F::CHUNK.div_ceil(64) {
            _mm_prefetch::<_MM_HINT_T0>(row(r + 16).wrapping_add(line * 64).cast());
        }
    }
    for half in 0..valid.div_ceil(4) {
        let groups = if valid == LANES { LANES } else { valid };
        let (mut a, mut b) = ([zero; 16], [zero; 16]);
        // SAFETY: features as ours; the chunk has `valid` groups in each of `count` rows.
        unsafe {
            if F::PACKED {
                for (r, a) in a.iter_mut().enumerate() {
                    *a = if r < count { F::packed(row(r), half, groups) } else { zero };
                }
                a = transpose(&a);
                for (a, b) in a.iter_mut().zip(&mut b) {
                    [*a, *b] = F::unpack(*a);
                }
            } else {
                for (r, (a, b)) in a.iter_mut().zip(&mut b).enumerate() {
                    [*a, *b] = if r < count { F::bytes(row(r), half, groups) } else { [zero; 2] };
                }
                (a, b) = (transpose(&a), transpose(&b));
            }
        }
        for i in 0..(valid - 4 * half).min(4) {
            // SAFETY: a valid record.
            unsafe {
                let record = record(4 * half + i);
                let first = put(&a[4 * i..4 * i + 4], offset, &raw mut (*record).q, 0, side);
                let second = put(&b[4 * i..4 * i + 4], offset, &raw mut (*record).q, 4, side);
                let to = &raw mut (*record).start;
                if F::SUB_GROUPS {
                    _mm512_store_si512((&raw mut (*to)[0][side]).cast(), first);
                    _mm512_store_si512((&raw mut (*to)[1][side]).cast(), second);
                } else {
                    _mm512_store_si512((&raw mut (*to)[0][side]).cast(), _mm512_add_epi32(first, second));
                }
            }
        }
    }
    let (mut scales, mut minima) = ([zero; 16], [zero; 16]);
    for (r, (scales, minima)) in scales.iter_mut().zip(&mut minima).enumerate() {
        if r < count {
            // SAFETY: as above.
            unsafe {
                *scales = _mm512_castps_si512(F::scales(row(r), valid));
                if F::SUB_GROUPS && F::MIN {
                    *minima = _mm512_castps_si512(F::sub_minima(row(r)));
                }
            }
        }
    }
    let scales = transpose(&scales);
    let minima = if F::SUB_GROUPS && F::MIN { transpose(&minima) } else { [zero; 16] };
    for lane in 0..valid {
        let at = lane % 4 * 4 + lane / 4 * 2;
        let record = record(lane);
        // SAFETY: a valid record.
        unsafe {
            let (d, m) = (&raw mut (*record).d, &raw mut (*record).m);
            _mm512_store_si512((&raw mut (*d)[0][side]).cast(), scales[at]);
            if F::SUB_GROUPS {
                _mm512_store_si512((&raw mut (*d)[1][side]).cast(), scales[at + 1]);
                if F::MIN {
                    _mm512_store_si512((&raw mut (*m)[0][side]).cast(), minima[at]);
                    _mm512_store_si512((&raw mut (*m)[1][side]).cast(), minima[at + 1]);
                }
            } else if F::MIN {
                _mm512_store_si512((&raw mut (*m)[0][side]).cast(), scales[at + 1]);
            }
        }
    }
}

/// Four vectors of a record from `q[from]` on, less the offset; yields -128 times their sums.
///
/// # Safety
/// `q` is a valid record's.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn put(
    columns: &[__m512i],
    offset: __m512i,
    q: *mut [[[i8; 64]; 2]; 8],
    from: usize,
    side: usize,
) -> __m512i {
    let mut sum = _mm512_setzero_si512();
    for (j, v) in columns.iter().enumerate() {
        let v = _mm512_sub_epi8(*v, offset);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), v);
        // SAFETY: the field is a vector's size.
        unsafe { _mm512_store_si512((&raw mut (*q)[from + j][side]).cast(), v) };
    }
    _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sum))
}

/// Transposes 16 by 16 double words.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn transpose(v: &[__m512i; 16]) -> [__m512i; 16] {
    let mut a = *v;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    // b[4 q + j]: in 128-bit lane l, column 4 l + j of rows 4 q ..
    let mut b = a;
    for q in 0..4 {
        b[4 * q] = _mm512_unpacklo_epi64(a[4 * q], a[4 * q + 2]);
        b[4 * q + 1] = _mm512_unpackhi_epi64(a[4 * q], a[4 * q + 2]);
        b[4 * q + 2] = _mm512_unpacklo_epi64(a[4 * q + 1], a[4 * q + 3]);
        b[4 * q + 3] = _mm512_unpackhi_epi64(a[4 * q + 1], a[4 * q + 3]);
    }
    let mut c = b;
    for j in 0..4 {
        let low = (
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[4 + j]),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]),
        );
        let high = (
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[4 + j]),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]),
        );
        c[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low.0, low.1);
        c[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low.0, low.1);
        c[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(high.0, high.1);
        c[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(high.0, high.1);
    }
    c
}

/// Results to `out[c * TILE_ROWS + r]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn multiply<F: Format>(t: &Tile<'_, '_>, panel: &[Line], x: &Activations, out: &mut [f32]) {
    let x = x.quantized();
    match t.cols {
        1 => columns::<F, 1>(t, panel, &x, out),
        2 => columns::<F, 2>(t, panel, &x, out),
        3 => columns::<F, 3>(t, panel, &x, out),
        4 => columns::<F, 4>(t, panel, &x, out),
        5 => columns::<F, 5>(t, panel, &x, out),
        _ => columns::<F, 6>(t, panel, &x, out),
    }
}

/// Sums for 32 rows of `N` columns.
type Sums<const N: usize> = [[__m512; 2]; N];

#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn columns<F: Format, const N: usize>(t: &Tile<'_, '_>, panel: &[Line], x: &Quantized<'_>, out: &mut [f32]) {
    let groups = t.weight.cols / GROUP;
    assert!(t.cols == N && N <= TILE_COLS && out.len() >= N * TILE_ROWS);
    assert!(size_of_val(panel) >= groups * size_of::<Record>());
    let row = |n: usize| t.col + n;
    let columns: [Column; N] = std::array::from_fn(|n| Column {
        q: x.q[row(n) * x.q_stride..].as_ptr().cast(),
        dx: x.dx[row(n) * x.groups..].as_ptr(),
        sums: x.sums[row(n) * x.groups..].as_ptr(),
        sub_sums: x.sub_sums[2 * row(n) * x.groups..].as_ptr(),
    });
    let mut record = panel.as_ptr().cast::<Record>();
    let zero = [[_mm512_setzero_ps(); 2]; N];
    // Partial sums of 1, 2, 4 and 8 lanes, a binary counter: lanes come so that this is the tree.
    let mut partial = [zero; 4];
    for (i, lane) in LANE_ORDER.into_iter().enumerate() {
        let count = in_lane(lane, groups);
        // SAFETY: features as ours; the panel has `count` records here, the columns all groups.
        let mut e = unsafe { lane_sum::<F, N>(record, &columns, lane, count) };
        record = record.wrapping_add(count);
        let level = i.trailing_ones() as usize;
        for partial in &partial[..level] {
            e = add(e, *partial);
        }
        partial[level] = e;
    }
    for (n, sums) in partial[3].into_iter().enumerate() {
        for (side, sum) in sums.into_iter().enumerate() {
            // A sum that is -0 is +0 in the other kernels, which add it to an empty lane.
            let sum = _mm512_add_ps(sum, _mm512_setzero_ps());
            let to = &mut out[n * TILE_ROWS + 16 * side..][..16];
            // SAFETY: `to` is 16 floats.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), sum) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn add<const N: usize>(mut a: Sums<N>, b: Sums<N>) -> Sums<N> {
    for (a, b) in a.iter_mut().zip(b) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = _mm512_add_ps(*a, b);
        }
    }
    a
}

/// One activation row.
struct Column {
    /// Bytes plus 128.
    q: *const i32,
    dx: *const f32,
    sums: *const f32,
    sub_sums: *const f32,
}

/// The sum of one lane's groups, minima and half groups included.
///
/// # Safety
/// `record` points to `count` records; the columns have groups up to `lane + 8 (count - 1)`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn lane_sum<F: Format, const N: usize>(
    record: *const Record,
    columns: &[Column; N],
    lane: usize,
    count: usize,
) -> Sums<N> {
    // SAFETY: passed on.
    unsafe {
        if F::SUB_GROUPS {
            let mut a = dots::<N, 0, 4>(record, columns, lane, count);
            let mut b = dots::<N, 4, 8>(record, columns, lane, count);
            if F::MIN {
                a = add(a, minima::<N, 0, true>(record, columns, lane, count));
                b = add(b, minima::<N, 1, true>(record, columns, lane, count));
            }
            return add(a, b);
        }
        let sum = dots::<N, 0, 8>(record, columns, lane, count);
        if F::MIN { add(sum, minima::<N, 0, false>(record, columns, lane, count)) } else { sum }
    }
}

/// `fma(dot, d * dx, acc)` over a lane's groups, from quarter words `FROM` to `TO` of each group.
///
/// # Safety
/// As [`lane_sum`].
#[inline(always)]
unsafe fn dots<const N: usize, const FROM: usize, const TO: usize>(
    record: *const Record,
    columns: &[Column; N],
    lane: usize,
    count: usize,
) -> Sums<N> {
    // SAFETY: records and groups are there, the caller says.
    unsafe {
        let half = FROM / 4;
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for c in 0..count {
            let group = lane + LANES * c;
            let record = &*record.add(c);
            let load = |p: &[i8; 64]| _mm512_load_si512(p.as_ptr().cast());
            let start = |side: usize| _mm512_load_si512(record.start[half][side].as_ptr().cast());
            let mut dot = [[start(0), start(1)]; N];
            for j in FROM..TO {
                let w = [load(&record.q[j][0]), load(&record.q[j][1])];
                for n in 0..N {
                    let x = _mm512_set1_epi32(columns[n].q.add(8 * group + j).read());
                    dot[n][0] = _mm512_dpbusd_epi32(dot[n][0], x, w[0]);
                    dot[n][1] = _mm512_dpbusd_epi32(dot[n][1], x, w[1]);
                }
            }
            let d = |side: usize| _mm512_load_ps(record.d[half][side].as_ptr());
            let d = [d(0), d(1)];
            for n in 0..N {
                let dx = _mm512_set1_ps(columns[n].dx.add(group).read());
                for side in 0..2 {
                    let dot = _mm512_cvtepi32_ps(dot[n][side]);
                    acc[n][side] = _mm512_fmadd_ps(dot, _mm512_mul_ps(d[side], dx), acc[n][side]);
                }
            }
        }
        acc
    }
}

/// `fma(m, dx * sum, acc)` over a lane's groups, or over their halves `HALF` with `SUB`.
///
/// # Safety
/// As [`lane_sum`].
#[inline(always)]
unsafe fn minima<const N: usize, const HALF: usize, const SUB: bool>(
    record: *const Record,
    columns: &[Column; N],
    lane: usize,
    count: usize,
) -> Sums<N> {
    // SAFETY: as in `dots`.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); 2]; N];
        for c in 0..count {
            let group = lane + LANES * c;
            let record = &*record.add(c);
            let m = |side: usize| _mm512_load_ps(record.m[HALF][side].as_ptr());
            let m = [m(0), m(1)];
            for n in 0..N {
                let column = &columns[n];
                let sum = if SUB { column.sub_sums.add(2 * group + HALF) } else { column.sums.add(group) };
                let sum = _mm512_set1_ps(sum.read());
                for side in 0..2 {
                    acc[n][side] = _mm512_fmadd_ps(m[side], sum, acc[n][side]);
                }
            }
        }
        acc
    }
}
