//! The emulator, through kernels: whole launches of every primitive. A new primitive's test goes into the file of its
//! kind.

mod arguments;
mod atomics;
mod clusters;
mod collectives;
mod failures;
mod grids;
mod shared_memory;
mod tensor;

use cuda_std::emulator::{self, LaunchError};
use cuda_std::launch::{Kernel, KernelArgs, LaunchConfig};

/// Launches a kernel whose arguments are right by the test's construction.
fn try_launch<A: KernelArgs>(
    kernel: &Kernel<A>,
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared_bytes: u32,
    args: A,
) -> Result<(), LaunchError> {
    let config = LaunchConfig { grid, block, dynamic_shared_bytes, cluster: 1 };
    // SAFETY: the tests pass pointers to vectors that are long enough.
    args.with_pointers(|pointers| unsafe { emulator::launch(kernel.info(), config, pointers) })
}

/// A launch of a one-dimensional grid in clusters.
fn try_launch_in_clusters<A: KernelArgs>(
    kernel: &Kernel<A>,
    grid: u32,
    block: u32,
    dynamic_shared_bytes: u32,
    cluster: u32,
    args: A,
) -> Result<(), LaunchError> {
    let config = LaunchConfig { grid: [grid, 1, 1], block: [block, 1, 1], dynamic_shared_bytes, cluster };
    // SAFETY: as above.
    args.with_pointers(|pointers| unsafe { emulator::launch(kernel.info(), config, pointers) })
}

/// A launch that must work, of a one-dimensional grid.
fn launch<A: KernelArgs>(kernel: &Kernel<A>, grid: u32, block: u32, args: A) {
    try_launch(kernel, [grid, 1, 1], [block, 1, 1], 0, args).unwrap_or_else(|error| panic!("{error}"));
}
