//! A step's logits on their way to the host.
//!
//! The best tokens come first; with them the step's work is done, which the host waits for. Whole rows follow in their order,
//! each with an event after it, so that the host samples one row while the next ones come. All of it is queued on the
//! one stream: what the next step queues, which has use for the same buffers, lies behind these copies.

use cudarc::driver::CudaEvent;

use super::{
    arguments::Logits,
    clock::Clock,
    gpu::{Dims, Gpu, Pinned, arguments},
    kernels::Kernels,
    state::State,
};
use crate::{
    backend::{Capacity, MOST_BEST, Need, Row, Shape, StepTimes},
    error::EngineError,
};

/// Where rows arrive, and which have.
pub(super) struct Rows {
    vocab: usize,
    /// `[logit_rows, vocab]`
    logits: Pinned,
    /// Of the best tokens, `[logit_rows, MOST_BEST]` at most.
    best_ids: Pinned,
    best_logits: Pinned,
    /// The rows' best tokens, best first.
    best: Vec<(u32, f32)>,
    places: Vec<Place>,
    /// Ends behind the step's work and the best tokens.
    clock: Clock,
    /// Behind the copy of each whole row.
    copied: Vec<CudaEvent>,
    /// Rows that have come: so many of the first.
    arrived: usize,
}

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In `best`.
    Best { first: usize, len: usize },
    /// In `logits`.
    All,
}

impl Rows {
    pub(super) fn new(gpu: &Gpu, shape: &Shape, capacity: &Capacity) -> Result<Self, EngineError> {
        let rows = capacity.logit_rows;
        let pinned = |width: usize, what: &str| Pinned::new(gpu.context(), rows * width * 4, what);
        Ok(Self {
            vocab: shape.vocab,
            logits: pinned(shape.vocab, "logits")?,
            best_ids: pinned(MOST_BEST, "the best tokens")?,
            best_logits: pinned(MOST_BEST, "the best tokens")?,
            best: Vec::with_capacity(rows * MOST_BEST),
            places: Vec::with_capacity(rows),
            clock: Clock::new(gpu)?,
            copied: (0..rows).map(|_| gpu.event()).collect::<Result<_, _>>()?,
            arrived: 0,
        })
    }

    /// Before the first launch of a step that no graph from before does.
    pub(super) fn begin(&self, gpu: &Gpu, capturing: bool) -> Result<(), EngineError> {
        self.clock.begin(gpu, capturing)
    }

    /// When the last step's work was done.
    pub(super) fn step_times(&self) -> Option<StepTimes> {
        self.clock.times()
    }

    /// Queues the copies of what `needs` asks for, and waits for the step's work and the best tokens.
    pub(super) fn bring(
        &mut self,
        gpu: &mut Gpu,
        s: &State,
        kernels: &Kernels,
        needs: &[Need],
    ) -> Result<(), EngineError> {
        let rows = s.metadata.logit_rows;
        if needs.len() != rows {
            return Err(EngineError::Backend(format!("{} needs for {rows} rows of logits", needs.len())));
        }
        let widest =
            needs.iter().map(|need| if let Need::Best(k) = need { *k } else { 0 }).max().unwrap_or(0);
        let widest = widest.min(MOST_BEST).min(self.vocab);
        if widest > 0 {
            self.find_best(gpu, s, kernels, rows, widest)?;
        }
        self.clock.end(gpu)?;
        let row_bytes = self.vocab * 4;
        for row in (0..rows).filter(|&row| needs[row] == Need::All) {
            // SAFETY: read in `row`, after `wait_for`.
            unsafe { gpu.download(&s.logits, &mut self.logits, row * row_bytes, row_bytes) }?;
            gpu.record(&self.copied[row])?;
        }
        self.clock.wait(gpu)?;
        self.take_best(needs, widest);
        self.arrived = needs.iter().position(|need| *need == Need::All).unwrap_or(rows);
        Ok(())
    }

    /// Leaves no number where rows arrive.
    #[cfg(all(test, feature = "gpu-tests"))]
    pub(super) fn poison(&mut self) {
        self.logits.slice_mut::<u8>().fill(0xff);
        self.best_ids.slice_mut::<u8>().fill(0xff);
        self.best_logits.slice_mut::<u8>().fill(0xff);
    }

    /// Whether the copy of a whole row has ended.
    #[cfg(all(test, feature = "gpu-tests"))]
    pub(super) fn has_come(&self, row: usize) -> bool {
        self.copied[row].is_complete()
    }

    /// Queues finding the `k` best tokens of each row, and their copies.
    fn find_best(
        &mut self,
        gpu: &mut Gpu,
        s: &State,
        kernels: &Kernels,
        rows: usize,
        k: usize,
    ) -> Result<(), EngineError> {
        let arguments = Logits {
            logits: s.logits.pointer(),
            ids: s.best_ids.pointer(),
            values: s.best_logits.pointer(),
            sums: s.best_sums.pointer(),
            partial: s.best_partial.pointer(),
            counters: s.attention_counters.pointer(),
            vocab: self.vocab as i32,
            k: k as i32,
        };
        let (kernel, segment) = if k == 1 { (&kernels.argmax, 4096) } else { (&kernels.top_k, 8192) };
        let grid = [self.vocab.div_ceil(segment) as u32, rows as u32, 1];
        let dims = Dims { grid, block: [256, 1, 1], shared: 0 };
        let bytes = 4 * (rows * self.vocab) as u64;
        // SAFETY: the argument of sample.cu's kernels; results and workspace hold MOST_BEST a row.
        unsafe { gpu.launch(kernel, dims, bytes, arguments![arguments]) }?;
        // SAFETY: read in `take_best`, after the wait.
        unsafe {
            gpu.download(&s.best_ids, &mut self.best_ids, 0, rows * k * 4)?;
            gpu.download(&s.best_logits, &mut self.best_logits, 0, rows * k * 4)
        }
    }

    /// Notes where each row is, with the best tokens of `k` a row that have come.
    fn take_best(&mut self, needs: &[Need], k: usize) {
        self.best.clear();
        self.places.clear();
        let (ids, logits) = (self.best_ids.slice::<u32>(), self.best_logits.slice::<f32>());
        for (row, need) in needs.iter().enumerate() {
            let first = self.best.len();
            self.places.push(match need {
                Need::All => Place::All,
                Need::Best(_) => {
                    let row = row * k..(row + 1) * k;
                    let found = ids[row.clone()].iter().zip(&logits[row]).filter(|&(&id, _)| id != u32::MAX);
                    self.best.extend(found.map(|(&id, &logit)| (id, logit)));
                    Place::Best { first, len: self.best.len() - first }
                }
            });
        }
    }

    /// Waits until the first `count` rows have come, which is when the last whole one of them has.
    pub(super) fn wait_for(&mut self, gpu: &mut Gpu, count: usize) -> Result<(), EngineError> {
        let coming = self.arrived.min(count)..count;
        if let Some(last) = coming.clone().rfind(|&row| self.places[row] == Place::All) {
            gpu.wait(&self.copied[last])?;
        }
        self.arrived = self.arrived.max(count);
        Ok(())
    }

    /// A row that was waited for.
    pub(super) fn row(&self, index: usize) -> Row<'_> {
        assert!(index < self.arrived, "row {index} was not waited for");
        match self.places[index] {
            Place::Best { first, len } => Row::Best(&self.best[first..first + len]),
            Place::All => Row::All(&self.logits.slice::<f32>()[index * self.vocab..(index + 1) * self.vocab]),
        }
    }
}
