//! Appending to the KV cache.
//!
//! The cache of a layer is two f16 arrays of shape `[n_head_kv, n_ctx, head_dim]`: what one head reads during
//! attention is one contiguous range.

use crate::step::Step;
use cuda_std::float::f32_to_f16;
use cuda_std::kernel;
use cuda_std::thread::index_1d;
use half::f16;

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;

/// Writes a token's keys and values into the cache at its position.
///
/// # Safety
/// The pointers are to device memory of the sizes below, and the step's position is below `n_ctx`.
///
/// # Parameters
/// - `k`, `v`: `[n_head_kv, head_dim]`
/// - `k_cache`, `v_cache`: `[n_head_kv, n_ctx, head_dim]`
/// - `step`: holds the position
///
/// # Thread mapping
/// One thread per value of k and v, any block size. Bytes moved: 12 per value.
#[kernel]
pub unsafe fn kv_append(
    k: *const f32,
    v: *const f32,
    k_cache: *mut f16,
    v_cache: *mut f16,
    step: *const Step,
    n_head_kv: u32,
    head_dim: u32,
    n_ctx: u32,
) {
    let (head_dim, n_ctx) = (head_dim as usize, n_ctx as usize);
    let i = index_1d() as usize;
    if i >= n_head_kv as usize * head_dim {
        return;
    }
    // SAFETY: i is inside k and v, the position is below n_ctx, and only this thread writes the two elements.
    unsafe {
        let at = (i / head_dim * n_ctx + (*step).position as usize) * head_dim + i % head_dim;
        *k_cache.add(at) = f16::from_bits(f32_to_f16(*k.add(i)));
        *v_cache.add(at) = f16::from_bits(f32_to_f16(*v.add(i)));
    }
}
