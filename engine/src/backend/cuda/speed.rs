//! The device's own speed, which other figures are held against.

use super::{
    Device,
    gpu::{Buffer, Dims, Gpu, arguments},
};
use crate::error::EngineError;

/// Bytes of the buffers that are copied: far more than a cache holds.
const BYTES: usize = 512 << 20;
const REPETITIONS: usize = 5;
/// Copies timed together, so that waiting for the device does not count.
const COPIES: usize = 4;

/// The speed of copying memory on the device in GB/s, bytes read and bytes written, the best of several. Takes a
/// gigabyte of its memory meanwhile, or what there is.
pub fn copy_speed(device: &Device) -> Result<f64, EngineError> {
    let mut gpu = Gpu::new(device.clone(), None)?;
    let bytes = BYTES.min(device.free_memory()? as usize / 4) & !15;
    let from = Buffer::zeroed(gpu.context(), bytes, "measuring the copy speed")?;
    let to = Buffer::zeroed(gpu.context(), bytes, "measuring the copy speed")?;
    let kernel = gpu.kernel("copy_quads")?;
    let (from, to, quads) = (from.pointer(), to.pointer(), (bytes / 16) as u64);
    let dims = Dims::new(gpu.sms() * 8, 256);
    let mut best = f64::INFINITY;
    for _ in 0..=REPETITIONS {
        gpu.synchronize()?;
        let start = std::time::Instant::now();
        for _ in 0..COPIES {
            // SAFETY: both buffers hold the quads, and live until the wait below.
            unsafe { gpu.launch(&kernel, dims, 2 * bytes as u64, arguments![from, to, quads]) }?;
        }
        gpu.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok((2 * bytes * COPIES) as f64 / best / 1e9)
}
