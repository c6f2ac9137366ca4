//! Choosing the next token on the device, so that no decode step waits for the host.
//!
//! Which tokens may be chosen is one number: every token has a *rank*, which orders tokens by likelihood and equals by
//! their ids, and those from a lowest rank on are kept. Weights are integers, in units of 2^-31 of the largest one, so
//! that no sum depends on the order in which threads add.
//!
//! Logits are dealt out in groups that follow each other, of which somebody leaves the largest rank: the product that makes the logits
//! ([`crate::gemv`]), or [`rank_groups`]. One block has the rest to do. For the most likely token these ranks are enough. Of them, the
//! k-th largest bounds the k most likely tokens from
//! below, so that only few groups have to be read again and few tokens are left, which are compared with each other
//! (`few.rs`). Where they are too many for that, or too few for top-p, the lowest rank is found by radix selection, in
//! passes over these groups or all of them (`selection.rs`).

mod few;
mod groups;
mod likelihood;
mod selection;

pub(crate) use groups::warp_largest;
pub use groups::{CHUNK, Groups, MAX_GROUPS};
pub(crate) use likelihood::Best;

use crate::step::Step;
use bytemuck::{Pod, Zeroable};
use core::f32::consts::LOG2_E;
use cuda_std::atomic::store_for_host_u32;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x};
use cuda_std::warp::{WARP_SIZE, warp_id, warp_uniform};
use cuda_std::{kernel, shared_array};
use few::{Few, ROOM, lanes_sum};
use groups::{Distances, Pass, Vocabulary};
use likelihood::{Measure, USABLE, Wanted, id_of, logit_of, random_bits, rank};
use selection::{BINS, Sums, select};

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;

/// Warps in a block, each of which takes a group of logits.
pub const WARPS: usize = BLOCK_DIM / WARP_SIZE as usize;

/// Tokens are chosen in the order of their ids modulo this, then of their ids.
const COLUMNS: usize = 1024;

/// The largest vocabulary: a choice among columns, then one among the rows of a column, each with a bin for all.
pub const MAX_VOCAB: usize = COLUMNS * COLUMNS;

/// What is chosen where no logit is a number above -inf.
pub const NO_TOKEN: u32 = u32::MAX;

/// How to choose, in device memory: a recorded launch keeps its arguments, this may change. All zeros is greedy.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct SamplingParameters {
    /// Chooses the random numbers.
    pub seed: u64,
    /// Multiplies the logits, finite; 0 takes the most likely token, whatever the rest says.
    pub inverse_temp: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Then keeps the fewest most likely tokens whose probabilities add up to this; 1 keeps all.
    pub top_p: f32,
    /// Not used: makes the size a multiple of the alignment.
    pub padding: u32,
}

const _: () = assert!(size_of::<SamplingParameters>() == 24);

/// Most tokens that top-k may keep for them to be compared with each other: not many more come into question. Where only
/// top-p keeps some, it has to find these among about as many.
const FEW: u32 = 192;

const TWO_TO_64: f32 = 18_446_744_073_709_551_616.0;

/// Leaves the largest rank of every group.
///
/// # Safety
/// The pointers are to device memory of the sizes below. `n_vocab` is from 1 to [`MAX_VOCAB`], and the groups have all logits.
///
/// # Parameters
/// - `logits`: `[n_vocab]`, in a buffer of at least four values, at a multiple of 16 bytes
/// - `groups`: how they are dealt out, and where the ranks go
///
/// # Thread mapping
/// A warp for each group, blocks of [`BLOCK_DIM`] threads, four logits for each lane at once. Bytes moved: 4 n_vocab.
#[kernel(overlapping, launch_bounds(256, 2))]
pub unsafe fn rank_groups(logits: *const f32, n_vocab: u32, groups: Groups) {
    let_next_start();
    let group = block_idx_x() * WARPS as u32 + warp_uniform(warp_id());
    wait_for_previous();
    if group >= groups.len() {
        return;
    }
    let largest = Vocabulary { logits, n: n_vocab, groups }.largest_of(group);
    if thread_idx_x().is_multiple_of(WARP_SIZE) {
        // SAFETY: the warp's place.
        unsafe { *groups.largest.add(group as usize) = largest };
    }
}

/// Chooses a token at random by its logit and makes it the step's: `chosen[position % n_places] = token`,
/// `step = { token, position + 1 }`.
///
/// A token's probability is in proportion to `exp(logit * inverse_temp)` among those that top-k, then top-p keep; of
/// equally likely ones the lower ids come first. Where `inverse_temp` is 0 or a logit is infinite, the largest logit's
/// token is taken, the lowest id of equals. NaN and -inf are never chosen; where there is nothing else, `chosen` is
/// [`NO_TOKEN`] and the step's token 0.
///
/// The choice depends on the seed, the step's position and the logits alone. Of the kept tokens in the order of their
/// ids modulo 1024, then of their ids, it is the one at which the running total of the weights reaches
/// `random bits * total / 2^64`, rounded up. A weight is rounded to 2^-31 of the largest one.
///
/// # Safety
/// The pointers are to device memory of the sizes below. `n_vocab` is from 1 to [`MAX_VOCAB`], and the groups have all logits.
///
/// # Parameters
/// - `logits`: `[n_vocab]`, in a buffer of at least four values, at a multiple of 16 bytes
/// - `parameters`: `[1]`
/// - `groups`: how the logits are dealt out, with the largest rank of each
/// - `chosen`: `[n_places]`, which may lie in host memory that the host watches meanwhile
/// - `step`: `[1]`; its position is that of the token whose logits these are
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads. Bytes moved: 8 for each group, with top-k some groups (about as many as tokens are kept). With
/// top-p alone or neither, 4 n_vocab. Where top-k is above 192, or tokens of nearly the same likelihood or top-p
/// make it more than 256 that come into question, the selection makes up to thirteen passes over these groups, or over all.
#[kernel(overlapping, launch_bounds(256, 1))]
pub unsafe fn sample(
    logits: *const f32,
    n_vocab: u32,
    parameters: *const SamplingParameters,
    groups: Groups,
    step: *mut Step,
    chosen: *mut u32,
    n_places: u32,
) {
    let_next_start();
    let distances = Distances(shared_array!(SAMPLE_DISTANCES: [u32; Distances::BINS]));
    let warp_ranks = shared_array!(SAMPLE_WARP_RANKS: [u64; WARPS]);
    let list = shared_array!(SAMPLE_LIST: [u16; MAX_GROUPS]);
    let n_listed = shared_array!(SAMPLE_LISTED: [u32; 1]);
    let masses = shared_array!(SAMPLE_MASSES: [u64; WARPS]);
    let few = Few {
        ranks: shared_array!(SAMPLE_FEW_RANKS: [u64; ROOM]),
        weights: shared_array!(SAMPLE_FEW_WEIGHTS: [u32; ROOM]),
        orders: shared_array!(SAMPLE_FEW_ORDERS: [u32; ROOM]),
        len: shared_array!(SAMPLE_FEW_LEN: [u32; 1]),
        totals: shared_array!(SAMPLE_FEW_TOTALS: [u64; 2]),
    };
    let sums = Sums {
        low: shared_array!(SAMPLE_LOW: [u32; BINS]),
        high: shared_array!(SAMPLE_HIGH: [u32; BINS]),
        found: shared_array!(SAMPLE_FOUND: [u64; 4]),
    };
    let thread = thread_idx_x();
    let (warp, lane) = (warp_uniform(warp_id()), thread % WARP_SIZE);
    distances.clear();
    if thread == 0 {
        n_listed.set(0, 0);
        few.len.set(0, 0);
    }
    wait_for_previous();

    // Eight ranks for each thread.
    let vocabulary = Vocabulary { logits, n: n_vocab, groups };
    let group_of = |pair: u32| 2 * (thread + pair * BLOCK_DIM as u32);
    let fetch = |pair: u32| {
        let group = if group_of(pair) < groups.len() { group_of(pair) } else { 0 };
        // SAFETY: there is room for an even number of ranks.
        unsafe { ld_global_u32x4(groups.largest.add(group as usize).cast()) }
    };
    let words = [fetch(0), fetch(1), fetch(2), fetch(3)];
    // SAFETY: one of each; the step is written when all threads have read it.
    let (SamplingParameters { seed, inverse_temp, top_k, top_p, .. }, position) =
        unsafe { (*parameters, (*step).position) };
    let pair = |pair: u32, [a, b, c, d]: [u32; 4]| {
        let rank = |i: u32, low: u32, high: u32| {
            if group_of(pair) + i < groups.len() { u64::from(high) << 32 | u64::from(low) } else { 0 }
        };
        (rank(0, a, b), rank(1, c, d))
    };
    let pairs = [pair(0, words[0]), pair(1, words[1]), pair(2, words[2]), pair(3, words[3])];
    let larger = |(a, b): (u64, u64)| if a > b { a } else { b };
    let [p0, p1, p2, p3] = pairs.map(larger);
    let own = warp_largest(larger((larger((p0, p1)), larger((p2, p3)))));
    if lane == 0 {
        warp_ranks.set(warp as usize, own);
    }
    sync_threads();
    let top_rank = warp_largest(warp_ranks.get(thread as usize % WARPS));
    let top = logit_of(top_rank);

    let finish = |token: u32| {
        let next = if token == NO_TOKEN { 0 } else { token };
        // SAFETY: one element each, written by one thread.
        unsafe {
            store_for_host_u32(chosen.add((position % n_places) as usize), token);
            *step = Step { token: next, position: position + 1 };
        }
    };
    // Every condition is the same in all threads.
    let is_random = top_rank >= USABLE && inverse_temp > 0.0 && top < f32::INFINITY;
    if !is_random {
        if thread == 0 {
            finish(if top_rank >= USABLE { id_of(top_rank) } else { NO_TOKEN });
        }
        return;
    }

    let scale = inverse_temp * LOG2_E;
    let scale = if scale < f32::MAX { scale } else { f32::MAX };
    let top_k = if top_k < n_vocab { top_k } else { 0 };
    let part = if top_p < 1.0 { Some(Wanted::Part((top_p * TWO_TO_64) as u64)) } else { None };
    let random = Wanted::Part(random_bits(seed, position));
    let measure = Measure { top, scale, count: false };
    let mut pass = Pass { vocabulary, list, n_listed: None };
    if top_k > 0 || part.is_some() {
        // Which groups have tokens that come into question.
        each_group(pairs, |_, largest| distances.count(top - logit_of(largest)));
        sync_threads();
        let few_groups = if groups.len() / 2 < FEW { groups.len() / 2 } else { FEW };
        let limit = distances.limit(if top_k > 0 { top_k } else { few_groups });
        each_group(pairs, |group, largest| {
            if top - logit_of(largest) < limit {
                list.set(n_listed.atomic_add(0, 1) as usize, group as u16);
            }
        });
        sync_threads();
        let n_listed = n_listed.get(0);
        if top_k > 0 {
            pass.n_listed = Some(n_listed);
        }
        if top_k <= FEW && n_listed <= ROOM as u32 {
            // Top-p alone is of the weights of all tokens.
            let mut mass = 0;
            pass.for_each(|first, [l0, l1, l2, l3]| {
                let mut add = |id, logit| {
                    if top - logit < limit {
                        few.push(rank(id, logit), measure.of(logit));
                    }
                    if top_k == 0 {
                        mass += u64::from(measure.of(logit));
                    }
                };
                add(first, l0);
                add(first + 1, l1);
                add(first + 2, l2);
                add(first + 3, l3);
            });
            if top_k == 0 {
                let mass = lanes_sum(mass, WARP_SIZE);
                if lane == 0 {
                    masses.set(warp as usize, mass);
                }
            }
            sync_threads();
            let mass = if top_k == 0 { Some((0..WARPS).map(|warp| masses.get(warp)).sum()) } else { None };
            if few.choose(top_k, part, mass, random, finish) {
                return;
            }
        }
    }
    let token = select(pass, sums, top, scale, top_k, part, random);
    if thread == 0 {
        finish(token);
    }
}

/// Calls `f` with the number and the largest rank of each of the thread's groups.
#[inline(always)]
fn each_group(pairs: [(u64, u64); 4], mut f: impl FnMut(u32, u64)) {
    // By hand, so that the ranks stay in registers.
    let group = |pair: u32| 2 * (thread_idx_x() + pair * BLOCK_DIM as u32);
    let [(a, b), (c, d), (e, g), (h, i)] = pairs;
    f(group(0), a);
    f(group(0) + 1, b);
    f(group(1), c);
    f(group(1) + 1, d);
    f(group(2), e);
    f(group(2) + 1, g);
    f(group(3), h);
    f(group(3) + 1, i);
}
