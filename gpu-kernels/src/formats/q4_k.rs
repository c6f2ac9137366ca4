//! Q4_K: 256 nibbles in eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum;
//! `w = d * sc * q - dmin * m` (llama.cpp, ggml-common.h).

use super::{QuantizedUnit, WeightFormat};
use cuda_std::float::f16_to_f32;
use cuda_std::memory::ld_stream_u32x4;
use half::f16;

/// A Q4_K block as GGUF stores it. Blocks lie at multiples of 144 bytes, so both parts can be read 16 bytes at a time.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct BlockQ4_K {
    /// Scale of the scales.
    pub d: f16,
    /// Scale of the minimums.
    pub dmin: f16,
    /// Eight scales and eight minimums of 6 bits; `scale_and_min` takes them apart.
    pub scales: [u32; 3],
    /// Nibbles: 32 bytes for each pair of sub-blocks, the even one below, the odd one above.
    pub qs: [[u32; 4]; 8],
}
const _: () = assert!(size_of::<BlockQ4_K>() == 144);

/// 4-bit weights in super-blocks of 256.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q4_K;

/// The 6-bit scale and minimum of sub-block `j`, from the twelve bytes that hold all of them.
///
/// Sub-blocks 0 to 3 have their six bits in bytes `j` (scale) and `j + 4` (minimum). Sub-blocks 4 to 7 have the
/// low four bits in byte `j + 4` (scale below, minimum above) and the high two in the top bits of bytes `j - 4`
/// (scale) and `j` (minimum).
#[inline(always)]
fn scale_and_min(scales: [u32; 3], j: usize) -> (u32, u32) {
    let shift = 8 * (j as u32 % 4);
    let [low, mid, high] = scales.map(|word| (word >> shift) & 0xff);
    if j < 4 { (low & 63, mid & 63) } else { ((high & 15) | (low >> 6) << 4, (high >> 4) | (mid >> 6) << 4) }
}

impl WeightFormat for Q4_K {
    type Block = BlockQ4_K;
    const BLOCK_LEN: usize = 256;
    type Unit = QuantizedUnit<true>;

    /// A unit is 16 bytes of nibbles: half of an even sub-block and the same half of the odd one after it.
    #[inline(always)]
    fn columns(unit: usize) -> [usize; 2] {
        let even = unit / 2 * 64 + unit % 2 * 16;
        [even, even + 32]
    }

    #[inline(always)]
    unsafe fn load(row: *const BlockQ4_K, unit: usize, _n_cols: usize) -> Self::Unit {
        let (part, even) = (unit % 8, unit % 8 / 2 * 2);
        // SAFETY: the caller vouches for block `unit / 8`, which is 16-byte aligned.
        let (head, qs) = unsafe {
            let block = row.add(unit / 8);
            (
                ld_stream_u32x4(block.cast()),
                ld_stream_u32x4((&raw const (*block).qs).cast::<[u32; 4]>().add(part)),
            )
        };
        let d = f16_to_f32(head[0] as u16);
        let dmin = f16_to_f32((head[0] >> 16) as u16);
        let packed = [head[1], head[2], head[3]];
        let (scale0, min0) = scale_and_min(packed, even);
        let (scale1, min1) = scale_and_min(packed, even + 1);
        let min = [dmin * min0 as f32, dmin * min1 as f32];
        QuantizedUnit {
            quants: [qs.map(|w| (w & 0x0f0f_0f0f) as i32), qs.map(|w| ((w >> 4) & 0x0f0f_0f0f) as i32)],
            scale: [d * scale0 as f32, d * scale1 as f32],
            min,
            // Units 2j and 2j + 1 share two sub-blocks: each accounts for one of them (`min_block` is the unit).
            block_min: if unit.is_multiple_of(2) { min[0] } else { min[1] },
        }
    }
}
