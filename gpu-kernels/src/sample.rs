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
const UNROLL: usize = 4;
/// Bits of a rank that a round of the selection decides, and the histogram's size.
const DIGIT_BITS: u32 = 11;
const BINS: usize = 1 << DIGIT_BITS;
/// Bins that a lane adds up.
const GROUP: usize = BINS / WARP_SIZE as usize;
const _: () = assert!(GROUP == 2 * 8 * 4);
/// Tokens that a thread has room to collect, and how many of the threads' maxima bound them. Of that many tokens,
/// spread at random, more than five come together in one thread once in 200 passes.
const SLOTS: usize = 5;
const COLLECTED: u32 = 352;

const TWO_TO_64: f32 = 18_446_744_073_709_551_616.0;

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

/// What a token adds to a sum.
#[derive(Clone, Copy)]
struct Measure {
    /// The largest logit.
    top: f32,
    /// What a difference of logits is multiplied with to become a power of two.
    scale: f32,
    /// Whether each token counts as 1 instead.
    count: bool,
}

impl Measure {
    /// `exp((logit - top) / temperature)` in units of 2^-31, rounded; 0 for NaN and -inf.
    #[inline(always)]
    fn of(self, logit: f32) -> u32 {
        const ONE: f32 = (1u32 << 31) as f32;
        if self.count { 1 } else { (exp2((logit - self.top) * self.scale) * ONE + 0.5) as u32 }
    }
}

/// How much is wanted of a sum.
#[derive(Clone, Copy)]
enum Wanted {
    Amount(u64),
    /// A part of all there is, in units of 2^-64; rounded up, and at least 1.
    Part(u64),
}

impl Wanted {
    #[inline(always)]
    fn of(self, total: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            Self::Part(part) => {
                let product = u128::from(part) * u128::from(total);
                let amount = (product >> 64) as u64 + u64::from(product as u64 > 0);
                if amount > 1 { amount } else { 1 }
            }
        }
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

impl Collected {
    /// Collects a token where there is room for it.
    #[inline(always)]
    fn push(&mut self, id: u32, logit: f32) -> bool {
        let has_room = self.len < SLOTS;
        if has_room {
            let at = self.len * BLOCK_DIM + thread_idx_x() as usize;
            self.logits.set(at, logit);
            self.rows.set(at, (id / BLOCK_DIM as u32) as u16);
            self.len += 1;
        }
        has_room
    }
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

    /// The sum of four bins.
    #[inline(always)]
    fn quad(self, bin: usize) -> u64 {
        let (low, high) = (self.low.get4(bin), self.high.get4(bin));
        (0..4).map(|i| u64::from(high[i]) << 32 | u64::from(low[i])).sum()
    }

    /// The bin at which the running total of the bins reaches what is wanted; the same in all threads. All of them must
    /// call this. The bins may be set again afterwards.
    #[inline(always)]
    fn seek(self, wanted: Wanted) -> Found {
        sync_threads();
        if thread_idx_x() < WARP_SIZE {
            let lane = thread_idx_x() as usize;
            let mut sum = 0u64;
            // Each lane begins elsewhere in its group: four banks further on than its neighbour. The compiler does not
            // see how often this loop runs, and so does not make it long.
            let mut i = lane % 8;
            loop {
                sum += self.quad(lane * GROUP + 4 * i) + self.quad(lane * GROUP + 4 * i + GROUP / 2);
                i = (i + 1) % 8;
                if i == lane % 8 {
                    break;
                }
            }
            let through = running_total(sum);
            let total = from_lane(through, WARP_SIZE - 1);
            let wanted = wanted.of(total);
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

/// What the sums are for. The stages are rounds of one loop, so that the code is short: a GPU has to fetch all of it
/// for this one block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Selects the bound of what is collected, from the threads' maxima.
    Bound,
    /// Collects, and sums all weights up.
    Collect,
    /// Selects the lowest rank that top-k keeps.
    TopK,
    /// Selects the lowest rank that top-p keeps.
    TopP,
    /// Chooses the thread whose token is chosen.
    Thread,
    /// Chooses the thread's token.
    Token,
}

/// The selection of the lowest rank of the fewest most likely tokens whose measures add up to what is wanted.
#[derive(Clone, Copy)]
struct Selection {
    /// The place of the digit that is sought.
    shift: u32,
    /// The digits that are known, and their bits.
    known: u64,
    mask: u64,
}

impl Selection {
    /// The shift at which no bit of the logit is left. The digit has one bit of the inverted id, which is always 1.
    const LOGIT_IS_KNOWN: u32 = 64 - 3 * DIGIT_BITS;

    #[inline(always)]
    fn new() -> Self {
        Self { shift: 64 - DIGIT_BITS, known: 0, mask: 0 }
    }

    /// The bin of a rank that begins with the known digits: the highest digit has the first.
    #[inline(always)]
    fn bin(self, rank: u64) -> usize {
        BINS - 1 - ((rank >> self.shift) as usize & (BINS - 1))
    }

    /// Adds the digit that was found. Gives what is wanted of its bin; None where that is all.
    #[inline(always)]
    fn advance(&mut self, found: Found, measure: Measure) -> Option<Wanted> {
        self.known |= ((BINS - 1 - found.bin) as u64) << self.shift;
        self.mask |= u64::MAX << self.shift;
        let left = found.wanted - found.before;
        // Of equal logits each adds the same, so that the last one may be needed to reach what is wanted.
        let is_tie = self.shift == Self::LOGIT_IS_KNOWN;
        let last = if is_tie { u64::from(measure.of(logit_of(self.known))) } else { 1 };
        if left + last > found.amount || self.shift == 0 {
            return None;
        }
        // The last digit overlaps the one before, which changes nothing: those bits are the same in all tokens left.
        self.shift = self.shift.saturating_sub(DIGIT_BITS);
        Some(Wanted::Amount(left))
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
/// The pointers are to device memory of the sizes below. `n_vocab` is from 1 to [`MAX_VOCAB`].
///
/// # Parameters
/// - `logits`: `[n_vocab]`
/// - `parameters`: `[1]`
/// - `chosen`: `[n_places]`, which may lie in host memory that the device writes to
/// - `step`: `[1]`; its position is that of the token whose logits these are
///
/// # Thread mapping
/// One block of [`BLOCK_DIM`] threads; a thread takes every `BLOCK_DIM`-th token. Bytes moved: 4 n_vocab per pass:
/// one if greedy, two otherwise. Where top-k is above 352, top-p keeps more than about as many, or six of the most
/// likely tokens fall to one thread, the selection makes up to twelve more. A thread must do with 64 registers.
#[kernel(overlapping, launch_bounds(1024, 1))]
pub unsafe fn sample(
    logits: *const f32,
    n_vocab: u32,
    parameters: *const SamplingParameters,
    step: *mut Step,
    chosen: *mut u32,
    n_places: u32,
) {
    let_next_start();
    wait_for_previous();
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
    // SAFETY: one of each; the step is written after the last barrier.
    let (inverse_temp, top_k, top_p) =
        unsafe { ((*parameters).inverse_temp, (*parameters).top_k, (*parameters).top_p) };
    // Read where they are needed, which saves registers.
    // SAFETY: as above.
    let random = || Wanted::Part(unsafe { random_bits((*parameters).seed, (*step).position) });

    let (mut best, mut best_id) = (f32::NEG_INFINITY, i32::MAX as u32);
    vocabulary.for_each(|id, logit| {
        if logit > best {
            (best, best_id) = (logit, id);
        }
    });
    let top = block_max(best, maxima);
    let top_id = block_min_index(if best == top { best_id } else { i32::MAX as u32 }, indices);

    let mut token = if top_id < n_vocab { top_id } else { NO_TOKEN };
    // Every condition is the same in all threads.
    if token != NO_TOKEN && inverse_temp > 0.0 && top < f32::INFINITY {
        let scale = inverse_temp * LOG2_E;
        let scale = if scale < f32::MAX { scale } else { f32::MAX };
        let top_k = if top_k < n_vocab { top_k } else { 0 };
        let part = || Wanted::Part((top_p * TWO_TO_64) as u64);
        let keeps_all = top_k == 0 && top_p >= 1.0;

        let mut of_collected = !keeps_all && top_k <= COLLECTED;
        let (mut stage, mut wanted) = if keeps_all {
            (Stage::Thread, random())
        } else if of_collected {
            let bounding = if top_k > 0 { top_k } else { COLLECTED };
            (Stage::Bound, Wanted::Amount(bounding.into()))
        } else {
            (Stage::TopK, Wanted::Amount(top_k.into()))
        };
        // For Bound. Barriers follow before there is more to collect.
        collected.push(best_id, best);
        overflow.set(0, 0);
        let mut selection = Selection::new();
        // Ranks below are not kept, or not collected.
        let mut lowest = USABLE;
        // The thread that Stage::Thread finds.
        let mut column = 0;
        token = loop {
            let measure = Measure { top, scale, count: matches!(stage, Stage::Bound | Stage::TopK) };
            match stage {
                Stage::Bound | Stage::TopK | Stage::TopP => {
                    sums.clear();
                    sync_threads();
                    let add = |id, logit| {
                        let rank = rank(id, logit);
                        if rank >= lowest && rank & selection.mask == selection.known {
                            sums.add(selection.bin(rank), measure.of(logit));
                        }
                    };
                    if of_collected {
                        collected.for_each(add);
                    } else {
                        vocabulary.for_each(add);
                    }
                }
                Stage::Collect => {
                    collected.len = 0;
                    let mut mass = 0;
                    vocabulary.for_each(|id, logit| {
                        if rank(id, logit) >= lowest && !collected.push(id, logit) {
                            overflow.set(0, 1);
                        }
                        if top_k == 0 {
                            mass += u64::from(measure.of(logit));
                        }
                    });
                    sums.set(mass);
                }
                Stage::Thread => {
                    let mut mass = 0;
                    let add = |id, logit| {
                        // Where all are kept the weight says it, which is 0 for unusable ones.
                        if keeps_all || rank(id, logit) >= lowest {
                            mass += u64::from(measure.of(logit));
                        }
                    };
                    if of_collected {
                        collected.for_each(add);
                    } else {
                        vocabulary.for_each(add);
                    }
                    sums.set(mass);
                }
                Stage::Token => {
                    let id = thread * BLOCK_DIM as u32 + column;
                    let logit = vocabulary.logit(id);
                    sums.set(if rank(id, logit) >= lowest { measure.of(logit).into() } else { 0 });
                }
            }

            let found = sums.seek(wanted);

            match stage {
                Stage::Bound | Stage::TopK | Stage::TopP => {
                    if found.bin < BINS {
                        if let Some(left) = selection.advance(found, measure) {
                            wanted = left;
                            continue;
                        }
                        lowest = if selection.known > lowest { selection.known } else { lowest };
                    } else if stage == Stage::TopP {
                        // What was collected is less than the part of all: the same again, from all.
                        of_collected = false;
                        selection = Selection::new();
                        continue;
                    }
                    // Where there are no more than what top-k or the bound wants, all are kept.
                    selection = Selection::new();
                    (stage, wanted) = match stage {
                        Stage::Bound => (Stage::Collect, Wanted::Amount(u64::MAX)),
                        Stage::TopK if top_p < 1.0 => (Stage::TopP, part()),
                        _ => (Stage::Thread, random()),
                    };
                }
                Stage::Collect => {
                    lowest = USABLE;
                    of_collected = overflow.get(0) == 0;
                    (stage, wanted) = if top_k > 0 {
                        (Stage::TopK, Wanted::Amount(top_k.into()))
                    } else {
                        (Stage::TopP, Wanted::Amount(part().of(found.total)))
                    };
                }
                Stage::Thread => {
                    column = found.bin as u32;
                    (stage, wanted) = (Stage::Token, Wanted::Amount(found.wanted - found.before));
                }
                Stage::Token => break found.bin as u32 * BLOCK_DIM as u32 + column,
            }
        };
    }
    if thread == 0 {
        let next = if token == NO_TOKEN { 0 } else { token };
        // SAFETY: one element each, written by one thread.
        unsafe {
            let position = (*step).position;
            *chosen.add((position % n_places) as usize) = token;
            *step = Step { token: next, position: position + 1 };
        }
    }
}
