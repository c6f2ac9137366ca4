//! The vector that a matrix is multiplied with, and its way into shared memory.

use super::MAX_WARPS;
use crate::activations::{Activations, Q8_1, Q8_1Scale, Quantized, VALUES_PER_THREAD};
use crate::formats::{UNIT, UNIT_WORDS};
use cuda_std::float::mul_add;
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
                    Quantized { word: *self.quants.add(first_word + word), d: scale.d }
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
            // What a thread works on in four rounds is on its way at once.
            let fetch = |from: *const f32| {
                [0, 1, 2, 3].map(|i| {
                    let wanted = warp_word + i * block_dim < n_words;
                    // SAFETY: the vector is as the fields say.
                    unsafe { fetch(from, self.n as usize, first + i * block_dim, wanted) }
                })
            };
            let mut values = fetch(self.values);
            if self.is_normalised() {
                let gamma = fetch(self.gamma);
                for i in 0..4 {
                    for j in 0..VALUES_PER_THREAD {
                        square_sum = mul_add(values[i][j], values[i][j], square_sum);
                        values[i][j] *= gamma[i][j];
                    }
                }
            }
            let [x0, x1, x2, x3] = values;
            let store = |i: usize, values| {
                let word = warp_word + i * block_dim;
                if word < n_words {
                    X::store(memory, n_units, word + lane, values);
                }
            };
            store(0, x0);
            store(1, x1);
            store(2, x2);
            store(3, x3);
            warp_word += 4 * block_dim;
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

/// Leaves the sum of this warp's squares at its word of [`MAX_WARPS`] from `at` on; zeros for warps that do not exist.
#[inline(always)]
pub fn store_squares(memory: DynamicShared<u32>, at: u32, square_sum: f32) {
    let sum = warp_reduce_add(FULL_MASK, square_sum, WARP_SIZE);
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    if thread % WARP_SIZE == 0 {
        memory.set((at + thread / WARP_SIZE) as usize, sum.to_bits());
    }
    if n_warps + thread < MAX_WARPS {
        memory.set((at + n_warps + thread) as usize, 0);
    }
}

/// The sum of what [`store_squares`] has left.
#[inline(always)]
pub fn load_squares(memory: DynamicShared<u32>, at: u32) -> f32 {
    let [a, b, c, d] = memory.get4(at as usize).map(f32::from_bits);
    let [e, f, g, h] = memory.get4(at as usize + 4).map(f32::from_bits);
    (a + b) + (c + d) + ((e + f) + (g + h))
}
const _: () = assert!(MAX_WARPS == 8);
