//! Attention of one query token over the KV cache, on tensor cores, split along the context.
//!
//! A block takes one key-value head, up to eight of the query heads that share it, and a range of positions; each key
//! and value is read once for all of these heads. A warp takes sixteen positions at a time: their scores are the product of the
//! queries, a row for each head, with their keys; the sum of their values is that of the values, a row for each dimension, with the
//! weights, a column for each head. Which dimension, or which of the positions, a product goes through first is of no matter: so a
//! lane reads 16 bytes of a key or a value at once, and has them where they are multiplied. Keys and values are f16, or become f16;
//! queries and weights are each two f16 whose sum they are, since there is room for both: to some 22 bits.
//!
//! Softmax is kept online (Milakov and Gimelshein, 2018): whoever has
//! looked at some positions holds their largest score, the sum of their weights relative to it, and the weighted sum
//! of values, and two such parts combine into one of both. Where several blocks share a context (flash-decoding: Dao et al., 2023), they
//! are a cluster, whose first block gets the others' parts (`mail.rs`), or, where they are too many for that, each leaves its part
//! in device memory, and the last one to come combines them (`splits.rs`): none waits.

mod mail;
mod reader;
mod splits;

#[cfg(not(target_arch = "nvptx64"))]
pub use mail::{MAX_CLUSTER, mail_words};

use crate::activations::OCTET;
#[cfg(not(target_arch = "nvptx64"))]
use crate::kv_cache::KvFormat;
use crate::kv_cache::{HalfKv, KvCodec, KvRef, Q8Kv};
use crate::operand::Operand;
use crate::step::Step;
use core::f32::consts::LOG2_E;
use cuda_std::float::{exp2, f16x2_to_f32, f32_to_f16x2, f32_to_f16x2_saturating, max, mul_add};
use cuda_std::grid::{let_next_start, wait_for_previous, wait_for_previous_knowing};
use cuda_std::intrinsics::transpose_halves;
use cuda_std::memory::{ld_global_u32x4, prefetch_l2, st_global_u32x4};
use cuda_std::shared::Shared;
use cuda_std::tensor::{F16, multiply_add_in_registers};
use cuda_std::thread::{block_idx_x, block_idx_y, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add, warp_reduce_max, warp_shuffle_idx};
use cuda_std::{kernel, shared_array};

#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use mail::Mail;
use mail::{Apart, Row};
use reader::Reader;
use splits::combine_if_last;

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
/// Most query heads that a block takes: columns of a product.
pub const MAX_HEADS: usize = 8;
/// Most pieces of them.
pub const MAX_PIECES: usize = 16;

/// Positions that a warp takes at a time.
const TILE: u32 = 16;
/// Positions that are worth a block of their own, what its warps take at a time: fewer blocks than there could be share a shorter context.
pub const SPLIT_POSITIONS: u32 = WARPS as u32 * TILE;
// So no split is empty: a length beyond `(n - 1) * SPLIT_POSITIONS` has more than `n - 1` positions for each of `n`.
const _: () = assert!(MAX_SPLITS <= SPLIT_POSITIONS as usize);
/// Dimensions of a *piece* of a head.
pub const PIECE: usize = 64;
/// What no score is below; finite, so that differences are numbers.
pub(crate) const LOWEST: f32 = -1e30;
/// Words between the queries of two heads, and between their sums: lanes that read several heads' should not meet in a bank.
const GAP: usize = 4;
/// Words for the vectors of a block's heads.
const HEADS_WORDS: usize = MAX_PIECES * PIECE + GAP * MAX_HEADS;

/// What a launch of attention works on.
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
    /// Query heads of a block, at most [`MAX_HEADS`] of at most [`MAX_PIECES`] pieces; the last one may have fewer.
    pub heads: u32,
    /// Values in a head, a multiple of 16, at most 256.
    pub head_dim: u32,
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

/// Four values, each as two f16 whose sum it is: the larger ones of the first two and of the last two, and what they lack.
#[inline(always)]
fn split_4([a, b, c, d]: [f32; 4]) -> [u32; 4] {
    let ([low0, rest0], [low1, rest1]) = (split_2(a, b), split_2(c, d));
    [low0, low1, rest0, rest1]
}

/// Two values, likewise.
#[inline(always)]
fn split_2(a: f32, b: f32) -> [u32; 2] {
    let near = f32_to_f16x2_saturating(a, b);
    let [near_a, near_b] = f16x2_to_f32(near);
    [near, f32_to_f16x2(a - near_a, b - near_b)]
}

/// Attention of a block's query heads over its positions; heads have at most `PIECES` pieces. A row of the grid is a cluster or not.
///
/// A launch has few blocks, which come to other multiprocessors each time: what they run is not in the instruction caches, and
/// comes from the L2 cache while everybody waits for attention (docs/performance.md, version 7). So a block that has to
/// wait for the kernel before rehearses meanwhile.
///
/// # Safety
/// The arguments are as their fields say; the cache is written at positions `0..=step.position`, which is below `n_ctx`.
#[inline(always)]
unsafe fn attend<C: KvCodec, R: Row, const PIECES: usize>(a: Arguments) {
    // Four values of a query, split, are four words.
    let queries = shared_array!(ATTENTION_QUERIES: [u32; HEADS_WORDS]);
    // Of each warp: the values of all heads, and their largest scores and sums.
    let warp_values = shared_array!(ATTENTION_VALUES: [f32; WARPS * HEADS_WORDS]);
    let warp_max = shared_array!(ATTENTION_MAX: [f32; WARPS * MAX_HEADS]);
    let warp_sum = shared_array!(ATTENTION_SUM: [f32; WARPS * MAX_HEADS]);

    let (thread, split, row) = (thread_idx_x(), block_idx_x(), block_idx_y());
    let (warp, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    let (group, member) = (lane / 4, lane % 4);
    let (kv_head, block_of_head) = (row / a.blocks_per_kv, row % a.blocks_per_kv);
    let first_head = kv_head * a.heads_per_kv + block_of_head * a.heads;
    let n_heads = (a.heads_per_kv - block_of_head * a.heads).min(a.heads);

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
    let row_of_blocks = R::new(n_heads * a.head_dim);
    row_of_blocks.begin(split, n_active - 1, n_heads);
    let in_cache = kv_head as usize * a.n_ctx as usize * a.head_dim as usize;
    let (k_head, v_head) = (C::starting_at(a.k_cache, in_cache), C::starting_at(a.v_cache, in_cache));
    let reader = Reader { keys: k_head, values: v_head, head_dim: a.head_dim, group, member };
    let first = start + warp * TILE;
    if thread < 2 {
        // All but the last positions were written in earlier steps: they are on their way before the wait.
        let head = if thread == 0 { k_head } else { v_head };
        let from = head.values.wrapping_add((start * a.head_dim * C::VALUE_BYTES) as usize);
        prefetch_l2(from, (end - start) * a.head_dim * C::VALUE_BYTES);
    }
    // Of two pieces there are registers for keys and values that come before they are needed.
    let is_ahead = PIECES <= 2;
    let stride = (PIECES * PIECE + GAP) as u32;
    if a.head_dim < (PIECES * PIECE) as u32 {
        let mut quad = thread;
        while quad < n_heads * stride / 4 {
            queries.set4(4 * quad as usize, [0; 4]);
            quad += BLOCK_DIM as u32;
        }
        sync_threads();
    }
    let (mut keys, mut values) = ([[[C::ZEROS; 2]; 2]; PIECES], [[C::ZEROS; 4]; PIECES]);
    // A thread's quad of the block's heads, in which head it is, and where in that.
    let quad = 4 * thread;
    let (quad_head, quad_dim) = (quad / a.head_dim, quad % a.head_dim);
    let has_quad = quad_head < n_heads;
    let mut rehearsals = a.rehearsals;
    loop {
        let is_real = rehearsals == 0;
        let mut query = [0u32; 4];
        if is_real {
            // What is fresh is there after the wait only.
            let is_fresh = first + TILE + a.n_fresh > length;
            if is_fresh {
                wait_for_previous();
            }
            if is_ahead && first < end {
                let reader = reader.no_sooner(rehearsals);
                // SAFETY: the positions are written.
                (keys, values) = unsafe {
                    (reader.all_keys::<C, PIECES>(first, end), reader.all_values::<C, PIECES>(first, end))
                };
            }
            let at = first_head * a.head_dim + quad;
            wait_for_previous_knowing(at | a.q.addr() as u32 >> 1);
            if has_quad {
                // SAFETY: the head is one of the query's.
                query = unsafe { ld_global_u32x4(a.q.add(at as usize).cast()) };
            }
        }
        if has_quad {
            queries.set4((quad_head * stride + quad_dim) as usize, split_4(query.map(f32::from_bits)));
        }
        sync_threads();
        // Rows without a head repeat the last one's: nobody looks at what becomes of them.
        let query_at = group.min(n_heads - 1) * stride + OCTET as u32 * member;
        // Weights are powers of 2: the scores' factor turns e^x into 2^x.
        let factor = a.scale * LOG2_E;
        let (mut largest, mut sum) = (LOWEST, 0.0f32);
        let mut sums = [[[0.0f32; 4]; 4]; PIECES];
        let mut position = first;
        // The same for all lanes of a warp.
        while position < end {
            let reader = reader.no_sooner(position);
            let after = position + SPLIT_POSITIONS;
            let goes_on = is_real && after < end;
            // Of both halves of a piece apart: what they wait for is their own.
            let mut scores = [[[0.0f32; 4]; 2]; 2];
            let mut piece = 0;
            while piece < PIECES {
                let keys = if is_ahead || !is_real {
                    keys[piece]
                } else {
                    // SAFETY: the positions are written.
                    unsafe { reader.keys::<C>(piece, position, end) }
                };
                let mut half = 0;
                while half < 2 {
                    let at = query_at as usize + PIECE * piece + PIECE / 2 * half;
                    let ([a0, a2, a1, a3], [b0, b2, b1, b3]) = (queries.get4(at), queries.get4(at + 4));
                    let mut row = 0;
                    while row < 2 {
                        let [k0, k1, k2, k3] = C::halves(keys[row][half]);
                        let before = scores[half][row];
                        let before = multiply_add_in_registers::<F16>([a0, a1, a2, a3], [k0, k1], before);
                        scores[half][row] =
                            multiply_add_in_registers::<F16>([b0, b1, b2, b3], [k2, k3], before);
                        row += 1;
                    }
                    half += 1;
                }
                piece += 1;
            }
            if goes_on && is_ahead {
                // SAFETY: the positions are written.
                keys = unsafe { reader.all_keys::<C, PIECES>(after, end) };
            }
            // Columns are positions; the lower rows are those of what queries lack.
            let score = |row: usize, column: usize| {
                let ([near, far], at) = ([scores[0][row], scores[1][row]], position + 8 * row as u32);
                let value = (near[column] + far[column]) + (near[column + 2] + far[column + 2]);
                if at + 2 * member + (column as u32) < end { value * factor } else { f32::NEG_INFINITY }
            };
            let [s0, s1, s2, s3] = [score(0, 0), score(0, 1), score(1, 0), score(1, 1)];
            let new = warp_reduce_max(FULL_MASK, max(max(s0, s1), max(s2, s3)), 4);
            let new = max(largest, new);
            let correction = exp2(largest - new);
            largest = new;
            let [w0, w1, w2, w3] = [exp2(s0 - new), exp2(s1 - new), exp2(s2 - new), exp2(s3 - new)];
            sum = mul_add(sum, correction, (w0 + w1) + (w2 + w3));
            let ([near0, rest0], [near1, rest1]) = (split_2(w0, w1), split_2(w2, w3));
            if position > first {
                // Columns are heads now.
                let even = warp_shuffle_idx(FULL_MASK, correction, 8 * member, WARP_SIZE);
                let odd = warp_shuffle_idx(FULL_MASK, correction, 8 * member + 4, WARP_SIZE);
                let mut piece = 0;
                while piece < PIECES {
                    let mut i = 0;
                    while i < 4 {
                        let [c0, c1, c2, c3] = sums[piece][i];
                        sums[piece][i] = [c0 * even, c1 * odd, c2 * even, c3 * odd];
                        i += 1;
                    }
                    piece += 1;
                }
            }
            let mut piece = 0;
            while piece < PIECES {
                let [v0, v1, v8, v9] = if is_ahead || !is_real {
                    values[piece]
                } else {
                    // SAFETY: the positions are written.
                    unsafe { reader.values::<C>(piece, position, end) }
                };
                let (v0, v1, v8, v9) = (C::halves(v0), C::halves(v1), C::halves(v8), C::halves(v9));
                let mut i = 0;
                while i < 4 {
                    let ([a0, a1], [a2, a3]) =
                        (transpose_halves(v0[i], v1[i]), transpose_halves(v8[i], v9[i]));
                    let with_near =
                        multiply_add_in_registers::<F16>([a0, a1, a2, a3], [near0, near1], sums[piece][i]);
                    sums[piece][i] =
                        multiply_add_in_registers::<F16>([a0, a1, a2, a3], [rest0, rest1], with_near);
                    i += 1;
                }
                piece += 1;
            }
            if !goes_on {
                break;
            }
            if is_ahead {
                // SAFETY: the positions are written.
                values = unsafe { reader.all_values::<C, PIECES>(after, end) };
            }
            position = after;
        }

        // The warps.
        let sum = warp_reduce_add(FULL_MASK, sum, 4);
        let head_values = |warp: u32, head: u32| (warp * n_heads + head) * stride;
        let mut piece = 0;
        while piece < PIECES {
            let dim = (PIECE * piece) as u32 + OCTET as u32 * group;
            if dim < a.head_dim {
                let [s0, s1, s2, s3] = sums[piece];
                let at = (head_values(warp, 2 * member) + dim) as usize;
                if 2 * member < n_heads {
                    warp_values.set4(at, [s0[0], s0[2], s1[0], s1[2]]);
                    warp_values.set4(at + 4, [s2[0], s2[2], s3[0], s3[2]]);
                }
                if 2 * member + 1 < n_heads {
                    let at = at + stride as usize;
                    warp_values.set4(at, [s0[1], s0[3], s1[1], s1[3]]);
                    warp_values.set4(at + 4, [s2[1], s2[3], s3[1], s3[3]]);
                }
            }
            piece += 1;
        }
        if member == 0 {
            let at = (group * WARPS as u32 + warp) as usize;
            warp_max.set(at, largest);
            warp_sum.set(at, sum);
        }
        sync_threads();

        let is_whole = R::IN_CLUSTER || n_active == 1;
        let (to, offset) = if is_whole {
            (a.out, first_head * a.head_dim)
        } else {
            (a.split_values, (split * a.n_head + first_head) * a.head_dim)
        };
        if has_quad {
            let (head, d) = (quad_head, quad_dim);
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
                let [v0, v1, v2, v3] = warp_values.get4((head_values(warp as u32, head) + d) as usize);
                let [r0, r1, r2, r3] = result;
                result = [
                    mul_add(share, v0, r0),
                    mul_add(share, v1, r1),
                    mul_add(share, v2, r2),
                    mul_add(share, v3, r3),
                ];
            }
            let first = (offset + quad) as usize;
            let sends = R::IN_CLUSTER && split > 0;
            let sums = [total_max, total];
            if is_real && sends {
                // SAFETY: the cluster's first block expects it of every block.
                unsafe { row_of_blocks.send(split, quad, (d == 0).then_some(head), result, sums) };
            }
            if is_real && !sends {
                let result = row_of_blocks.combine(n_active - 1, quad, head, result, sums);
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
        }
        if is_real {
            break;
        }
        rehearsals -= 1;
        // Everyone has read what the next time is written over.
        sync_threads();
    }
    if R::IN_CLUSTER || n_active == 1 {
        return;
    }

    // SAFETY: the block has left its part, of these heads.
    unsafe { combine_if_last(a, row, first_head, n_heads, n_active) };
}

macro_rules! define_kernel {
    ($pieces:literal, $suffix:ident, $Codec:ident, $format:ident, $Row:ident, $row:literal) => {
        #[doc = concat!("Heads of ", stringify!($pieces), " times 64 values or fewer, a cache in ", stringify!($format), ".")]
        pub mod $suffix {
            use super::*;

            /// `out[h] = softmax(scale * q[h] K^T) V` over positions `0..=step.position`.
            ///
            /// # Safety
            /// The arguments are as their fields say, in device memory; the caches are written at positions
            /// `0..=step.position`, and `step.position < n_ctx`. Of clusters the launch has the shared memory that [`mail_words`]
            /// gives.
            ///
            /// # Parameters
            /// - `arguments`: queries, cache, result and workspace
            ///
            /// # Thread mapping
            /// Blocks of [`BLOCK_DIM`] threads, grid `n_splits` by `n_head_kv * blocks_per_kv`: a row of the grid is a
            /// key-value head and some of its query heads; the row's first blocks share the context, as many as it is
            /// worth, the others end at once.
            #[doc = $row]
            /// Bytes moved: 4 per position and dimension of each key-value head, 2 and its factors in Q8_0.
            #[kernel(suffix = $suffix, overlapping, launch_bounds(256, 1))]
            pub unsafe fn attention(arguments: Arguments) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { attend::<$Codec, $Row, $pieces>(arguments) }
            }
        }
    };
}
macro_rules! define_kernels {
    ($(($pieces:literal, $suffix:ident, $cluster_suffix:ident, $Codec:ident, $format:ident))*) => {
        $(
            define_kernel!($pieces, $suffix, $Codec, $format, Apart, "");
            #[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
            define_kernel!($pieces, $cluster_suffix, $Codec, $format, Mail, " The row is a cluster.");
        )*

        /// The kernel for heads of `head_dim` values and a format of the cache, for rows of the grid that are clusters or not.
        ///
        /// # Panics
        /// When there is none: heads are longer than [`MAX_HEAD_DIM`].
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn kernel_for(
            head_dim: usize,
            format: KvFormat,
            in_cluster: bool,
        ) -> &'static cuda_std::launch::Kernel<(Arguments,)> {
            match (head_dim.div_ceil(PIECE).next_power_of_two(), format) {
                $(($pieces, KvFormat::$format) if in_cluster => &$cluster_suffix::ATTENTION,
                ($pieces, KvFormat::$format) => &$suffix::ATTENTION,)*
                _ => panic!("no attention kernel for heads of {head_dim}"),
            }
        }
    };
}

define_kernels! {
    (1, d64, cluster_d64, HalfKv, F16)
    (2, d128, cluster_d128, HalfKv, F16)
    (4, d256, cluster_d256, HalfKv, F16)
    (1, q8_0_d64, cluster_q8_0_d64, Q8Kv, Q8_0)
    (2, q8_0_d128, cluster_q8_0_d128, Q8Kv, Q8_0)
    (4, q8_0_d256, cluster_q8_0_d256, Q8Kv, Q8_0)
}
