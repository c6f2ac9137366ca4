//! The embedding of a token: one row of the token-embedding matrix, dequantized.

use crate::formats::{UNIT, WeightFormat, WeightUnit};
use crate::step::Step;
use cuda_std::kernel;
use cuda_std::thread::index_1d;

/// Threads in a block.
pub const BLOCK_DIM: usize = 64;

#[inline(always)]
unsafe fn embed_row<F: WeightFormat>(
    weights: *const F::Block,
    step: *const Step,
    out: *mut f32,
    n_embd: usize,
) {
    let unit = index_1d() as usize;
    if unit >= n_embd.div_ceil(UNIT) {
        return;
    }
    // SAFETY: the caller vouches for the token's row and for `out`; the unit is inside the row.
    unsafe {
        let row = weights.add((*step).token as usize * (n_embd / F::BLOCK_LEN));
        let values = F::load(row, unit, n_embd).dequantize();
        for (start, run) in F::columns(unit).into_iter().zip(values) {
            for (column, value) in (start..).zip(run) {
                if F::BLOCK_LEN.is_multiple_of(UNIT) || column < n_embd {
                    *out.add(column) = value;
                }
            }
        }
    }
}

macro_rules! define_kernels {
    ($(($Type:ident, $name:ident))*) => {$(
        #[doc = concat!("The kernel for ", stringify!($Type), " embeddings.")]
        pub mod $name {
            use super::*;
            use crate::formats::$Type;

            /// `out = weights[token]`.
            ///
            /// # Safety
            /// The pointers are to device memory of the sizes below, and the step's token is below `n_vocab`.
            ///
            /// # Parameters
            /// - `weights`: `[n_vocab, n_embd]` in blocks, row by row
            /// - `step`: holds the token
            /// - `out`: `[n_embd]`
            ///
            /// # Thread mapping
            /// One thread per unit of 32 columns, any block size.
            #[kernel(suffix = $name)]
            pub unsafe fn embed(
                weights: *const u8,
                step: *const Step,
                out: *mut f32,
                n_embd: u32,
            ) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { embed_row::<$Type>(weights.cast(), step, out, n_embd as usize) }
            }
        }
    )*

        /// The embedding kernel for weights in `format`.
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn embed_kernel(format: crate::formats::Format) -> &'static cuda_std::launch::Kernel<(*const u8, *const Step, *mut f32, u32)> {
            match format {
                $(crate::formats::Format::$Type => &$name::EMBED,)*
            }
        }
    };
}
crate::for_each_format!(define_kernels);
