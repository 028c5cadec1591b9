//! What the worker counts.

/// A histogram whose bounds are powers of two of a unit: the first bucket is up to one, the last without a bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct Distribution {
    /// Observations of each bucket, not cumulated.
    pub buckets: [u64; 14],
    /// Of all observations.
    pub sum: f64,
}

impl Distribution {
    pub(crate) fn observe(&mut self, value: f64, unit: f64) {
        let over = self.buckets.len() - 1;
        let bucket = (0..over).find(|&i| value <= unit * f64::from(1u32 << i)).unwrap_or(over);
        self.buckets[bucket] += 1;
        self.sum += value;
    }
}

/// Counters and gauges of the worker, for metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Requests waiting for a place.
    pub waiting: usize,
    /// Sequences in the batch.
    pub running: usize,
    /// Sequences whose [`Allowance`](crate::Allowance) allows them no token now.
    pub paused: usize,
    /// KV blocks that sequences hold.
    pub kv_blocks_used: usize,
    /// KV blocks that nobody holds and that are kept for who has the same beginning.
    pub kv_blocks_cached: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens processed.
    pub prompt_tokens: u64,
    /// Tokens of prompts that were taken from the cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Times a sequence had to give its blocks back, to be computed again.
    pub preemptions: u64,
    /// Seconds of steps, in milliseconds times powers of two.
    pub step_seconds: Distribution,
    /// Sequences in a step, in powers of two.
    pub step_sequences: Distribution,
    /// Of steps that came right after another one, seconds that the device waited before its work began: by its own
    /// events, on a CPU the time between forward passes.
    pub idle_seconds: f64,
    /// Of the same steps, seconds of the device's work.
    pub busy_seconds: f64,
    /// Kernels launched on the device since it was opened; 0 on a CPU.
    pub kernel_launches: u64,
    /// Times the host has waited for the device; 0 on a CPU.
    pub device_syncs: u64,
}
