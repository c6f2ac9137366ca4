//! Q4_K: 256 nibbles in eight sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum;
//! `w = d * sc * q - dmin * m` (llama.cpp, ggml-common.h).

use super::tile::{PAIR_BYTES, Place, TileSource, nibble_sums, nibble_words, nibbles, pack_nibbles};
use super::{Format, NibbleUnit, TensorFormat, WeightFormat, read_u32};
use crate::activations::Q8_1Tile;
use cuda_std::float::{f16_to_f32, mul_add};
use cuda_std::intrinsics::byte;
use cuda_std::warp::lane_id;

/// 4-bit weights in super-blocks of 256.
///
/// A GGUF block holds `d` and `dmin` (f16), twelve bytes of scales and minimums, and 32 bytes of nibbles for each pair
/// of sub-blocks, the even one below, the odd one above. A unit is a sub-block, a tile a block of each of its rows. After
/// the pairs' nibbles come `d` and `dmin` of each row; for each lane a word with a byte for each of its sub-blocks, the
/// scale below and the low two bits of the minimum above; and for each lane half a word with the high four bits of
/// these minimums.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q4_K;

/// Where things start in a tile, in bytes.
const HEADS: usize = 4 * PAIR_BYTES;
const SCALES: usize = HEADS + 16 * 4;
const MINS: usize = SCALES + 32 * 4;

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

/// The scales and the minimums of a lane's four sub-blocks, a byte each: of row `group` and row `group + 8` the even
/// sub-block, then of both the odd one.
#[inline(always)]
fn scales_and_mins<S: TileSource>(tile: S, lane: usize) -> (u32, u32) {
    let scales = tile.u32(SCALES + lane * 4);
    let highs = u32::from(tile.u16(MINS + lane * 2));
    // Two nibbles of a row are neighbours; the shifted copy puts the second one into a byte of its own.
    let mins = (highs | highs << 12) & 0x0f0f_0f0f;
    (scales & 0x3f3f_3f3f, mins << 2 | scales >> 6 & 0x0303_0303)
}

impl WeightFormat for Q4_K {
    const FORMAT: Format = Format::Q4_K;
    const BLOCK_LEN: usize = 256;
    const BLOCK_BYTES: usize = 144;
    type Unit = NibbleUnit;

    #[inline(always)]
    fn tile_bytes(_n_units: usize) -> usize {
        MINS + 32 * 2
    }

    #[inline(always)]
    unsafe fn pack(block: *const u8, _n_cols: usize, tile: *mut u8, _n_units: usize, row: usize) {
        // SAFETY: the block is there and the row is inside the tile, as the caller vouches.
        unsafe {
            for pair in 0..4 {
                let words = core::array::from_fn(|i| read_u32(block.add(16 + 32 * pair + 4 * i)));
                pack_nibbles(tile, pair, row, words);
            }
            *tile.add(HEADS).cast::<u32>().add(row % 8 * 2 + row / 8) = read_u32(block);
            let packed = [read_u32(block.add(4)), read_u32(block.add(8)), read_u32(block.add(12))];
            for member in 0..4 {
                let lane = row % 8 * 4 + member;
                let (scale, min) = scale_and_min(packed, 2 * member);
                let (odd_scale, odd_min) = scale_and_min(packed, 2 * member + 1);
                let scales = tile.add(SCALES + lane * 4 + row / 8);
                *scales = (scale | min << 6) as u8;
                *scales.add(2) = (odd_scale | odd_min << 6) as u8;
                *tile.add(MINS + lane * 2 + row / 8) = (min >> 2 | odd_min >> 2 << 4) as u8;
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> NibbleUnit {
        let head = tile.u32(HEADS + (place.row % 8 * 2 + place.row / 8) * 4);
        let (scales, mins) = scales_and_mins(tile, place.row % 8 * 4 + place.unit / 2);
        let of_unit = |bytes: u32| (bytes >> (place.unit % 2 * 16 + place.row / 8 * 8) & 0xff) as f32;
        let (d, dmin) = (f16_to_f32(head as u16), f16_to_f32((head >> 16) as u16));
        NibbleUnit {
            quants: nibbles(tile, place),
            scale: d * of_unit(scales),
            min: dmin * of_unit(mins),
        }
    }
}

impl TensorFormat for Q4_K {
    #[inline(always)]
    fn dot_tile<S: TileSource>(tile: S, _n_units: usize, x: &Q8_1Tile, sums: [f32; 2]) -> [f32; 2] {
        let lane = lane_id() as usize;
        let [q0, q1, q2, q3] = nibble_sums(nibble_words(tile, 4, lane), x);
        let [head0, head1] = tile.u32x2(HEADS + lane / 4 * 8);
        let (scales, mins) = scales_and_mins(tile, lane);
        let (scale, min) = (|i| byte(scales, i) as f32, |i| byte(mins, i) as f32);
        let row = |sum: f32, head: u32, even: f32, odd: f32, i: u32| {
            let product = mul_add(scale(i), even, scale(i + 2) * odd);
            let minimum = mul_add(min(i), x.d_sum[0], min(i + 2) * x.d_sum[1]);
            let (d, dmin) = (f16_to_f32(head as u16), f16_to_f32((head >> 16) as u16));
            mul_add(-dmin, minimum, mul_add(d, product, sum))
        };
        [row(sums[0], head0, q0, q1, 0), row(sums[1], head1, q2, q3, 1)]
    }
}
