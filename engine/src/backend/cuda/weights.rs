//! Matrices on the card: brought there in chunks through pinned memory, repacked by the device into the tiles that its
//! kernels read (`kernels/quant.cuh`).

use std::{collections::HashMap, sync::Arc, thread};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result};

use super::{
    error::Call as _,
    gpu::{Buffer, Dims, Gpu, Kernel, Pinned, arguments, launch_on},
};
use crate::{
    error::EngineError,
    gguf::{DType, Tensor},
};

/// Bytes of blocks that go to the device at a time: large enough for the bus to run at speed.
const CHUNK: usize = 16 << 20;
/// Chunks under way at once: while one is copied to pinned memory, one crosses the bus and one is repacked.
const LANES: usize = 3;
/// Threads that read the file: one alone is slower than the bus where the file is in memory already.
const READERS: usize = 4;
/// Below so many bytes a reader is not worth its start.
const READ_SHARE: usize = 1 << 20;
/// Kernels may read this far past the last tile, while they read ahead.
pub(super) const PAD: usize = 64 << 10;
/// Rows of a tile, and columns that kernels take at a time.
pub(super) const TILE_ROWS: usize = 4;
const GROUP: usize = 32;
/// Threads of a repacking block, and blocks a multiprocessor.
const REPACK_THREADS: u32 = 128;
const REPACK_BLOCKS: usize = 16;

/// The types that kernels read.
pub(super) const ON_CARD: [DType; 10] = [
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
];

/// What a file's type becomes on the card, and in words what is lost by it, if anything is.
pub(super) fn on_card(dtype: DType) -> (DType, Option<&'static str>) {
    match dtype {
        DType::Q3_K => (DType::Q6_K, Some("exactly, 1.9 times its size")),
        DType::IQ4_NL => (DType::Q8_0, Some("exactly, 1.9 times its size")),
        DType::IQ4_XS => (DType::Q8_0, Some("its scales rounded to f16, twice its size")),
        DType::Q2_K => (DType::F16, Some("rounded to f16, six times its size")),
        DType::F32 => (DType::F16, Some("rounded to f16, half its size")),
        other => (other, None),
    }
}

/// A type's name in the names of kernels.
pub(super) fn suffix(dtype: DType) -> String {
    dtype.name().to_lowercase()
}

/// A repacked matrix.
#[derive(Debug)]
pub struct Matrix {
    tiles: Buffer,
    /// One of [`ON_CARD`].
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Matrix {
    /// Memory for a matrix, its tiles not yet written.
    pub(super) fn new(
        gpu: &Gpu,
        dtype: DType,
        rows: usize,
        columns: usize,
        name: &str,
    ) -> Result<Self, EngineError> {
        if !columns.is_multiple_of(GROUP) {
            return Err(EngineError::Model(format!(
                "tensor {name} has {columns} columns; CUDA kernels want a multiple of {GROUP}: use --backend cpu"
            )));
        }
        let tiles = Buffer::new(gpu.context(), tile_bytes(dtype, rows, columns) + PAD, name)?;
        Ok(Self { tiles, dtype, rows, columns })
    }

    pub(super) fn pointer(&self) -> u64 {
        self.tiles.pointer()
    }

    /// Bytes that a product reads.
    pub(super) fn bytes(&self) -> u64 {
        tile_bytes(self.dtype, self.rows, self.columns) as u64
    }
}

/// Bytes of a repacked matrix: those of its blocks, its rows filled up to whole tiles of whole 16 bytes.
pub(super) fn tile_bytes(dtype: DType, rows: usize, columns: usize) -> usize {
    rows.div_ceil(TILE_ROWS) * (TILE_ROWS * dtype.row_bytes(columns)).next_multiple_of(16)
}

/// A norm or a bias, in both orders of activations.
#[derive(Debug)]
pub struct Vector {
    numbers: Buffer,
    len: usize,
}

impl Vector {
    pub(super) fn new(gpu: &mut Gpu, values: &[f32]) -> Result<Self, EngineError> {
        let mut both = values.to_vec();
        both.resize(2 * values.len(), 0.0);
        for (column, &value) in values.iter().enumerate() {
            both[values.len() + permuted(column, values.len())] = value;
        }
        Ok(Self { numbers: gpu.clone_to_device(&both, "a norm or bias")?, len: values.len() })
    }

    pub(super) fn natural(&self) -> u64 {
        self.numbers.pointer()
    }

    pub(super) fn permuted(&self) -> u64 {
        self.numbers.at(self.len * 4)
    }
}

/// `permuted` of `kernels/common.cuh`; whole groups only, what is left of the columns stays in place.
pub(super) fn permuted(column: usize, columns: usize) -> usize {
    let start = column / 1024 * 1024;
    let groups = (columns - start).min(1024) / GROUP;
    if column >= columns / GROUP * GROUP {
        return column;
    }
    let (group, quad) = (column % 1024 / GROUP, column % GROUP / 4);
    start + (quad * groups + group) * 4 + column % 4
}

/// One chunk's way.
struct Lane {
    stream: Arc<CudaStream>,
    host: Pinned,
    device: Buffer,
    /// Happens when the chunk before has been repacked.
    done: CudaEvent,
}

/// Brings matrices in; dropped, with its staging memory, when all are there.
pub(super) struct Loader {
    context: Arc<CudaContext>,
    lanes: Vec<Lane>,
    next: usize,
    kernels: HashMap<DType, Kernel>,
    grid: usize,
    /// Types that were converted, each told once.
    told: Vec<DType>,
}

impl Loader {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, EngineError> {
        let context = gpu.context();
        let lanes = (0..LANES).map(|_| {
            Ok(Lane {
                stream: context.new_stream().call("cuStreamCreate")?,
                host: Pinned::new(context, CHUNK, "loading weights")?,
                device: Buffer::new(context, CHUNK + 16, "loading weights")?,
                done: context.new_event(None).call("cuEventCreate")?,
            })
        });
        Ok(Self {
            context: Arc::clone(context),
            lanes: lanes.collect::<Result<_, EngineError>>()?,
            next: 0,
            kernels: HashMap::new(),
            grid: gpu.sms() * REPACK_BLOCKS,
            told: Vec::new(),
        })
    }

    /// Queues a tensor's way to the device. Returns once the file has been read; [`Loader::finish`] waits for the rest.
    pub(super) fn load(&mut self, gpu: &Gpu, tensor: &Tensor) -> Result<Matrix, EngineError> {
        let (dtype, conversion) = on_card(tensor.dtype());
        let (rows, columns) = (tensor.rows(), tensor.cols());
        let matrix = Matrix::new(gpu, dtype, rows, columns, &tensor.info.name)?;
        if let Some(words) = conversion
            && !self.told.contains(&tensor.dtype())
        {
            self.told.push(tensor.dtype());
            let (from, to) = (tensor.dtype().name(), dtype.name());
            tracing::warn!("{from} has no kernel of its own and is converted to {to} on loading ({words})");
        }
        let kernel = self.kernel(gpu, tensor.dtype())?;
        let row_bytes = tensor.dtype().row_bytes(columns);
        let chunk_rows = CHUNK / row_bytes / TILE_ROWS * TILE_ROWS;
        if chunk_rows == 0 {
            return Err(EngineError::Model(format!(
                "tensor {} has rows of {row_bytes} bytes; at most {} can be loaded",
                tensor.info.name,
                CHUNK / TILE_ROWS
            )));
        }
        for first in (0..rows).step_by(chunk_rows) {
            let count = chunk_rows.min(rows - first);
            let blocks = &tensor.bytes()[first * row_bytes..(first + count) * row_bytes];
            self.chunk(&kernel, &matrix, blocks, count, first)?;
        }
        Ok(matrix)
    }

    fn chunk(
        &mut self,
        kernel: &Kernel,
        matrix: &Matrix,
        blocks: &[u8],
        rows: usize,
        first: usize,
    ) -> Result<(), EngineError> {
        self.next = (self.next + 1) % LANES;
        let lane = &mut self.lanes[self.next];
        lane.done.synchronize().call("cuEventSynchronize")?;
        read(&mut lane.host.slice_mut::<u8>()[..blocks.len()], blocks);
        let stream = lane.stream.cu_stream();
        let staged = &lane.host.slice::<u8>()[..blocks.len()];
        // SAFETY: the host memory is written again only behind `done`, which is recorded after the copy.
        unsafe { result::memcpy_htod_async(lane.device.pointer(), staged, stream) }
            .call("cuMemcpyHtoDAsync of weights")?;
        let (from, to) = (lane.device.pointer(), matrix.pointer());
        let (rows, columns, first) = (rows as i32, matrix.columns as i32, first as i32);
        let dims = Dims::new(self.grid, REPACK_THREADS);
        // SAFETY: the arguments of repack.cu's kernels; `to` was made for the whole matrix.
        unsafe { launch_on(stream, kernel, dims, arguments![from, to, rows, columns, first]) }?;
        lane.done.record(&lane.stream).call("cuEventRecord")
    }

    fn kernel(&mut self, gpu: &Gpu, dtype: DType) -> Result<Kernel, EngineError> {
        if let Some(kernel) = self.kernels.get(&dtype) {
            return Ok(kernel.clone());
        }
        let verb = if ON_CARD.contains(&dtype) { "repack" } else { "convert" };
        let kernel = gpu.kernel(&format!("{verb}_{}", suffix(dtype)))?;
        self.kernels.insert(dtype, kernel.clone());
        Ok(kernel)
    }

    /// Waits until all matrices taken in so far are whole.
    pub(super) fn wait(&self) -> Result<(), EngineError> {
        self.context.bind_to_thread().call("cuCtxSetCurrent")?;
        for lane in &self.lanes {
            lane.stream.synchronize().call("cuStreamSynchronize after loading weights")?;
        }
        Ok(())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // After a failure chunks may still be on their way out of the memory that is freed now.
        for lane in &self.lanes {
            let _ = lane.stream.synchronize();
        }
    }
}

/// Copies out of the file's mapping, by several threads where that is worth it.
fn read(to: &mut [u8], from: &[u8]) {
    let readers = (from.len() / READ_SHARE)
        .clamp(1, READERS)
        .min(thread::available_parallelism().map_or(1, usize::from));
    let share = from.len().div_ceil(readers).max(1);
    thread::scope(|scope| {
        let mut parts = to.chunks_mut(share).zip(from.chunks(share));
        let own = parts.next();
        for (to, from) in parts {
            scope.spawn(|| to.copy_from_slice(from));
        }
        if let Some((to, from)) = own {
            to.copy_from_slice(from);
        }
    });
}

/// A matrix of random weights made on the device, for benchmarks without a model.
pub(super) fn random(
    gpu: &mut Gpu,
    dtype: DType,
    rows: usize,
    columns: usize,
    seed: u32,
) -> Result<Matrix, EngineError> {
    let matrix = Matrix::new(gpu, on_card(dtype).0, rows, columns, "random weights")?;
    let kernel = gpu.kernel(&format!("random_{}", suffix(matrix.dtype)))?;
    let dims = Dims::new(gpu.sms() * REPACK_BLOCKS, REPACK_THREADS);
    let (to, rows, columns, bytes) = (matrix.pointer(), rows as i32, columns as i32, matrix.bytes());
    // SAFETY: the arguments of repack.cu's random kernels; `to` was made for the matrix.
    unsafe { gpu.launch(&kernel, dims, bytes, arguments![to, rows, columns, seed]) }?;
    Ok(matrix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_permuted_order_is_a_permutation_with_quads_together() {
        for columns in [32, 576, 896, 1024, 3584, 4864, 80] {
            let mut seen: Vec<usize> = (0..columns).map(|c| permuted(c, columns)).collect();
            if columns >= 1024 {
                assert_eq!(
                    (permuted(4, columns), permuted(32, columns), permuted(1023, columns)),
                    (128, 4, 1023)
                );
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..columns).collect::<Vec<_>>());
        }
    }

    #[test]
    fn tiles_take_what_blocks_take() {
        for dtype in ON_CARD {
            let blocks = 4096 * dtype.row_bytes(4096);
            assert_eq!(tile_bytes(dtype, 4096, 4096), blocks, "{}", dtype.name());
        }
        // Three super-blocks of Q6_K are no multiple of 16 bytes, and five rows make two tiles.
        assert_eq!(tile_bytes(DType::Q6_K, 5, 768), 2 * 2528);
    }

    #[test]
    fn every_type_has_a_place_on_the_card() {
        for dtype in DType::ALL {
            let (stored, conversion) = on_card(dtype);
            assert!(ON_CARD.contains(&stored));
            assert_eq!(conversion.is_none(), stored == dtype);
        }
    }

    #[test]
    fn reading_in_parts_reads_everything() {
        for len in [0, 1, 1000, (1 << 20) + 3, (5 << 20) + 7] {
            let from: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
            let mut to = vec![0; len];
            read(&mut to, &from);
            assert!(to == from);
        }
    }
}
