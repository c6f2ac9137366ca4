//! The vector that a matrix is multiplied with.

use crate::activations::Q8_1Scale;
use crate::formats::UNIT;
use cuda_std::memory::ld_global_u32x4;
use cuda_std::thread::thread_idx_x;

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

    /// This thread's part of the sum of the squares, of `n_threads` threads.
    ///
    /// # Safety
    /// The sums must be as the fields say.
    #[inline(always)]
    pub unsafe fn squares(&self, n_threads: u32) -> f32 {
        let mut sum = 0.0;
        let mut first = 4 * thread_idx_x();
        while first < self.n_squares {
            // SAFETY: the caller's promise; the sums are filled up to a multiple of four.
            let [a, b, c, d] =
                unsafe { ld_global_u32x4(self.squares.add(first as usize).cast()) }.map(f32::from_bits);
            let keep = |i: u32, square: f32| if first + i < self.n_squares { square } else { 0.0 };
            sum += (a + keep(1, b)) + (keep(2, c) + keep(3, d));
            first += 4 * n_threads;
        }
        sum
    }
}
