//! Q4_1: 32 nibbles, a scale and a minimum; `w = d * q + m` (llama.cpp, ggml-common.h).

use super::{QuantizedUnit, RUN, UNIT, WeightFormat};
use cuda_std::float::f16_to_f32;
use half::f16;

/// A Q4_1 block as GGUF stores it.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug)]
pub struct BlockQ4_1 {
    /// Scale.
    pub d: f16,
    /// Minimum, added.
    pub m: f16,
    /// Nibbles: byte `i` holds weight `i` below and weight `i + 16` above.
    pub qs: [u32; 4],
}
const _: () = assert!(size_of::<BlockQ4_1>() == 20);

/// 4-bit weights, one scale and minimum per 32.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q4_1;

impl WeightFormat for Q4_1 {
    type Block = BlockQ4_1;
    const BLOCK_LEN: usize = 32;
    type Unit = QuantizedUnit<true>;

    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        [unit * UNIT, unit * UNIT + RUN]
    }

    #[inline(always)]
    unsafe fn load(row: *const BlockQ4_1, unit: usize, _n_cols: usize) -> Self::Unit {
        // SAFETY: the caller vouches for block `unit`.
        let block = unsafe { *row.add(unit) };
        let (d, min) = (f16_to_f32(block.d.to_bits()), -f16_to_f32(block.m.to_bits()));
        QuantizedUnit {
            quants: [
                block.qs.map(|w| (w & 0x0f0f_0f0f) as i32),
                block.qs.map(|w| ((w >> 4) & 0x0f0f_0f0f) as i32),
            ],
            scale: [d; 2],
            min: [min; 2],
            block_min: min,
        }
    }
}
