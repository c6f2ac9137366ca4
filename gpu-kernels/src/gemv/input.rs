//! The vector that a matrix is multiplied with, and its way into shared memory.

use super::MAX_WARPS;
use crate::activations::{Activations, OCTET, Q8_1, Q8_1Scale, Quantized};
use crate::formats::tile::TILE_UNITS;
use crate::formats::UNIT;
use cuda_std::float::mul_add;
use cuda_std::memory::ld_global_u32x4;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add};

/// A vector, as a launch passes it: f32 values, to be normalised or not, or Q8_1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// `[n]`, at a multiple of 16 bytes and readable up to one; null where the vector is in Q8_1.
    pub values: *const f32,
    /// `[n]` likewise, the factors of RMSNorm; null where nothing is normalised.
    pub gamma: *const f32,
    /// `[n.div_ceil(32) * 8]` words of four integers.
    pub quants: *const u32,
    /// `[n.div_ceil(32)]`.
    pub scales: *const Q8_1Scale,
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
        !self.gamma.is_null()
    }

    /// Puts the units that meet tiles `first_tile` to `first_tile + n_tiles` into shared memory, zeros beyond the
    /// vector's end; all threads of the block take part. Gives the sum of the squares of what this thread has read where
    /// it normalises. `factors` are those of the first round.
    ///
    /// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. Here `x * gamma` is stored; the
    /// products get the common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the
    /// integers that Q8_1 of the normalised vector has.
    ///
    /// # Safety
    /// The vector must be as the fields say, in device memory, and the tiles' first units inside it; the shared memory
    /// must have room from its start on; with `may_normalise` unset, nothing is to be normalised.
    #[inline(always)]
    pub unsafe fn load<X: Activations>(
        &self,
        memory: DynamicShared<u32>,
        first_tile: u32,
        n_tiles: u32,
        may_normalise: bool,
        factors: Factors,
    ) -> f32 {
        const PARTS: u32 = (UNIT / OCTET) as u32;
        const TILE_OCTETS: u32 = TILE_UNITS as u32 * PARTS;
        let (thread, block_dim) = (thread_idx_x(), block_dim_x());
        let (first_octet, n_octets) = (first_tile * TILE_OCTETS, n_tiles * TILE_OCTETS);
        if self.values.is_null() {
            let mut octet = thread;
            while octet < n_octets {
                let of_vector = first_octet + octet;
                let quantized = if of_vector < self.n_units() * PARTS {
                    // SAFETY: the octet and its block are inside the vector.
                    unsafe {
                        let words = *self.quants.cast::<[u32; 2]>().add(of_vector as usize);
                        Quantized { words, scale: *self.scales.add((of_vector / PARTS) as usize) }
                    }
                } else {
                    Quantized::default()
                };
                Q8_1::store_quantized(memory, octet as usize, quantized);
                octet += block_dim;
            }
            return 0.0;
        }

        // Warps stay whole: the lanes of a unit quantize it together.
        let warp_octet = thread / WARP_SIZE * WARP_SIZE;
        let normalises = may_normalise && self.is_normalised();
        let mut square_sum = 0.0;
        let (mut round, mut factors) = (0, factors);
        while warp_octet + round < n_octets {
            if first_octet + round > 0 {
                // SAFETY: the vector is as the fields say.
                factors = unsafe { self.fetch_factors(first_octet + round, normalises) };
            }
            // SAFETY: the vector is as the fields say.
            let fetch = |i: u32| unsafe {
                let octet = first_octet + round + i * block_dim + thread;
                [self.fetch(2 * octet), self.fetch(2 * octet + 1)]
            };
            let mut store = |i: u32, [low, high]: [[f32; 4]; 2], [low_factors, high_factors]: [[f32; 4]; 2]| {
                let octet = round + i * block_dim + thread;
                if warp_octet + round + i * block_dim < n_octets {
                    let first_word = 2 * (first_octet + octet);
                    let ([a, b, c, d], low) = self.scale(first_word, low, low_factors, normalises);
                    let ([e, f, g, h], high) = self.scale(first_word + 1, high, high_factors, normalises);
                    square_sum += low + high;
                    X::store(memory, n_octets as usize, octet as usize, [a, b, c, d, e, f, g, h]);
                }
            };
            // Both are on their way at once.
            let (first, second) = (fetch(0), fetch(1));
            store(0, first, factors[0]);
            store(1, second, factors[1]);
            round += 2 * block_dim;
        }
        square_sum
    }

    /// The factors of the octets that this thread has in the round that starts with octet `round`.
    ///
    /// # Safety
    /// `gamma` must be as its field says.
    #[inline(always)]
    pub unsafe fn fetch_factors(&self, round: u32, normalises: bool) -> Factors {
        let factors = |octet: u32| {
            if !normalises {
                return [[1.0; 4]; 2];
            }
            let words = [self.place(2 * octet), self.place(2 * octet + 1)];
            // SAFETY: inside gamma, whose memory is a multiple of 16 bytes long.
            words.map(|at| unsafe { ld_global_u32x4(self.gamma.add(at).cast()).map(f32::from_bits) })
        };
        let octet = round + thread_idx_x();
        [factors(octet), factors(octet + block_dim_x())]
    }

    /// Where four values start; beyond the vector's end these are its last ones.
    #[inline(always)]
    fn place(&self, word: u32) -> usize {
        word.min(self.n.div_ceil(4) - 1) as usize * 4
    }

    /// Values `4 * word` and on.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn fetch(&self, word: u32) -> [f32; 4] {
        // SAFETY: inside the vector, whose memory is a multiple of 16 bytes long.
        unsafe { ld_global_u32x4(self.values.add(self.place(word)).cast()).map(f32::from_bits) }
    }

    /// Values with their factors, zeros beyond the vector's end, and the sum of the values' squares.
    #[inline(always)]
    fn scale(&self, word: u32, x: [f32; 4], factors: [f32; 4], normalises: bool) -> ([f32; 4], f32) {
        let mut x = x;
        if 4 * word + 4 > self.n {
            let keep = |i: u32, value: f32| if 4 * word + i < self.n { value } else { 0.0 };
            x = [keep(0, x[0]), keep(1, x[1]), keep(2, x[2]), keep(3, x[3])];
        }
        if !normalises {
            return (x, 0.0);
        }
        let squares = mul_add(x[0], x[0], x[1] * x[1]) + mul_add(x[2], x[2], x[3] * x[3]);
        ([x[0] * factors[0], x[1] * factors[1], x[2] * factors[2], x[3] * factors[3]], squares)
    }
}

/// The factors of two octets.
pub type Factors = [[[f32; 4]; 2]; 2];

/// Leaves the sum of this warp's squares at its word of [`MAX_WARPS`] from `at` on; zeros for warps that do not exist.
#[inline(always)]
pub fn store_squares(memory: DynamicShared<u32>, at: u32, square_sum: f32) {
    let sum = warp_reduce_add(FULL_MASK, square_sum, WARP_SIZE);
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    if thread % WARP_SIZE == 0 {
        memory.set((at + thread / WARP_SIZE) as usize, sum.to_bits());
    }
    if thread + n_warps < MAX_WARPS {
        memory.set((at + n_warps + thread) as usize, 0);
    }
}

/// The sum of what [`store_squares`] has left.
#[inline(always)]
pub fn load_squares(memory: DynamicShared<u32>, at: u32) -> f32 {
    let mut sum = 0.0;
    for i in 0..MAX_WARPS / 4 {
        let [a, b, c, d] = memory.get4((at + 4 * i) as usize).map(f32::from_bits);
        sum += (a + b) + (c + d);
    }
    sum
}
