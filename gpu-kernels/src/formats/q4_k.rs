//! Q4_K: 256 nibbles in eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum;
//! `w = d * sc * q - dmin * m` (llama.cpp, ggml-common.h).

use super::{Format, NibbleUnit, Place, WeightFormat, pack_nibbles, read_u32, tile::TileSource};
use cuda_std::float::f16_to_f32;

/// 4-bit weights in super-blocks of 256.
///
/// A GGUF block holds `d` and `dmin` (f16), twelve bytes of scales and minimums, and 32 bytes of nibbles for each pair
/// of sub-blocks, the even one below, the odd one above. A unit is a sub-block. A tile has a plane of nibbles and a
/// plane of heads of 16 bytes, one per block: `d` and `dmin`, then three words with a nibble for each sub-block: the
/// low four bits of its scale, those of its minimum, and the high two of both (the scale's below).
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q4_K;

const NIBBLES: usize = 16;

/// The 6-bit scale and minimum of sub-block `j`, from the twelve bytes that hold all of them in GGUF.
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
    const FORMAT: Format = Format::Q4_K;
    const BLOCK_LEN: usize = 256;
    const BLOCK_BYTES: usize = 144;
    type Unit = NibbleUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        4 * n_units * NIBBLES + n_units / 8 * 4 * 16
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        let j = unit % 8;
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit / 8 * Self::BLOCK_BYTES);
            let quants = block.add(16 + j / 2 * 32);
            let nibbles = pack_nibbles(|i| (*quants.add(i) >> (4 * (j % 2))) & 15);
            *tile.cast::<[u32; 4]>().add(place.index()) = nibbles;
            if j == 0 {
                let packed = [read_u32(block.add(4)), read_u32(block.add(8)), read_u32(block.add(12))];
                let (mut scales, mut mins, mut high) = (0, 0, 0);
                for j in 0..8 {
                    let (scale, min) = scale_and_min(packed, j);
                    scales |= (scale & 15) << (4 * j);
                    mins |= (min & 15) << (4 * j);
                    high |= (scale >> 4 | min >> 4 << 2) << (4 * j);
                }
                let heads = tile.add(4 * place.n_units * NIBBLES).cast::<[u32; 4]>();
                *heads.add(place.block_of_8()) = [read_u32(block), scales, mins, high];
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let nibbles = tile.u32x4(place.index() * NIBBLES);
        let head = tile.u32x4(4 * place.n_units * NIBBLES + place.block_of_8() * 16);
        let shift = 4 * (place.unit as u32 % 8);
        let high = head[3] >> shift;
        let scale = (head[1] >> shift) & 15 | (high << 4) & 0x30;
        let min = (head[2] >> shift) & 15 | (high << 2) & 0x30;
        let (d, dmin) = (f16_to_f32(head[0] as u16), f16_to_f32((head[0] >> 16) as u16));
        NibbleUnit { nibbles, scale: d * scale as f32, min: dmin * min as f32 }
    }
}
