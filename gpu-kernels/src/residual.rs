//! The residual connection on its own; `gemv` also adds onto its output directly.

use cuda_std::kernel;
use cuda_std::thread::index_1d;

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;

/// `x[i] += y[i]`.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`, `y`: `[n]`
///
/// # Thread mapping
/// One thread per value, any block size. Bytes moved: 12 n.
#[kernel]
pub unsafe fn residual_add(x: *mut f32, y: *const f32, n: u32) {
    let i = index_1d() as usize;
    if i < n as usize {
        // SAFETY: i < n, and only this thread touches element i.
        unsafe { *x.add(i) += *y.add(i) };
    }
}
