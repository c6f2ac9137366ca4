//! Tokens by likelihood: their order, their weights, and what is wanted of a sum of weights.

use cuda_std::float::{exp2, from_order_key, order_key};

/// The lowest rank of a token that can be chosen: the one that follows all of -inf's.
pub(super) const USABLE: u64 = (!f32::NEG_INFINITY.to_bits() as u64 + 1) << 32;

/// A token's place in the order of likelihood: higher for a larger logit, among equals for a lower id. Below
/// [`USABLE`] for NaN and -inf.
#[inline(always)]
pub(super) fn rank(id: u32, logit: f32) -> u64 {
    // -0 becomes 0.
    let key = if logit > f32::NEG_INFINITY { order_key(logit + 0.0) } else { 0 };
    u64::from(key) << 32 | u64::from(!id)
}

/// The logit of a token of this rank.
#[inline(always)]
pub(super) fn logit_of(rank: u64) -> f32 {
    from_order_key((rank >> 32) as u32)
}

/// The token of this rank.
#[inline(always)]
pub(super) fn id_of(rank: u64) -> u32 {
    !(rank as u32)
}

/// The most likely of some tokens, which are looked at in the order of their ids.
#[derive(Clone, Copy)]
pub(crate) struct Best {
    id: u32,
    logit: f32,
}

impl Best {
    /// Of none.
    pub(crate) const NONE: Self = Self { id: u32::MAX, logit: f32::NEG_INFINITY };

    /// Of four more tokens, from `first` on.
    #[inline(always)]
    pub(crate) fn or_of_4(self, first: u32, [l0, l1, l2, l3]: [f32; 4]) -> Self {
        let or = |best: Self, id: u32, logit: f32| if logit > best.logit { Self { id, logit } } else { best };
        or(or(or(or(self, first, l0), first + 1, l1), first + 2, l2), first + 3, l3)
    }

    /// Its rank; below [`USABLE`] where no token can be chosen.
    #[inline(always)]
    pub(crate) fn rank(self) -> u64 {
        rank(self.id, self.logit)
    }
}

/// What a token adds to a sum.
#[derive(Clone, Copy)]
pub(super) struct Measure {
    /// The largest logit.
    pub(super) top: f32,
    /// What a difference of logits is multiplied with to become a power of two.
    pub(super) scale: f32,
    /// Whether each token counts as 1 instead.
    pub(super) count: bool,
}

impl Measure {
    /// `exp((logit - top) / temperature)` in units of 2^-31, rounded; 0 for NaN and -inf.
    #[inline(always)]
    pub(super) fn of(self, logit: f32) -> u32 {
        const ONE: f32 = (1u32 << 31) as f32;
        if self.count { 1 } else { (exp2((logit - self.top) * self.scale) * ONE + 0.5) as u32 }
    }
}

/// How much is wanted of a sum.
#[derive(Clone, Copy)]
pub(super) enum Wanted {
    Amount(u64),
    /// A part of all there is, in units of 2^-64; rounded up, and at least 1.
    Part(u64),
}

impl Wanted {
    #[inline(always)]
    pub(super) fn of(self, total: u64) -> u64 {
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
pub(super) fn random_bits(seed: u64, position: u32) -> u64 {
    let z = seed.wrapping_add((u64::from(position) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
