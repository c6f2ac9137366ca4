//! The logits in groups: the largest of each, which groups have some of the largest of all, and passes over these.

use super::likelihood::rank;
use super::{BLOCK_DIM, WARPS};
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

/// Chunks that a warp has on their way in a pass.
const AHEAD: u32 = 6;

/// All logits. A group is `1 << group_shift` chunks that follow each other.
#[derive(Clone, Copy)]
pub(super) struct Vocabulary {
    pub(super) logits: *const f32,
    pub(super) n: u32,
    pub(super) group_shift: u32,
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
        let (mut best, mut best_id) = (f32::NEG_INFINITY, u32::MAX);
        let mut chunk = group << self.group_shift;
        let end = chunk + (1 << self.group_shift);
        while chunk < end {
            let first = chunk * CHUNK as u32 + 4 * lane;
            let [l0, l1, l2, l3] = self.checked(first, self.quad(first));
            let mut compare = |id, logit| {
                if logit > best {
                    (best, best_id) = (logit, id);
                }
            };
            compare(first, l0);
            compare(first + 1, l1);
            compare(first + 2, l2);
            compare(first + 3, l3);
            chunk += 1;
        }
        warp_largest(rank(best_id, best))
    }
}

/// The largest rank of a warp's.
#[inline(always)]
pub(super) fn warp_largest(rank: u64) -> u64 {
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
        let Vocabulary { n, group_shift, .. } = self.vocabulary;
        let n_chunks = match self.n_listed {
            Some(n_listed) => n_listed << group_shift,
            None => n.div_ceil(CHUNK as u32),
        };
        // The first token of the lane's part of a chunk, which may be beyond the last.
        let first = |i: u32| {
            let chunk = if self.n_listed.is_some() {
                let i = i.min(n_chunks - 1);
                let group = u32::from(self.list.get((i >> group_shift) as usize));
                (group << group_shift) + (i & ((1 << group_shift) - 1))
            } else {
                i
            };
            chunk * CHUNK as u32 + 4 * lane
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
