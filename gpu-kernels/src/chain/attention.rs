//! Attention of one query token over the KV cache, split along the context.
//!
//! A block takes one key-value head, up to four of the query heads that share it, and a range of positions; each key
//! and value is read once for all of these heads. Softmax is kept online (Milakov and Gimelshein, 2018): whoever has
//! looked at some positions holds their largest score, the sum of their weights relative to it, and the weighted sum
//! of values, and two such parts combine into one of both. Where several blocks share a context, each leaves its part
//! in vectors of the step, which another stage combines (flash-decoding: Dao et al., 2023).

use super::Block;
use super::feed::Feed;
use super::stage::{HeadsRef, StageRef};
use super::vector::{await4, put, put4};
use core::f32::consts::LOG2_E;
use cuda_std::float::{exp2, f16_to_f32, f32_to_f16, max, mul_add};
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, sync_warp, warp_reduce_across_n, warp_reduce_add, warp_reduce_add_n, warp_reduce_max,
};

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
/// What no score is below; finite, so that differences are numbers.
const LOWEST: f32 = -1e30;
/// Words of shared memory for `n_warps` warps and `heads` query heads of `head_dim` values: each warp's values, largest
/// scores and sums, and both of the last over all warps.
pub const fn shared_words(n_warps: u32, heads: u32, head_dim: u32) -> u32 {
    heads * (n_warps * (head_dim + 2) + 2)
}

/// Words of shared memory for combining the parts of a context, with `n_threads` threads.
pub const fn combine_words(n_threads: u32) -> u32 {
    MAX_SPLITS as u32 + 4 * n_threads
}

/// How many blocks share a context of `length` tokens.
#[inline(always)]
fn n_active(heads: HeadsRef, length: u32) -> u32 {
    length.div_ceil(SPLIT_POSITIONS).min(heads.n_splits())
}

/// A part of attention that one block does: which heads, which positions.
pub(super) struct Item {
    pub(super) kv_head: u32,
    first_head: u32,
    n_heads: u32,
    split: u32,
    pub(super) start: u32,
    end: u32,
}

impl Item {
    /// Item `number` of those of a context of `length` tokens.
    #[inline(always)]
    pub(super) fn new(heads: HeadsRef, number: u32, length: u32) -> Self {
        let n_rows = heads.n_head_kv() * heads.blocks_per_kv();
        let (split, row) = (number / n_rows, number % n_rows);
        let (kv_head, block_of_head) = (row / heads.blocks_per_kv(), row % heads.blocks_per_kv());
        let heads_per_kv = heads.n_head() / heads.n_head_kv();
        let before = block_of_head * heads.heads_per_block();
        let per_split = length.div_ceil(n_active(heads, length));
        Self {
            kv_head,
            first_head: kv_head * heads_per_kv + before,
            n_heads: (heads_per_kv - before).min(heads.heads_per_block()),
            split,
            start: split * per_split,
            end: (split * per_split + per_split).min(length),
        }
    }

    /// How many of its positions are in the cache: all but the step's own.
    #[inline(always)]
    pub(super) fn n_cached(&self, position: u32) -> u32 {
        self.end.min(position) - self.start
    }
}

/// How many items the attention over a context of `length` tokens has; a block takes every so many-th as there are
/// blocks, from its own number on.
#[inline(always)]
pub(super) fn n_items(heads: HeadsRef, length: u32) -> u32 {
    heads.n_head_kv() * heads.blocks_per_kv() * n_active(heads, length)
}

/// Runs the stage in this block.
///
/// # Safety
/// The stage, the block's memory and the feed are as they say.
#[inline(always)]
pub(super) unsafe fn run<const HEADS: usize>(stage: StageRef, block: &Block, feed: &mut Feed, known: u32) {
    let (heads, length) = (stage.heads(), block.position + 1);
    let n_items = n_items(heads, length);
    let mut number = block.index;
    while number < n_items {
        let item = Item::new(heads, number, length);
        // SAFETY: the caller's promise.
        unsafe { attend::<HEADS>(stage, block, &item, feed, known) };
        number += block.n_blocks;
    }
    block.store_fetched();
    sync_threads();
}

/// Eight f16 values.
#[inline(always)]
fn widen(words: [u32; 4]) -> [f32; DIMS] {
    let half = |i: usize| f16_to_f32((words[i / 2] >> (16 * (i % 2))) as u16);
    [half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7)]
}

/// Eight values as f16: what the cache holds of them.
#[inline(always)]
fn narrow([a, b, c, d]: [f32; 4], [e, f, g, h]: [f32; 4]) -> [u32; 4] {
    let pair = |low: f32, high: f32| u32::from(f32_to_f16(low)) | u32::from(f32_to_f16(high)) << 16;
    [pair(a, b), pair(c, d), pair(e, f), pair(g, h)]
}

/// What a lane knows of the positions it has looked at.
struct State<const HEADS: usize> {
    largest: [f32; HEADS],
    sum: [f32; HEADS],
    value: [[f32; DIMS]; HEADS],
}

impl<const HEADS: usize> State<HEADS> {
    /// Takes in two positions, of which either may be missing.
    #[inline(always)]
    fn take(
        &mut self,
        q: &[[f32; DIMS]; HEADS],
        lanes: u32,
        keys: [[u32; 4]; 2],
        values: [[u32; 4]; 2],
        is_there: [bool; 2],
    ) {
        let [k0, k1] = keys.map(widen);
        let mut scores = [[0.0f32; 2]; HEADS];
        for head in 0..HEADS {
            for d in 0..DIMS {
                scores[head][0] = mul_add(q[head][d], k0[d], scores[head][0]);
                scores[head][1] = mul_add(q[head][d], k1[d], scores[head][1]);
            }
        }
        // One meeting of the lanes for all scores.
        let scores = reduce(scores, lanes);
        let [v0, v1] = values.map(widen);
        for head in 0..HEADS {
            let s0 = if is_there[0] { scores[head][0] } else { f32::NEG_INFINITY };
            let s1 = if is_there[1] { scores[head][1] } else { f32::NEG_INFINITY };
            let new = max(self.largest[head], max(s0, s1));
            let (w0, w1, correction) = (exp2(s0 - new), exp2(s1 - new), exp2(self.largest[head] - new));
            self.largest[head] = new;
            self.sum[head] = mul_add(self.sum[head], correction, w0 + w1);
            for d in 0..DIMS {
                let before = self.value[head][d] * correction;
                self.value[head][d] = mul_add(w0, v0[d], mul_add(w1, v1[d], before));
            }
        }
    }

    /// Combines what the groups of lanes of a warp know: all know the same afterwards.
    #[inline(always)]
    fn join_groups(&mut self, lanes: u32) {
        if lanes == WARP_SIZE {
            return;
        }
        let largest = warp_reduce_across_n::<HEADS, true>(self.largest, lanes);
        for head in 0..HEADS {
            let factor = exp2(self.largest[head] - largest[head]);
            self.largest[head] = largest[head];
            let [v0, v1, v2, v3, v4, v5, v6, v7] = self.value[head].map(|value| value * factor);
            let all = [v0, v1, v2, v3, v4, v5, v6, v7, self.sum[head] * factor];
            let [v0, v1, v2, v3, v4, v5, v6, v7, sum] = warp_reduce_across_n::<9, false>(all, lanes);
            self.value[head] = [v0, v1, v2, v3, v4, v5, v6, v7];
            self.sum[head] = sum;
        }
    }
}

/// Attention of `HEADS` query heads over an item's positions.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn attend<const HEADS: usize>(
    stage: StageRef,
    block: &Block,
    item: &Item,
    feed: &mut Feed,
    known: u32,
) {
    let heads = stage.heads();
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    let (warp, lane) = (thread / WARP_SIZE, thread % WARP_SIZE);
    let (head_dim, lanes, n_heads) = (heads.head_dim(), heads.lanes(), item.n_heads);
    // A group of lanes takes a position, a lane eight of its dimensions.
    let per_warp = WARP_SIZE / lanes;
    let (group, first_dim) = (lane / lanes, lane % lanes * DIMS as u32);
    let has_dims = first_dim < head_dim;
    let memory = block.memory.view::<f32>();

    let qkv = block.set.wrapping_add(stage.input() as usize);
    // Weights are powers of 2: the scores' factor turns e^x into 2^x.
    let factor = heads.scale() * LOG2_E;
    let mut q = [[0.0f32; DIMS]; HEADS];
    for head in 0..HEADS {
        if has_dims && (head as u32) < n_heads {
            // SAFETY: the head is one of the query's, the dimensions are inside it.
            unsafe {
                let from = qkv.add(((item.first_head + head as u32) * head_dim + first_dim) as usize);
                let [q0, q1, q2, q3] = await4(from).map(|value| value * factor);
                let [q4, q5, q6, q7] = await4(from.add(4)).map(|value| value * factor);
                q[head] = [q0, q1, q2, q3, q4, q5, q6, q7];
            }
        }
    }
    block.mark(1);
    // The step's own key and value are not in the cache: they come after the warps' pieces, as if they were one more.
    let n_cached = item.n_cached(block.position);
    let n_chunks = n_cached.div_ceil(heads.chunk());
    let has_own = item.end > block.position && n_chunks % n_warps == warp;
    let mut state = State { largest: [LOWEST; HEADS], sum: [0.0; HEADS], value: [[0.0; DIMS]; HEADS] };
    let mut chunk = warp;
    while chunk < n_chunks + u32::from(has_own) {
        let is_own = chunk == n_chunks;
        let n_rows = if is_own { 1 } else { (n_cached - chunk * heads.chunk()).min(heads.chunk()) };
        let (mut own, mut at) = ([[0; 4]; 2], 0);
        if !is_own {
            at = feed.front() + first_dim / 2;
        } else if has_dims && group == 0 {
            let (n_q, n_kv) = (heads.n_head() * head_dim, heads.n_head_kv() * head_dim);
            // SAFETY: the key-value head is one of the step's.
            unsafe {
                let from = qkv.add((n_q + item.kv_head * head_dim + first_dim) as usize);
                // In the precision that they have in the cache.
                own[0] = narrow(await4(from), await4(from.add(4)));
                let from = from.add(n_kv as usize);
                own[1] = narrow(await4(from), await4(from.add(4)));
            }
        }
        let load = |row: u32, half: u32| -> [u32; 4] {
            if is_own || row >= n_rows || !has_dims {
                own[half as usize % 2]
            } else {
                block.memory.get4((at + (half * n_rows + row) * (head_dim / 2)) as usize)
            }
        };
        let mut row = group;
        while row - group < n_rows {
            let (near, far) = (row, row + per_warp);
            let (keys, values) = ([load(near, 0), load(far, 0)], [load(near, 1), load(far, 1)]);
            state.take(&q, lanes, keys, values, [near < n_rows, far < n_rows]);
            row += 2 * per_warp;
        }
        if !is_own {
            // All lanes meet here after their last read of the piece: its place is free.
            sync_warp(FULL_MASK);
            // SAFETY: the stages are as they say.
            unsafe { feed.pop(known) };
        }
        chunk += n_warps;
    }
    block.mark(2);
    state.join_groups(lanes);
    block.mark(3);

    let heads_u32 = HEADS as u32;
    let max_at = n_warps * heads_u32 * head_dim;
    let (sum_at, total_at) = (max_at + n_warps * heads_u32, max_at + 2 * n_warps * heads_u32);
    let values_at = |warp: u32, head: u32| ((warp * heads_u32 + head) * head_dim) as usize;
    // What was in the memory before may still be read.
    sync_threads();
    if has_dims && lane < lanes {
        for head in 0..HEADS {
            let at = values_at(warp, head as u32) + first_dim as usize;
            let [x0, x1, x2, x3, x4, x5, x6, x7] = state.value[head];
            memory.set4(at, [x0, x1, x2, x3]);
            memory.set4(at + 4, [x4, x5, x6, x7]);
        }
    }
    if lane == 0 {
        for head in 0..HEADS {
            let at = warp * heads_u32 + head as u32;
            memory.set((max_at + at) as usize, state.largest[head]);
            memory.set((sum_at + at) as usize, state.sum[head]);
        }
    }
    sync_threads();

    // A warp combines the warps' scores of a head, a lane those of one: what is left of each warp's weight.
    let mut head = warp;
    while head < n_heads {
        let at = lane * heads_u32 + head;
        let largest = if lane < n_warps { memory.get((max_at + at) as usize) } else { LOWEST };
        let total_max = warp_reduce_max(FULL_MASK, largest, WARP_SIZE);
        let share = exp2(largest - total_max);
        let weight = if lane < n_warps { share * memory.get((sum_at + at) as usize) } else { 0.0 };
        let total_sum = warp_reduce_add(FULL_MASK, weight, WARP_SIZE);
        if lane < n_warps {
            memory.set((sum_at + at) as usize, share / total_sum);
        }
        if lane == 0 {
            memory.set((total_at + 2 * head) as usize, total_max);
            memory.set((total_at + 2 * head + 1) as usize, total_sum);
        }
        head += n_warps;
    }
    sync_threads();

    block.mark(4);
    let is_whole = n_active(heads, block.position + 1) == 1;
    let to = if is_whole {
        stage.output() + item.first_head * head_dim
    } else {
        heads.split_values() + (item.split * heads.n_head() + item.first_head) * head_dim
    };
    let mut i = thread;
    while i < n_heads * head_dim {
        let (head, d) = (i / head_dim, i % head_dim);
        let mut result = 0.0;
        for part in 0..n_warps {
            let share = memory.get((sum_at + part * heads_u32 + head) as usize);
            result = mul_add(share, memory.get(values_at(part, head) + d as usize), result);
        }
        // SAFETY: the element is inside the vector, and this thread's own.
        unsafe { put(block.set.add((to + i) as usize), result) };
        i += block_dim_x();
    }
    if !is_whole && thread < n_heads {
        let at = heads.split_sums() + 4 * (item.split * heads.n_head() + item.first_head + thread);
        let (max, sum) =
            (memory.get((total_at + 2 * thread) as usize), memory.get((total_at + 2 * thread + 1) as usize));
        // SAFETY: as above.
        unsafe { put4(block.set.add(at as usize), [max, sum, 0.0, 0.0]) };
    }
}

/// Combines what the blocks of a context have left, a head in each block.
///
/// # Safety
/// As [`run`].
#[inline(always)]
pub(super) unsafe fn combine(stage: StageRef, block: &Block) {
    let (heads, thread) = (stage.heads(), thread_idx_x());
    let (memory, head_dim) = (block.memory.view::<f32>(), heads.head_dim());
    let n_active = n_active(heads, block.position + 1);
    block.store_fetched();
    if n_active == 1 {
        sync_threads();
        return;
    }
    let mut head = block.index;
    while head < heads.n_head() {
        // What was in the memory before may still be read.
        sync_threads();
        if thread < WARP_SIZE {
            // A lane looks at every 32nd split.
            let sums = |split: u32| {
                let at = heads.split_sums() + 4 * (split * heads.n_head() + head);
                if split < n_active {
                    // SAFETY: the split is one of those that are made.
                    let [max, sum, ..] = unsafe { await4(block.set.add(at as usize)) };
                    (max, sum)
                } else {
                    (LOWEST, 0.0)
                }
            };
            const { assert!(MAX_SPLITS == 2 * WARP_SIZE as usize) };
            let (near, far) = (sums(thread), sums(thread + WARP_SIZE));
            let largest = warp_reduce_max(FULL_MASK, max(near.0, far.0), WARP_SIZE);
            let (near, far) = (exp2(near.0 - largest) * near.1, exp2(far.0 - largest) * far.1);
            let total = warp_reduce_add(FULL_MASK, near + far, WARP_SIZE);
            memory.set(thread as usize, near / total);
            memory.set((thread + WARP_SIZE) as usize, far / total);
        }
        sync_threads();

        // Groups of threads share the splits, a thread takes four neighbouring values.
        let (n_quads, n_threads) = (head_dim / 4, block_dim_x());
        let n_groups = (n_threads / n_quads).min(n_active);
        let (group, quad) = (thread / n_quads, thread % n_quads);
        let mut sum = [0.0f32; 4];
        if group < n_groups {
            let mut split = group;
            while split < n_active {
                let at = heads.split_values() + (split * heads.n_head() + head) * head_dim + 4 * quad;
                // SAFETY: the split is one of those that are made.
                let [v0, v1, v2, v3] = unsafe { await4(block.set.add(at as usize)) };
                let factor = memory.get(split as usize);
                sum = [
                    mul_add(factor, v0, sum[0]),
                    mul_add(factor, v1, sum[1]),
                    mul_add(factor, v2, sum[2]),
                    mul_add(factor, v3, sum[3]),
                ];
                split += n_groups;
            }
            memory.set4(MAX_SPLITS + 4 * thread as usize, sum);
        }
        sync_threads();
        if group == 0 {
            let mut sum = [0.0f32; 4];
            for group in 0..n_groups {
                let at = MAX_SPLITS + 4 * (group * n_quads + quad) as usize;
                let [v0, v1, v2, v3] = memory.get4(at);
                sum = [sum[0] + v0, sum[1] + v1, sum[2] + v2, sum[3] + v3];
            }
            // SAFETY: the values are the head's, and this thread's own.
            unsafe { put4(block.set.add((stage.output() + head * head_dim + 4 * quad) as usize), sum) };
        }
        head += block.n_blocks;
    }
    // The memory is written again by whatever comes next.
    sync_threads();
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
    let [s0, s1, s2, s3, s4, s5, ..] = list;
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
    core::array::from_fn(|head| [list[2 * head], list[2 * head + 1]])
}
