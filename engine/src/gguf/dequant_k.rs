//! Superblocks of 256 weights to f32: the K types and `IQ4_XS`. See [`super::dequantize`].

use super::dequant::{half_at, iq4};

/// `scales: [u8; 16], qs: [u8; 64], d: f16, dmin: f16`. Each half of 128 weights has 32 bytes, whose bit
/// pairs, lowest first, are four runs of 32; each run of 16 has a scale (low nibble) and a minimum (high).
pub(super) fn q2_k(block: &[u8; 84], y: &mut [f32; 256]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (run, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[run] & 15);
        let min = dmin * f32::from(scales[run] >> 4);
        let (half, pair, part) = (run / 8, run / 2 % 4, run % 2);
        for (y, &q) in y.iter_mut().zip(&qs[half * 32 + part * 16..]) {
            *y = scale * f32::from(q >> (2 * pair) & 3) - min;
        }
    }
}

/// `hmask: [u8; 32], qs: [u8; 64], scales: [u8; 12], d: f16`. Bit pairs as in `Q2_K`; bit `i` of
/// `hmask[l]` belongs to weight `l` of the `i`-th run of 32 and, when clear, takes 4 off.
pub(super) fn q3_k(block: &[u8; 110], y: &mut [f32; 256]) {
    let (high, qs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half_at(block, 108);
    for (run, y) in y.chunks_exact_mut(16).enumerate() {
        // Six bits a scale: low nibbles of runs 0 to 7, high nibbles for 8 to 15, the top bits in four bytes.
        let low = scales[run % 8] >> (4 * (run / 8)) & 15;
        let top = scales[8 + run % 4] >> (2 * (run / 4)) & 3;
        let scale = d * (f32::from(top << 4 | low) - 32.0);
        let (half, pair, part) = (run / 8, run / 2 % 4, run % 2);
        for (l, y) in y.iter_mut().enumerate() {
            let q = qs[half * 32 + part * 16 + l] >> (2 * pair) & 3;
            let third = high[part * 16 + l] >> (run / 2) & 1;
            *y = scale * (f32::from(third << 2 | q) - 4.0);
        }
    }
}

/// Scale and minimum `i` of the eight in the 12 bytes that `Q4_K` and `Q5_K` share: six bits each, the
/// first four of both whole in bytes 0 to 7, the others' low nibbles in bytes 8 to 11, their top bits above.
fn scale_and_min(scales: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (scales[i] & 63, scales[i + 4] & 63)
    } else {
        (scales[i + 4] & 15 | scales[i - 4] >> 6 << 4, scales[i + 4] >> 4 | scales[i] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `d: f16, dmin: f16, scales: [u8; 12], qs: [u8; 128]`. Of each 32 bytes the low nibbles are one run of
/// 32 weights, the high nibbles the next.
pub(super) fn q4_k(block: &[u8; 144], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, qs) = (&block[4..16], &block[16..]);
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, run);
        let (scale, min) = (d * scale, dmin * min);
        for (y, &q) in y.iter_mut().zip(&qs[run / 2 * 32..]) {
            *y = scale * f32::from(q >> (4 * (run % 2)) & 15) - min;
        }
    }
}

/// `d: f16, dmin: f16, scales: [u8; 12], qh: [u8; 32], qs: [u8; 128]`: `Q4_K` and a fifth bit, bit `run`
/// of `qh[l]`.
pub(super) fn q5_k(block: &[u8; 176], y: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, high, qs) = (&block[4..16], &block[16..48], &block[48..]);
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_and_min(scales, run);
        let (scale, min) = (d * scale, dmin * min);
        for (l, y) in y.iter_mut().enumerate() {
            let q = qs[run / 2 * 32 + l] >> (4 * (run % 2)) & 15;
            let fifth = high[l] >> run & 1;
            *y = scale * f32::from(fifth << 4 | q) - min;
        }
    }
}

/// `ql: [u8; 128], qh: [u8; 64], scales: [i8; 16], d: f16`. Each half of 128 weights has 64 bytes of `ql`
/// (low nibbles: its runs of 32 number 0 and 1; high nibbles: 2 and 3) and 32 of `qh`, bit pairs by run.
pub(super) fn q6_k(block: &[u8; 210], y: &mut [f32; 256]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (run, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[run] as i8);
        let (half, quarter, part) = (run / 8, run / 2 % 4, run % 2);
        for (l, y) in y.iter_mut().enumerate() {
            let low = ql[half * 64 + quarter % 2 * 32 + part * 16 + l] >> (4 * (quarter / 2)) & 15;
            let high = qh[half * 32 + part * 16 + l] >> (2 * quarter) & 3;
            *y = scale * (f32::from(high << 4 | low) - 32.0);
        }
    }
}

/// `d: f16, scales_h: u16, scales_l: [u8; 4], qs: [u8; 128]`: eight runs of 32 like `IQ4_NL`, each with a
/// six-bit scale, low nibbles in `scales_l`, top bit pairs in `scales_h`.
pub(super) fn iq4_xs(block: &[u8; 136], y: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, qs) = (&block[4..8], &block[8..]);
    for (run, (y, qs)) in y.chunks_exact_mut(32).zip(qs.chunks_exact(16)).enumerate() {
        let low = low[run / 2] >> (4 * (run % 2)) & 15;
        let top = (high >> (2 * run)) as u8 & 3;
        iq4(d * (f32::from(top << 4 | low) - 32.0), qs, y);
    }
}
