//! Random weights, for benchmarks without a file.

use half::{bf16, f16};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{
    error::EngineError,
    gguf::{DType, Tensor, dequantize},
};

/// Root mean square of a weight, about that of trained models.
const SIZE: f32 = 0.02;
/// Blocks made; a matrix repeats them, as making every one would take longer than the benchmark.
const DISTINCT: usize = 4096;

/// A matrix of random blocks. Quants are random bits; the half-precision scales are such that weights
/// come out of about [`SIZE`].
pub(super) fn tensor(dtype: DType, rows: usize, cols: usize, seed: u32) -> Result<Tensor, EngineError> {
    let mut rng = ChaCha8Rng::seed_from_u64(u64::from(seed));
    let (len, size) = (dtype.block_len(), dtype.block_bytes());
    let total = rows * dtype.row_bytes(cols);
    let mut distinct: Vec<u8> =
        (0..DISTINCT.min(total / size)).flat_map(|_| block(dtype, &mut rng)).collect();
    let mut numbers = vec![0.0; distinct.len() / size * len];
    dequantize(dtype, &distinct, &mut numbers);
    let squares: f64 = numbers.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let rms = (squares / numbers.len() as f64).sqrt() as f32;
    if !scales(dtype).is_empty() {
        for block in distinct.chunks_exact_mut(size) {
            for &at in scales(dtype) {
                let bytes = &mut block[at..at + 2];
                let scale = f16::from_le_bytes([bytes[0], bytes[1]]).to_f32() * SIZE / rms;
                bytes.copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
        }
    }
    let bytes: Vec<u8> = distinct.iter().copied().cycle().take(total).collect();
    Ok(Tensor::from_bytes("random weights", &[cols, rows], dtype, &bytes)?)
}

/// Where a block has its half-precision scales and minima.
fn scales(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => &[],
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
    }
}

fn block(dtype: DType, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let uniform =
        |rng: &mut ChaCha8Rng| ((rng.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * SIZE * 1.732;
    match dtype {
        DType::F32 => uniform(rng).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(uniform(rng)).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(uniform(rng)).to_le_bytes().to_vec(),
        _ => {
            let mut block = vec![0; dtype.block_bytes()];
            rng.fill_bytes(&mut block);
            for (i, &at) in scales(dtype).iter().enumerate() {
                // Scales of either sign; a minimum is taken off, or added, to about the middle of the quants.
                let sign = if i == 0 && rng.next_u32().is_multiple_of(2) { -1.0 } else { 1.0 };
                let scale = f16::from_f32(sign * (0.5 + (rng.next_u32() % 1024) as f32 / 1024.0) / 64.0);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
            block
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_comes_out_of_about_the_size_of_trained_weights() {
        for dtype in DType::ALL {
            let tensor = tensor(dtype, 64, 512, 7).unwrap();
            let mut numbers = vec![0.0; 64 * 512];
            dequantize(dtype, tensor.bytes(), &mut numbers);
            let rms = (numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32).sqrt();
            assert!((0.5 * SIZE..2.0 * SIZE).contains(&rms), "{}: {rms}", dtype.name());
        }
    }
}
