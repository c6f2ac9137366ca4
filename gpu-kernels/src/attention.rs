//! Attention of one query token over the KV cache.

use crate::step::Step;
use cuda_std::float::{exp, f16_to_f32, max};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, sync_warp, warp_reduce_add, warp_reduce_max};
use cuda_std::{kernel, shared_array};
use half::f16;

/// Warps in a block; each takes every `WARPS`-th tile of positions.
pub const WARPS: usize = 8;
/// Threads in a block.
pub const BLOCK_DIM: usize = WARPS * WARP_SIZE as usize;
/// Positions in a tile: one per lane.
pub const TILE: usize = WARP_SIZE as usize;
/// The largest head size, and the number whose multiples are head sizes.
pub const MAX_HEAD_DIM: usize = 256;
/// Head sizes are multiples of this.
pub const HEAD_DIM_STEP: usize = 32;

/// Dimensions that a lane accumulates: every 32nd.
const DIMS_PER_LANE: usize = MAX_HEAD_DIM / HEAD_DIM_STEP;
/// f16 values in a 16-byte load.
const F16_PER_LOAD: usize = 8;

/// `out[h] = softmax(scale * q[h] K^T) V` over positions `0..=step.position`, in one pass over the cache.
///
/// Softmax is kept online (Milakov and Gimelshein, 2018): each warp holds the running maximum, the running sum and
/// the weighted values relative to that maximum; the warps' parts are merged at the end.
///
/// # Safety
/// The pointers are to device memory of the sizes below, the caches 16-byte aligned and written at positions
/// `0..=step.position`; `step.position < n_ctx`.
///
/// # Parameters
/// - `q`, `out`: `[n_head, head_dim]`, head_dim a multiple of 32, at most 256
/// - `k_cache`, `v_cache`: `[n_head / heads_per_kv, n_ctx, head_dim]`
/// - `heads_per_kv`: query heads that share a key-value head (GQA)
/// - `scale`: usually `1 / sqrt(head_dim)`
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads per query head. For scores a lane is a position, for values a lane holds
/// every 32nd dimension. Bytes moved: 4 per position and dimension of each key-value head.
#[kernel]
pub unsafe fn attention(
    q: *const f32,
    k_cache: *const f16,
    v_cache: *const f16,
    out: *mut f32,
    step: *const Step,
    heads_per_kv: u32,
    head_dim: u32,
    n_ctx: u32,
    scale: f32,
) {
    let query = shared_array!(ATTENTION_QUERY: [f32; MAX_HEAD_DIM]);
    let weights = shared_array!(ATTENTION_WEIGHTS: [f32; BLOCK_DIM]);
    let warp_max = shared_array!(ATTENTION_MAX: [f32; WARPS]);
    let warp_sum = shared_array!(ATTENTION_SUM: [f32; WARPS]);
    let warp_values = shared_array!(ATTENTION_VALUES: [f32; WARPS * MAX_HEAD_DIM]);

    let (thread, head) = (thread_idx_x() as usize, block_idx_x() as usize);
    let (warp, lane) = (thread / WARP_SIZE as usize, thread % WARP_SIZE as usize);
    let (head_dim, n_ctx) = (head_dim as usize, n_ctx as usize);
    let kv_head = head / heads_per_kv as usize;
    // SAFETY: the head is one of the query's, kv_head one of the cache's; the position is set.
    let (length, k_head, v_head) = unsafe {
        if thread < head_dim {
            query.set(thread, *q.add(head * head_dim + thread) * scale);
        }
        let offset = kv_head * n_ctx * head_dim;
        ((*step).position as usize + 1, k_cache.add(offset), v_cache.add(offset))
    };
    sync_threads();

    let mut running_max = f32::NEG_INFINITY;
    let mut running_sum = 0.0;
    let mut values = [0.0f32; DIMS_PER_LANE];
    let mut tile = warp * TILE;
    while tile < length {
        let position = tile + lane;
        let mut score = f32::NEG_INFINITY;
        if position < length {
            score = 0.0;
            for d in (0..head_dim).step_by(F16_PER_LOAD) {
                // SAFETY: the position is written, d + 8 <= head_dim, and rows are multiples of 64 bytes long.
                let words = unsafe { ld_global_u32x4(k_head.add(position * head_dim + d).cast()) };
                let (low, high) = (query.get4(d), query.get4(d + 4));
                let q = [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]];
                for (i, &word) in words.iter().enumerate() {
                    score +=
                        q[2 * i] * f16_to_f32(word as u16) + q[2 * i + 1] * f16_to_f32((word >> 16) as u16);
                }
            }
        }
        let new_max = max(running_max, warp_reduce_max(FULL_MASK, score, WARP_SIZE));
        let correction = exp(running_max - new_max);
        let weight = exp(score - new_max);
        // This lane's part of the sum only: the lanes are added up once, at the end.
        running_sum = running_sum * correction + weight;
        running_max = new_max;
        weights.set(thread, weight);
        sync_warp(FULL_MASK);

        for value in &mut values {
            *value *= correction;
        }
        let n_positions = TILE.min(length - tile);
        for j in 0..n_positions {
            let weight = weights.get(warp * TILE + j);
            for (i, value) in values.iter_mut().enumerate() {
                let d = i * HEAD_DIM_STEP + lane;
                if d < head_dim {
                    // SAFETY: position tile + j is written and d is inside the head.
                    let v = unsafe { *v_head.add((tile + j) * head_dim + d) };
                    *value += weight * f16_to_f32(v.to_bits());
                }
            }
        }
        // The weights are written again in the next round.
        sync_warp(FULL_MASK);
        tile += WARPS * TILE;
    }

    let sum = warp_reduce_add(FULL_MASK, running_sum, WARP_SIZE);
    if lane == 0 {
        warp_max.set(warp, running_max);
        warp_sum.set(warp, sum);
    }
    for (i, &value) in values.iter().enumerate() {
        warp_values.set(warp * MAX_HEAD_DIM + i * HEAD_DIM_STEP + lane, value);
    }
    sync_threads();

    if thread < head_dim {
        let total_max = (0..WARPS).fold(f32::NEG_INFINITY, |m, w| max(m, warp_max.get(w)));
        let (mut total, mut value) = (0.0, 0.0);
        for w in 0..WARPS {
            // A warp that met no position has maximum -inf, so its part counts nothing.
            let share = exp(warp_max.get(w) - total_max);
            total += share * warp_sum.get(w);
            value += share * warp_values.get(w * MAX_HEAD_DIM + thread);
        }
        // SAFETY: the element is this thread's own.
        unsafe { *out.add(head * head_dim + thread) = value / total };
    }
}
