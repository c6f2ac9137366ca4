//! The index of the largest value: greedy sampling on the device.

use crate::block::{block_max, block_min_index};
use cuda_std::thread::{block_dim_x, thread_idx_x};
use cuda_std::{kernel, shared_array};

/// Threads in the block.
pub const BLOCK_DIM: usize = 1024;

/// The index of the largest value; the lowest one of equals. NaNs never win.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`: `[n]`, n at least 1
/// - `index`: `[1]`
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads; a thread takes every `BLOCK_DIM`-th value. Bytes moved: 4 n.
#[kernel]
pub unsafe fn argmax(x: *const f32, index: *mut u32, n: u32) {
    let maxima = shared_array!(ARGMAX_VALUES: [f32; 32]);
    let indices = shared_array!(ARGMAX_INDICES: [i32; 32]);
    let mut best = f32::NEG_INFINITY;
    let mut best_index = i32::MAX as u32;
    for i in (thread_idx_x()..n).step_by(block_dim_x() as usize) {
        // SAFETY: i < n.
        let value = unsafe { *x.add(i as usize) };
        if value > best {
            (best, best_index) = (value, i);
        }
    }
    let max = block_max(best, maxima);
    let winner = block_min_index(if best == max { best_index } else { i32::MAX as u32 }, indices);
    if thread_idx_x() == 0 {
        // SAFETY: one element, written by one thread. Where nothing exceeds -inf the first index stands.
        unsafe { *index = if winner < n { winner } else { 0 } };
    }
}
