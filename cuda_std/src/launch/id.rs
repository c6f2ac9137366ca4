//! Dense numbers for statics, given at first use.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The next free number of one kind of thing.
#[doc(hidden)]
#[derive(Debug)]
pub struct IdSource(AtomicUsize);

impl IdSource {
    /// Numbers from 0 on.
    #[allow(clippy::new_without_default, reason = "only const")]
    pub const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }
}

/// A number that is given when it is first asked for.
#[doc(hidden)]
#[derive(Debug)]
pub struct Id(AtomicUsize);

impl Id {
    const UNSET: usize = usize::MAX;

    /// No number yet.
    #[allow(clippy::new_without_default, reason = "only const")]
    pub const fn new() -> Self {
        Self(AtomicUsize::new(Self::UNSET))
    }

    /// The number, from `source` the first time.
    #[inline]
    pub fn get(&self, source: &IdSource) -> usize {
        let id = self.0.load(Ordering::Relaxed);
        if id == Self::UNSET { self.assign(source) } else { id }
    }

    #[cold]
    fn assign(&self, source: &IdSource) -> usize {
        static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
        // Without the lock two threads would take two numbers for one thing, and one number would name nothing.
        let _guard = LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let id = self.0.load(Ordering::Relaxed);
        if id != Self::UNSET {
            return id;
        }
        let id = source.0.fetch_add(1, Ordering::Relaxed);
        self.0.store(id, Ordering::Relaxed);
        id
    }
}
