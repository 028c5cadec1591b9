//! What sampling wants of logits: the best tokens, and rows that come while others are sampled.

use std::time::{Duration, Instant};

use super::{
    super::{
        arguments::Logits,
        gpu::{Buffer, Dims, Pinned, arguments},
        kernels::Kernels,
        rows::Rows,
        state::State,
    },
    Rig,
};
use crate::{
    backend::{Capacity, Need, Row, Shape},
    config::KvType,
    sampling::{Sampler, SamplingParams},
};

/// The best of rows, some of which are equal, on the device and by sorting.
fn check_best(rig: &mut Rig, vocab: usize, rows: usize, ks: &[usize]) {
    let mut logits = rig.numbers(rows * vocab);
    for i in (0..logits.len()).step_by(7) {
        logits[i] = (logits[i] * 8.0).round() / 8.0;
    }
    logits[0] = f32::NAN;
    let on_device = rig.gpu.clone_to_device(&logits, "logits").expect("logits");
    for k in ks.iter().map(|&k| k.min(vocab)) {
        let context = rig.gpu.context().clone();
        let make = |bytes: usize| Buffer::zeroed(&context, bytes, "results").expect("memory");
        let (ids, values, sums) = (make(rows * k * 4), make(rows * k * 4), make(rows * 8));
        let (partial, counters) = (make(rows * vocab.div_ceil(4096) * 512), make(4096));
        let argument = Logits {
            logits: on_device.pointer(),
            ids: ids.pointer(),
            values: values.pointer(),
            sums: sums.pointer(),
            partial: partial.pointer(),
            counters: counters.pointer(),
            vocab: vocab as i32,
            k: k as i32,
        };
        let (name, segment) = if k == 1 { ("argmax_rows", 4096) } else { ("top_k_rows", 8192) };
        let kernel = rig.gpu.kernel(name).expect("a kernel");
        let grid = [vocab.div_ceil(segment) as u32, rows as u32, 1];
        let dims = Dims { grid, block: [256, 1, 1], shared: 0 };
        // SAFETY: the argument of sample.cu's kernels, with room for what its header says.
        unsafe { rig.gpu.launch(&kernel, dims, 0, arguments![argument]) }.expect("a launch");
        let ids: Vec<u32> = rig.read(&ids, rows * k).into_iter().map(f32::to_bits).collect();
        let values = rig.read(&values, rows * k);
        for row in 0..rows {
            let sorted = sorted(&logits[row * vocab..(row + 1) * vocab]);
            for (i, &best) in sorted.iter().take(k).enumerate() {
                let at = row * k + i;
                assert_eq!((ids[at], values[at]), best, "vocab {vocab}, row {row}, place {i} of {k}");
            }
        }
    }
}

fn sorted(row: &[f32]) -> Vec<(u32, f32)> {
    let mut sorted: Vec<(u32, f32)> =
        (0u32..).zip(row.iter().copied()).filter(|(_, l)| !l.is_nan()).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    sorted
}

#[test]
fn the_best_tokens_are_those_of_a_sort() {
    let mut rig = Rig::new();
    for vocab in [5, 64, 4097, 32_000, 151_936] {
        let rows = 1 + rig.below(20);
        check_best(&mut rig, vocab, rows, &[1, 2, 40, 64]);
    }
}

/// For compute-sanitizer: rows of more than one segment.
#[test]
fn tiny_best_tokens() {
    let mut rig = Rig::new();
    check_best(&mut rig, 9000, 2, &[1, 40]);
}

/// Logits on the device, and what brings them from there.
struct Ready {
    rig: Rig,
    kernels: Kernels,
    rows: Rows,
    logits: Vec<f32>,
}

impl Ready {
    fn new(vocab: usize, count: usize) -> Self {
        let mut rig = Rig::new();
        let shape = Shape { vocab, ..rig.state.shape.clone() };
        let capacity = Capacity { logit_rows: count, ..rig.state.capacity };
        rig.state = State::new(&mut rig.gpu, &shape, &capacity).expect("run state");
        rig.state.metadata.logit_rows = count;
        let kernels = Kernels::find(&rig.gpu, &[], &shape, KvType::F16).expect("kernels");
        let rows = Rows::new(&rig.gpu, &shape, &capacity).expect("pinned memory");
        let logits = rig.numbers(count * vocab);
        Self { rig, kernels, rows, logits }
    }

    /// Puts the logits where a step would, as one that is queued.
    fn compute(&mut self) -> Pinned {
        let bytes = self.logits.len() * 4;
        let mut staged = Pinned::new(self.rig.gpu.context(), bytes, "logits").expect("pinned memory");
        staged.slice_mut::<f32>()[..self.logits.len()].copy_from_slice(&self.logits);
        // SAFETY: the caller keeps `staged` until the stream has been waited for.
        unsafe { self.rig.gpu.upload(&staged, &self.rig.state.logits, bytes) }.expect("a copy");
        staged
    }

    fn bring(&mut self, needs: &[Need]) {
        let Self { rig, kernels, rows, .. } = self;
        rows.bring(&mut rig.gpu, &rig.state, kernels, needs).expect("rows");
    }

    fn wait_for(&mut self, count: usize) {
        self.rows.wait_for(&mut self.rig.gpu, count).expect("rows");
    }
}

#[test]
fn rows_are_whole_when_they_have_been_waited_for() {
    let (vocab, count) = (128_256, 24);
    let mut ready = Ready::new(vocab, count);
    let fill = ready.rig.gpu.kernel("fill_random").expect("a kernel");
    for round in 0..20 {
        let staged = ready.compute();
        ready.rows.poison();
        let needs: Vec<Need> = (0..count)
            .map(|_| [Need::All, Need::All, Need::Best(1), Need::Best(40)][ready.rig.below(4)])
            .collect();
        let before = ready.rig.gpu.counters().syncs;
        ready.bring(&needs);
        // As the next step would, this uses the same memory for something else.
        let (to, words, seed) = (ready.rig.state.logits.pointer(), (count * vocab) as u64, round as u32);
        // SAFETY: the arguments of copy.cu's kernel; the buffer holds the rows.
        unsafe { ready.rig.gpu.launch(&fill, Dims::new(1024, 256), 0, arguments![to, words, seed]) }
            .expect("a launch");
        let mut at = 0;
        while at < count {
            let next = (at + 1 + ready.rig.below(3)).min(count);
            let waits = ready.rig.gpu.counters().syncs;
            ready.wait_for(next);
            ready.wait_for(next);
            let whole = needs[at..next].contains(&Need::All);
            assert_eq!(
                ready.rig.gpu.counters().syncs - waits,
                u64::from(whole),
                "one wait, where one is needed"
            );
            for (i, &need) in needs.iter().enumerate().take(next).skip(at) {
                let row = &ready.logits[i * vocab..(i + 1) * vocab];
                match (need, ready.rows.row(i)) {
                    (Need::All, Row::All(found)) => assert!(found == row, "row {i} in round {round}"),
                    (Need::Best(k), Row::Best(found)) => {
                        assert_eq!(found[..k], sorted(row)[..k], "row {i} in round {round}");
                    }
                    other => panic!("row {i}: {other:?}"),
                }
            }
            at = next;
        }
        assert!(ready.rig.gpu.counters().syncs - before <= 1 + count as u64);
        ready.rig.gpu.synchronize().expect("a wait");
        drop(staged);
    }
}

/// Prints what a step's last part takes with the copies at once and with each row as it comes.
#[test]
fn rows_come_while_others_are_sampled() {
    let (vocab, count) = (128_256, 16);
    let mut ready = Ready::new(vocab, count);
    let staged = ready.compute();
    let needs = vec![Need::All; count];
    let params = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::greedy() };
    let mut sampler = Sampler::new(params, &[1, 2, 3]);
    let mut best = [Duration::MAX; 4];
    let mut ahead = 0;
    for _ in 0..60 {
        for (way, best) in best.iter_mut().enumerate() {
            let start = Instant::now();
            ready.bring(&needs);
            ready.wait_for(if way % 2 == 0 { count } else { 1 });
            // The first can be sampled; whether the last could, too?
            ahead += usize::from(way == 1 && !ready.rows.has_come(count - 1));
            if way >= 2 {
                for i in 0..count {
                    ready.wait_for(i + 1);
                    assert!(sampler.sample(ready.rows.row(i)).is_some());
                }
            }
            *best = start.elapsed().min(*best);
            ready.rig.gpu.synchronize().expect("a wait");
        }
    }
    drop(staged);
    let [all, first, at_once, as_they_come] = best;
    println!(
        "{count} rows of {vocab}: the first is there after {first:?}, all are after {all:?}; \
sampled after that {at_once:?}, sampled as they come {as_they_come:?}; \
{ahead} of 60 times the first was ahead of the last"
    );
    assert!(ahead > 0, "the first row comes with the last");
}
