//! Q6_K: 256 weights of 6 bits in sixteen runs of 16, each with a signed 8-bit scale; `w = d * sc * (q - 32)`
//! (llama.cpp, ggml-common.h).

use super::{QuantizedUnit, WeightFormat};
use cuda_std::float::f16_to_f32;
use half::f16;

/// A Q6_K block as GGUF stores it.
///
/// Each half of the block holds 128 weights: byte `i` of its 64 bytes of `ql` has the low four bits of weight `i`
/// below and of weight `i + 64` above; byte `i` of its 32 bytes of `qh` has the high two bits of weights `i`,
/// `i + 32`, `i + 64` and `i + 96`, lowest first.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct BlockQ6_K {
    /// Low four bits.
    pub ql: [u8; 128],
    /// High two bits.
    pub qh: [u8; 64],
    /// Scale of each run of 16.
    pub scales: [i8; 16],
    /// Scale of the scales.
    pub d: f16,
}
const _: () = assert!(size_of::<BlockQ6_K>() == 210);

/// 6-bit weights in super-blocks of 256.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q6_K;

impl WeightFormat for Q6_K {
    type Block = BlockQ6_K;
    const BLOCK_LEN: usize = 256;
    type Unit = QuantizedUnit<false>;

    /// A unit is 16 bytes of `ql`: their low nibbles are one run, their high nibbles the run 64 columns on.
    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        let low = unit / 4 * 128 + unit % 4 * 16;
        [low, low + 64]
    }

    #[inline(always)]
    unsafe fn load(row: *const BlockQ6_K, unit: usize, _n_cols: usize) -> Self::Unit {
        let part = unit % 8;
        let (half, quarter) = (part / 4, part % 4);
        // SAFETY: the caller vouches for block `unit / 8`; it is aligned to 2 bytes, so halves of words are read.
        let (ql, qh, scales, d) = unsafe {
            let block = row.add(unit / 8);
            (
                (&raw const (*block).ql).cast::<[u16; 8]>().add(part).read(),
                (&raw const (*block).qh).cast::<[u16; 8]>().add(2 * half + quarter % 2).read(),
                [(*block).scales[8 * half + quarter], (*block).scales[8 * half + quarter + 4]],
                f16_to_f32((*block).d.to_bits()),
            )
        };
        let word = |halves: [u16; 8], i: usize| halves[2 * i] as u32 | (halves[2 * i + 1] as u32) << 16;
        // Runs in the first 32 columns of a half (quarters 0 and 1) have their high bits lowest in `qh`.
        let shift = quarter as u32 / 2 * 2;
        let quants = |nibble: u32, high: u32| {
            core::array::from_fn(|i| {
                let low = (word(ql, i) >> nibble) & 0x0f0f_0f0f;
                let high = ((word(qh, i) >> (shift + high)) & 0x0303_0303) << 4;
                less_32(low | high)
            })
        };
        QuantizedUnit {
            quants: [quants(0, 0), quants(4, 4)],
            scale: scales.map(|scale| d * scale as f32),
            min: [0.0; 2],
            block_min: 0.0,
        }
    }
}

/// Subtracts 32 from each of four bytes below 64, with no borrow between them: setting bit 7 first leaves room,
/// and `0x80 + q - 32` then has the sign bit of `q - 32` inverted.
#[inline(always)]
fn less_32(bytes: u32) -> i32 {
    (((bytes | 0x8080_8080) - 0x2020_2020) ^ 0x8080_8080) as i32
}
