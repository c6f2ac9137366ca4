//! The SwiGLU product on its own, for gate and up matrices in different formats; `gemv_swiglu` fuses it.

use crate::math::silu;
use cuda_std::kernel;
use cuda_std::thread::index_1d;

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;

/// `gate[i] = silu(gate[i]) * up[i]` (Shazeer, 2020).
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `gate`, `up`: `[n]`
///
/// # Thread mapping
/// One thread per value, any block size. Bytes moved: 12 n.
#[kernel]
pub unsafe fn swiglu(gate: *mut f32, up: *const f32, n: u32) {
    let i = index_1d() as usize;
    if i < n as usize {
        // SAFETY: i < n, and only this thread touches element i.
        unsafe { *gate.add(i) = silu(*gate.add(i)) * *up.add(i) };
    }
}
