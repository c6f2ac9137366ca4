//! The CPU as a device that runs kernels.
//!
//! [`launch`] runs a whole grid and returns when it is done. Blocks are spread over the CPU's cores, through rayon; a
//! block runs on one core. Each of its threads runs straight on until it reaches a barrier or a warp collective, where
//! it waits on its own stack while the others run. Threads that never wait cost hardly more than a function call.
//!
//! # What may wait for what
//! A loop that waits for memory must call something that lets other threads run: [`spin_hint`], [`nanosleep`],
//! [`load_acquire_u32`], or an exchange or compare-and-swap that fails. It may then wait for
//! - any thread of its own block or cluster, and
//! - any thread of a block with a lower index (in the order x, y, z): blocks start in that order.
//!
//! It must not wait for a block with a higher index, which may start only when this one is done. So a barrier across
//! the grid, which on a GPU needs all blocks resident at once, never opens here unless the grid is one block.
//!
//! # Errors in kernels
//! A panic, a barrier or collective that not all threads reach, and different collectives that meet end the launch
//! with a [`LaunchError`] that names kernel, block and thread. Memory is then in an unspecified state. A thread's stack
//! has 128 KB; beyond it lies a guard page, which ends the process.
//!
//! [`spin_hint`]: crate::thread::spin_hint
//! [`nanosleep`]: crate::thread::nanosleep
//! [`load_acquire_u32`]: crate::atomic::load_acquire_u32

mod arena;
mod block;
mod collective;
mod error;
mod fiber;
mod grid;
mod worker;

pub use arena::MAX_TOTAL as SHARED_BYTES;
pub use error::LaunchError;

pub(crate) use block::with_thread;
pub(crate) use collective::{Collective, Lanes, collective};

use crate::launch::{KernelInfo, LaunchConfig};
use grid::Grid;
use std::ffi::c_void;
use std::time::{Duration, Instant};

/// A launch runs on the calling thread for this long before it asks for the other cores, whose waking takes a few
/// microseconds itself.
const ALONE: Duration = Duration::from_micros(20);

/// Runs a kernel over a grid.
///
/// # Errors
/// When a GPU would refuse the launch, or the kernel fails; see [`LaunchError`].
///
/// # Safety
/// `arguments` are pointers to values of the types that the kernel takes, and what they hold keeps the kernel's own
/// contract.
pub unsafe fn launch(
    kernel: &KernelInfo,
    config: LaunchConfig,
    arguments: &[*mut c_void],
) -> Result<(), LaunchError> {
    error::keep_panics_quiet();
    let grid = Grid::new(kernel, config, arguments)?;
    let started = Instant::now();
    worker::run_blocks(&grid, || started.elapsed() < ALONE);
    let helpers = grid.blocks_left().min(rayon::current_num_threads() as u64 - 1);
    if grid.blocks_left() > 0 {
        rayon::in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| worker::run_blocks(&grid, || true));
            }
            worker::run_blocks(&grid, || true);
        });
    }
    grid.into_result()
}
