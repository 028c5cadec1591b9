//! Masks computed beside the worker, while it runs the step that they are for.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel, sync_channel},
    },
    thread,
};

use llguidance::Matcher;

use super::{Mask, failure};
use crate::{error::EngineError, handle::lock};

/// A matcher on its way back, with the mask of what may come next.
pub(super) type Computed = (Matcher, Result<Mask, EngineError>);

type Task = Box<dyn FnOnce() + Send>;

/// Most threads that compute masks. They take the cores from nobody for long: a mask has budgets.
const THREADS: usize = 8;

/// Threads that compute masks, so that a costly one holds up no other. They start with the first, and end with this.
#[derive(Default)]
pub(crate) struct Masks(Option<Sender<Task>>);

impl Masks {
    /// Computes a matcher's mask beside the caller.
    pub(super) fn compute(
        &mut self,
        matcher: impl FnOnce() -> Matcher + Send + 'static,
    ) -> Receiver<Computed> {
        let (reply, receiver) = sync_channel(1);
        let task = move || {
            let mut matcher = matcher();
            let mask = matcher.compute_mask().map(Mask).map_err(|_| failure(&matcher));
            // Nobody may be waiting any more.
            let _ = reply.send((matcher, mask));
        };
        let threads = self.0.get_or_insert_with(start);
        if let Err(returned) = threads.send(Box::new(task)) {
            // There is no thread: here, then.
            (returned.0)();
        }
        receiver
    }
}

fn start() -> Sender<Task> {
    let (tasks, todo) = channel::<Task>();
    let todo = Arc::new(Mutex::new(todo));
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..cores.min(THREADS) {
        let todo = Arc::clone(&todo);
        let work = move || {
            // The lock is let go before the task runs.
            while let Some(task) = next(&todo) {
                task();
            }
        };
        if let Err(error) = thread::Builder::new().name("m40llm-masks".into()).spawn(work) {
            tracing::warn!(%error, "no thread for masks");
            break;
        }
    }
    tasks
}

fn next(todo: &Mutex<Receiver<Task>>) -> Option<Task> {
    lock(todo).recv().ok()
}
