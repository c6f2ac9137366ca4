//! The choice from few tokens: each is compared with every other, and that says where it is in any order.

use super::likelihood::{Wanted, id_of};
use super::{BLOCK_DIM, COLUMNS};
use cuda_std::shared::Shared;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor_n};

/// Tokens that there is room for: one for each thread.
pub(super) const ROOM: usize = BLOCK_DIM;

/// A token as a term of a sum: the number of terms is above the sum of their weights.
const ONE: u64 = 1 << 48;
const _: () = assert!((ROOM as u64) << 31 < ONE && (ROOM as u64) < 1 << 16);

/// Some of the most likely tokens, in any order.
#[derive(Clone, Copy)]
pub(super) struct Few {
    pub(super) ranks: Shared<u64, ROOM>,
    pub(super) weights: Shared<u32, ROOM>,
    /// Places in the order in which tokens are chosen.
    pub(super) orders: Shared<u32, ROOM>,
    /// How many there are, or would be if there were room.
    pub(super) len: Shared<u32, 1>,
    /// The weights of the tokens that top-k keeps, and of those that are left of them.
    pub(super) totals: Shared<u64, 2>,
}

impl Few {
    /// Adds a token where there is room for it.
    #[inline(always)]
    pub(super) fn push(self, rank: u64, weight: u32) {
        let at = self.len.atomic_add(0, 1) as usize;
        if at < ROOM {
            self.ranks.set(at, rank);
            self.weights.set(at, weight);
        }
    }

    /// Calls `choose` with the token in one thread, where it can be told from these tokens. All threads must call this
    /// once every token has been added and a barrier has followed; all get whether there is a choice.
    ///
    /// Kept are the `top_k` most likely (0: all), of these as many as add up to `part` of `mass`, or of what top-k keeps
    /// where that is None; `random` says which of them it is.
    #[inline(always)]
    pub(super) fn choose(
        self,
        top_k: u32,
        part: Option<Wanted>,
        mass: Option<u64>,
        random: Wanted,
        choose: impl FnOnce(u32),
    ) -> bool {
        let n = self.len.get(0);
        if n > ROOM as u32 {
            return false;
        }
        // So many lanes share a token's comparisons, a power of two.
        let log2_n = u32::BITS - (n - 1).leading_zeros();
        let log2_lanes = (BLOCK_DIM.ilog2() - log2_n).min(WARP_SIZE.ilog2());
        let lanes = 1 << log2_lanes;
        let (own, lane) = (thread_idx_x() >> log2_lanes, thread_idx_x() & (lanes - 1));
        let is_there = own < n;
        let own = if is_there { own as usize } else { 0 };

        let (rank, weight) = (self.ranks.get(own), self.weights.get(own));
        let above = sum(lane, lanes, n, |i| {
            if self.ranks.get(i) > rank { ONE + u64::from(self.weights.get(i)) } else { 0 }
        });
        let (place, before) = ((above / ONE) as u32, above % ONE);
        let end = if top_k > 0 && top_k < n { top_k } else { n };
        let through = before + u64::from(weight);
        let is_first = is_there && lane == 0;
        if is_first && place == end - 1 {
            self.totals.set(0, through);
        }
        sync_threads();

        let available = self.totals.get(0);
        let wanted = match part {
            Some(part) => part.of(mass.unwrap_or(available)),
            None => available,
        };
        if wanted > available {
            return false;
        }
        let weight = if place < end && before < wanted { weight } else { 0 };
        let id = id_of(rank);
        let order = id % COLUMNS as u32 * COLUMNS as u32 + id / COLUMNS as u32;
        if is_first {
            self.orders.set(own, order);
            self.weights.set(own, weight);
            if weight > 0 && wanted <= through {
                self.totals.set(1, through);
            }
        }
        sync_threads();

        let wanted = random.of(self.totals.get(1));
        let before =
            sum(lane, lanes, n, |i| if self.orders.get(i) < order { self.weights.get(i).into() } else { 0 });
        if is_first && before < wanted && wanted <= before + u64::from(weight) {
            choose(id);
        }
        true
    }
}

/// The sum of the terms of tokens 0 to `n - 1`, which neighbouring lanes share.
#[inline(always)]
fn sum(lane: u32, lanes: u32, n: u32, term: impl Fn(usize) -> u64) -> u64 {
    let mut sum = 0;
    let mut i = lane;
    while i < n {
        sum += term(i as usize);
        i += lanes;
    }
    lanes_sum(sum, lanes)
}

/// The sum over groups of `lanes` lanes.
#[inline(always)]
pub(super) fn lanes_sum(value: u64, lanes: u32) -> u64 {
    let mut sum = value;
    let mut distance = lanes / 2;
    while distance > 0 {
        let [low, high] = warp_shuffle_xor_n(FULL_MASK, [sum as u32, (sum >> 32) as u32], distance);
        sum += u64::from(high) << 32 | u64::from(low);
        distance /= 2;
    }
    sum
}
