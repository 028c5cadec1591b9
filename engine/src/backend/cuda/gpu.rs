//! The device as the backend uses it: one stream on which everything happens in order, memory that frees itself,
//! launches that are counted and, on request, timed.

use std::{ffi::c_void, fmt, ptr, sync::Arc};

use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaStream, result,
    sys::{self, CUdeviceptr, CUevent_flags, CUevent_record_flags, CUstream},
};

use super::{Device, Kernels, error::Call as _, trace::Trace};
use crate::{backend::Counters, error::EngineError};

/// A launch's geometry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dims {
    /// Blocks.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub(super) shared: u32,
}

impl Dims {
    /// A row of blocks without dynamic shared memory.
    pub(super) fn new(grid: usize, block: u32) -> Self {
        Self { grid: [grid as u32, 1, 1], block: [block, 1, 1], shared: 0 }
    }
}

/// A kernel by its name.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    function: CudaFunction,
    name: &'static str,
}

/// The addresses of a launch's arguments, in the kernel's order.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        &mut [$((&raw const $argument).cast_mut().cast::<std::ffi::c_void>()),*]
    };
}
pub(super) use arguments;

/// An open device with its kernels and its stream.
pub(super) struct Gpu {
    device: Device,
    kernels: Kernels,
    stream: Arc<CudaStream>,
    counters: Counters,
    trace: Option<Trace>,
}

impl Gpu {
    /// On the device, with a stream of its own.
    pub(super) fn new(device: Device, trace: Option<Trace>) -> Result<Self, EngineError> {
        // SAFETY: all of this backend's memory is used in the order of one stream, or behind explicit waits.
        unsafe { device.context().disable_event_tracking() };
        let stream = device.context().new_stream().call("cuStreamCreate")?;
        Ok(Self { kernels: Kernels::new(&device), device, stream, counters: Counters::default(), trace })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.device.context()
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Streaming multiprocessors, which grids are sized by.
    pub(super) fn sms(&self) -> usize {
        self.device.info().multiprocessors as usize
    }

    /// Makes the device's context that of this thread; before anything else on a new thread.
    pub(super) fn bind(&self) -> Result<(), EngineError> {
        self.context().bind_to_thread().call("cuCtxSetCurrent")
    }

    /// Loads kernels, several at a time, so that finding them takes no time.
    pub(super) fn load_kernels(&self, names: &[String]) -> Result<(), EngineError> {
        self.kernels.load(names)
    }

    /// Finds a kernel, loading its file if need be. For the time before the first step.
    pub(super) fn kernel(&self, name: &str) -> Result<Kernel, EngineError> {
        let (name, function) = self.kernels.find(name)?;
        Ok(Kernel { function, name })
    }

    /// Queues a kernel. `bytes` is what it must read and write at least, for the trace.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in its order; what they point to is as large as the kernel's header
    /// comment says for this geometry, and stays until the stream has come past this launch.
    pub(super) unsafe fn launch(
        &mut self,
        kernel: &Kernel,
        dims: Dims,
        bytes: u64,
        arguments: &mut [*mut c_void],
    ) -> Result<(), EngineError> {
        let stream = self.stream.cu_stream();
        if let Some(trace) = &mut self.trace {
            trace.before(&self.stream)?;
        }
        // SAFETY: promised by the caller; the function belongs to a module that `self.kernels` keeps.
        unsafe { launch_on(stream, kernel, dims, arguments) }?;
        self.counters.launches += 1;
        if let Some(trace) = &mut self.trace {
            trace.after(&self.stream, kernel.name, bytes)?;
        }
        Ok(())
    }

    /// Queues what a library launches, counted and timed as one. Returns what `queue` does.
    pub(super) fn foreign<T>(
        &mut self,
        name: &'static str,
        bytes: u64,
        queue: impl FnOnce() -> T,
    ) -> Result<T, EngineError> {
        if let Some(trace) = &mut self.trace {
            trace.before(&self.stream)?;
        }
        let result = queue();
        self.counters.launches += 1;
        if let Some(trace) = &mut self.trace {
            trace.after(&self.stream, name, bytes)?;
        }
        Ok(result)
    }

    /// Counts launches that a graph made.
    pub(super) fn count_launches(&mut self, launches: u64) {
        self.counters.launches += launches;
    }

    /// True while launches are timed one by one, which a graph would hide.
    pub(super) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    /// Waits for everything queued.
    pub(super) fn synchronize(&mut self) -> Result<(), EngineError> {
        self.counters.syncs += 1;
        self.stream.synchronize().call("cuStreamSynchronize")?;
        self.collect_trace()
    }

    /// An event to wait for, to be used again and again.
    pub(super) fn event(&self) -> Result<CudaEvent, EngineError> {
        let flags = Some(CUevent_flags::CU_EVENT_DISABLE_TIMING);
        self.context().new_event(flags).call("cuEventCreate")
    }

    /// Has the event happen when the stream has come past all that is queued.
    pub(super) fn record(&self, event: &CudaEvent) -> Result<(), EngineError> {
        event.record(&self.stream).call("cuEventRecord")
    }

    /// As [`Gpu::record`], while the stream is captured: each run of the graph has the event happen.
    pub(super) fn record_in_graph(&self, event: &CudaEvent) -> Result<(), EngineError> {
        let external = CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: the event and the stream live, and are of one context.
        unsafe { sys::cuEventRecordWithFlags(event.cu_event(), self.stream.cu_stream(), external) }
            .result()
            .call("cuEventRecordWithFlags")
    }

    /// Waits for an event behind all launches so far.
    pub(super) fn wait(&mut self, event: &CudaEvent) -> Result<(), EngineError> {
        self.counters.syncs += 1;
        event.synchronize().call("cuEventSynchronize")?;
        self.collect_trace()
    }

    fn collect_trace(&mut self) -> Result<(), EngineError> {
        self.trace.as_mut().map_or(Ok(()), Trace::collect)
    }

    /// Queues a copy of the beginning of pinned memory to the device.
    ///
    /// # Safety
    /// The host does not change these bytes before the stream has come past the copy.
    pub(super) unsafe fn upload(&self, from: &Pinned, to: &Buffer, bytes: usize) -> Result<(), EngineError> {
        assert!(bytes <= from.bytes && bytes <= to.bytes);
        // SAFETY: both hold `bytes`; the rest is promised by the caller.
        unsafe {
            result::memcpy_htod_async(to.pointer, &from.slice::<u8>()[..bytes], self.stream.cu_stream())
        }
        .call("cuMemcpyHtoDAsync")
    }

    /// Queues a copy from the device to pinned memory, `bytes` from `at` in both.
    ///
    /// # Safety
    /// The host does not look at these bytes before the stream has come past the copy.
    pub(super) unsafe fn download(
        &self,
        from: &Buffer,
        to: &mut Pinned,
        at: usize,
        bytes: usize,
    ) -> Result<(), EngineError> {
        assert!(at + bytes <= from.bytes && at + bytes <= to.bytes);
        let target = &mut to.slice_mut::<u8>()[at..at + bytes];
        // SAFETY: both hold the range; the rest is promised by the caller.
        unsafe { result::memcpy_dtoh_async(target, from.pointer + at as u64, self.stream.cu_stream()) }
            .call("cuMemcpyDtoHAsync")
    }

    /// Queues a copy within a buffer, of `bytes` that do not overlap.
    pub(super) fn copy(
        &self,
        buffer: &Buffer,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), EngineError> {
        assert!(from.max(to) + bytes <= buffer.bytes && from.abs_diff(to) >= bytes);
        // SAFETY: both ranges are the buffer's, whose memory is freed only after the stream's work.
        unsafe { result::memcpy_dtod_async(buffer.at(to), buffer.at(from), bytes, self.stream.cu_stream()) }
            .call("cuMemcpyDtoDAsync")
    }

    /// A copy of host numbers on the device; waits for it.
    pub(super) fn clone_to_device(&mut self, numbers: &[f32], what: &str) -> Result<Buffer, EngineError> {
        let buffer = Buffer::new(self.context(), size_of_val(numbers), what)?;
        // SAFETY: the buffer was made as large as the slice.
        unsafe { result::memcpy_htod_sync(buffer.pointer, numbers) }.call("cuMemcpyHtoD")?;
        default_stream_done()?;
        Ok(buffer)
    }
}

/// Waits for the default stream, whose copies from pageable memory and fills may return before they are done; our own
/// streams do not wait for it.
fn default_stream_done() -> Result<(), EngineError> {
    // SAFETY: null is the default stream.
    unsafe { result::stream::synchronize(ptr::null_mut()) }.call("cuStreamSynchronize")
}

/// Queues a kernel on any stream, uncounted: for loading, which has streams of its own.
///
/// # Safety
/// As [`Gpu::launch`].
pub(super) unsafe fn launch_on(
    stream: CUstream,
    kernel: &Kernel,
    dims: Dims,
    arguments: &mut [*mut c_void],
) -> Result<(), EngineError> {
    let [x, y, z] = dims.grid;
    // SAFETY: promised by the caller.
    unsafe {
        result::launch_kernel(
            kernel.function.cu_function(),
            (x, y, z),
            (dims.block[0], dims.block[1], dims.block[2]),
            dims.shared,
            stream,
            arguments,
        )
    }
    .call(format_args!("cuLaunchKernel of {}", kernel.name))
}

/// Device memory, freed when dropped.
pub(super) struct Buffer {
    pointer: CUdeviceptr,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl Buffer {
    /// `bytes` of memory for `what`, with whatever it holds.
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        context.bind_to_thread().call("cuCtxSetCurrent")?;
        // SAFETY: the pointer is freed once, in `drop`.
        let pointer = unsafe { result::malloc_sync(bytes.max(16)) }
            .call(format_args!("cuMemAlloc of {bytes} bytes for {what}"))?;
        Ok(Self { pointer, bytes, context: Arc::clone(context) })
    }

    /// Zeroed memory.
    pub(super) fn zeroed(context: &Arc<CudaContext>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        let buffer = Self::new(context, bytes, what)?;
        buffer.fill(0)?;
        Ok(buffer)
    }

    /// Sets every byte; waits for it.
    pub(super) fn fill(&self, byte: u8) -> Result<(), EngineError> {
        // SAFETY: the range is this buffer's.
        unsafe { result::memset_d8_sync(self.pointer, byte, self.bytes) }.call("cuMemsetD8")?;
        default_stream_done()
    }

    /// What is there from `at` on. All work on it must have been waited for.
    #[cfg(feature = "gpu-tests")]
    pub(super) fn read(&self, at: usize, bytes: usize) -> Result<Vec<u8>, EngineError> {
        assert!(at + bytes <= self.bytes);
        let mut read = vec![0u8; bytes];
        // SAFETY: the range is this buffer's, and the copy has ended when this returns.
        unsafe { result::memcpy_dtoh_sync(&mut read, self.pointer + at as u64) }.call("cuMemcpyDtoH")?;
        Ok(read)
    }

    pub(super) fn pointer(&self) -> CUdeviceptr {
        self.pointer
    }

    /// The address `bytes` further on.
    pub(super) fn at(&self, bytes: usize) -> CUdeviceptr {
        assert!(bytes <= self.bytes);
        self.pointer + bytes as u64
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.pointer)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // A lost device refuses; its memory is gone with it.
        let _ = self.context.bind_to_thread();
        // SAFETY: made by `malloc_sync`, freed here only.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

/// Page-locked host memory, which the device copies from and to by itself. Zeroed at first.
pub(super) struct Pinned {
    pointer: *mut c_void,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory without ties to a thread.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        context.bind_to_thread().call("cuCtxSetCurrent")?;
        let bytes = bytes.next_multiple_of(64);
        // SAFETY: the pointer is freed once, in `drop`.
        let pointer = unsafe { result::malloc_host(bytes, 0) }
            .call(format_args!("cuMemHostAlloc of {bytes} bytes for {what}"))?;
        // SAFETY: just allocated, so many bytes.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Self { pointer, bytes, context: Arc::clone(context) })
    }

    /// All of it as numbers.
    pub(super) fn slice<T: Plain>(&self) -> &[T] {
        // SAFETY: page-aligned, initialised, valid for any bits of a plain type; borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }

    pub(super) fn slice_mut<T: Plain>(&mut self) -> &mut [T] {
        // SAFETY: as in `slice`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.bytes / size_of::<T>()) }
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pinned bytes", self.bytes)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: made by `malloc_host`, freed here only.
        let _ = unsafe { result::free_host(self.pointer) };
    }
}

/// Types of which any bits are a value.
///
/// # Safety
/// No padding, no invalid values.
pub(super) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
