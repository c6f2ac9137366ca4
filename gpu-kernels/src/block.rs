//! Reductions over all threads of a block.

use cuda_std::shared::Shared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add, warp_reduce_max};

/// Most warps in a block.
pub const MAX_WARPS: usize = 32;

/// Scratch for a block reduction: one value per warp.
pub type WarpValues<T> = Shared<T, MAX_WARPS>;

/// The sum of every thread's `value`, the same in all threads of a block that is a multiple of 32 wide.
#[inline(always)]
pub fn block_sum(value: f32, scratch: WarpValues<f32>) -> f32 {
    let sum = warp_reduce_add(FULL_MASK, value, WARP_SIZE);
    across_warps(sum, 0.0, scratch, |v| warp_reduce_add(FULL_MASK, v, WARP_SIZE))
}

/// The largest of every thread's `value`, the same in all threads of a block that is a multiple of 32 wide.
#[inline(always)]
pub fn block_max(value: f32, scratch: WarpValues<f32>) -> f32 {
    let max = warp_reduce_max(FULL_MASK, value, WARP_SIZE);
    across_warps(max, f32::NEG_INFINITY, scratch, |v| warp_reduce_max(FULL_MASK, v, WARP_SIZE))
}

/// The smallest of every thread's `value`, at most `i32::MAX`.
#[inline(always)]
pub fn block_min_index(value: u32, scratch: WarpValues<i32>) -> u32 {
    let negated = warp_reduce_max(FULL_MASK, -(value as i32), WARP_SIZE);
    -across_warps(negated, -i32::MAX, scratch, |v| warp_reduce_max(FULL_MASK, v, WARP_SIZE)) as u32
}

/// Reduces one value per warp: the warps put theirs side by side, and every warp reduces them all.
#[inline(always)]
fn across_warps<T: cuda_std::shared::SharedValue>(
    value: T,
    identity: T,
    scratch: WarpValues<T>,
    reduce: impl Fn(T) -> T,
) -> T {
    let (warp, lane) = (thread_idx_x() / WARP_SIZE, thread_idx_x() % WARP_SIZE);
    // The scratch may still be read by a reduction before this one.
    sync_threads();
    if lane == 0 {
        scratch.set(warp as usize, value);
    }
    sync_threads();
    reduce(if lane < block_dim_x() / WARP_SIZE { scratch.get(lane as usize) } else { identity })
}
