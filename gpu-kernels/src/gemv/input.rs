//! The vector that a matrix is multiplied with, and its way into shared memory.

use super::MAX_WARPS;
use crate::activations::{Activations, Q8_1, Q8_1Scale, Quantized, VALUES_PER_THREAD};
use crate::formats::{UNIT, UNIT_WORDS};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add};

/// A vector, as a launch passes it: f32 values, to be normalised or not, or Q8_1.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Input {
    /// `[n]`, at a multiple of 16 bytes; null where the vector is in Q8_1.
    pub values: *const f32,
    /// `[n]` likewise, the factors of RMSNorm; null where nothing is normalised.
    pub gamma: *const f32,
    /// `[n.div_ceil(32) * 8]` words of four integers.
    pub quants: *const u32,
    /// `[n.div_ceil(32)]`.
    pub scales: *const Q8_1Scale,
    /// The number of values.
    pub n: u32,
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

    /// Puts units `first_unit` to `first_unit + n_units` into shared memory; all threads of the block take part.
    /// Gives the sum of the squares of what this thread has read.
    ///
    /// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. Here `x * gamma` is stored; the
    /// products get the common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the
    /// integers that Q8_1 of the normalised vector has.
    ///
    /// # Safety
    /// The vector must be as the fields say, in device memory, and the units inside it; the shared memory must have
    /// room from its start on.
    #[inline(always)]
    pub unsafe fn load<X: Activations>(
        &self,
        memory: DynamicShared<u32>,
        first_unit: u32,
        n_units: u32,
    ) -> f32 {
        let (first_word, n_units) = (first_unit as usize * UNIT_WORDS, n_units as usize);
        let n_words = n_units * UNIT_WORDS;
        let (thread, block_dim) = (thread_idx_x() as usize, block_dim_x() as usize);
        if self.values.is_null() {
            for word in (thread..n_words).step_by(block_dim) {
                // SAFETY: the word and its block are inside the vector.
                let quantized = unsafe {
                    let scale = *self.scales.add((first_word + word) / UNIT_WORDS);
                    Quantized { word: *self.quants.add(first_word + word), d: scale.d, sum: scale.sum }
                };
                Q8_1::store_quantized(memory, n_units, word, quantized);
            }
            return 0.0;
        }

        let mut square_sum = 0.0;
        // Warps stay whole: the lanes of a unit quantize it together.
        let mut warp_word = thread / WARP_SIZE as usize * WARP_SIZE as usize;
        let lane = thread % WARP_SIZE as usize;
        while warp_word < n_words {
            let first = first_word + warp_word + lane;
            let [x0, x1] = [0, block_dim].map(|i| {
                // SAFETY: the vector is as the fields say.
                unsafe { fetch(self.values, self.n as usize, first + i, warp_word + i < n_words) }
            });
            let (mut scaled0, mut scaled1) = (x0, x1);
            if self.is_normalised() {
                let [g0, g1] = [0, block_dim].map(|i| {
                    // SAFETY: as above.
                    unsafe { fetch(self.gamma, self.n as usize, first + i, warp_word + i < n_words) }
                });
                for j in 0..VALUES_PER_THREAD {
                    square_sum += x0[j] * x0[j] + x1[j] * x1[j];
                    scaled0[j] *= g0[j];
                    scaled1[j] *= g1[j];
                }
            }
            X::store(memory, n_units, warp_word + lane, scaled0);
            if warp_word + block_dim < n_words {
                X::store(memory, n_units, warp_word + block_dim + lane, scaled1);
            }
            // Two of a thread's words are on their way at once.
            warp_word += 2 * block_dim;
        }
        square_sum
    }
}

/// Values `4 * word` and on of `n`; zeros beyond, and where nothing is `wanted`.
///
/// # Safety
/// `from` must have `n` values.
#[inline(always)]
unsafe fn fetch(from: *const f32, n: usize, word: usize, wanted: bool) -> [f32; VALUES_PER_THREAD] {
    let first = VALUES_PER_THREAD * word;
    // SAFETY: only what lies below `n` is read.
    unsafe {
        if wanted && first + VALUES_PER_THREAD <= n {
            ld_global_u32x4(from.add(first).cast()).map(f32::from_bits)
        } else if wanted && first < n {
            core::array::from_fn(|i| if first + i < n { *from.add(first + i) } else { 0.0 })
        } else {
            [0.0; VALUES_PER_THREAD]
        }
    }
}

/// Leaves the sums of the warps' squares at word `at` of the shared memory, one per warp.
#[inline(always)]
pub fn store_squares(memory: DynamicShared<u32>, at: usize, square_sum: f32) {
    let sum = warp_reduce_add(FULL_MASK, square_sum, WARP_SIZE);
    let warp = (thread_idx_x() / WARP_SIZE) as usize;
    if thread_idx_x().is_multiple_of(WARP_SIZE) && warp < MAX_WARPS as usize {
        memory.set(at + warp, sum.to_bits());
    }
}
