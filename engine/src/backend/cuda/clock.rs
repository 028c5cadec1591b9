//! When a step's work began and ended, by the device's own clock.

use std::time::Duration;

use cudarc::driver::{CudaEvent, result, sys::CUevent_flags};

use super::{error::Call as _, gpu::Gpu};
use crate::{backend::StepTimes, error::EngineError};

/// Events at both ends of a step's work.
pub(super) struct Clock {
    /// Before the first kernel. In a captured step it is a node of the graph, so that the host's time for launching
    /// the graph lies before it.
    began: CudaEvent,
    /// Behind the best tokens' copies, of this step and the one before, in turns.
    ended: [CudaEvent; 2],
    this: usize,
    times: Option<StepTimes>,
}

impl Clock {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, EngineError> {
        let event = || gpu.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).call("cuEventCreate");
        Ok(Self { began: event()?, ended: [event()?, event()?], this: 0, times: None })
    }

    /// Before the first launch of a step that no graph from before does.
    pub(super) fn begin(&self, gpu: &Gpu, capturing: bool) -> Result<(), EngineError> {
        if capturing { gpu.record_in_graph(&self.began) } else { gpu.record(&self.began) }
    }

    /// Behind the last launch.
    pub(super) fn end(&mut self, gpu: &Gpu) -> Result<(), EngineError> {
        self.this = 1 - self.this;
        gpu.record(&self.ended[self.this])
    }

    /// Waits until the step's work is done, and reads the clock.
    pub(super) fn wait(&mut self, gpu: &mut Gpu) -> Result<(), EngineError> {
        gpu.wait(&self.ended[self.this])?;
        let before = &self.ended[1 - self.this];
        // The first step has none before it, whose event then says so; it is no reason to fail.
        self.times = between(before, &self.began)
            .and_then(|idle| Some(StepTimes { idle, busy: between(&self.began, &self.ended[self.this])? }));
        Ok(())
    }

    /// Of the last step that was waited for.
    pub(super) fn times(&self) -> Option<StepTimes> {
        self.times
    }
}

/// From one event to a later one, both of which have happened; none where one was never recorded.
fn between(from: &CudaEvent, to: &CudaEvent) -> Option<Duration> {
    // SAFETY: both events live, and belong to one context.
    let milliseconds = unsafe { result::event::elapsed(from.cu_event(), to.cu_event()) }.ok()?;
    // Events of one moment may be told the wrong way round.
    Some(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
}
