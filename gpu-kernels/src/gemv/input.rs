//! The vector that a matrix is multiplied with, and its way into shared memory.

use super::MAX_WARPS;
use crate::activations::{Activations, OCTETS, Q8_1, Q8_1Scale, Quantized};
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
        let (first_octet, n_octets) = (first_unit * OCTETS as u32, n_units * OCTETS as u32);
        if self.values.is_null() {
            let mut octet = thread;
            while octet < n_octets {
                let of_vector = (first_octet + octet) as usize;
                // SAFETY: the octet and its block are inside the vector.
                let quantized = unsafe {
                    let scale = *self.scales.add(of_vector / OCTETS);
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
        let mut round = 0;
        while warp_octet + round < n_octets {
            // SAFETY: the vector is as the fields say.
            let fetch = |i: u32| unsafe {
                let word = 2 * (first_octet + round + i * block_dim + thread);
                [self.fetch(word, normalises), self.fetch(word + 1, normalises)]
            };
            let mut store = |i: u32, [low, high]: [Fetched; 2]| {
                let octet = round + i * block_dim + thread;
                if warp_octet + round + i * block_dim < n_octets {
                    let word = 2 * (first_octet + octet);
                    let ([a, b, c, d], low) = self.scale(word, low, may_normalise);
                    let ([e, f, g, h], high) = self.scale(word + 1, high, may_normalise);
                    square_sum += low + high;
                    X::store(memory, n_octets as usize, octet as usize, [a, b, c, d, e, f, g, h]);
                }
            };
            // A batch is on its way at once. Written out: an array that is filled by a closure would lie in local memory.
            if may_normalise {
                // These have factors besides, and are the hidden state, which is shorter.
                let (first, second) = (fetch(0), fetch(1));
                store(0, first);
                store(1, second);
                round += 2 * block_dim;
            } else {
                let (first, second, third) = (fetch(0), fetch(1), fetch(2));
                store(0, first);
                store(1, second);
                store(2, third);
                round += 3 * block_dim;
            }
        }
        square_sum
    }

    /// Values `4 * word` and on, and their factors; those of the vector's last word beyond its end.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[inline(always)]
    unsafe fn fetch(&self, word: u32, normalises: bool) -> Fetched {
        let last = self.n.div_ceil(4) - 1;
        let first = word.min(last) as usize * 4;
        // SAFETY: inside the vector, whose memory is a multiple of 16 bytes long.
        unsafe {
            let values = ld_global_u32x4(self.values.add(first).cast());
            let gamma =
                if normalises { ld_global_u32x4(self.gamma.add(first).cast()) } else { [1f32.to_bits(); 4] };
            Fetched { values: values.map(f32::from_bits), gamma: gamma.map(f32::from_bits) }
        }
    }

    /// Values with their factors, zeros beyond the vector's end, and the sum of the values' squares.
    #[inline(always)]
    fn scale(&self, word: u32, fetched: Fetched, may_normalise: bool) -> ([f32; 4], f32) {
        let Fetched { values: mut x, gamma } = fetched;
        if 4 * word + 4 > self.n {
            let keep = |i: u32, value: f32| if 4 * word + i < self.n { value } else { 0.0 };
            x = [keep(0, x[0]), keep(1, x[1]), keep(2, x[2]), keep(3, x[3])];
        }
        if !may_normalise {
            return (x, 0.0);
        }
        let squares = mul_add(x[0], x[0], x[1] * x[1]) + mul_add(x[2], x[2], x[3] * x[3]);
        // What lies beyond the end of gamma is 0, as all padding is.
        ([x[0] * gamma[0], x[1] * gamma[1], x[2] * gamma[2], x[3] * gamma[3]], squares)
    }
}

/// Four values as a thread has read them.
#[derive(Clone, Copy)]
struct Fetched {
    values: [f32; 4],
    gamma: [f32; 4],
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
