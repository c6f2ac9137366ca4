//! The vectors of many tokens, as kernels read them that leave them in another form: normalised where they have to be.

use crate::block::{WarpValues, block_sum};
use cuda_std::float::rsqrt;
use cuda_std::memory::ld_global_u32x4;
use cuda_std::thread::{block_dim_x, thread_idx_x};

/// The vector of the token that a block works on.
#[derive(Clone, Copy)]
pub struct TokenVector {
    x: *const f32,
    gamma: *const f32,
    n: usize,
    /// What RMSNorm multiplies with besides the factors.
    scale: f32,
}

impl TokenVector {
    /// Token `token`'s, normalised (RMSNorm, as [`crate::rms_norm`]) where `gamma` is not null. All threads of the block take
    /// part.
    ///
    /// # Safety
    /// `x` is `[n_tokens, n]`, rows filled up to a multiple of 4 values, and `gamma` is null or `[n]`, readable up to a
    /// multiple of 16 bytes; both at a multiple of 16 bytes, and unchanged as long as the vector is read.
    #[inline(always)]
    pub unsafe fn new(
        x: *const f32,
        gamma: *const f32,
        token: u32,
        n: u32,
        eps: f32,
        scratch: WarpValues<f32>,
    ) -> Self {
        let n = n as usize;
        let x = x.wrapping_add(token as usize * n.next_multiple_of(4));
        let mut vector = Self { x, gamma, n, scale: 1.0 };
        if !gamma.is_null() {
            let (thread, stride) = (thread_idx_x() as usize, block_dim_x() as usize);
            let mut sum = 0.0;
            let mut column = 4 * thread;
            while column < n {
                let [a, b, c, d] = vector.four_of(x, column);
                sum += (a * a + b * b) + (c * c + d * d);
                column += 4 * stride;
            }
            vector.scale = rsqrt(block_sum(sum, scratch) / n as f32 + eps);
        }
        vector
    }

    /// Four columns from `column` on, a multiple of 4; zeros beyond the vector's end.
    #[inline(always)]
    pub fn four(&self, column: usize) -> [f32; 4] {
        let [a, b, c, d] = self.four_of(self.x, column);
        if self.gamma.is_null() {
            return [a, b, c, d];
        }
        let [ga, gb, gc, gd] = self.four_of(self.gamma, column);
        let scale = self.scale;
        [a * scale * ga, b * scale * gb, c * scale * gc, d * scale * gd]
    }

    /// Likewise of one of the two vectors as it is; zeros beyond its end, whatever is there.
    #[inline(always)]
    fn four_of(&self, from: *const f32, column: usize) -> [f32; 4] {
        if column >= self.n {
            return [0.0; 4];
        }
        // SAFETY: by the promise of `new` the vector is filled up to a multiple of four values.
        let [a, b, c, d] = unsafe { ld_global_u32x4(from.add(column).cast()) }.map(f32::from_bits);
        let keep = |i: usize, value: f32| if column + i < self.n { value } else { 0.0 };
        [a, keep(1, b), keep(2, c), keep(3, d)]
    }
}
