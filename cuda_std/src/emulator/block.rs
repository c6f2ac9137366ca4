//! A block and its threads: what they wait for, and what makes them ready.
//!
//! A worker has as many [`Block`]s as a cluster has and runs all its blocks in them. The threads of these and the scheduler
//! ([`worker`](super::worker)) take turns on one thread of the operating system, so everything is in `Cell`s.

use super::arena::Arena;
use super::collective::Meetings;
use super::error;
use super::fiber::FiberYielder;
use super::grid::{Grid, MAX_THREADS};
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::rc::Rc;

/// Lanes in a warp.
const WARP: usize = 32;

thread_local! {
    /// The emulated thread that runs; null outside of kernels.
    static CURRENT: Cell<*const Thread> = const { Cell::new(ptr::null()) };
}

/// Hands `f` the emulated thread that runs.
#[inline(always)]
#[track_caller]
pub(crate) fn with_thread<R>(f: impl FnOnce(&Thread) -> R) -> R {
    // SAFETY: the pointer is null, or to a thread of the block that this worker runs and therefore keeps.
    match unsafe { CURRENT.get().as_ref() } {
        Some(thread) => f(thread),
        None => outside(),
    }
}

#[cold]
#[track_caller]
fn outside() -> ! {
    panic!("this function belongs in a kernel: no launch is running on this thread")
}

/// Whether an emulated thread runs.
pub(super) fn is_inside() -> bool {
    !CURRENT.get().is_null()
}

/// While it lives no emulated thread runs, or those of a new launch; then the one before again.
pub(super) struct Outside(*const Thread);

impl Outside {
    pub(super) fn new() -> Self {
        Self(CURRENT.replace(ptr::null()))
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Why a thread ends its launch.
pub(super) enum Failure {
    /// It panicked.
    Panic(String),
    /// It is where it does not meet the others.
    Divergence(String),
    /// It wants what a GPU does not have.
    Refused(String),
}

/// What unwinds a thread whose launch has failed elsewhere.
struct Cancelled;

/// A thread of the block.
pub(crate) struct Thread {
    index: Cell<[u32; 3]>,
    lane: u32,
    warp: usize,
    block: Cell<*const Block>,
    /// The fiber that it runs on.
    pub(super) fiber: Cell<usize>,
    yielder: Cell<*const FiberYielder>,
}

impl Thread {
    #[inline(always)]
    pub(crate) fn thread_index(&self) -> [u32; 3] {
        self.index.get()
    }

    #[inline(always)]
    pub(crate) fn block_index(&self) -> [u32; 3] {
        self.block().index.get()
    }

    #[inline(always)]
    pub(crate) fn block_dim(&self) -> [u32; 3] {
        self.block().block_dim.get()
    }

    #[inline(always)]
    pub(crate) fn grid_dim(&self) -> [u32; 3] {
        self.block().grid_dim.get()
    }

    #[inline(always)]
    pub(crate) fn lane(&self) -> u32 {
        self.lane
    }

    #[inline(always)]
    fn block(&self) -> &Block {
        // SAFETY: set when the block was made, which holds the thread and does not move.
        unsafe { &*self.block.get() }
    }

    #[inline(always)]
    pub(super) fn warp(&self) -> &Warp {
        &self.block().warps[self.warp]
    }

    /// Waits until someone has made the thread ready.
    #[inline(always)]
    pub(super) fn wait(&self) {
        // SAFETY: the fiber's own, set when the thread started on it.
        unsafe { (*self.yielder.get()).suspend(()) };
        CURRENT.set(self);
        if self.block().cancelled.get() {
            resume_unwind(Box::new(Cancelled));
        }
    }

    /// Waits for all threads of the block that have not returned.
    #[inline(always)]
    pub(crate) fn sync_threads(&self) {
        let (block, warp) = (self.block(), self.warp());
        if block.at_barrier.get() + 1 == block.running.get() {
            block.open_barrier();
        } else {
            block.at_barrier.set(block.at_barrier.get() + 1);
            warp.at_barrier.set(warp.at_barrier.get() | 1 << self.lane);
            self.wait();
        }
    }

    /// Lets the other threads run.
    #[inline(always)]
    pub(crate) fn spin(&self) {
        let (block, warp) = (self.block(), self.warp());
        block.spins.set(block.spins.get() + 1);
        warp.spinning.set(warp.spinning.get() | 1 << self.lane);
        self.wait();
    }

    /// The address of a shared array.
    pub(crate) fn static_shared(&self, id: usize, name: &str, bytes: usize) -> *mut u8 {
        match self.block().shared.array(id, name, bytes) {
            Ok(address) => address,
            Err(reason) => self.fail(Failure::Refused(reason)),
        }
    }

    /// The block's number in its cluster.
    pub(crate) fn cluster_rank(&self) -> u32 {
        self.block().rank.get()
    }

    /// The address of the dynamic shared memory of block `rank` of the cluster.
    #[track_caller]
    pub(crate) fn dynamic_shared_of(&self, rank: u32) -> *mut u8 {
        let cluster = self.block().cluster.borrow();
        assert!((rank as usize) < cluster.len(), "block {rank} of a cluster of {}", cluster.len());
        // SAFETY: the worker keeps the blocks of the cluster while they run.
        unsafe { &*cluster[rank as usize] }.shared.dynamic().0
    }

    /// Waits for all threads of the cluster that have not returned.
    pub(crate) fn sync_cluster(&self) {
        let running = || -> u32 {
            let cluster = self.block().cluster.borrow();
            // SAFETY: as above.
            cluster.iter().map(|&block| unsafe { &*block }.running.get()).sum()
        };
        // SAFETY: as above; the first block counts for all.
        let first = unsafe { &*self.block().cluster.borrow()[0] };
        let meeting = first.cluster_meetings.get();
        first.at_cluster_barrier.set(first.at_cluster_barrier.get() + 1);
        while first.cluster_meetings.get() == meeting {
            if first.at_cluster_barrier.get() == running() {
                first.at_cluster_barrier.set(0);
                first.cluster_meetings.set(meeting + 1);
            } else {
                self.spin();
            }
        }
    }

    /// The address and bytes of the dynamic shared memory.
    pub(crate) fn dynamic_shared(&self) -> (*mut u8, u32) {
        self.block().shared.dynamic()
    }

    /// Ends the launch.
    pub(super) fn fail(&self, failure: Failure) -> ! {
        self.block().fail(self.index.get(), failure);
        resume_unwind(Box::new(Cancelled))
    }

    /// The thread's function has returned.
    fn returned(&self) {
        let (block, warp) = (self.block(), self.warp());
        warp.returned.set(warp.returned.get() | 1 << self.lane);
        block.running.set(block.running.get() - 1);
        if block.has_failed() {
            return;
        }
        warp.ready.set(warp.ready.get() | warp.meetings.settle(warp.returned.get()));
        if block.at_barrier.get() > 0 && block.at_barrier.get() == block.running.get() {
            block.open_barrier();
        }
    }
}

/// A warp: which of its lanes are in which state, one bit each.
#[derive(Default)]
pub(super) struct Warp {
    /// Lanes whose threads have not started.
    pub(super) unstarted: Cell<u32>,
    /// Lanes that waited and may go on.
    pub(super) ready: Cell<u32>,
    /// Lanes that wait for memory: they go on in the next round.
    pub(super) spinning: Cell<u32>,
    at_barrier: Cell<u32>,
    /// Lanes that have returned, or that the block does not have.
    pub(super) returned: Cell<u32>,
    pub(super) meetings: Meetings,
}

/// A block that a worker runs.
pub(super) struct Block {
    /// The blocks of its cluster, and which of them it is.
    cluster: RefCell<Vec<*const Block>>,
    rank: Cell<u32>,
    /// Of the first block of a cluster: threads of all its blocks at the cluster's barrier, and how often that has opened.
    at_cluster_barrier: Cell<u32>,
    cluster_meetings: Cell<u64>,
    index: Cell<[u32; 3]>,
    block_dim: Cell<[u32; 3]>,
    grid_dim: Cell<[u32; 3]>,
    entry: Cell<unsafe fn(*const *mut c_void)>,
    arguments: Cell<*const *mut c_void>,
    threads: Box<[Thread]>,
    warps: Box<[Warp]>,
    shared: Arena,
    /// Threads that have not returned.
    pub(super) running: Cell<u32>,
    at_barrier: Cell<u32>,
    /// How often threads have spun.
    pub(super) spins: Cell<u64>,
    /// The warp whose threads the scheduler runs, and on which fiber.
    pub(super) current_warp: Cell<usize>,
    pub(super) current_fiber: Cell<usize>,
    /// The fiber has no thread to run any more.
    pub(super) fiber_is_idle: Cell<bool>,
    failure: RefCell<Option<([u32; 3], Failure)>>,
    failed: Cell<bool>,
    cancelled: Cell<bool>,
}

impl Block {
    pub(super) fn new() -> Rc<Self> {
        unsafe fn nothing(_: *const *mut c_void) {}
        let thread = |number: usize| Thread {
            index: Cell::default(),
            lane: (number % WARP) as u32,
            warp: number / WARP,
            block: Cell::new(ptr::null()),
            fiber: Cell::default(),
            yielder: Cell::new(ptr::null()),
        };
        let block = Rc::new(Self {
            cluster: RefCell::default(),
            rank: Cell::default(),
            at_cluster_barrier: Cell::default(),
            cluster_meetings: Cell::default(),
            index: Cell::default(),
            block_dim: Cell::default(),
            grid_dim: Cell::default(),
            entry: Cell::new(nothing),
            arguments: Cell::new(ptr::null()),
            threads: (0..MAX_THREADS).map(thread).collect(),
            warps: (0..MAX_THREADS / WARP).map(|_| Warp::default()).collect(),
            shared: Arena::new(),
            running: Cell::default(),
            at_barrier: Cell::default(),
            spins: Cell::default(),
            current_warp: Cell::default(),
            current_fiber: Cell::default(),
            fiber_is_idle: Cell::default(),
            failure: RefCell::default(),
            failed: Cell::default(),
            cancelled: Cell::default(),
        });
        for thread in &block.threads {
            thread.block.set(&raw const *block);
        }
        block
    }

    /// Prepares for the blocks of a launch, as one of a cluster.
    pub(super) fn begin_launch(&self, grid: &Grid, cluster: &[Rc<Self>]) {
        self.cluster.replace(cluster.iter().map(Rc::as_ptr).collect());
        let rank = cluster.iter().position(|block| ptr::eq(Rc::as_ptr(block), self));
        self.rank.set(rank.expect("a block is one of its own cluster") as u32);
        self.entry.set(grid.kernel.entry);
        self.arguments.set(grid.arguments());
        self.grid_dim.set(grid.config.grid);
        if self.block_dim.replace(grid.config.block) != grid.config.block {
            let [x, y, _] = grid.config.block.map(|n| n as usize);
            for (i, thread) in self.threads[..self.n_threads()].iter().enumerate() {
                thread.index.set([i % x, i / x % y, i / x / y].map(|i| i as u32));
            }
        }
        self.shared.begin_launch(grid.config.dynamic_shared_bytes as usize);
    }

    /// Prepares for one block.
    pub(super) fn begin(&self, index: [u32; 3]) {
        self.index.set(index);
        let mut left = self.n_threads();
        self.running.set(left as u32);
        self.at_barrier.set(0);
        self.at_cluster_barrier.set(0);
        self.failed.set(false);
        self.cancelled.set(false);
        for warp in self.warps() {
            let lanes = if left >= WARP { u32::MAX } else { (1 << left) - 1 };
            left = left.saturating_sub(WARP);
            warp.unstarted.set(lanes);
            warp.returned.set(!lanes);
            warp.ready.set(0);
            warp.spinning.set(0);
            warp.at_barrier.set(0);
            warp.meetings.clear();
        }
        self.shared.begin_block();
    }

    fn n_threads(&self) -> usize {
        self.block_dim.get().iter().product::<u32>() as usize
    }

    /// The warps that the block has.
    pub(super) fn warps(&self) -> &[Warp] {
        &self.warps[..self.n_threads().div_ceil(WARP)]
    }

    pub(super) fn thread(&self, warp: usize, lane: u32) -> &Thread {
        &self.threads[warp * WARP + lane as usize]
    }

    /// Runs the threads of the current warp that have not started, until none is left: the work of a fiber. Where one
    /// has to wait, the fiber is suspended in the middle of this.
    pub(super) fn run_unstarted(&self, yielder: &FiberYielder) {
        let warp = self.current_warp.get();
        let unstarted = &self.warps[warp].unstarted;
        while unstarted.get() != 0 && !self.has_failed() {
            let thread = self.thread(warp, unstarted.get().trailing_zeros());
            unstarted.set(unstarted.get() & (unstarted.get() - 1));
            thread.yielder.set(yielder);
            thread.fiber.set(self.current_fiber.get());
            CURRENT.set(thread);
            // SAFETY: whoever launched vouches for the arguments.
            let body = AssertUnwindSafe(|| unsafe { (self.entry.get())(self.arguments.get()) });
            if let Err(payload) = catch_unwind(body)
                && !payload.is::<Cancelled>()
            {
                self.fail(thread.index.get(), Failure::Panic(error::describe_panic(&*payload)));
            }
            thread.returned();
        }
        self.fiber_is_idle.set(true);
    }

    fn open_barrier(&self) {
        self.at_barrier.set(0);
        for warp in self.warps() {
            warp.ready.set(warp.ready.get() | warp.at_barrier.take());
        }
    }

    /// Ends the block; the first failure is the one that is reported.
    fn fail(&self, thread: [u32; 3], failure: Failure) {
        self.failed.set(true);
        self.failure.borrow_mut().get_or_insert((thread, failure));
    }

    /// Makes every thread that is resumed from here on unwind.
    pub(super) fn cancel(&self) {
        self.failed.set(true);
        self.cancelled.set(true);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// The failure and its thread, once.
    pub(super) fn take_failure(&self) -> Option<([u32; 3], Failure)> {
        self.failure.take()
    }

    /// Ends the block because none of its threads can run: says who waits where.
    pub(super) fn fail_stuck(&self) {
        let index = |warp: usize, lanes: u32| self.thread(warp, lanes.trailing_zeros()).index.get();
        let threads = |count: u32, first: [u32; 3]| match count {
            1 => format!("thread {first:?} waits"),
            _ => format!("{count} threads from {first:?} on wait"),
        };
        let mut first = None;
        let mut places = Vec::new();
        let mut at_barrier = None;
        for (w, warp) in self.warps().iter().enumerate() {
            for (arrived, missing, what) in warp.meetings.describe(warp.returned.get()) {
                let waits = threads(arrived.count_ones(), index(w, arrived));
                places.push(format!("{waits} in {what} for thread {:?}", index(w, missing)));
                first.get_or_insert(index(w, arrived));
            }
            if warp.at_barrier.get() != 0 {
                at_barrier.get_or_insert(index(w, warp.at_barrier.get()));
            }
        }
        if let Some(thread) = at_barrier {
            places.push(format!("{} at sync_threads", threads(self.at_barrier.get(), thread)));
            first.get_or_insert(thread);
        }
        const SHOWN: usize = 4;
        let more = places.len().saturating_sub(SHOWN);
        places.truncate(SHOWN);
        let mut message = format!("no thread can go on: {}", places.join("; "));
        if more > 0 {
            message += &format!("; and {more} more such groups");
        }
        self.fail(first.unwrap_or_default(), Failure::Divergence(message));
    }
}
