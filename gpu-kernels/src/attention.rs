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
use cuda_std::grid::{let_next_start, wait_for_previous_knowing};
use cuda_std::memory::{ld_global_u32x2, ld_global_u32x4, prefetch_l2, st_global_u32x4};
use cuda_std::shared::Shared;
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, warp_reduce_add, warp_reduce_add_n, warp_reduce_max, warp_shuffle_xor_n,
};
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
/// Most query heads times positions that a group of lanes takes at a time.
const SCORES: usize = 8;
/// What no score is below; finite, so that differences are numbers.
pub(crate) const LOWEST: f32 = -1e30;

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
    /// How often a block goes through its work, with nothing to show for it, before it waits for the kernel before.
    pub rehearsals: u32,
    /// The factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Arguments {}

/// Attention of `HEADS` query heads over a block's positions, of which a group of lanes takes `POSITIONS` at a time.
///
/// A launch has few blocks, which come to other multiprocessors each time: what they run is not in the instruction caches, and
/// comes from the L2 cache while everybody waits for attention (docs/performance.md, version 7). So a block that has to
/// wait for the kernel before rehearses meanwhile.
///
/// # Safety
/// The arguments are as their fields say; the cache is written at positions `0..=step.position`, which is below `n_ctx`.
#[inline(always)]
unsafe fn attend<C: KvCodec, const HEADS: usize, const POSITIONS: usize>(a: Arguments) {
    const { assert!(HEADS * POSITIONS <= SCORES) };
    // Of each warp: the values of all heads, and their largest scores and sums.
    let warp_values = shared_array!(ATTENTION_VALUES: [f32; WARPS * MAX_HEADS * MAX_HEAD_DIM]);
    let warp_max = shared_array!(ATTENTION_MAX: [f32; WARPS * MAX_HEADS]);
    let warp_sum = shared_array!(ATTENTION_SUM: [f32; WARPS * MAX_HEADS]);
    // Whether this block is the last.
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
    // Blocks that have nothing to do make room for the next kernel's; those that have wait, for all.
    if split >= n_active {
        return;
    }
    let head_offset = kv_head as usize * a.n_ctx as usize * a.head_dim as usize;
    let stride = WARPS as u32 * per_warp;
    let first = start + group;
    if thread < 2 {
        // All but the last positions were written in earlier steps: they are on their way before the wait.
        let cache = if thread == 0 { a.k_cache } else { a.v_cache };
        let from = head_offset + (start * a.head_dim) as usize;
        let from = cache.values.wrapping_add(from * C::VALUE_BYTES as usize);
        prefetch_l2(from, (end - start) * a.head_dim * C::VALUE_BYTES);
    }
    let fetch = |from: KvRef, first: u32, end: u32| -> [C::Raw; POSITIONS] {
        core::array::from_fn(|i| {
            let position = first + i as u32 * stride;
            if position < end && has_dims {
                let at = head_offset + first_dim as usize + position as usize * a.head_dim as usize;
                // SAFETY: the position is written.
                unsafe { C::fetch(from, at) }
            } else {
                C::ZEROS
            }
        })
    };
    let (mut keys, mut values) = ([C::ZEROS; POSITIONS], [C::ZEROS; POSITIONS]);
    // A block of several heads has no registers for it: a context that is worth one is long.
    let mut rehearsals = if HEADS == 1 { a.rehearsals } else { 0 };
    loop {
        let is_real = HEADS > 1 || rehearsals == 0;
        let mut queries = [[0u32; DIMS]; HEADS];
        if is_real {
            // The first of them go into registers. Those that are fresh are there after the wait only.
            let settled = length.saturating_sub(a.n_fresh);
            (keys, values) =
                (fetch(a.k_cache, first, end.min(settled)), fetch(a.v_cache, first, end.min(settled)));
            let at = first_head * a.head_dim + first_dim;
            let has_fresh = first + (POSITIONS as u32 - 1) * stride >= settled;
            wait_for_previous_knowing(at | u32::from(has_fresh) | a.q.addr() as u32 >> 1);
            queries = core::array::from_fn(|head| {
                if has_dims && (head as u32) < n_heads {
                    // SAFETY: the head is one of the query's, the dimensions are inside it.
                    unsafe {
                        let q = a.q.add((at + head as u32 * a.head_dim) as usize);
                        let ([q0, q1, q2, q3], [q4, q5, q6, q7]) =
                            (ld_global_u32x4(q.cast()), ld_global_u32x4(q.add(4).cast()));
                        [q0, q1, q2, q3, q4, q5, q6, q7]
                    }
                } else {
                    [0; DIMS]
                }
            });
            if has_fresh {
                (keys, values) = (fetch(a.k_cache, first, end), fetch(a.v_cache, first, end));
            }
        }
        // Weights are powers of 2: the scores' factor turns e^x into 2^x.
        let factor = a.scale * LOG2_E;
        let q = queries.map(|query| query.map(|bits| f32::from_bits(bits) * factor));
        let mut largest = [LOWEST; HEADS];
        let mut sum = [0.0f32; HEADS];
        let mut value = [[0.0f32; DIMS]; HEADS];
        let mut position = first;
        // The same for all lanes of a warp: those of later groups may have no position.
        while position - lane / a.lanes < end {
            let mut scores = [[0.0f32; POSITIONS]; HEADS];
            for i in 0..POSITIONS {
                let key = C::widen(keys[i]);
                for head in 0..HEADS {
                    for d in 0..DIMS {
                        scores[head][i] = mul_add(q[head][d], key[d], scores[head][i]);
                    }
                }
            }
            // One meeting of the lanes for all scores.
            let scores = reduce(scores, a.lanes);
            let after = position + POSITIONS as u32 * stride;
            let goes_on = is_real && after - lane / a.lanes < end;
            if goes_on {
                keys = fetch(a.k_cache, after, end);
            }
            let mut weights = scores;
            for head in 0..HEADS {
                for (i, weight) in weights[head].iter_mut().enumerate() {
                    if position + i as u32 * stride >= end {
                        *weight = f32::NEG_INFINITY;
                    }
                }
                let new = weights[head].into_iter().fold(largest[head], max);
                let correction = exp2(largest[head] - new);
                largest[head] = new;
                let mut added = 0.0;
                for weight in &mut weights[head] {
                    *weight = exp2(*weight - new);
                    added += *weight;
                }
                sum[head] = mul_add(sum[head], correction, added);
                value[head] = value[head].map(|value| value * correction);
            }
            for i in 0..POSITIONS {
                let from = C::widen(values[i]);
                for head in 0..HEADS {
                    for d in 0..DIMS {
                        value[head][d] = mul_add(weights[head][i], from[d], value[head][d]);
                    }
                }
            }
            if !goes_on {
                break;
            }
            values = fetch(a.v_cache, after, end);
            position = after;
        }

        // The groups of a warp, and then the warps.
        let mut distance = a.lanes;
        while distance < WARP_SIZE {
            for head in 0..HEADS {
                let [v0, v1, v2, v3, v4, v5, v6, v7] = value[head];
                let [other_max, other_sum, w0, w1, w2, w3, w4, w5, w6, w7] = warp_shuffle_xor_n(
                    FULL_MASK,
                    [largest[head], sum[head], v0, v1, v2, v3, v4, v5, v6, v7],
                    distance,
                );
                let new = max(largest[head], other_max);
                let (own, other) = (exp2(largest[head] - new), exp2(other_max - new));
                largest[head] = new;
                sum[head] = mul_add(sum[head], own, other_sum * other);
                let others = [w0, w1, w2, w3, w4, w5, w6, w7];
                value[head] = core::array::from_fn(|d| mul_add(value[head][d], own, others[d] * other));
            }
            distance *= 2;
        }
        let head_values = |warp: u32, head: u32| ((warp * HEADS as u32 + head) * a.head_dim) as usize;
        if lane < a.lanes {
            for head in 0..HEADS {
                if has_dims {
                    let at = head_values(warp, head as u32) + first_dim as usize;
                    let [x0, x1, x2, x3, x4, x5, x6, x7] = value[head];
                    warp_values.set4(at, [x0, x1, x2, x3]);
                    warp_values.set4(at + 4, [x4, x5, x6, x7]);
                }
                if first_dim == 0 {
                    warp_max.set(head * WARPS + warp as usize, largest[head]);
                    warp_sum.set(head * WARPS + warp as usize, sum[head]);
                }
            }
        }
        sync_threads();

        let is_whole = n_active == 1;
        let (to, offset) = if is_whole {
            (a.out, first_head * a.head_dim)
        } else {
            (a.split_values, (split * a.n_head + first_head) * a.head_dim)
        };
        let mut quad = thread;
        while quad < n_heads * a.head_dim / 4 {
            let (head, d) =
                if HEADS == 1 { (0, 4 * quad) } else { (4 * quad / a.head_dim, 4 * quad % a.head_dim) };
            let of_warps = |array: Shared<f32, { WARPS * MAX_HEADS }>| -> [f32; WARPS] {
                let at = head as usize * WARPS;
                let ([a, b, c, d], [e, f, g, h]) = (array.get4(at), array.get4(at + 4));
                [a, b, c, d, e, f, g, h]
            };
            // What is left of each warp's weights.
            let (maxima, sums) = (of_warps(warp_max), of_warps(warp_sum));
            let total_max = maxima.into_iter().fold(LOWEST, max);
            let shares = maxima.map(|largest| exp2(largest - total_max));
            let (mut total, mut result) = (0.0, [0.0; 4]);
            for warp in 0..WARPS {
                total = mul_add(shares[warp], sums[warp], total);
            }
            let per_total = 1.0 / total;
            #[allow(
                clippy::needless_range_loop,
                reason = "an iterator over an array puts it into local memory"
            )]
            for warp in 0..WARPS {
                let share = shares[warp] * per_total;
                let [v0, v1, v2, v3] = warp_values.get4(head_values(warp as u32, head) + d as usize);
                let [r0, r1, r2, r3] = result;
                result = [
                    mul_add(share, v0, r0),
                    mul_add(share, v1, r1),
                    mul_add(share, v2, r2),
                    mul_add(share, v3, r3),
                ];
            }
            let first = (offset + 4 * quad) as usize;
            if is_real {
                // SAFETY: the elements are inside the output, and this thread's own.
                unsafe {
                    st_global_u32x4(to.add(first).cast(), result.map(f32::to_bits));
                    if is_whole && !a.operand.words.is_null() {
                        a.operand.store_4(first, result);
                    }
                    if !is_whole && d == 0 {
                        let at = 2 * (split * a.n_head + first_head + head) as usize;
                        *a.split_sums.add(at) = total_max;
                        *a.split_sums.add(at + 1) = total;
                    }
                }
            }
            quad += BLOCK_DIM as u32;
        }
        if is_real {
            break;
        }
        rehearsals -= 1;
        // Everyone has read what the next time is written over.
        sync_threads();
    }
    if n_active == 1 {
        return;
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

/// Sums over groups of `lanes` lanes, of all heads and positions in one meeting.
#[inline(always)]
fn reduce<const HEADS: usize, const POSITIONS: usize>(
    scores: [[f32; POSITIONS]; HEADS],
    lanes: u32,
) -> [[f32; POSITIONS]; HEADS] {
    let mut list = [0.0f32; SCORES];
    for head in 0..HEADS {
        for i in 0..POSITIONS {
            list[head * POSITIONS + i] = scores[head][i];
        }
    }
    // No more are exchanged than there are.
    let [s0, s1, s2, s3, s4, s5, _, _] = list;
    match HEADS * POSITIONS {
        4 => {
            let [s0, s1, s2, s3] = warp_reduce_add_n(FULL_MASK, [s0, s1, s2, s3], lanes);
            list = [s0, s1, s2, s3, 0.0, 0.0, 0.0, 0.0];
        }
        6 => {
            let [s0, s1, s2, s3, s4, s5] = warp_reduce_add_n(FULL_MASK, [s0, s1, s2, s3, s4, s5], lanes);
            list = [s0, s1, s2, s3, s4, s5, 0.0, 0.0];
        }
        _ => list = warp_reduce_add_n(FULL_MASK, list, lanes),
    }
    core::array::from_fn(|head| core::array::from_fn(|i| list[head * POSITIONS + i]))
}

macro_rules! define_kernels {
    ($(($heads:literal, $positions:literal, $suffix:ident, $Codec:ident, $format:ident))*) => {$(
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
                unsafe { attend::<$Codec, $heads, $positions>(arguments) }
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
    (1, 4, h1, HalfKv, F16)
    (2, 2, h2, HalfKv, F16)
    (3, 2, h3, HalfKv, F16)
    (4, 2, h4, HalfKv, F16)
    (1, 4, q8_0_h1, Q8Kv, Q8_0)
    (2, 2, q8_0_h2, Q8Kv, Q8_0)
    (3, 2, q8_0_h3, Q8Kv, Q8_0)
    (4, 2, q8_0_h4, Q8Kv, Q8_0)
}
