//! The logits in groups: the largest of each, which groups have some of the largest of all, and passes over these.

use super::likelihood::Best;
use super::{BLOCK_DIM, WARPS};
use crate::gemv::Shares;
use cuda_std::memory::{ld_global_u32, ld_global_u32x4};
use cuda_std::shared::Shared;
use cuda_std::thread::thread_idx_x;
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, warp_max_u32, warp_shuffle_idx, warp_shuffle_up, warp_vote_ballot,
};

/// Logits that a warp reads at once: 16 bytes for each lane.
pub const CHUNK: usize = 4 * WARP_SIZE as usize;

/// Most groups: eight for each thread of the block that looks at their largest ranks.
pub const MAX_GROUPS: usize = 8 * BLOCK_DIM;

/// How often a warp asks for a quad for each lane before it needs the first ones, in a pass.
const AHEAD: u32 = 6;

/// How the logits are dealt out in groups that follow each other, and the largest rank of each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Groups {
    /// The largest rank of each: `[shares.blocks]`, with room for an even number of them, at a multiple of 16 bytes.
    pub largest: *mut u64,
    /// The groups are blocks, at most [`MAX_GROUPS`], and have strips of `strip_quads` quads of four logits.
    pub shares: Shares,
    /// See there.
    pub strip_quads: u32,
    /// A warp goes through a group `1 << shift` times, a quad for each lane.
    pub shift: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: a pointer and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Groups {}

impl Groups {
    /// How many there are.
    #[inline(always)]
    pub(super) fn len(self) -> u32 {
        self.shares.blocks
    }

    /// The first token of quad `lane` of those that a warp takes at once, the `turn`th time of a group; beyond all vocabularies where
    /// the group has no such quad.
    #[inline(always)]
    fn token(self, group: u32, turn: u32, lane: u32) -> u32 {
        let quad = turn * WARP_SIZE + lane;
        let first = self.shares.first(group) * self.strip_quads;
        if quad < self.shares.of(group) * self.strip_quads { 4 * (first + quad) } else { BEYOND }
    }
}

/// No token has this number, nor one of those after it.
const BEYOND: u32 = 1 << 31;
const _: () = assert!(super::MAX_VOCAB <= BEYOND as usize);

/// All logits.
#[derive(Clone, Copy)]
pub(super) struct Vocabulary {
    pub(super) logits: *const f32,
    pub(super) n: u32,
    pub(super) groups: Groups,
}

impl Vocabulary {
    /// The logit of a token, -inf beyond the vocabulary.
    #[inline(always)]
    pub(super) fn logit(self, id: u32) -> f32 {
        if id < self.n {
            // SAFETY: there are n logits, which the kernel's caller vouches for.
            f32::from_bits(unsafe { ld_global_u32(self.logits.add(id as usize).cast()) })
        } else {
            f32::NEG_INFINITY
        }
    }

    /// The logits of four tokens from a multiple of four on, as far as [`checked`](Self::checked) leaves them as they are.
    /// There is no branch, so that a thread can have several on their way.
    #[inline(always)]
    fn quad(self, first: u32) -> [f32; 4] {
        let last = (self.n & !3).saturating_sub(4);
        // SAFETY: as above, at least four of them, at a multiple of 16 bytes.
        unsafe { ld_global_u32x4(self.logits.add(first.min(last) as usize).cast()) }.map(f32::from_bits)
    }

    /// The logits of a [`quad`](Self::quad); -inf beyond the vocabulary.
    #[inline(always)]
    fn checked(self, first: u32, quad: [f32; 4]) -> [f32; 4] {
        let whole = self.n & !3;
        if first < whole {
            quad
        } else if first == whole {
            [self.logit(first), self.logit(first + 1), self.logit(first + 2), f32::NEG_INFINITY]
        } else {
            [f32::NEG_INFINITY; 4]
        }
    }

    /// The largest rank of a group, the same in all lanes of the warp; 0 where no token can be chosen.
    #[inline(always)]
    pub(super) fn largest_of(self, group: u32) -> u64 {
        let lane = thread_idx_x() % WARP_SIZE;
        let mut best = Best::NONE;
        let mut turn = 0;
        while turn < 1 << self.groups.shift {
            let first = self.groups.token(group, turn, lane);
            best = best.or_of_4(first, self.checked(first, self.quad(first)));
            turn += 1;
        }
        warp_largest(best.rank())
    }
}

/// The largest rank of a warp's.
#[inline(always)]
pub(crate) fn warp_largest(rank: u64) -> u64 {
    let key = (rank >> 32) as u32;
    let largest = warp_max_u32(key);
    let low = warp_max_u32(if key == largest { rank as u32 } else { 0 });
    u64::from(largest) << 32 | u64::from(low)
}

/// Which logits a block goes through together: those of some groups, or all.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    pub(super) vocabulary: Vocabulary,
    pub(super) list: Shared<u16, MAX_GROUPS>,
    /// Groups in the list; None for all there are.
    pub(super) n_listed: Option<u32>,
}

impl Pass {
    /// Gives neighbouring tokens, four at a time, to `f`: the first one's id and their logits, -inf beyond the
    /// vocabulary. Where all are gone through, a thread gets those whose ids modulo 1024 are from four times its number
    /// on.
    #[inline(always)]
    pub(super) fn for_each(self, mut f: impl FnMut(u32, [f32; 4])) {
        const { assert!(WARPS * CHUNK == super::COLUMNS) };
        const BESIDE: u32 = WARPS as u32;
        let (warp, lane) = (thread_idx_x() / WARP_SIZE, thread_idx_x() % WARP_SIZE);
        let Vocabulary { n, groups, .. } = self.vocabulary;
        let n_chunks = match self.n_listed {
            Some(n_listed) => n_listed << groups.shift,
            None => n.div_ceil(CHUNK as u32),
        };
        // The first token of the lane's part of a chunk, which may be beyond the last.
        let first = |i: u32| {
            if self.n_listed.is_some() {
                let i = i.min(n_chunks - 1);
                let group = u32::from(self.list.get((i >> groups.shift) as usize));
                groups.token(group, i & ((1 << groups.shift) - 1), lane)
            } else {
                i * CHUNK as u32 + 4 * lane
            }
        };
        let fetch = |i: u32| self.vocabulary.quad(first(i));
        let next = |i: u32| fetch(warp + i * BESIDE);
        let mut queue = [next(0), next(1), next(2), next(3), next(4), next(5)];
        let mut i = warp;
        while i < n_chunks {
            let [quad, q1, q2, q3, q4, q5] = queue;
            queue = [q1, q2, q3, q4, q5, fetch(i + AHEAD * BESIDE)];
            let id = first(i);
            f(id, self.vocabulary.checked(id, quad));
            i += BESIDE;
        }
    }
}

/// How many groups' largest logits are how far below the largest of all: a histogram with 128 bins for each doubling of
/// the distance, from an eighth to 32.
#[derive(Clone, Copy)]
pub(super) struct Distances(pub(super) Shared<u32, { Distances::BINS }>);

impl Distances {
    pub(super) const BINS: usize = 4 * BLOCK_DIM;
    /// The bits of an f32 that tell bins apart are those above the lowest 16; these are an eighth's.
    const FIRST: u32 = 0.125f32.to_bits() >> 16;

    /// Sets the thread's bins to 0.
    #[inline(always)]
    pub(super) fn clear(self) {
        self.0.set4(4 * thread_idx_x() as usize, [0; 4]);
    }

    /// Counts a distance. NaN and infinity are in the last bin.
    #[inline(always)]
    pub(super) fn count(self, distance: f32) {
        let bin = (distance.to_bits() >> 16).saturating_sub(Self::FIRST).min(Self::BINS as u32 - 1);
        self.0.atomic_add(bin as usize, 1);
    }

    /// A distance below which at least so many lie, and not many more; infinity where there are none, or some are too
    /// far away. All lanes of the warp must call this.
    #[inline(always)]
    pub(super) fn limit(self, wanted: u32) -> f32 {
        const PER_LANE: usize = Distances::BINS / WARP_SIZE as usize;
        const { assert!(PER_LANE == WARP_SIZE as usize) };
        let lane = (thread_idx_x() % WARP_SIZE) as usize;
        let mut sum = 0;
        // Each lane begins elsewhere in its bins: four banks further on than its neighbour.
        for i in 0..8 {
            let [a, b, c, d] = self.0.get4(lane * PER_LANE + 4 * ((lane + i) % 8));
            sum += a + b + c + d;
        }
        let through = running_total(sum);
        let group = warp_vote_ballot(FULL_MASK, through >= wanted).trailing_zeros();
        if group == WARP_SIZE {
            return f32::INFINITY;
        }
        let before = warp_shuffle_idx(FULL_MASK, through - sum, group, WARP_SIZE);
        let through = before + running_total(self.0.get(group as usize * PER_LANE + lane));
        let bin = group * WARP_SIZE + warp_vote_ballot(FULL_MASK, through >= wanted).trailing_zeros();
        if bin + 1 < Self::BINS as u32 {
            f32::from_bits((bin + 1 + Self::FIRST) << 16)
        } else {
            f32::INFINITY
        }
    }
}

/// The sum of the values of all lanes up to this one (Hillis and Steele, 1986).
#[inline(always)]
fn running_total(value: u32) -> u32 {
    let mut total = value;
    let mut distance = 1;
    while distance < WARP_SIZE {
        let other = warp_shuffle_up(FULL_MASK, total, distance, WARP_SIZE);
        if thread_idx_x() % WARP_SIZE >= distance {
            total += other;
        }
        distance *= 2;
    }
    total
}
