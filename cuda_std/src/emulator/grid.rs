//! One launch: what all workers share.

use super::arena;
use super::error::LaunchError;
use crate::launch::{KernelInfo, LaunchConfig};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most threads in a block, as on every GPU since compute capability 2.0.
pub(super) const MAX_THREADS: usize = 1024;
/// Most blocks in x, y and z.
const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
/// Most threads of a block in x, y and z.
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
/// Most blocks in a cluster, as on compute capability 9.0.
const MAX_CLUSTER: u32 = 16;

/// A launch in progress.
pub(super) struct Grid<'a> {
    pub(super) kernel: &'a KernelInfo,
    pub(super) config: LaunchConfig,
    arguments: &'a [*mut c_void],
    blocks: u64,
    /// The next block to run.
    next: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<LaunchError>>,
}

// SAFETY: the pointers are to arguments that are only read; whoever launches vouches for what they hold.
unsafe impl Sync for Grid<'_> {}

impl<'a> Grid<'a> {
    /// Checks the launch as a GPU does.
    pub(super) fn new(
        kernel: &'a KernelInfo,
        config: LaunchConfig,
        arguments: &'a [*mut c_void],
    ) -> Result<Self, LaunchError> {
        let refuse = |reason: String| Err(LaunchError::Refused { kernel: kernel.name, reason });
        let LaunchConfig { grid, block, dynamic_shared_bytes, cluster } = config;
        if grid.iter().zip(MAX_GRID).any(|(&n, max)| n == 0 || n > max) {
            return refuse(format!("the grid is {grid:?}, each must be 1 or more and at most {MAX_GRID:?}"));
        }
        if block.iter().zip(MAX_BLOCK).any(|(&n, max)| n == 0 || n > max) {
            return refuse(format!(
                "the block is {block:?}, each must be 1 or more and at most {MAX_BLOCK:?}"
            ));
        }
        let threads: u32 = block.iter().product();
        if threads as usize > MAX_THREADS {
            return refuse(format!(
                "the block {block:?} has {threads} threads, at most {MAX_THREADS} are allowed"
            ));
        }
        if cluster == 0 || cluster > MAX_CLUSTER || !grid[0].is_multiple_of(cluster) {
            return refuse(format!(
                "clusters are {cluster} blocks of a grid of {grid:?}, they must divide its x and be at most {MAX_CLUSTER}"
            ));
        }
        if dynamic_shared_bytes as usize > arena::MAX_TOTAL {
            return refuse(format!(
                "{dynamic_shared_bytes} bytes of dynamic shared memory, at most {} are allowed",
                arena::MAX_TOTAL
            ));
        }
        if arguments.len() != kernel.param_names.len() {
            return refuse(format!(
                "{} arguments, the kernel takes {} ({})",
                arguments.len(),
                kernel.param_names.len(),
                kernel.param_names.join(", ")
            ));
        }
        Ok(Self {
            kernel,
            config,
            arguments,
            blocks: grid.iter().map(|&n| u64::from(n)).product(),
            next: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        })
    }

    /// The number of the first block of the next cluster that nobody has taken.
    pub(super) fn take_cluster(&self) -> Option<u64> {
        if self.has_failed() || self.blocks_left() == 0 {
            return None;
        }
        let number = self.next.fetch_add(self.config.cluster.into(), Ordering::Relaxed);
        (number < self.blocks).then_some(number)
    }

    /// The index of block `number`.
    pub(super) fn index_of(&self, number: u64) -> [u32; 3] {
        let [x, y, _] = self.config.grid.map(u64::from);
        [number % x, number / x % y, number / x / y].map(|i| i as u32)
    }

    /// How many blocks nobody has taken.
    pub(super) fn blocks_left(&self) -> u64 {
        self.blocks.saturating_sub(self.next.load(Ordering::Relaxed))
    }

    /// What the kernel's entry takes.
    pub(super) fn arguments(&self) -> *const *mut c_void {
        self.arguments.as_ptr()
    }

    /// Whether the launch is to end, because a block has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Ends the launch; the first failure is the one that is reported.
    pub(super) fn fail(&self, error: LaunchError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
    }

    /// How the launch went.
    pub(super) fn into_result(self) -> Result<(), LaunchError> {
        match self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
