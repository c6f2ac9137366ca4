//! The launcher of the kernel that only reads.

use super::{aligned, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use gpu_kernels::read as read_kernel;

/// Reads all of `data`, with as many threads as there are `sums`, each of which leaves the sum of its words: for
/// measuring bandwidth.
///
/// # Errors
/// When `sums` are not whole blocks of [`BLOCK_DIM`](read_kernel::BLOCK_DIM) threads, `data` does not start at a multiple
/// of 16 bytes, or the launch fails.
pub fn read(device: &Device, data: &Buffer<[u32; 4]>, sums: &mut Buffer<u32>) -> Result<()> {
    aligned("read", "data", data, 1)?;
    ensure!(
        !sums.is_empty() && sums.len().is_multiple_of(read_kernel::BLOCK_DIM),
        "read: {} sums are not whole blocks of {} threads",
        sums.len(),
        read_kernel::BLOCK_DIM
    );
    let config = launch_1d(sums.len() / read_kernel::BLOCK_DIM, read_kernel::BLOCK_DIM)?;
    let arguments = (data.as_ptr(), data.len() as u64, sums.as_mut_ptr());
    // SAFETY: the kernel reads the buffer's own length, and there is a sum for each thread.
    unsafe { device.launch(&read_kernel::READ, config, arguments) }
}
