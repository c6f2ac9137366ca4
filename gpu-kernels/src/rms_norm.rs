//! Root-mean-square normalisation.

use crate::block::block_sum;
use cuda_std::float::sqrt;
use cuda_std::thread::{block_dim_x, thread_idx_x};
use cuda_std::{kernel, shared_array};

/// Threads in the block.
pub const BLOCK_DIM: usize = 256;

/// `y[i] = x[i] * gamma[i] / sqrt(mean(x^2) + eps)` (Zhang and Sennrich, 2019).
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`, `gamma`, `y`: `[n]`, n at least 1; `y` may be `x`
/// - `eps`: added to the mean square
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads; a thread takes every `BLOCK_DIM`-th value. Bytes moved: 16 n (x twice).
#[kernel]
pub unsafe fn rms_norm(x: *const f32, gamma: *const f32, y: *mut f32, n: u32, eps: f32) {
    let scratch = shared_array!(RMS_NORM_SUMS: [f32; 32]);
    let (n, first, stride) = (n as usize, thread_idx_x() as usize, block_dim_x() as usize);

    let mut sum = 0.0;
    for i in (first..n).step_by(stride) {
        // SAFETY: i < n.
        let value = unsafe { *x.add(i) };
        sum += value * value;
    }
    let scale = 1.0 / sqrt(block_sum(sum, scratch) / n as f32 + eps);

    for i in (first..n).step_by(stride) {
        // SAFETY: i < n, and only this thread touches element i from here on.
        unsafe { *y.add(i) = *x.add(i) * scale * *gamma.add(i) };
    }
}
