//! Graphs of fused steps, one for each number of tokens.

use std::{collections::HashMap, mem};

use cudarc::driver::{
    CudaGraph,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::{error::Call as _, gpu::Gpu};
use crate::error::EngineError;

/// The graphs so far, and how the step under way is run.
#[derive(Default)]
pub(super) struct Graphs {
    /// By the number of tokens. The first such step runs directly, as kernels that were never launched may have to be
    /// loaded, which a capture does not allow; it leaves `None`.
    captured: HashMap<usize, Option<Captured>>,
    mode: StepMode,
    tokens: usize,
}

struct Captured {
    graph: CudaGraph,
    launches: u64,
}

// SAFETY: the graph is used by the thread that has the backend, one at a time; CUDA ties it to no thread.
unsafe impl Send for Captured {}

/// How the step under way reaches the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum StepMode {
    /// Launch by launch.
    #[default]
    Direct,
    /// Launch by launch into a graph, which `finish` then runs.
    Capture { launches_before: u64 },
    /// By a graph from before, in `finish`.
    Replay,
}

impl Graphs {
    /// Begins a step, in a graph where that is `allowed` and can be.
    pub(super) fn begin(&mut self, gpu: &Gpu, tokens: usize, allowed: bool) -> Result<(), EngineError> {
        self.tokens = tokens;
        self.mode = match self.captured.get(&tokens) {
            _ if !allowed => StepMode::Direct,
            None => {
                self.captured.insert(tokens, None);
                StepMode::Direct
            }
            Some(Some(_)) => StepMode::Replay,
            Some(None) => {
                let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                gpu.stream().begin_capture(mode).call("cuStreamBeginCapture")?;
                StepMode::Capture { launches_before: gpu.counters().launches }
            }
        };
        Ok(())
    }

    /// True while a graph is going to do the step's work.
    pub(super) fn replays(&self) -> bool {
        self.mode == StepMode::Replay
    }

    /// True while launches go into a graph.
    pub(super) fn captures(&self) -> bool {
        matches!(self.mode, StepMode::Capture { .. })
    }

    /// Ends a capture, and runs the step's graph if it has one.
    pub(super) fn finish(&mut self, gpu: &mut Gpu) -> Result<(), EngineError> {
        let mode = mem::take(&mut self.mode);
        if let StepMode::Capture { launches_before } = mode {
            let flags = CUgraphInstantiate_flags(0);
            let graph = gpu.stream().end_capture(flags).call("cuGraphInstantiate of a step")?;
            let graph = graph.ok_or_else(|| EngineError::Backend("cuStreamEndCapture: no graph".into()))?;
            let launches = gpu.counters().launches - launches_before;
            self.captured.insert(self.tokens, Some(Captured { graph, launches }));
        }
        let captured = self.captured.get(&self.tokens).and_then(Option::as_ref);
        let Some(captured) = captured.filter(|_| mode != StepMode::Direct) else { return Ok(()) };
        if mode == StepMode::Replay {
            gpu.count_launches(captured.launches);
        }
        captured.graph.launch().call("cuGraphLaunch of a step")
    }
}
