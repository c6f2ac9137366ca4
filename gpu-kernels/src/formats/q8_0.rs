//! Q8_0: 32 signed bytes and one scale; `w = d * q` (llama.cpp, ggml-common.h).

use super::{QuantizedUnit, RUN, UNIT, WeightFormat};
use cuda_std::float::f16_to_f32;
use half::f16;

/// A Q8_0 block as GGUF stores it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BlockQ8_0 {
    /// Scale.
    pub d: f16,
    /// The integers.
    pub qs: [i8; 32],
}
const _: () = assert!(size_of::<BlockQ8_0>() == 34);

/// 8-bit weights, one scale per 32.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q8_0;

impl WeightFormat for Q8_0 {
    type Block = BlockQ8_0;
    const BLOCK_LEN: usize = 32;
    type Unit = QuantizedUnit<false>;

    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        [unit * UNIT, unit * UNIT + RUN]
    }

    #[inline(always)]
    unsafe fn load(row: *const BlockQ8_0, unit: usize, _n_cols: usize) -> Self::Unit {
        // SAFETY: the caller vouches for block `unit`; a block is aligned to 2 bytes, so halves of words are read.
        let (d, halves) = unsafe {
            let block = row.add(unit);
            (f16_to_f32((*block).d.to_bits()), (&raw const (*block).qs).cast::<[u16; 16]>().read())
        };
        let word = |i: usize| (halves[2 * i] as u32 | (halves[2 * i + 1] as u32) << 16) as i32;
        QuantizedUnit {
            quants: [core::array::from_fn(word), core::array::from_fn(|i| word(RUN / 4 + i))],
            scale: [d; 2],
            min: [0.0; 2],
            block_min: 0.0,
        }
    }
}
