//! The vector that a matrix is multiplied with, and its way into shared memory.

use super::MAX_WARPS;
use crate::activations::{Activations, OCTET, Q8_1, Q8_1Scale, Quantized, UNIT_OCTETS};
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
    /// [`BATCH`]: as a number that the compiler does not know, so that it does not write out the loop over a batch.
    pub batch: u32,
}

/// Octets of a vector that a thread has on their way at once.
pub const BATCH: u32 = 2;

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

    /// Puts units `first_unit` to `first_unit + n_units` into shared memory; all threads of the block take part. Gives
    /// the sum of the squares of what this thread has read where it normalises.
    ///
    /// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. Here `x * gamma` is stored; the
    /// products get the common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the
    /// integers that Q8_1 of the normalised vector has.
    ///
    /// # Safety
    /// The vector must be as the fields say, in device memory, and the units inside it; the shared memory must have
    /// room from its start on; with `may_normalise` unset, nothing is to be normalised.
    #[inline(always)]
    pub unsafe fn load<X: Activations>(
        &self,
        memory: DynamicShared<u32>,
        first_unit: u32,
        n_units: u32,
        may_normalise: bool,
    ) -> f32 {
        let (thread, block_dim) = (thread_idx_x(), block_dim_x());
        let (first_octet, n_octets) = (first_unit * UNIT_OCTETS as u32, n_units * UNIT_OCTETS as u32);
        if self.values.is_null() {
            let mut octet = thread;
            while octet < n_octets {
                let of_vector = (first_octet + octet) as usize;
                // SAFETY: the octet and its block are inside the vector.
                let quantized = unsafe {
                    let scale = *self.scales.add(of_vector / UNIT_OCTETS);
                    Quantized { words: *self.quants.cast::<[u32; 2]>().add(of_vector), d: scale.d }
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
        let mut octet = thread;
        while warp_octet + octet - thread < n_octets {
            // A batch is on its way at once, and each of it is stored by the same code, which is to stay in the
            // instruction caches with the rest of the kernel.
            let (near, far) = (first_octet + octet, first_octet + octet + block_dim);
            // SAFETY: the vector is as the fields say.
            let ([mut x, next_x], [mut factors, next_factors]) = unsafe {
                let factors = |octet: u32| self.fetch_factors(octet, normalises);
                ([self.fetch(near), self.fetch(far)], [factors(near), factors(far)])
            };
            let end = octet + self.batch * block_dim;
            while octet < end && warp_octet + octet - thread < n_octets {
                let (values, squares) = self.scale(first_octet + octet, x, factors, normalises);
                square_sum += squares;
                X::store(memory, n_octets as usize, octet as usize, values);
                (x, factors) = (next_x, next_factors);
                octet += block_dim;
            }
            octet = end;
        }
        square_sum
    }

    /// Values `8 * octet` and on, the vector's last ones beyond its end.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn fetch(&self, octet: u32) -> [f32; OCTET] {
        // SAFETY: the caller's promise.
        unsafe { self.fetch_from(self.values, octet) }
    }

    /// Their factors; 1 where nothing is normalised.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn fetch_factors(&self, octet: u32, normalises: bool) -> [f32; OCTET] {
        // SAFETY: the caller's promise.
        if normalises { unsafe { self.fetch_from(self.gamma, octet) } } else { [1.0; OCTET] }
    }

    /// Eight of `n` values.
    ///
    /// # Safety
    /// `values` must be to as many, at a multiple of 16 bytes and readable up to one.
    #[inline(always)]
    unsafe fn fetch_from(&self, values: *const f32, octet: u32) -> [f32; OCTET] {
        let last = self.n.div_ceil(4) - 1;
        // SAFETY: inside the vector.
        let four = |word: u32| unsafe { ld_global_u32x4(values.add(word.min(last) as usize * 4).cast()) };
        let ([a, b, c, d], [e, f, g, h]) = (four(2 * octet), four(2 * octet + 1));
        [a, b, c, d, e, f, g, h].map(f32::from_bits)
    }

    /// Values with their factors, zeros beyond the vector's end, and the sum of the values' squares.
    #[inline(always)]
    fn scale(
        &self,
        octet: u32,
        x: [f32; OCTET],
        factors: [f32; OCTET],
        normalises: bool,
    ) -> ([f32; OCTET], f32) {
        let (mut x, mut factors) = (x, factors);
        let n_left = self.n.saturating_sub(OCTET as u32 * octet);
        if n_left < OCTET as u32 {
            // What lies beyond the end of either may be anything.
            let keep = |[a, b, c, d, e, f, g, h]: [f32; OCTET]| {
                let keep = |i: u32, value: f32| if i < n_left { value } else { 0.0 };
                let low = [keep(0, a), keep(1, b), keep(2, c), keep(3, d)];
                let high = [keep(4, e), keep(5, f), keep(6, g), keep(7, h)];
                [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
            };
            (x, factors) = (keep(x), keep(factors));
        }
        if !normalises {
            return (x, 0.0);
        }
        let ([a, b, c, d, e, f, g, h], [fa, fb, fc, fd, fe, ff, fg, fh]) = (x, factors);
        let squares = |a: f32, b: f32, c: f32, d: f32| mul_add(a, a, b * b) + mul_add(c, c, d * d);
        let scaled = [a * fa, b * fb, c * fc, d * fd, e * fe, f * ff, g * fg, h * fh];
        (scaled, squares(a, b, c, d) + squares(e, f, g, h))
    }
}

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
