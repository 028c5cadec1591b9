//! Persistent worker threads for steps of a few microseconds.
//!
//! A decode step of a small model is some two hundred parallel regions in a few milliseconds, so waking
//! a thread through the kernel each time would cost more than the work. Idle workers therefore stay
//! awake for [`AWAKE`], which bridges the gaps within and between steps, then park: an idle server uses
//! no CPU.
//!
//! Threads beside ours want the cores too: the server's own, its client, other programs. So nothing
//! here relies on a worker being on a core:
//! - a region belongs to its caller, who takes items until none is left. Workers join while it is open;
//!   one that comes late finds it closed and touches nothing of it. The caller waits only for workers in
//!   the midst of an item;
//! - a worker that waits gives its core to whoever wants it, and takes what it gets back. Above all this
//!   lets the caller go on when both are on one core.

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

/// How long an idle worker stays awake, the time others had its core not counted. Longer than the
/// serial gaps of a step (norms, sampling), far shorter than anything a load monitor sees.
const AWAKE: Duration = Duration::from_micros(150);

/// Looks at the region so many times, some microseconds, before it looks at the clock and gives way.
const LOOKS: u32 = 64;

/// More than [`LOOKS`] looks take: beyond this somebody else had the core.
const GLANCE: Duration = Duration::from_micros(10);

/// How long a caller waits for a worker's last item before it takes the worker to be off its core.
const PATIENCE: Duration = Duration::from_micros(50);

type Task<'a> = dyn Fn(usize) + Sync + 'a;
type Panic = Box<dyn Any + Send>;

thread_local! {
    /// True while this thread runs a pool's task: a nested region would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// The region now or last open: its number, whether workers may join it, and how many are inside.
///
/// One word, so that joining and closing exclude each other: `number << 17 | open << 16 | inside`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Region(u64);

impl Region {
    const OPEN: u64 = 1 << 16;
    /// Workers inside; a pool has fewer than there are numbers here.
    const INSIDE: u64 = Self::OPEN - 1;
    const NUMBER: u64 = !(Self::OPEN | Self::INSIDE);

    /// The region after this one, open and empty.
    fn next(self) -> Self {
        Self((self.0 & Self::NUMBER).wrapping_add(Self::OPEN << 1) | Self::OPEN)
    }

    fn number(self) -> u64 {
        self.0 & Self::NUMBER
    }

    fn is_open(self) -> bool {
        self.0 & Self::OPEN != 0
    }

    fn inside(self) -> u64 {
        self.0 & Self::INSIDE
    }
}

/// What caller and workers share.
struct Shared {
    /// A [`Region`].
    region: AtomicU64,
    /// The open region's task. Written while the region is closed and nobody is inside; read by workers
    /// inside.
    task: UnsafeCell<Option<&'static Task<'static>>>,
    /// Workers that are parked or about to park.
    parked: Vec<AtomicBool>,
    /// Tells the workers to end.
    stop: AtomicBool,
    /// The first panic of a worker in this region.
    panic: Mutex<Option<Panic>>,
}

// SAFETY: `task` is written only by the caller that holds `Pool::gate`, while the region is closed and
// nobody is inside, and read only by workers that have joined the region opened after the write.
unsafe impl Sync for Shared {}
// SAFETY: as above; the reference in `task` is to a `Sync` closure, usable from any thread.
unsafe impl Send for Shared {}

/// Threads that share out a loop; the caller takes part as thread 0.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
    /// One region at a time, whoever calls.
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
        let count = threads.saturating_sub(1).min(Region::INSIDE as usize);
        let shared = Arc::new(Shared {
            region: AtomicU64::new(0),
            task: UnsafeCell::new(None),
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

    /// Threads that may take part in [`Pool::for_each`], the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(item, thread)` once for each item below `items`, handed out in order to whoever is free,
    /// and returns when all are done. Any thread, and none but the caller, may get items.
    ///
    /// # Panics
    /// With the first panic of `f`, when no thread is inside `f` any more; items that nobody had begun by
    /// then may be left out. And when called from within `f`.
    pub fn for_each(&self, items: usize, f: impl Fn(usize, usize) + Sync) {
        if items <= 1 || self.workers.is_empty() {
            let _inside = Inside::enter();
            for item in 0..items {
                f(item, 0);
            }
            return;
        }
        let next = AtomicUsize::new(0);
        self.region(&|thread| {
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                f(item, thread);
            }
        });
    }

    /// Runs `task(0)` on the caller, and at the same time `task(thread)` at most once on each worker that
    /// comes before the caller has finished: the caller's return must mean that no work is left to begin.
    fn region(&self, task: &Task<'_>) {
        let _inside = Inside::enter();
        let shared = &*self.shared;
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the lifetime is only for the way through `Shared`: this function does not return or
        // unwind before the region is closed and nobody is inside, and only those inside use it.
        let task: &'static Task<'static> =
            unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        // SAFETY: we hold the gate, the last region is closed and nobody is inside, so nobody reads now.
        unsafe { *shared.task.get() = Some(task) };
        let last = Region(shared.region.load(Ordering::Relaxed));
        debug_assert!(!last.is_open() && last.inside() == 0);
        // Nobody else changes a closed, empty region. Sequentially consistent, as is `parked` in
        // `next_region`: either we see its flag or it sees the region.
        shared.region.store(last.next().0, Ordering::SeqCst);
        for (flag, handle) in shared.parked.iter().zip(&self.handles) {
            if flag.load(Ordering::SeqCst) {
                handle.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| task(0)));
        shared.close();
        let theirs = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(gate);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
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
    /// # Panics
    /// Within a task.
    fn enter() -> Self {
        INSIDE.with(|inside| assert!(!inside.replace(true), "Pool::for_each within a task of a pool"));
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(false));
    }
}

impl Shared {
    /// Closes the region and returns when nobody is inside. A worker in there has begun an item; when that
    /// takes long it may want this core.
    fn close(&self) {
        let mut region = Region(self.region.fetch_and(!Region::OPEN, Ordering::Acquire));
        let mut since: Option<Instant> = None;
        while region.inside() != 0 {
            for _ in 0..LOOKS {
                std::hint::spin_loop();
                region = Region(self.region.load(Ordering::Acquire));
                if region.inside() == 0 {
                    return;
                }
            }
            if since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                thread::yield_now();
            }
        }
    }

    /// Joins the open region, unless it is `done`; returns its number.
    fn join(&self, done: u64) -> Option<u64> {
        let mut region = Region(self.region.load(Ordering::SeqCst));
        while region.is_open() && region.number() != done {
            // Acquire: what the caller wrote before it opened the region, the task above all.
            let joined = self.region.compare_exchange_weak(
                region.0,
                region.0 + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match joined {
                Ok(_) => return Some(region.number()),
                Err(now) => region = Region(now),
            }
        }
        None
    }

    /// Leaves the region; the caller sees what this thread wrote.
    fn leave(&self) {
        self.region.fetch_sub(1, Ordering::Release);
    }
}

/// A worker's life: join a region, run its task, leave.
fn worker(shared: &Shared, index: usize) {
    let mut done = 0;
    while let Some(region) = next_region(shared, index, done) {
        done = region;
        // SAFETY: we are inside the region: the task was written before it was opened, and stays until we
        // have left.
        let task = unsafe { *shared.task.get() };
        if let Some(task) = task {
            let inside = Inside::enter();
            let result = catch_unwind(AssertUnwindSafe(|| task(index + 1)));
            drop(inside);
            if let Err(panic) = result {
                shared.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
            }
        }
        shared.leave();
    }
}

/// Joins the next region after `done` that is open when this thread looks: awake for [`AWAKE`], then
/// parked. `None` when the pool ends.
fn next_region(shared: &Shared, index: usize, done: u64) -> Option<u64> {
    loop {
        let mut awake = Duration::ZERO;
        let mut last = Instant::now();
        while awake < AWAKE {
            for _ in 0..LOOKS {
                if let Some(region) = shared.join(done) {
                    return Some(region);
                }
                std::hint::spin_loop();
            }
            thread::yield_now();
            let now = Instant::now();
            awake += (now - last).min(GLANCE);
            last = now;
        }
        shared.parked[index].store(true, Ordering::SeqCst);
        if shared.stop.load(Ordering::SeqCst) {
            return None;
        }
        let region = shared.join(done);
        if region.is_none() {
            // Whoever wakes us opens a region that may be over before we run: the loop waits for the next.
            thread::park();
        }
        shared.parked[index].store(false, Ordering::SeqCst);
        if region.is_some() {
            return region;
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
mod tests;
