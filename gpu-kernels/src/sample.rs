//! Choosing the next token on the device, so that no decode step waits for the host.
//!
//! Which tokens may be chosen is one number: every token has a *rank*, which orders tokens by likelihood and equals by
//! their ids, and those from a lowest rank on are kept. Top-k and top-p each find that rank by radix selection: the
//! ranks' digits, the highest first, are counted in a histogram (top-p: their probabilities are summed up), and the
//! digit at which the count reaches what is wanted is the lowest rank's. Probabilities are integers, in units of 2^-31
//! of the largest one, so that no sum depends on the order in which threads add.
//!
//! Only few tokens matter most of the time. The `k` largest of the threads' own maxima bound the `k` largest logits
//! from below, so one more pass collects all tokens above that bound, a few per thread, and the selection works on
//! these. Where they are too many for the room, or too few for top-p, it works on all logits.

use crate::block::{block_max, block_min_index};
use crate::step::Step;
use bytemuck::{Pod, Zeroable};
use core::f32::consts::LOG2_E;
use cuda_std::float::exp2;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::ld_global_u32;
use cuda_std::shared::Shared;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx, warp_shuffle_up, warp_vote_ballot};
use cuda_std::{kernel, shared_array};

/// Threads in the block.
pub const BLOCK_DIM: usize = 1024;

/// The largest vocabulary: the last step of a choice gives each thread one token of one thread.
pub const MAX_VOCAB: usize = BLOCK_DIM * BLOCK_DIM;

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

/// Loads that a thread has in flight in a pass over the logits.
const UNROLL: usize = 8;
/// Bits of a rank that a round of the selection decides, and the histogram's size.
const DIGIT_BITS: u32 = 11;
const BINS: usize = 1 << DIGIT_BITS;
/// Bins that a lane adds up.
const GROUP: usize = BINS / WARP_SIZE as usize;
/// Tokens that a thread has room to collect, and how many of the threads' maxima bound them. Of that many tokens,
/// spread at random, more than five come together in one thread once in 200 passes.
const SLOTS: usize = 5;
const COLLECTED: u32 = 352;

/// The lowest rank of a token that can be chosen: the one that follows all of -inf's.
const USABLE: u64 = (!f32::NEG_INFINITY.to_bits() as u64 + 1) << 32;

/// A token's place in the order of likelihood: higher for a larger logit, among equals for a lower id. Below
/// [`USABLE`] for NaN and -inf.
///
/// Floats are ordered as integers are once the bits of negative ones, or else the sign, are inverted (Herf, 2001).
#[inline(always)]
fn rank(id: u32, logit: f32) -> u64 {
    let bits = (logit + 0.0).to_bits(); // -0 becomes 0
    let key = if logit > f32::NEG_INFINITY { bits ^ ((bits as i32 >> 31) as u32 | 1 << 31) } else { 0 };
    u64::from(key) << 32 | u64::from(!id)
}

/// The logit of a token of this rank.
#[inline(always)]
fn logit_of(rank: u64) -> f32 {
    let key = (rank >> 32) as u32;
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}

/// Probabilities up to a common factor.
#[derive(Clone, Copy)]
struct Weights {
    /// The largest logit.
    top: f32,
    /// What a difference of logits is multiplied with to become a power of two.
    scale: f32,
}

impl Weights {
    /// `exp((logit - top) / temperature)` in units of 2^-31, rounded; 0 for NaN and -inf.
    #[inline(always)]
    fn of(self, logit: f32) -> u32 {
        const ONE: f32 = (1u32 << 31) as f32;
        (exp2((logit - self.top) * self.scale) * ONE + 0.5) as u32
    }
}

/// 64 random bits: number `position` of the generator SplitMix64 (Steele, Lea and Flood, 2014) with this seed.
#[inline(always)]
fn random_bits(seed: u64, position: u32) -> u64 {
    let z = seed.wrapping_add((u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Tokens of a thread with their logits.
trait Tokens: Copy {
    /// Gives each token's id and logit to `f`.
    fn for_each(self, f: impl FnMut(u32, f32));
}

/// All tokens; a thread takes every [`BLOCK_DIM`]-th.
#[derive(Clone, Copy)]
struct Vocabulary {
    logits: *const f32,
    n: u32,
}

impl Vocabulary {
    /// The logit of a token, -inf beyond the vocabulary.
    #[inline(always)]
    fn logit(self, id: u32) -> f32 {
        // SAFETY: there are n logits, which the kernel's caller vouches for.
        if id < self.n { unsafe { load(self.logits.add(id as usize)) } } else { f32::NEG_INFINITY }
    }
}

/// Reads a value that an earlier kernel wrote.
///
/// # Safety
/// `pointer` is to readable device memory.
#[inline(always)]
unsafe fn load(pointer: *const f32) -> f32 {
    // SAFETY: the caller vouches for the memory.
    f32::from_bits(unsafe { ld_global_u32(pointer.cast()) })
}

impl Tokens for Vocabulary {
    #[inline(always)]
    fn for_each(self, mut f: impl FnMut(u32, f32)) {
        let mut first = thread_idx_x();
        while first < self.n {
            let left = (self.n - first) as usize;
            // SAFETY: there are n logits, and each place is below n: `left` more follow from `first` on.
            let logits: [f32; UNROLL] = unsafe {
                let at = self.logits.add(first as usize);
                if left > (UNROLL - 1) * BLOCK_DIM {
                    core::array::from_fn(|i| load(at.add(i * BLOCK_DIM)))
                } else {
                    core::array::from_fn(|i| {
                        if i * BLOCK_DIM < left { load(at.add(i * BLOCK_DIM)) } else { f32::NEG_INFINITY }
                    })
                }
            };
            // By hand, since the compiler leaves a loop with a long body as it is, and the array then in memory.
            let id = |i: usize| first + (i * BLOCK_DIM) as u32;
            f(id(0), logits[0]);
            f(id(1), logits[1]);
            f(id(2), logits[2]);
            f(id(3), logits[3]);
            f(id(4), logits[4]);
            f(id(5), logits[5]);
            f(id(6), logits[6]);
            f(id(7), logits[7]);
            first += (UNROLL * BLOCK_DIM) as u32;
        }
    }
}

/// The first tokens of the vocabulary that a thread collected: logits and rows (`id / BLOCK_DIM`), slot by slot.
#[derive(Clone, Copy)]
struct Collected {
    logits: Shared<f32, { SLOTS * BLOCK_DIM }>,
    rows: Shared<u16, { SLOTS * BLOCK_DIM }>,
    len: usize,
}

impl Tokens for Collected {
    #[inline(always)]
    fn for_each(self, mut f: impl FnMut(u32, f32)) {
        let thread = thread_idx_x() as usize;
        for slot in 0..self.len {
            let at = slot * BLOCK_DIM + thread;
            f(u32::from(self.rows.get(at)) * BLOCK_DIM as u32 + thread as u32, self.logits.get(at));
        }
    }
}

/// One token per thread.
#[derive(Clone, Copy)]
struct Single {
    id: u32,
    logit: f32,
}

impl Tokens for Single {
    #[inline(always)]
    fn for_each(self, mut f: impl FnMut(u32, f32)) {
        f(self.id, self.logit);
    }
}

/// [`BINS`] sums of 64 bits that the block has in common, as two words: GPUs add atomically to words only.
#[derive(Clone, Copy)]
struct Sums {
    low: Shared<u32, BINS>,
    high: Shared<u32, BINS>,
    found: Shared<u64, 5>,
}

/// Where a running total reaches what is wanted.
#[derive(Clone, Copy)]
struct Found {
    /// The bin in which it does; [`BINS`] where all together are less.
    bin: usize,
    /// The total before that bin, and what is in it.
    before: u64,
    amount: u64,
    /// The total of all bins.
    total: u64,
    /// What was wanted.
    wanted: u64,
}

impl Sums {
    /// Sets the thread's two bins to 0.
    #[inline(always)]
    fn clear(self) {
        self.set(0);
    }

    /// Sets the bin of the thread's number, and the rest to 0.
    #[inline(always)]
    fn set(self, amount: u64) {
        let thread = thread_idx_x() as usize;
        self.low.set(thread, amount as u32);
        self.high.set(thread, (amount >> 32) as u32);
        self.low.set(BLOCK_DIM + thread, 0);
        self.high.set(BLOCK_DIM + thread, 0);
    }

    #[inline(always)]
    fn add(self, bin: usize, amount: u32) {
        let before = self.low.atomic_add(bin, amount);
        if before.checked_add(amount).is_none() {
            self.high.atomic_add(bin, 1);
        }
    }

    #[inline(always)]
    fn get(self, bin: usize) -> u64 {
        u64::from(self.high.get(bin)) << 32 | u64::from(self.low.get(bin))
    }

    /// The bin at which the running total of the bins reaches `wanted`, a function of the total; the same in all
    /// threads. All of them must call this. The bins may be set again afterwards.
    #[inline(always)]
    fn seek(self, wanted: impl Fn(u64) -> u64) -> Found {
        sync_threads();
        if thread_idx_x() < WARP_SIZE {
            let lane = thread_idx_x() as usize;
            let mut sum = 0u64;
            for i in 0..GROUP / 4 {
                // Each lane begins elsewhere in its group: four banks further on than its neighbour.
                let at = lane * GROUP + (i + lane) % (GROUP / 4) * 4;
                let (low, high) = (self.low.get4(at), self.high.get4(at));
                for j in 0..4 {
                    sum += u64::from(high[j]) << 32 | u64::from(low[j]);
                }
            }
            let through = running_total(sum);
            let total = from_lane(through, WARP_SIZE - 1);
            let wanted = wanted(total);
            let is_here = |before: u64, amount: u64| before < wanted && wanted <= before + amount;
            let group = warp_vote_ballot(FULL_MASK, is_here(through - sum, sum)).trailing_zeros();
            if lane == 0 {
                self.found.set(3, total);
                self.found.set(4, wanted);
            }
            if group < WARP_SIZE {
                let bin = group as usize * GROUP + 2 * lane;
                let (first, second) = (self.get(bin), self.get(bin + 1));
                let before =
                    from_lane(through - sum, group) + running_total(first + second) - (first + second);
                if is_here(before, first) {
                    self.set_found(bin, before, first);
                } else if is_here(before + first, second) {
                    self.set_found(bin + 1, before + first, second);
                }
            } else if lane == 0 {
                self.set_found(BINS, total, 0);
            }
        }
        sync_threads();
        Found {
            bin: self.found.get(0) as usize,
            before: self.found.get(1),
            amount: self.found.get(2),
            total: self.found.get(3),
            wanted: self.found.get(4),
        }
    }

    #[inline(always)]
    fn set_found(self, bin: usize, before: u64, amount: u64) {
        self.found.set(0, bin as u64);
        self.found.set(1, before);
        self.found.set(2, amount);
    }
}

/// Another lane's value.
#[inline(always)]
fn from_lane(value: u64, lane: u32) -> u64 {
    let low = warp_shuffle_idx(FULL_MASK, value as u32, lane, WARP_SIZE);
    u64::from(warp_shuffle_idx(FULL_MASK, (value >> 32) as u32, lane, WARP_SIZE)) << 32 | u64::from(low)
}

/// The sum of the values of all lanes up to this one (Hillis and Steele, 1986).
#[inline(always)]
fn running_total(value: u64) -> u64 {
    let mut total = value;
    let mut distance = 1;
    while distance < WARP_SIZE {
        let low = warp_shuffle_up(FULL_MASK, total as u32, distance, WARP_SIZE);
        let high = warp_shuffle_up(FULL_MASK, (total >> 32) as u32, distance, WARP_SIZE);
        if thread_idx_x() % WARP_SIZE >= distance {
            total += u64::from(high) << 32 | u64::from(low);
        }
        distance *= 2;
    }
    total
}

/// The lowest rank of the fewest most likely `tokens` whose measures add up to at least `wanted`, which is a function
/// of the sum of them all, among those from rank `lowest` on. None where all together are less.
#[inline(always)]
fn select<T: Tokens>(
    tokens: T,
    sums: Sums,
    lowest: u64,
    wanted: impl Fn(u64) -> u64,
    measure: impl Fn(f32) -> u32,
) -> Option<u64> {
    /// The shift at which no bit of the logit is left. The digit has one bit of the inverted id, which is always 1.
    const LOGIT_IS_KNOWN: u32 = 64 - 3 * DIGIT_BITS;
    let mut shift = 64 - DIGIT_BITS;
    // The rank's digits that are known, and their bits.
    let (mut known, mut mask) = (0u64, 0u64);
    let mut left = None;
    loop {
        sums.clear();
        sync_threads();
        tokens.for_each(|id, logit| {
            let rank = rank(id, logit);
            if rank >= lowest && rank & mask == known {
                // The highest digit comes first.
                sums.add(BINS - 1 - ((rank >> shift) as usize & (BINS - 1)), measure(logit));
            }
        });
        let found = sums.seek(|total| left.unwrap_or_else(|| wanted(total)));
        if found.bin == BINS {
            return None;
        }
        let still_wanted = found.wanted - found.before;
        known |= ((BINS - 1 - found.bin) as u64) << shift;
        mask |= u64::MAX << shift;
        // Of equal logits each adds the same, so that the last one may be needed to reach what is wanted.
        let last = if shift == LOGIT_IS_KNOWN { u64::from(measure(logit_of(known))) } else { 1 };
        if still_wanted + last > found.amount || shift == 0 {
            return Some(if known > lowest { known } else { lowest });
        }
        left = Some(still_wanted);
        // The last digit overlaps the one before, which changes nothing: those bits are the same in all tokens left.
        shift = shift.saturating_sub(DIGIT_BITS);
    }
}

/// The lowest rank that top-k and then top-p keep of `tokens`. `mass` is the sum of the weights that top-p begins with
/// where it is more than that of `tokens`; None where they do not reach top-p's part of it.
#[inline(always)]
fn narrow<T: Tokens>(
    tokens: T,
    sums: Sums,
    weights: Weights,
    top_k: u32,
    top_p: f32,
    mass: Option<u64>,
) -> Option<u64> {
    let mut lowest = USABLE;
    if top_k > 0 {
        // None where there are no more than k: all are kept.
        lowest = select(tokens, sums, lowest, |_| top_k.into(), |_| 1).unwrap_or(lowest);
    }
    if top_p < 1.0 {
        let wanted = |total: u64| {
            let part = f64::from(top_p) * mass.unwrap_or(total) as f64;
            let floor = part as u64;
            let ceil = if (floor as f64) < part { floor + 1 } else { floor };
            ceil.max(1)
        };
        lowest = select(tokens, sums, lowest, wanted, |logit| weights.of(logit))?;
    }
    Some(lowest)
}

/// Chooses a token at random by its logit and makes it the step's: `chosen[0] = token`,
/// `step = { token, position + 1 }`.
///
/// A token's probability is in proportion to `exp(logit * inverse_temp)` among those that top-k, then top-p keep; of
/// equally likely ones the lower ids come first. Where `inverse_temp` is 0 or a logit is infinite, the largest logit's
/// token is taken, the lowest id of equals. NaN and -inf are never chosen; where there is nothing else, `chosen` is
/// [`NO_TOKEN`] and the step's token 0.
///
/// The choice depends on the seed, the step's position and the logits alone. Of the kept tokens in the order of their
/// ids modulo 1024, then of their ids, it is the one at which the running total of the weights exceeds
/// `random bits * total / 2^64`. A weight is rounded to 2^-31 of the largest one.
///
/// # Safety
/// The pointers are to device memory of the sizes below. `n_vocab` is from 1 to [`MAX_VOCAB`].
///
/// # Parameters
/// - `logits`: `[n_vocab]`
/// - `parameters`, `chosen`: `[1]`
/// - `step`: `[1]`; its position is that of the token whose logits these are
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads; a thread takes every `BLOCK_DIM`-th token. Bytes moved: 4 n_vocab per pass:
/// one if greedy, two otherwise. A third to twelfth pass where top-k is above 352, top-p keeps more than about as many,
/// or six of the most likely tokens fall to one thread.
#[kernel]
pub unsafe fn sample(
    logits: *const f32,
    n_vocab: u32,
    parameters: *const SamplingParameters,
    step: *mut Step,
    chosen: *mut u32,
) {
    wait_for_previous();
    let_next_start();
    let maxima = shared_array!(SAMPLE_MAXIMA: [f32; 32]);
    let indices = shared_array!(SAMPLE_INDICES: [i32; 32]);
    let sums = Sums {
        low: shared_array!(SAMPLE_LOW: [u32; BINS]),
        high: shared_array!(SAMPLE_HIGH: [u32; BINS]),
        found: shared_array!(SAMPLE_FOUND: [u64; 5]),
    };
    let overflow = shared_array!(SAMPLE_OVERFLOW: [u32; 1]);
    let mut collected = Collected {
        logits: shared_array!(SAMPLE_COLLECTED: [f32; SLOTS * BLOCK_DIM]),
        rows: shared_array!(SAMPLE_ROWS: [u16; SLOTS * BLOCK_DIM]),
        len: 0,
    };
    let vocabulary = Vocabulary { logits, n: n_vocab };
    let thread = thread_idx_x();
    // SAFETY: one of each; the step is not written before all threads have read it.
    let (parameters, position) = unsafe { (*parameters, (*step).position) };
    let SamplingParameters { seed, inverse_temp, top_k, top_p, .. } = parameters;

    let mut best = Single { id: i32::MAX as u32, logit: f32::NEG_INFINITY };
    vocabulary.for_each(|id, logit| {
        if logit > best.logit {
            best = Single { id, logit };
        }
    });
    let top = block_max(best.logit, maxima);
    let top_id = block_min_index(if best.logit == top { best.id } else { i32::MAX as u32 }, indices);

    let mut token = if top_id < n_vocab { top_id } else { NO_TOKEN };
    // Every condition is the same in all threads.
    if token != NO_TOKEN && inverse_temp > 0.0 && top < f32::INFINITY {
        let scale = inverse_temp * LOG2_E;
        let weights = Weights { top, scale: if scale < f32::MAX { scale } else { f32::MAX } };
        let top_k = if top_k < n_vocab { top_k } else { 0 };
        let mut lowest = USABLE;
        let mut is_collected = false;
        if (top_k > 0 || top_p < 1.0) && top_k <= COLLECTED {
            let wanted = if top_k > 0 { top_k } else { COLLECTED };
            if thread == 0 {
                overflow.set(0, 0);
            }
            let bound = select(best, sums, USABLE, |_| wanted.into(), |_| 1).unwrap_or(USABLE);
            let needs_mass = top_k == 0;
            let mut mass = 0u64;
            vocabulary.for_each(|id, logit| {
                if rank(id, logit) >= bound {
                    if collected.len < SLOTS {
                        let at = collected.len * BLOCK_DIM + thread as usize;
                        collected.logits.set(at, logit);
                        collected.rows.set(at, (id / BLOCK_DIM as u32) as u16);
                        collected.len += 1;
                    } else {
                        overflow.set(0, 1);
                    }
                }
                if needs_mass {
                    mass += u64::from(weights.of(logit));
                }
            });
            sums.set(mass);
            let mass = sums.seek(|_| u64::MAX).total;
            if overflow.get(0) == 0 {
                let mass = if needs_mass { Some(mass) } else { None };
                if let Some(rank) = narrow(collected, sums, weights, top_k, top_p, mass) {
                    (lowest, is_collected) = (rank, true);
                }
            }
        }
        if !is_collected && (top_k > 0 || top_p < 1.0) {
            lowest = narrow(vocabulary, sums, weights, top_k, top_p, None).unwrap_or(USABLE);
        }

        // First the thread, then the token among the thread's.
        let mut mass = 0;
        let mut add = |id, logit| {
            // Where all are kept the weight says it, which is 0 for unusable ones.
            if lowest == USABLE || rank(id, logit) >= lowest {
                mass += u64::from(weights.of(logit));
            }
        };
        if is_collected {
            collected.for_each(&mut add);
        } else {
            vocabulary.for_each(&mut add);
        }
        sums.set(mass);
        let bits = random_bits(seed, position);
        let column = sums.seek(|total| (u128::from(bits) * u128::from(total) >> 64) as u64 + 1);
        let id = thread * BLOCK_DIM as u32 + column.bin as u32;
        let logit = vocabulary.logit(id);
        sums.set(if rank(id, logit) >= lowest { weights.of(logit).into() } else { 0 });
        let row = sums.seek(|_| column.wanted - column.before);
        token = (row.bin * BLOCK_DIM + column.bin) as u32;
    }
    if thread == 0 {
        let next = if token == NO_TOKEN { 0 } else { token };
        // SAFETY: one element each, written by one thread.
        unsafe {
            *chosen = token;
            *step = Step { token: next, position: position + 1 };
        }
    }
}
