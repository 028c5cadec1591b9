//! Masks computed beside the worker, while it runs the step that they are for.

use std::{
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use llguidance::Matcher;

use super::{Mask, guarded};

/// A matcher on its way back, with the mask of what may come next.
pub(super) type Computed = (Matcher, Result<Mask, String>);

/// A thread that computes masks, one after another. It starts with the first, and ends with this.
#[derive(Default)]
pub(crate) struct Masks(Option<Sender<(Matcher, SyncSender<Computed>)>>);

impl Masks {
    /// Computes the matcher's mask beside the caller.
    pub(super) fn compute(&mut self, matcher: Matcher) -> Receiver<Computed> {
        let (reply, receiver) = sync_channel(1);
        let thread = self.0.get_or_insert_with(start);
        if let Err(returned) = thread.send((matcher, reply)) {
            // There is no thread: here, then.
            let (matcher, reply) = returned.0;
            let _ = reply.send(computed(matcher));
        }
        receiver
    }
}

fn start() -> Sender<(Matcher, SyncSender<Computed>)> {
    let (tasks, todo) = channel::<(Matcher, SyncSender<Computed>)>();
    let work = move || {
        while let Ok((matcher, reply)) = todo.recv() {
            // Nobody may be waiting any more.
            let _ = reply.send(computed(matcher));
        }
    };
    if let Err(error) = thread::Builder::new().name("m40llm-masks".into()).spawn(work) {
        tracing::warn!(%error, "no thread for masks: they are computed between the steps");
    }
    tasks
}

fn computed(mut matcher: Matcher) -> Computed {
    let mask = guarded(|| matcher.compute_mask().map(Mask).map_err(|error| error.to_string()));
    (matcher, mask)
}
