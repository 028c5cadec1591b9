//! Persistent worker threads for steps of a few microseconds.
//!
//! A decode step of a small model is some two hundred parallel regions in a millisecond, so waking a
//! thread through the kernel each time would cost more than the work. Idle workers therefore spin for
//! [`SPIN`], which bridges the gaps within and between steps, then park: an idle server uses no CPU.

use std::{
    any::Any,
    cell::{Cell, UnsafeCell},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long an idle worker stays awake. Longer than the serial gaps of a step (norms, sampling), far
/// shorter than anything a load monitor sees.
const SPIN: Duration = Duration::from_micros(150);

/// Looks at the clock once in so many turns of a spin loop.
const SPINS_PER_CLOCK: u32 = 64;

type Task<'a> = dyn Fn(usize) + Sync + 'a;
type Panic = Box<dyn Any + Send>;

thread_local! {
    /// True while this thread runs a pool's task: a nested `run` would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What caller and workers share.
struct Shared {
    /// Counts dispatches; a change tells the workers to look at `task`.
    epoch: AtomicU64,
    /// The task of this epoch; written before `epoch`, valid until `pending` is zero.
    task: UnsafeCell<Option<&'static Task<'static>>>,
    /// Workers that have not finished this epoch.
    pending: AtomicUsize,
    /// Workers that are parked or about to park.
    parked: Vec<AtomicBool>,
    /// Tells the workers to end.
    stop: AtomicBool,
    /// The first panic of this epoch.
    panic: Mutex<Option<Panic>>,
}

// SAFETY: `task` is written only by the caller that holds `Pool::gate` while no worker is pending, and
// read only by workers after they acquired the `epoch` released after the write.
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference in `task` is to a `Sync` closure, usable from any thread.
unsafe impl Send for Shared {}

/// Threads that run a closure together; the caller takes part as thread 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// One dispatch at a time, whoever calls.
    gate: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Pool {
    /// Starts `threads - 1` workers (at least 0); threads the system refuses to start are done without.
    pub fn new(threads: usize) -> Self {
        let count = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            task: UnsafeCell::new(None),
            pending: AtomicUsize::new(0),
            parked: (0..count).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut workers = Vec::with_capacity(count);
        for index in 0..count {
            let shared = Arc::clone(&shared);
            let builder = thread::Builder::new().name(format!("cpu-{}", index + 1));
            match builder.spawn(move || worker(&shared, index)) {
                Ok(handle) => workers.push(handle),
                Err(_) => break,
            }
        }
        let handles = workers.iter().map(|w| w.thread().clone()).collect();
        Self { shared, workers, handles, gate: Mutex::new(()) }
    }

    /// Threads that take part in [`Pool::run`], the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(thread)` once on each thread and returns when all have; the caller is thread 0.
    ///
    /// # Panics
    /// With the first panic of `f`, after all threads have finished; and when called from within `f`.
    pub fn run(&self, f: impl Fn(usize) + Sync) {
        INSIDE.with(|inside| assert!(!inside.get(), "Pool::run within a task of a pool"));
        if self.workers.is_empty() {
            let guard = Inside::enter();
            f(0);
            drop(guard);
            return;
        }
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let task: &Task<'_> = &f;
        // SAFETY: the lifetime is only for the way through `Shared`: this function does not return or
        // unwind before every worker has finished with the reference (`pending` is zero).
        let task: &'static Task<'static> =
            unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        // SAFETY: we hold the gate and no worker is pending, so nobody reads `task` now.
        unsafe { *self.shared.task.get() = Some(task) };
        self.shared.pending.store(self.workers.len(), Ordering::Relaxed);
        // Sequentially consistent, as is `parked` in `worker`: either we see its flag or it sees the epoch.
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (flag, handle) in self.shared.parked.iter().zip(&self.handles) {
            if flag.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        let guard = Inside::enter();
        let own = catch_unwind(AssertUnwindSafe(|| f(0)));
        drop(guard);
        self.wait();
        let theirs = self.shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(gate);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }

    /// Runs `f(item, thread)` once for each item below `items`, handed out in order to whoever is free.
    ///
    /// # Panics
    /// As [`Pool::run`]; items not yet begun by the panicking thread are taken by the others.
    pub fn for_each(&self, items: usize, f: impl Fn(usize, usize) + Sync) {
        if items <= 1 || self.workers.is_empty() {
            for item in 0..items {
                f(item, 0);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(|thread| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                f(item, thread);
            }
        });
    }

    /// Returns when no worker is pending. Gives the core away after a while, in case a worker needs it.
    fn wait(&self) {
        let mut spins = 0u32;
        while self.shared.pending.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins > 2000 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        for (worker, handle) in self.workers.drain(..).zip(&self.handles) {
            handle.unpark();
            // A worker catches its task's panics, so there is nothing to learn from the result.
            let _ = worker.join();
        }
    }
}

/// Marks this thread as running a task, until dropped.
struct Inside;

impl Inside {
    fn enter() -> Self {
        INSIDE.with(|inside| inside.set(true));
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(false));
    }
}

/// A worker's life: wait for an epoch, run its task, say so.
fn worker(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        seen = next_epoch(shared, index, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the epoch was acquired after the task was written, and the caller waits for `pending`.
        let task = unsafe { *shared.task.get() };
        if let Some(task) = task {
            let guard = Inside::enter();
            let result = catch_unwind(AssertUnwindSafe(|| task(index + 1)));
            drop(guard);
            if let Err(panic) = result {
                shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
        }
        shared.pending.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until the epoch differs from `seen`: spins for [`SPIN`], then parks.
fn next_epoch(shared: &Shared, index: usize, seen: u64) -> u64 {
    let mut since: Option<Instant> = None;
    loop {
        for _ in 0..SPINS_PER_CLOCK {
            let epoch = shared.epoch.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            std::hint::spin_loop();
        }
        if since.get_or_insert_with(Instant::now).elapsed() < SPIN {
            continue;
        }
        shared.parked[index].store(true, Ordering::SeqCst);
        loop {
            let epoch = shared.epoch.load(Ordering::SeqCst);
            if epoch != seen {
                shared.parked[index].store(false, Ordering::SeqCst);
                return epoch;
            }
            thread::park();
        }
    }
}

/// A shared `*mut T` for tasks that write disjoint parts of one slice.
#[derive(Debug)]
pub(crate) struct SharedMut<T>(AtomicPtr<T>);

impl<T> SharedMut<T> {
    /// Wraps the slice's start.
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self(AtomicPtr::new(slice.as_mut_ptr()))
    }

    /// Part of the slice.
    ///
    /// # Safety
    /// `start + len` is within the slice, the slice's borrow still lives, and no other part in use
    /// overlaps this one.
    #[allow(clippy::mut_from_ref, reason = "the caller promises disjoint parts")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.0.load(Ordering::Relaxed).add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_runs_once() {
        for threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..pool.threads()).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|t| {
                    counts[t].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn each_item_is_handed_out_once() {
        let pool = Pool::new(3);
        for items in [0, 1, 2, 3, 100, 1000] {
            let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each(items, |i, t| {
                assert!(t < 3);
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(4);
        for culprit in 0..4 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(|t| assert!(t != culprit, "thread {t}"))));
            let message = result.unwrap_err();
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("thread {culprit}")));
        }
        pool.run(|_| {});
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = Pool::new(2);
        for pause in [0, 100, 300, 2000] {
            let count = AtomicUsize::new(0);
            for _ in 0..20 {
                thread::sleep(Duration::from_micros(pause));
                pool.run(|_| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
            }
            assert_eq!(count.load(Ordering::Relaxed), 40);
        }
    }

    #[test]
    fn callers_take_turns_and_nesting_is_refused() {
        let pool = Pool::new(2);
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 400);
        assert!(catch_unwind(AssertUnwindSafe(|| pool.run(|_| pool.run(|_| {})))).is_err());
    }
}
