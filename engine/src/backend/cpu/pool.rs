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
mod tests {
    use super::*;

    /// Runs `items` items and counts how often each was run.
    fn counts(pool: &Pool, items: usize, f: impl Fn(usize, usize) + Sync) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
        pool.for_each(items, |item, thread| {
            counts[item].fetch_add(1, Ordering::Relaxed);
            f(item, thread);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    /// Waits for what another thread is about to do.
    fn wait_for(flag: &AtomicBool) {
        while !flag.load(Ordering::Acquire) {
            thread::yield_now();
        }
    }

    #[test]
    fn a_region_is_opened_joined_and_closed() {
        let region = Region(0);
        assert!(!region.is_open() && region.inside() == 0);
        let open = region.next();
        assert!(open.is_open() && open.inside() == 0 && open.number() != region.number());
        let joined = Region(open.0 + 2);
        assert!(joined.is_open() && joined.inside() == 2 && joined.number() == open.number());
        let closed = Region(joined.0 & !Region::OPEN);
        assert!(!closed.is_open() && closed.inside() == 2 && closed.number() == open.number());
        let last = Region(Region::NUMBER);
        assert!(last.next().is_open() && last.next().number() == 0 && last.next().inside() == 0);
    }

    #[test]
    fn each_item_is_handed_out_once() {
        for threads in [0, 1, 2, 3, 8] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads.max(1));
            for items in [0, 1, 2, 3, 100, 1000] {
                let counts = counts(&pool, items, |_, thread| assert!(thread < threads.max(1)));
                assert_eq!(counts, vec![1; items]);
            }
        }
    }

    /// Many short regions one after the other, in which workers come early, late and not at all. Each
    /// region's state is on its caller's stack: a worker that touched one after its end, or a caller that
    /// went on before an item's end, would spoil a sum.
    #[test]
    fn short_regions_keep_apart() {
        let pool = Pool::new(4);
        for round in 0..20_000usize {
            let items = 2 + round % 7;
            let mut results = [0usize; 8];
            let out = SharedMut::new(&mut results);
            pool.for_each(items, |item, _| {
                // SAFETY: the array has a place for each item.
                unsafe { out.part(item, 1)[0] = round + item };
            });
            let expected = std::array::from_fn(|i| if i < items { round + i } else { 0 });
            assert_eq!(results, expected);
            // Pauses of all lengths up to those in which workers begin to park.
            for _ in 0..round % 50 * (round % 11) {
                std::hint::spin_loop();
            }
        }
    }

    #[test]
    fn no_two_threads_have_the_same_number() {
        let pool = Pool::new(3);
        let busy: Vec<AtomicBool> = (0..3).map(|_| AtomicBool::new(false)).collect();
        for _ in 0..500 {
            pool.for_each(64, |_, thread| {
                assert!(!busy[thread].swap(true, Ordering::AcqRel), "thread {thread} twice");
                busy[thread].store(false, Ordering::Release);
            });
        }
    }

    /// The caller neither waits for a worker that never gets a core nor leaves an item to it.
    #[test]
    fn a_caller_needs_no_worker() {
        let pool = Pool::new(2);
        // A worker that has ended is one that looks away for good.
        pool.shared.stop.store(true, Ordering::SeqCst);
        pool.handles[0].unpark();
        while !pool.workers[0].is_finished() {
            thread::yield_now();
        }
        for _ in 0..100 {
            assert_eq!(counts(&pool, 50, |_, thread| assert_eq!(thread, 0)), vec![1; 50]);
        }
    }

    /// A worker that comes when the region is closed finds no way in, even where someone is inside still.
    #[test]
    fn a_late_worker_stays_outside() {
        let shared = Shared {
            region: AtomicU64::new(Region(0).next().0),
            task: UnsafeCell::new(None),
            parked: Vec::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        };
        let number = shared.join(0).unwrap();
        assert_eq!(shared.join(number), None, "a worker joins a region once");
        shared.region.fetch_and(!Region::OPEN, Ordering::AcqRel);
        assert_eq!(shared.join(0), None, "closed, one inside");
        shared.leave();
        shared.close();
        assert_eq!(shared.join(0), None, "closed, nobody inside");
        let next = Region(shared.region.load(Ordering::Relaxed)).next();
        shared.region.store(next.0, Ordering::SeqCst);
        assert_eq!(shared.join(number), Some(next.number()));
    }

    /// The caller has no item left and waits for the one that the worker has begun.
    #[test]
    fn the_last_item_is_waited_for() {
        let pool = Pool::new(2);
        for pause in [0, 10, 200, 3000] {
            let (begun, ended) = (AtomicBool::new(false), AtomicBool::new(false));
            pool.for_each(2, |_, thread| {
                if thread == 0 {
                    wait_for(&begun);
                } else {
                    begun.store(true, Ordering::Release);
                    thread::sleep(Duration::from_micros(pause));
                    ended.store(true, Ordering::Release);
                }
            });
            assert!(ended.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for culprit in [0, 1, 0, 1] {
            // Each thread has one of the two items, so that the culprit surely has one.
            let (here, there) = (AtomicBool::new(false), AtomicBool::new(false));
            let region = || {
                pool.for_each(2, |_, thread| {
                    let (mine, other) = if thread == 0 { (&here, &there) } else { (&there, &here) };
                    mine.store(true, Ordering::Release);
                    wait_for(other);
                    assert!(thread != culprit, "thread {thread}");
                });
            };
            let message = catch_unwind(AssertUnwindSafe(region)).unwrap_err();
            assert_eq!(message.downcast_ref::<String>(), Some(&format!("thread {culprit}")));
            assert_eq!(counts(&pool, 20, |_, _| {}), vec![1; 20]);
        }
    }

    #[test]
    fn parked_workers_wake_up() {
        let pool = Pool::new(2);
        for pause in [0, 100, 300, 2000] {
            for _ in 0..20 {
                thread::sleep(Duration::from_micros(pause));
                // The caller does not go on without the worker.
                let come = AtomicBool::new(false);
                pool.for_each(2, |_, thread| {
                    if thread == 1 {
                        come.store(true, Ordering::Release);
                    }
                    wait_for(&come);
                });
            }
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Pool::new(2);
        let inside = AtomicBool::new(false);
        let count = AtomicUsize::new(0);
        thread::scope(|scope| {
            for caller in 0..4 {
                let (pool, inside, count) = (&pool, &inside, &count);
                scope.spawn(move || {
                    for _ in 0..50 {
                        pool.for_each(10, |item, _| {
                            // One item is enough to tell that no other caller's region is open.
                            if item == 0 {
                                assert!(!inside.swap(true, Ordering::AcqRel), "caller {caller}");
                                inside.store(false, Ordering::Release);
                            }
                            count.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(count.load(Ordering::Relaxed), 4 * 50 * 10);
    }

    #[test]
    fn nesting_is_refused() {
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            let nested = AssertUnwindSafe(|| pool.for_each(4, |_, _| pool.for_each(4, |_, _| {})));
            let message = catch_unwind(nested).unwrap_err();
            assert!(message.downcast_ref::<&str>().unwrap().contains("within a task"));
            assert_eq!(counts(&pool, 4, |_, _| {}), vec![1; 4]);
        }
    }
}
