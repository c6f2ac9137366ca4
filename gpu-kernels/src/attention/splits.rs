//! How blocks that are no cluster put their parts together: each leaves its own in device memory, and the last one to come combines them.

use super::{Arguments, BLOCK_DIM, LOWEST, MAX_HEADS, MAX_SPLITS};
use cuda_std::atomic::{atomic_add_u32, thread_fence};
use cuda_std::float::{exp2, max, mul_add};
use cuda_std::memory::{ld_global_u32x2, ld_global_u32x4, st_global_u32x4};
use cuda_std::shared_array;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add, warp_reduce_max};

/// Combines the parts of row `row` of the grid, if this is the last of its `n_active` blocks. All threads of the block make this call.
///
/// # Safety
/// The block has left its values and sums of `n_heads` heads from `first_head` on.
#[inline(always)]
pub(super) unsafe fn combine_if_last(a: Arguments, row: u32, first_head: u32, n_heads: u32, n_active: u32) {
    let is_last = shared_array!(ATTENTION_LAST: [u32; 1]);
    let thread = thread_idx_x();
    // The last block of the row has everything that the others wrote, and they are not waited for.
    thread_fence();
    sync_threads();
    if thread == 0 {
        // SAFETY: the row's counter.
        let before = unsafe { atomic_add_u32(a.n_ended.add(row as usize), 1) };
        is_last.set(0, u32::from(before + 1 == n_active));
    }
    sync_threads();
    if is_last.get(0) == 0 {
        return;
    }
    thread_fence();
    // SAFETY: what the row's blocks have written is there.
    unsafe { combine(a, first_head, n_heads, n_active) };
    if thread == 0 {
        // SAFETY: the row's counter, which no other block uses any more.
        unsafe { *a.n_ended.add(row as usize) = 0 };
    }
}

/// Combines what the blocks of a row have left.
///
/// # Safety
/// `n_active` splits have values and sums of `n_heads` heads from `first_head` on.
#[inline(always)]
unsafe fn combine(a: Arguments, first_head: u32, n_heads: u32, n_active: u32) {
    let factors = shared_array!(ATTENTION_FACTORS: [f32; MAX_HEADS * MAX_SPLITS]);
    let partial = shared_array!(ATTENTION_PARTIAL: [f32; 4 * BLOCK_DIM]);
    let thread = thread_idx_x();
    let (warp, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    if warp < n_heads {
        // A lane looks at every 32nd split.
        let sums = |split: u32| {
            let at = 2 * (split.min(n_active - 1) * a.n_head + first_head + warp) as usize;
            // SAFETY: the caller's promise.
            let [max, sum] = unsafe { ld_global_u32x2(a.split_sums.add(at).cast()) }.map(f32::from_bits);
            if split < n_active { (max, sum) } else { (LOWEST, 0.0) }
        };
        const { assert!(MAX_SPLITS == 2 * WARP_SIZE as usize) };
        let (near, far) = (sums(lane), sums(lane + WARP_SIZE));
        let largest = warp_reduce_max(FULL_MASK, max(near.0, far.0), WARP_SIZE);
        let (near, far) = (exp2(near.0 - largest) * near.1, exp2(far.0 - largest) * far.1);
        let total = warp_reduce_add(FULL_MASK, near + far, WARP_SIZE);
        let at = warp as usize * MAX_SPLITS + lane as usize;
        factors.set(at, near / total);
        factors.set(at + WARP_SIZE as usize, far / total);
    }
    sync_threads();

    // Groups of threads share the splits, a thread takes four neighbouring values.
    let n_quads = n_heads * a.head_dim / 4;
    let n_groups = BLOCK_DIM as u32 / n_quads;
    let (group, quad) = (thread / n_quads, thread % n_quads);
    let head = 4 * quad / a.head_dim;
    let mut sum = [0.0f32; 4];
    let mut split = group;
    while split < n_active {
        // Four on their way at once.
        let fetch = |i: u32| {
            let split = (split + i * n_groups).min(n_active - 1);
            let at = (split * a.n_head + first_head) * a.head_dim + 4 * quad;
            // SAFETY: the caller's promise.
            unsafe { ld_global_u32x4(a.split_values.add(at as usize).cast()) }.map(f32::from_bits)
        };
        let add = |i: u32, [v0, v1, v2, v3]: [f32; 4], [s0, s1, s2, s3]: [f32; 4]| {
            // Splits that are not there have a factor of 0.
            let at = split + i * n_groups;
            let factor =
                if at < n_active { factors.get(head as usize * MAX_SPLITS + at as usize) } else { 0.0 };
            [
                mul_add(factor, v0, s0),
                mul_add(factor, v1, s1),
                mul_add(factor, v2, s2),
                mul_add(factor, v3, s3),
            ]
        };
        let (v0, v1, v2, v3) = (fetch(0), fetch(1), fetch(2), fetch(3));
        sum = add(3, v3, add(2, v2, add(1, v1, add(0, v0, sum))));
        split += 4 * n_groups;
    }
    if group < n_groups {
        partial.set4(4 * thread as usize, sum);
    }
    sync_threads();
    if group == 0 {
        let mut sum = [0.0f32; 4];
        for group in 0..n_groups {
            let [v0, v1, v2, v3] = partial.get4(4 * (group * n_quads + quad) as usize);
            sum = [sum[0] + v0, sum[1] + v1, sum[2] + v2, sum[3] + v3];
        }
        // SAFETY: the values are the output's, and this thread's own.
        unsafe {
            let first = (first_head * a.head_dim + 4 * quad) as usize;
            st_global_u32x4(a.out.add(first).cast(), sum.map(f32::to_bits));
            if !a.operand.words.is_null() {
                a.operand.store_4(first, sum);
            }
        }
    }
}
