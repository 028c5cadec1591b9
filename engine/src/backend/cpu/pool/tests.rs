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
