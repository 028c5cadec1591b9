//! The device's own speed, which other figures are held against.

use std::time::Instant;

use super::{
    Device,
    arguments::{Mode, Product},
    cublas::{Cublas, Size},
    gpu::{Buffer, Dims, Gpu, arguments},
    products::{partial_bytes, tiled},
    weights::random,
};
use crate::{backend::DeviceSpeed, error::EngineError, gguf::DType};

/// Bytes of the buffers that are copied: far more than a cache holds.
const BYTES: usize = 512 << 20;
const REPETITIONS: usize = 5;
/// Runs timed together, so that waiting for the device does not count.
const TOGETHER: usize = 4;
/// A product large enough for every multiprocessor to be busy all the time.
const SIZE: Size = Size { rows: 8192, columns: 4096, tokens: 2048, pitch: 8192 };

/// Takes a gigabyte of the device's memory meanwhile, or what there is.
pub fn measure(device: &Device) -> Result<DeviceSpeed, EngineError> {
    let mut gpu = Gpu::new(device.clone(), None)?;
    let copy_gb_per_s = copy(&mut gpu)?;
    let numbers = numbers(SIZE.rows * SIZE.columns);
    let x = gpu.clone_to_device(&numbers[..SIZE.tokens * SIZE.columns], "measuring products")?;
    let out = Buffer::new(gpu.context(), SIZE.tokens * SIZE.rows * 4, "measuring products")?;
    let mut products = vec![("gemm_f16", own(&mut gpu, &x, &out)?)];
    // The library is no part of this; where it is missing there is nothing to compare with.
    match Cublas::open(&gpu) {
        Ok(library) => products.push(("cublas_sgemm", sgemm(&mut gpu, &library, &numbers, &x, &out)?)),
        Err(reason) => tracing::debug!(%reason, "cuBLAS is not measured"),
    }
    Ok(DeviceSpeed { copy_gb_per_s, products })
}

/// GB/s of copying memory, bytes read and bytes written.
fn copy(gpu: &mut Gpu) -> Result<f64, EngineError> {
    let bytes = BYTES.min(gpu.device().free_memory()? as usize / 4) & !15;
    let from = Buffer::zeroed(gpu.context(), bytes, "measuring the copy speed")?;
    let to = Buffer::zeroed(gpu.context(), bytes, "measuring the copy speed")?;
    let kernel = gpu.kernel("copy_quads")?;
    let (from, to, quads) = (from.pointer(), to.pointer(), (bytes / 16) as u64);
    let dims = Dims::new(gpu.sms() * 8, 256);
    let seconds = fastest(gpu, |gpu| {
        // SAFETY: both buffers hold the quads, and live until all was waited for.
        unsafe { gpu.launch(&kernel, dims, 2 * bytes as u64, arguments![from, to, quads]) }
    })?;
    Ok((2 * bytes) as f64 / seconds / 1e9)
}

/// TFLOP/s of our kernel for prompts, with weights in F16.
fn own(gpu: &mut Gpu, x: &Buffer, out: &Buffer) -> Result<f64, EngineError> {
    let (kernel, dims) = tiled(gpu, DType::F16)?;
    let matrix = random(gpu, DType::F16, SIZE.rows, SIZE.columns, 1)?;
    let partial = Buffer::new(gpu.context(), partial_bytes(gpu.sms()), "measuring products")?;
    let counters = Buffer::zeroed(gpu.context(), dims.grid[0] as usize * 4, "measuring products")?;
    let product = Product {
        weight: [matrix.pointer(), 0, 0],
        out: [out.pointer(), 0, 0],
        rows: [SIZE.rows as i32, 0, 0],
        matrices: 1,
        columns: SIZE.columns as i32,
        tokens: SIZE.tokens as i32,
        mode: Mode::Store.kernels(),
        x: x.pointer(),
        partial: partial.pointer(),
        counters: counters.pointer(),
        ..Product::default()
    };
    let seconds = fastest(gpu, |gpu| {
        // SAFETY: the argument of gemm.cu; x, out and the workspace are as large as its header says for SIZE and this
        // grid, and live until all was waited for.
        unsafe { gpu.launch(&kernel, dims, matrix.bytes(), arguments![product]) }
    })?;
    Ok(tflops(seconds))
}

/// TFLOP/s of the library, with weights in FP32.
fn sgemm(
    gpu: &mut Gpu,
    library: &Cublas,
    numbers: &[f32],
    x: &Buffer,
    out: &Buffer,
) -> Result<f64, EngineError> {
    let weights = gpu.clone_to_device(numbers, "measuring cuBLAS")?;
    let (weights, x, out) = (weights.pointer(), x.pointer(), out.pointer());
    let seconds = fastest(gpu, |gpu| {
        // SAFETY: the buffers were made for SIZE, and live until all was waited for.
        unsafe { library.multiply(gpu, SIZE, weights, x, out, false) }
    })?;
    Ok(tflops(seconds))
}

fn tflops(seconds: f64) -> f64 {
    2.0 * (SIZE.rows * SIZE.columns * SIZE.tokens) as f64 / seconds / 1e12
}

/// Seconds of what `queue` queues, the best of several after one that does not count. All is done when this returns.
fn fastest(
    gpu: &mut Gpu,
    mut queue: impl FnMut(&mut Gpu) -> Result<(), EngineError>,
) -> Result<f64, EngineError> {
    let mut best = f64::INFINITY;
    for round in 0..=REPETITIONS {
        gpu.synchronize()?;
        let start = Instant::now();
        for _ in 0..TOGETHER {
            queue(gpu)?;
        }
        gpu.synchronize()?;
        if round > 0 {
            best = best.min(start.elapsed().as_secs_f64());
        }
    }
    Ok(best / TOGETHER as f64)
}

/// Numbers between -1 and 1 that repeat after a while (a linear congruential generator): a card's clock may depend on what
/// it multiplies, and zeros are cheap.
fn numbers(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
