//! Q4_K: 256 nibbles in eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum;
//! `w = d * sc * q - dmin * m` (llama.cpp, ggml-common.h).

use super::{Format, NibbleUnit, Place, WeightFormat, pack_nibbles, read_u32, tile::TileSource, word_of_row};
use cuda_std::float::f16_to_f32;
use cuda_std::intrinsics::byte;

/// 4-bit weights in super-blocks of 256.
///
/// A GGUF block holds `d` and `dmin` (f16), twelve bytes of scales and minimums, and 32 bytes of nibbles for each pair
/// of sub-blocks, the even one below, the odd one above. A unit is a sub-block. A tile holds four rows of a block
/// after the next four ([`GROUP`] bytes each): the units' nibbles; `d` and `dmin` of each row; for each unit a word
/// with a byte of each row, the scale below and the low two bits of the minimum above; and for each pair of units a
/// word with a byte of each row, the high four bits of their minimums. So a lane has the scales of four rows at once.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q4_K;

/// Bytes of four rows of a block, and where in them things start.
const GROUP: usize = 4 * Q4_K::BLOCK_BYTES;
const HEADS: usize = 8 * 4 * 16;
const SCALES: usize = HEADS + 4 * 4;
const MINS: usize = SCALES + 8 * 4;

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
    const IN_PAIRS: bool = true;
    const IN_STRIPS_OF_TWO: bool = true;
    type Unit = NibbleUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        n_units / 8 * GROUP
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        let j = unit % 8;
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit / 8 * Self::BLOCK_BYTES);
            let quants = block.add(16 + j / 2 * 32);
            let nibbles = pack_nibbles(|i| (*quants.add(i) >> (4 * (j % 2))) & 15);
            let group = tile.add(place.unit / 8 * GROUP);
            let in_group = Place { unit: j, ..place };
            *group.cast::<[u32; 4]>().add(in_group.by_unit_swizzled()) = nibbles;
            let packed = [read_u32(block.add(4)), read_u32(block.add(8)), read_u32(block.add(12))];
            let (scale, min) = scale_and_min(packed, j);
            *group.add(SCALES + in_group.by_unit()) = (scale | min << 6) as u8;
            if j.is_multiple_of(2) {
                let (_, next_min) = scale_and_min(packed, j + 1);
                *group.add(MINS + j / 2 * 4 + place.row) = (min >> 2 | next_min >> 2 << 4) as u8;
            }
            if j == 0 {
                *group.add(HEADS).cast::<u32>().add(place.row) = read_u32(block);
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let (group, j) = (place.unit / 8 * GROUP, place.unit % 8);
        let nibbles = tile.u32x4(group + Place { unit: j, ..place }.by_unit_swizzled() * 16);
        // Of all rows, which are read one after the other: what is done for one is done for all.
        let head = word_of_row(tile.u32x4(group + HEADS), place.row);
        let scales = tile.u32(group + SCALES + j * 4);
        let mins = (tile.u32(group + MINS + j / 2 * 4) >> (j % 2 * 4) & 0x0f0f_0f0f) << 2
            | scales >> 6 & 0x0303_0303;
        let of_row = |bytes: u32| byte(bytes, place.row as u32) as f32;
        let (d, dmin) = (f16_to_f32(head as u16), f16_to_f32((head >> 16) as u16));
        NibbleUnit { nibbles, scale: d * of_row(scales & 0x3f3f_3f3f), min: dmin * of_row(mins) }
    }
}
