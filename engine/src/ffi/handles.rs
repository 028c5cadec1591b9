//! Handles as keys of a table. What a handle names is found under a lock and shared, so that a handle
//! freed twice, used after it was freed, or freed while another thread works with it is an error of that
//! call and never a crash.

use std::{
    collections::BTreeMap,
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use super::{
    model::{Model, ModelHandle},
    session::{Session, SessionHandle},
    status::Failure,
};
use crate::handle::lock;

/// Open models.
pub(super) static MODELS: Table<ModelHandle, Model> = Table::new("model");
/// Open sessions.
pub(super) static SESSIONS: Table<SessionHandle, Session> = Table::new("session");

/// Keys are never used again, and differ between tables; 0 stays free for NULL.
static NEXT_KEY: AtomicUsize = AtomicUsize::new(1);

/// What handles of type `H` stand for.
pub(super) struct Table<H, T> {
    what: &'static str,
    entries: Mutex<BTreeMap<usize, Arc<T>>>,
    handle: std::marker::PhantomData<fn(*const H)>,
}

impl<H, T> Table<H, T> {
    const fn new(what: &'static str) -> Self {
        Self { what, entries: Mutex::new(BTreeMap::new()), handle: std::marker::PhantomData }
    }

    /// A handle for `entry`: a number in a pointer's clothes, never dereferenced.
    pub(super) fn insert(&self, entry: T) -> *mut H {
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        lock(&self.entries).insert(key, Arc::new(entry));
        ptr::without_provenance_mut(key)
    }

    /// What `handle` names.
    pub(super) fn get(&self, handle: *const H) -> Result<Arc<T>, Failure> {
        lock(&self.entries).get(&handle.addr()).cloned().ok_or_else(|| self.unknown(handle))
    }

    /// Takes `handle` out of use. What it named lives on while calls work with it; NULL names nothing.
    pub(super) fn remove(&self, handle: *mut H) -> Result<Option<Arc<T>>, Failure> {
        if handle.is_null() {
            return Ok(None);
        }
        let removed = lock(&self.entries).remove(&handle.addr());
        removed.map(Some).ok_or_else(|| self.unknown(handle))
    }

    fn unknown(&self, handle: *const H) -> Failure {
        let what = self.what;
        Failure::invalid(if handle.is_null() {
            format!("{what} is NULL")
        } else {
            format!("{what} is not open: it was freed, or never was a {what}")
        })
    }
}
