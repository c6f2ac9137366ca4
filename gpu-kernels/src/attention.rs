//! Attention of one query token over the KV cache, split along the context.
//!
//! A block takes one key-value head, up to four of the query heads that share it, and a range of positions; each key
//! and value is read once for all of these heads. Softmax is kept online (Milakov and Gimelshein, 2018): whoever has
//! looked at some positions holds their largest score, the sum of their weights relative to it, and the weighted sum
//! of values, and two such parts combine into one of both. Where several blocks share a context, each leaves its part
//! in device memory, and the last one to come combines them (flash-decoding: Dao et al., 2023): none waits.

#[cfg(not(target_arch = "nvptx64"))]
use crate::kv_cache::KvFormat;
use crate::kv_cache::{HalfKv, KvCodec, KvRef, Q8Kv};
use crate::operand::Operand;
use crate::step::Step;
use core::f32::consts::LOG2_E;
use cuda_std::atomic::{atomic_add_u32, thread_fence};
use cuda_std::float::{exp2, max, mul_add};
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::{ld_global_u32x2, ld_global_u32x4, prefetch_l2, st_global_u32x4};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add, warp_reduce_add_n, warp_reduce_max};
use cuda_std::{kernel, shared_array};

/// Warps in a block.
pub const WARPS: usize = 8;
/// Threads in a block.
pub const BLOCK_DIM: usize = WARPS * WARP_SIZE as usize;
/// The largest head size.
pub const MAX_HEAD_DIM: usize = 256;
/// Head sizes are multiples of this.
pub const HEAD_DIM_STEP: usize = 16;
/// Most blocks that share a context.
pub const MAX_SPLITS: usize = 64;
/// Most query heads that a block takes.
pub const MAX_HEADS: usize = 4;
/// Positions that are worth a block of their own: fewer blocks than there could be share a shorter context.
pub const SPLIT_POSITIONS: u32 = 128;
// So no split is empty: a length beyond `(n - 1) * SPLIT_POSITIONS` has more than `n - 1` positions for each of `n`.
const _: () = assert!(MAX_SPLITS <= SPLIT_POSITIONS as usize);

/// Dimensions that a lane holds: 16 bytes of f16.
const DIMS: usize = 8;
/// Fewest lanes that share a position.
const MIN_LANES: usize = 8;
/// Most parts that a block combines: groups of lanes in all its warps.
const MAX_PARTS: usize = WARPS * WARP_SIZE as usize / MIN_LANES;
/// What no score is below; finite, so that differences are numbers.
const LOWEST: f32 = -1e30;

/// What an attention launch works on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    /// Queries, `[n_head, head_dim]`.
    pub q: *const f32,
    /// Keys.
    pub k_cache: KvRef,
    /// Values.
    pub v_cache: KvRef,
    /// The result, `[n_head, head_dim]`.
    pub out: *mut f32,
    /// The result as the next product reads it, or nothing.
    pub operand: Operand,
    /// Holds the position.
    pub step: *const Step,
    /// The blocks' results: `[n_splits, n_head, head_dim]`.
    pub split_values: *mut f32,
    /// Their largest scores (times log2 e) and sums of weights: `[n_splits, n_head, 2]`.
    pub split_sums: *mut f32,
    /// How many blocks of a row of the grid have ended: one per row, 0 between launches.
    pub n_ended: *mut u32,
    /// Query heads.
    pub n_head: u32,
    /// Query heads that share a key-value head.
    pub heads_per_kv: u32,
    /// Blocks that the heads of a key-value head are dealt out to.
    pub blocks_per_kv: u32,
    /// Values in a head, a multiple of 16, at most 256.
    pub head_dim: u32,
    /// Lanes that share a position: the power of two from `head_dim / 8` on, at least 8.
    pub lanes: u32,
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Most blocks that share a context, at most [`MAX_SPLITS`].
    pub n_splits: u32,
    /// Positions up to the step's, counted back from it, that the kernels just before have written.
    pub n_fresh: u32,
    /// The factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Arguments {}

/// Attention of `HEADS` query heads over a block's positions.
///
/// # Safety
/// The arguments are as their fields say; the cache is written at positions `0..=step.position`, which is below `n_ctx`.
#[inline(always)]
unsafe fn attend<C: KvCodec, const HEADS: usize>(a: Arguments) {
    // Of each part: the values of all heads, and their largest scores and sums.
    let part_values = shared_array!(ATTENTION_VALUES: [f32; WARPS * MAX_HEADS * MAX_HEAD_DIM]);
    let part_max = shared_array!(ATTENTION_MAX: [f32; MAX_PARTS * MAX_HEADS]);
    let part_sum = shared_array!(ATTENTION_SUM: [f32; MAX_PARTS * MAX_HEADS]);
    // Of each head: largest score and sum over all parts. And whether this block is the last.
    let total = shared_array!(ATTENTION_TOTAL: [f32; 2 * MAX_HEADS]);
    let is_last = shared_array!(ATTENTION_LAST: [u32; 1]);

    let (thread, split, row) = (thread_idx_x(), block_idx_x(), block_idx_y());
    let (warp, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    let (kv_head, block_of_head) = (row / a.blocks_per_kv, row % a.blocks_per_kv);
    let first_head = kv_head * a.heads_per_kv + block_of_head * HEADS as u32;
    let n_heads = (a.heads_per_kv - block_of_head * HEADS as u32).min(HEADS as u32);
    // A group of lanes takes a position, a lane eight of its dimensions.
    let per_warp = WARP_SIZE / a.lanes;
    let (group, first_dim) = (warp * per_warp + lane / a.lanes, lane % a.lanes * DIMS as u32);
    let has_dims = first_dim < a.head_dim;

    let_next_start();
    // SAFETY: the caller vouches for the step, which was written before the kernels of the step started.
    let length = unsafe { (*a.step).position } + 1;
    let n_active = length.div_ceil(SPLIT_POSITIONS).min(a.n_splits);
    let per_split = length.div_ceil(n_active);
    let (start, end) = (split * per_split, (split * per_split + per_split).min(length));
    let is_active = split < n_active;
    let head_offset = kv_head as usize * a.n_ctx as usize * a.head_dim as usize;
    if is_active && thread < 2 {
        // All but the last positions were written in earlier steps: they are on their way before the wait.
        let cache = if thread == 0 { a.k_cache } else { a.v_cache };
        let from = head_offset + (start * a.head_dim) as usize;
        let from = cache.values.wrapping_add(from * C::VALUE_BYTES as usize);
        prefetch_l2(from, (end - start) * a.head_dim * C::VALUE_BYTES);
    }
    // Blocks that have nothing to do make room for the next kernel's; those that have wait, for all.
    if !is_active {
        return;
    }
    let (keys, values) = (a.k_cache, a.v_cache);
    let load = |from: KvRef, position: u32, end: u32| -> C::Raw {
        if position < end && has_dims {
            let at = head_offset + first_dim as usize + position as usize * a.head_dim as usize;
            // SAFETY: the position is written.
            unsafe { C::fetch(from, at) }
        } else {
            C::ZEROS
        }
    };
    let stride = WARPS as u32 * per_warp;
    let mut position = start + group;
    let fetch = |near: u32, end: u32| {
        let far = near + stride;
        [load(keys, near, end), load(keys, far, end), load(values, near, end), load(values, far, end)]
    };
    // The first of them go into registers. Those that are fresh are there after the wait only.
    let settled = length.saturating_sub(a.n_fresh);
    let mut next = fetch(position, end.min(settled));
    wait_for_previous();
    if position + stride >= settled {
        next = fetch(position, end);
    }

    // Weights are powers of 2: the scores' factor turns e^x into 2^x.
    let factor = a.scale * LOG2_E;
    let query = |head: u32| -> [f32; DIMS] {
        if has_dims && head < n_heads {
            // SAFETY: the head is one of the query's, the dimensions are inside it.
            unsafe {
                let q = a.q.add(((first_head + head) * a.head_dim + first_dim) as usize);
                let [q0, q1, q2, q3] = ld_global_u32x4(q.cast()).map(|bits| f32::from_bits(bits) * factor);
                let [q4, q5, q6, q7] =
                    ld_global_u32x4(q.add(4).cast()).map(|bits| f32::from_bits(bits) * factor);
                [q0, q1, q2, q3, q4, q5, q6, q7]
            }
        } else {
            [0.0; DIMS]
        }
    };
    let q: [[f32; DIMS]; HEADS] = core::array::from_fn(|head| query(head as u32));
    let mut largest = [LOWEST; HEADS];
    let mut sum = [0.0f32; HEADS];
    let mut value = [[0.0f32; DIMS]; HEADS];
    // The same for all lanes of a warp: those of later groups may have no position.
    while position - lane / a.lanes < end {
        let (near, far) = (position, position + stride);
        let [k0, k1, v0, v1] = next;
        let (k0, k1) = (C::widen(k0), C::widen(k1));
        let mut scores = [[0.0f32; 2]; HEADS];
        for head in 0..HEADS {
            for d in 0..DIMS {
                scores[head][0] = mul_add(q[head][d], k0[d], scores[head][0]);
                scores[head][1] = mul_add(q[head][d], k1[d], scores[head][1]);
            }
        }
        // One meeting of the lanes for all scores.
        let scores = reduce(scores, a.lanes);
        next = fetch(position + 2 * stride, end);
        let (v0, v1) = (C::widen(v0), C::widen(v1));
        for head in 0..HEADS {
            let s0 = if near < end { scores[head][0] } else { f32::NEG_INFINITY };
            let s1 = if far < end { scores[head][1] } else { f32::NEG_INFINITY };
            let new = max(largest[head], max(s0, s1));
            let (w0, w1, correction) = (exp2(s0 - new), exp2(s1 - new), exp2(largest[head] - new));
            largest[head] = new;
            sum[head] = mul_add(sum[head], correction, w0 + w1);
            for d in 0..DIMS {
                value[head][d] = mul_add(w0, v0[d], mul_add(w1, v1[d], value[head][d] * correction));
            }
        }
        position += 2 * stride;
    }

    let head_values = |part: u32, head: u32| ((part * HEADS as u32 + head) * a.head_dim) as usize;
    for head in 0..HEADS {
        if has_dims {
            let at = head_values(group, head as u32) + first_dim as usize;
            let [x0, x1, x2, x3, x4, x5, x6, x7] = value[head];
            part_values.set4(at, [x0, x1, x2, x3]);
            part_values.set4(at + 4, [x4, x5, x6, x7]);
        }
        if first_dim == 0 {
            part_max.set(group as usize * HEADS + head, largest[head]);
            part_sum.set(group as usize * HEADS + head, sum[head]);
        }
    }
    sync_threads();

    // A warp combines the parts' scores of one head, a lane one part: what is left of each part's weight.
    let n_parts = stride;
    if warp < n_heads {
        let at = (lane as usize % n_parts as usize) * HEADS + warp as usize;
        let largest = if lane < n_parts { part_max.get(at) } else { LOWEST };
        let total_max = warp_reduce_max(FULL_MASK, largest, WARP_SIZE);
        let share = exp2(largest - total_max);
        let weight = if lane < n_parts { share * part_sum.get(at) } else { 0.0 };
        let total_sum = warp_reduce_add(FULL_MASK, weight, WARP_SIZE);
        if lane < n_parts {
            part_sum.set(at, share / total_sum);
        }
        if lane == 0 {
            total.set(2 * warp as usize, total_max);
            total.set(2 * warp as usize + 1, total_sum);
        }
    }
    sync_threads();

    let n_pairs = n_heads * a.head_dim / 2;
    let is_whole = n_active == 1;
    let (to, offset) = if is_whole {
        (a.out, first_head * a.head_dim)
    } else {
        (a.split_values, (split * a.n_head + first_head) * a.head_dim)
    };
    let mut pair = thread;
    while pair < n_pairs {
        let (head, d) = (2 * pair / a.head_dim, 2 * pair % a.head_dim);
        let mut result = [0.0; 2];
        for part in 0..n_parts {
            let share = part_sum.get((part * HEADS as u32 + head) as usize);
            let at = head_values(part, head) + d as usize;
            result[0] = mul_add(share, part_values.get(at), result[0]);
            result[1] = mul_add(share, part_values.get(at + 1), result[1]);
        }
        let first = (offset + 2 * pair) as usize;
        // SAFETY: the elements are inside the output, and this thread's own.
        unsafe {
            *to.add(first) = result[0];
            *to.add(first + 1) = result[1];
            if is_whole && !a.operand.words.is_null() {
                a.operand.store_2(first, result);
            }
        }
        pair += BLOCK_DIM as u32;
    }
    if n_active == 1 {
        return;
    }
    if thread < 2 * n_heads {
        // SAFETY: as above.
        unsafe {
            *a.split_sums.add((2 * (split * a.n_head + first_head) + thread) as usize) =
                total.get(thread as usize)
        };
    }

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

/// Sums over groups of `lanes` lanes.
#[inline(always)]
fn reduce<const HEADS: usize>(scores: [[f32; 2]; HEADS], lanes: u32) -> [[f32; 2]; HEADS] {
    // As one list, of a length that is known for each number of heads.
    let mut list = [0.0f32; 2 * MAX_HEADS];
    for head in 0..HEADS {
        list[2 * head] = scores[head][0];
        list[2 * head + 1] = scores[head][1];
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7] = list;
    let list = match HEADS {
        1 => {
            let [s0, s1] = warp_reduce_add_n(FULL_MASK, [s0, s1], lanes);
            [s0, s1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        }
        2 => {
            let [s0, s1, s2, s3] = warp_reduce_add_n(FULL_MASK, [s0, s1, s2, s3], lanes);
            [s0, s1, s2, s3, 0.0, 0.0, 0.0, 0.0]
        }
        3 => {
            let [s0, s1, s2, s3, s4, s5] = warp_reduce_add_n(FULL_MASK, [s0, s1, s2, s3, s4, s5], lanes);
            [s0, s1, s2, s3, s4, s5, 0.0, 0.0]
        }
        _ => warp_reduce_add_n(FULL_MASK, list, lanes),
    };
    let _ = (s6, s7);
    core::array::from_fn(|head| [list[2 * head], list[2 * head + 1]])
}

macro_rules! define_kernels {
    ($(($heads:literal, $suffix:ident, $Codec:ident, $format:ident))*) => {$(
        #[doc = concat!("Blocks of ", stringify!($heads), " query heads, a cache in ", stringify!($format), ".")]
        pub mod $suffix {
            use super::*;

            /// `out[h] = softmax(scale * q[h] K^T) V` over positions `0..=step.position`.
            ///
            /// # Safety
            /// The arguments are as their fields say, in device memory; the caches are written at positions
            /// `0..=step.position`, and `step.position < n_ctx`.
            ///
            /// # Parameters
            /// - `arguments`: queries, cache, result and workspace
            ///
            /// # Thread mapping
            /// Blocks of [`BLOCK_DIM`] threads, grid `n_splits` by `n_head_kv * blocks_per_kv`: a row of the grid is a
            /// key-value head and some of its query heads; the row's first blocks share the context, as many as it is
            /// worth, the others end at once. Bytes moved: 4 per position and dimension of each
            /// key-value head, 2 and its factors in Q8_0.
            #[kernel(suffix = $suffix, overlapping, launch_bounds(256, 2))]
            pub unsafe fn attention(arguments: Arguments) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { attend::<$Codec, $heads>(arguments) }
            }
        }
    )*

        /// The kernel for blocks of `heads` query heads and a format of the cache.
        ///
        /// # Panics
        /// When there is none: `heads` is not from 1 to [`MAX_HEADS`].
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn kernel_for(heads: usize, format: KvFormat) -> &'static cuda_std::launch::Kernel<(Arguments,)> {
            match (heads, format) {
                $(($heads, KvFormat::$format) => &$suffix::ATTENTION,)*
                _ => panic!("no attention kernel for {heads} heads"),
            }
        }
    };
}
define_kernels! {
    (1, h1, HalfKv, F16)
    (2, h2, HalfKv, F16)
    (3, h3, HalfKv, F16)
    (4, h4, HalfKv, F16)
    (1, q8_0_h1, Q8Kv, Q8_0)
    (2, q8_0_h2, Q8Kv, Q8_0)
    (3, q8_0_h3, Q8Kv, Q8_0)
    (4, q8_0_h4, Q8Kv, Q8_0)
}
