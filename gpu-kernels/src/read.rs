//! Reading memory and nothing else: the bandwidth that other kernels are measured against.

use cuda_std::kernel;
use cuda_std::memory::ld_stream_u32x4;
use cuda_std::thread::{block_dim_x, grid_dim_x, index_1d};

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;

/// `sums[t]` is the sum of all words that thread `t` reads, modulo 2^32: what keeps the loads from being left out.
///
/// # Safety
/// The pointers are to device memory of the sizes below, `data` at a multiple of 16 bytes.
///
/// # Parameters
/// - `data`: `[n, 4]`
/// - `sums`: one per thread of the grid
///
/// # Thread mapping
/// A grid of any size in blocks of [`BLOCK_DIM`]; each thread takes every so many 16 bytes, eight of them on their way
/// at once. Bytes moved: 16 n, and 4 per thread.
#[kernel]
pub unsafe fn read(data: *const [u32; 4], n: u64, sums: *mut u32) {
    let stride = u64::from(grid_dim_x()) * u64::from(block_dim_x());
    let thread = u64::from(index_1d());
    // SAFETY: only called with indices below n.
    let load = |i: u64| unsafe { ld_stream_u32x4(data.add(i as usize)) };
    let mut sum = 0u32;
    let mut add = |[a, b, c, d]: [u32; 4]| {
        sum = sum.wrapping_add(a).wrapping_add(b).wrapping_add(c).wrapping_add(d);
    };
    let mut i = thread;
    while i + 7 * stride < n {
        let (v0, v1, v2, v3) = (load(i), load(i + stride), load(i + 2 * stride), load(i + 3 * stride));
        let (v4, v5) = (load(i + 4 * stride), load(i + 5 * stride));
        let (v6, v7) = (load(i + 6 * stride), load(i + 7 * stride));
        add(v0);
        add(v1);
        add(v2);
        add(v3);
        add(v4);
        add(v5);
        add(v6);
        add(v7);
        i += 8 * stride;
    }
    while i < n {
        add(load(i));
        i += stride;
    }
    // SAFETY: this thread's own word.
    unsafe { *sums.add(thread as usize) = sum };
}
