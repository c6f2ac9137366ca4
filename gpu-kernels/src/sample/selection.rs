//! The choice from many tokens, by radix selection.
//!
//! The digits of the tokens' ranks, the highest first, are counted in a histogram (for top-p their weights are summed
//! up), and the digit at which the count reaches what is wanted is that of the lowest rank that is kept. Each digit takes
//! a pass over the logits.

use super::groups::Pass;
use super::likelihood::{Measure, USABLE, Wanted, logit_of, rank};
use super::{BLOCK_DIM, COLUMNS};
use cuda_std::shared::Shared;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_idx, warp_shuffle_up, warp_vote_ballot};

/// Bits of a rank that a round of the selection decides, and the histogram's size.
const DIGIT_BITS: u32 = 11;
pub(super) const BINS: usize = 1 << DIGIT_BITS;
/// Bins that a lane adds up.
const GROUP: usize = BINS / WARP_SIZE as usize;
const _: () = assert!(GROUP == 2 * 8 * 4 && BINS == 8 * BLOCK_DIM && BINS >= COLUMNS);

/// [`BINS`] sums of 64 bits that the block has in common, as two words: GPUs add atomically to words only.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) low: Shared<u32, BINS>,
    pub(super) high: Shared<u32, BINS>,
    pub(super) found: Shared<u64, 4>,
}

/// Where a running total reaches what is wanted.
#[derive(Clone, Copy)]
struct Found {
    /// The bin in which it does; [`BINS`] where all together are less.
    bin: usize,
    /// The total before that bin, and what is in it.
    before: u64,
    amount: u64,
    /// What was wanted.
    wanted: u64,
}

impl Sums {
    /// Sets the thread's bins to 0.
    #[inline(always)]
    fn clear(self) {
        let first = 4 * thread_idx_x() as usize;
        self.low.set4(first, [0; 4]);
        self.low.set4(BINS / 2 + first, [0; 4]);
        self.high.set4(first, [0; 4]);
        self.high.set4(BINS / 2 + first, [0; 4]);
    }

    /// Sets four bins of the thread's number.
    #[inline(always)]
    fn set(self, amounts: [u64; 4]) {
        let first = 4 * thread_idx_x() as usize;
        self.low.set4(first, amounts.map(|amount| amount as u32));
        self.high.set4(first, amounts.map(|amount| (amount >> 32) as u32));
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
                self.found.set(3, wanted);
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
            wanted: self.found.get(3),
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

/// What the sums are for. The stages are rounds of one loop, so that the code is short: a GPU has to fetch all of it
/// for this one block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Selects the lowest rank that top-k keeps.
    TopK,
    /// Selects the lowest rank that top-p keeps.
    TopP,
    /// Chooses the column of the token that is chosen.
    Column,
    /// Chooses the column's token.
    Row,
}

/// The token that is chosen, the same in all threads; all of them must call this.
///
/// Kept are the `top_k` most likely of the pass (0: all), of these as many as add up to `part` of them all; `random` says
/// which of them it is.
#[inline(always)]
pub(super) fn select(
    pass: Pass,
    sums: Sums,
    top: f32,
    scale: f32,
    top_k: u32,
    part: Option<Wanted>,
    random: Wanted,
) -> u32 {
    let after_top_k = match part {
        Some(part) => (Stage::TopP, part),
        None => (Stage::Column, random),
    };
    let (mut stage, mut wanted) =
        if top_k > 0 { (Stage::TopK, Wanted::Amount(top_k.into())) } else { after_top_k };
    let mut selection = Selection::new();
    // Ranks below are not kept.
    let mut lowest = USABLE;
    // What Stage::Column finds.
    let mut column = 0;
    loop {
        let measure = Measure { top, scale, count: stage == Stage::TopK };
        sums.clear();
        sync_threads();
        if stage == Stage::Row {
            let row = 4 * thread_idx_x();
            let weight = |row: u32| {
                let id = row * COLUMNS as u32 + column;
                let logit = pass.vocabulary.logit(id);
                if rank(id, logit) >= lowest { measure.of(logit).into() } else { 0 }
            };
            sums.set([weight(row), weight(row + 1), weight(row + 2), weight(row + 3)]);
        } else {
            // Where all are gone through, the columns of the thread's tokens are its own.
            let has_columns = stage == Stage::Column && pass.n_listed.is_none();
            let (mut mass0, mut mass1, mut mass2, mut mass3) = (0, 0, 0, 0);
            pass.for_each(|first, [l0, l1, l2, l3]| {
                let add = |id: u32, logit: f32, mass: &mut u64| {
                    let rank = rank(id, logit);
                    if rank >= lowest && rank & selection.mask == selection.known {
                        let amount = measure.of(logit);
                        if has_columns {
                            *mass += u64::from(amount);
                        } else if stage == Stage::Column {
                            sums.add(id as usize % COLUMNS, amount);
                        } else {
                            sums.add(selection.bin(rank), amount);
                        }
                    }
                };
                add(first, l0, &mut mass0);
                add(first + 1, l1, &mut mass1);
                add(first + 2, l2, &mut mass2);
                add(first + 3, l3, &mut mass3);
            });
            if has_columns {
                sums.set([mass0, mass1, mass2, mass3]);
            }
        }

        let found = sums.seek(wanted);

        match stage {
            Stage::TopK | Stage::TopP => {
                // Where there are no more than top-k wants, all are kept.
                if found.bin < BINS {
                    if let Some(left) = selection.advance(found, measure) {
                        wanted = left;
                        continue;
                    }
                    lowest = if selection.known > lowest { selection.known } else { lowest };
                }
                selection = Selection::new();
                (stage, wanted) = if stage == Stage::TopK { after_top_k } else { (Stage::Column, random) };
            }
            Stage::Column => {
                column = found.bin as u32;
                (stage, wanted) = (Stage::Row, Wanted::Amount(found.wanted - found.before));
            }
            Stage::Row => return found.bin as u32 * COLUMNS as u32 + column,
        }
    }
}
