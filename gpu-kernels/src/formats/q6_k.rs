//! Q6_K: 256 weights of 6 bits in sixteen runs of 16, each with a signed 8-bit scale; `w = d * sc * (q - 32)`
//! (llama.cpp, ggml-common.h).

use super::{
    Format, IntegerUnit, Place, WeightFormat, pack_nibbles, read_u16, tile::TileSource, unpack_nibbles,
};
use cuda_std::float::f16_to_f32;

/// 6-bit weights in super-blocks of 256.
///
/// Each half of a GGUF block holds 128 weights: byte `i` of its 64 bytes of low bits has the low four of weight `i`
/// below and of weight `i + 64` above; byte `i` of its 32 bytes of high bits has the high two of weights `i`,
/// `i + 32`, `i + 64` and `i + 96`, lowest first. Then follow sixteen scales and `d` (f16). A tile has a plane for
/// each: nibbles, high bits (8 bytes a unit: bits `2k` and up of byte `b` in word `h` belong to weight
/// `16h + 4k + b`), both scales of each unit, and the blocks' `d`.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q6_K;

/// Where a tile's planes start, in bytes for each unit of a row.
const HIGH: usize = 4 * 16;
const SCALES: usize = HIGH + 4 * 8;
const D: usize = SCALES + 4 * 2;

impl WeightFormat for Q6_K {
    const FORMAT: Format = Format::Q6_K;
    const BLOCK_LEN: usize = 256;
    const BLOCK_BYTES: usize = 210;
    type Unit = IntegerUnit<32, 2>;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        n_units * D + n_units / 8 * 4 * 2
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        let (half, quarter) = (unit % 8 / 4, unit % 4);
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit / 8 * Self::BLOCK_BYTES);
            let low = block.add(64 * half + 32 * (quarter % 2));
            let nibbles = pack_nibbles(|i| (*low.add(i) >> (4 * (quarter / 2))) & 15);
            *tile.cast::<[u32; 4]>().add(place.index()) = nibbles;
            let high = block.add(128 + 32 * half);
            let mut words = [0u32; 2];
            for i in 0..32 {
                let bits = u32::from(*high.add(i) >> (2 * quarter)) & 3;
                let (word, k, byte) = (i / 16, i % 16 / 4, i % 4);
                if word == 0 {
                    words[0] |= bits << (8 * byte + 2 * k);
                } else {
                    words[1] |= bits << (8 * byte + 2 * k);
                }
            }
            *tile.add(place.n_units * HIGH).cast::<[u32; 2]>().add(place.index()) = words;
            let scales = block.add(192 + unit % 8 * 2);
            *tile.add(place.n_units * SCALES).cast::<u16>().add(place.index()) = read_u16(scales);
            if unit.is_multiple_of(8) {
                *tile.add(place.n_units * D).cast::<u16>().add(place.block_of_8()) = read_u16(block.add(208));
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let nibbles = unpack_nibbles(tile.u32x4(place.index() * 16));
        let high = tile.u32x2(place.n_units * HIGH + place.index() * 8);
        let scales = tile.u16(place.n_units * SCALES + place.index() * 2);
        let d = f16_to_f32(tile.u16(place.n_units * D + place.block_of_8() * 2));
        IntegerUnit {
            quants: core::array::from_fn(|i| {
                let (word, k) = (high[i / 4], i % 4);
                // Bits 2k go to bit 4: by shifts that are known at compile time.
                let aligned = if k < 2 { word << (4 - 2 * k) } else { word >> (2 * k - 4) };
                nibbles[i] | (aligned & 0x3030_3030) as i32
            }),
            scales: [d * f32::from(scales as i8), d * f32::from((scales >> 8) as i8)],
        }
    }
}
