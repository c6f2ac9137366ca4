//! The vector that a matrix is multiplied with.

use crate::activations::Q8_1Scale;
use crate::formats::UNIT;
use cuda_std::float::{mul_add, rsqrt};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, warp_reduce_add};

/// A vector, as a launch passes it: an [operand](crate::operand), Q8_1, or f32 values.
///
/// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. The vector is `x * gamma`; the products get the
/// common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the integers that Q8_1 of the
/// normalised vector has.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// An operand's words; null where the vector is something else.
    pub words: *const u32,
    /// Of Q8_1 `[n.div_ceil(32) * 8]` words of four integers.
    pub quants: *const u32,
    /// Of Q8_1 `[n.div_ceil(32)]`.
    pub scales: *const Q8_1Scale,
    /// On the exact path `[n]`, at a multiple of 16 bytes and readable up to one.
    pub values: *const f32,
    /// On the exact path `[n]` likewise, the factors of RMSNorm; null where nothing is normalised.
    pub gamma: *const f32,
    /// `[n_squares]`, at a multiple of 16 bytes and readable up to one: they add up to the sum of the squares of the vector that
    /// is to be normalised.
    pub squares: *const f32,
    /// How many there are: none where nothing is normalised.
    pub n_squares: u32,
    /// The number of values.
    pub n: u32,
    /// `1 / n`.
    pub per_n: f32,
    /// What RMSNorm adds to the mean square.
    pub eps: f32,
}

impl Input {
    /// Units of 32 values, the last one filled up.
    #[inline(always)]
    pub fn n_units(&self) -> u32 {
        self.n.div_ceil(UNIT as u32)
    }

    /// Whether the products are of the normalised vector.
    #[inline(always)]
    pub fn is_normalised(&self) -> bool {
        self.n_squares > 0
    }

    /// What RMSNorm multiplies the products with, 1 where nothing is normalised. The lanes of a warp make this call together.
    ///
    /// # Safety
    /// The sums must be as the fields say.
    #[inline(always)]
    pub unsafe fn norm_factor(&self) -> f32 {
        if !self.is_normalised() {
            return 1.0;
        }
        let mut sum = 0.0;
        let mut first = 4 * lane_id();
        while first - 4 * lane_id() < self.n_squares {
            let four = |i: u32| {
                let first = first + i * 4 * WARP_SIZE;
                let last = (self.n_squares - 1) / 4 * 4;
                // SAFETY: the caller's promise; the sums are filled up to a multiple of four.
                let [a, b, c, d] =
                    unsafe { ld_global_u32x4(self.squares.add(first.min(last) as usize).cast()) }
                        .map(f32::from_bits);
                let keep = |i: u32, square: f32| if first + i < self.n_squares { square } else { 0.0 };
                ((keep(0, a) + keep(1, b)) + keep(2, c)) + keep(3, d)
            };
            // On their way at once.
            let (a, b, c, d) = (four(0), four(1), four(2), four(3));
            sum += (a + b) + (c + d);
            first += 16 * WARP_SIZE;
        }
        let sum = warp_reduce_add(FULL_MASK, sum, WARP_SIZE);
        rsqrt(mul_add(sum, self.per_n, self.eps))
    }
}
