//! Events around every launch, read when the stream has come past them.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys::CUevent_flags};

use super::error::Call as _;
use crate::{
    error::EngineError,
    handle::lock,
    trace::{KernelLaunch, KernelTrace},
};

/// Times launches into a [`KernelTrace`] that others may read.
pub(super) struct Trace {
    context: Arc<CudaContext>,
    /// Where time begins.
    base: Option<CudaEvent>,
    /// Events to use again.
    free: Vec<CudaEvent>,
    started: Option<CudaEvent>,
    waiting: Vec<Waiting>,
    shared: Arc<Mutex<KernelTrace>>,
}

/// A launch whose events may not have happened yet.
struct Waiting {
    name: &'static str,
    bytes: u64,
    start: CudaEvent,
    end: CudaEvent,
}

impl Trace {
    pub(super) fn new(context: &Arc<CudaContext>, shared: Arc<Mutex<KernelTrace>>) -> Self {
        let context = Arc::clone(context);
        Self { context, base: None, free: Vec::new(), started: None, waiting: Vec::new(), shared }
    }

    fn record(&mut self, stream: &CudaStream) -> Result<CudaEvent, EngineError> {
        let event = match self.free.pop() {
            Some(event) => event,
            None => self
                .context
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .call("cuEventCreate for --trace-kernels")?,
        };
        event.record(stream).call("cuEventRecord")?;
        Ok(event)
    }

    pub(super) fn before(&mut self, stream: &CudaStream) -> Result<(), EngineError> {
        if self.base.is_none() {
            self.base = Some(self.record(stream)?);
        }
        self.started = Some(self.record(stream)?);
        Ok(())
    }

    pub(super) fn after(
        &mut self,
        stream: &CudaStream,
        name: &'static str,
        bytes: u64,
    ) -> Result<(), EngineError> {
        let end = self.record(stream)?;
        if let Some(start) = self.started.take() {
            self.waiting.push(Waiting { name, bytes, start, end });
        }
        Ok(())
    }

    /// Reads all events, after the stream was waited for.
    pub(super) fn collect(&mut self) -> Result<(), EngineError> {
        let Some(base) = &self.base else { return Ok(()) };
        let mut trace = lock(&self.shared);
        for Waiting { name, bytes, start, end } in self.waiting.drain(..) {
            let start_us = f64::from(base.elapsed_ms(&start).call("cuEventElapsedTime")?) * 1e3;
            let time_us = f64::from(start.elapsed_ms(&end).call("cuEventElapsedTime")?) * 1e3;
            trace.add(KernelLaunch { name, start_us, time_us, bytes });
            self.free.extend([start, end]);
        }
        Ok(())
    }
}
