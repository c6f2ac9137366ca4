//! Q4_1: 32 nibbles, a scale and a minimum; `w = d * q + m` (llama.cpp, ggml-common.h).

use super::tile::{PAIR_BYTES, Place, TileSource, nibble_sums, nibble_words, nibbles, pack_nibbles};
use super::{Format, NibbleUnit, TensorFormat, WeightFormat, read_u32};
use crate::activations::Q8_1Tile;
use cuda_std::float::{f16_to_f32, mul_add};
use cuda_std::warp::lane_id;

/// 4-bit weights, one scale and minimum per 32.
///
/// A GGUF block holds `d` and `m` (f16, the minimum is added) and 16 bytes of nibbles: byte `i` holds weight `i` below
/// and weight `i + 16` above. After the pairs' nibbles a tile has for each pair and each group of lanes four words with
/// `d` and `m`: of row `group` the even and the odd unit, then of row `group + 8`.
#[derive(Clone, Copy, Debug)]
pub struct Q4_1;

/// Where the word of a row and unit starts.
#[inline(always)]
fn scale_at(Place { n_units, row, unit }: Place) -> usize {
    n_units.div_ceil(2) * PAIR_BYTES + ((unit / 2 * 8 + row % 8) * 4 + row / 8 * 2 + unit % 2) * 4
}

impl WeightFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const BLOCK_LEN: usize = 32;
    const BLOCK_BYTES: usize = 20;
    type Unit = NibbleUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        n_units.div_ceil(2) * (PAIR_BYTES + 8 * 16)
    }

    #[inline(always)]
    unsafe fn pack(block: *const u8, _n_cols: usize, tile: *mut u8, n_units: usize, row: usize) {
        // SAFETY: the blocks are there and the row is inside the tile, as the caller vouches.
        unsafe {
            for unit in 0..n_units {
                let block = block.add(unit * Self::BLOCK_BYTES);
                *tile.add(scale_at(Place { n_units, row, unit })).cast() = read_u32(block);
                if unit.is_multiple_of(2) {
                    let has_odd = unit + 1 < n_units;
                    let words = core::array::from_fn(|i| {
                        let read = |block: *const u8| read_u32(block.add(4 + i % 4 * 4)) >> (i / 4 * 4) & LOW;
                        read(block) | if has_odd { read(block.add(Self::BLOCK_BYTES)) << 4 } else { 0 }
                    });
                    pack_nibbles(tile, unit / 2, row, words);
                }
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> NibbleUnit {
        let word = tile.u32(scale_at(place));
        NibbleUnit {
            quants: nibbles(tile, place),
            scale: f16_to_f32(word as u16),
            min: -f16_to_f32((word >> 16) as u16),
        }
    }
}

/// The low nibble of each byte.
const LOW: u32 = 0x0f0f_0f0f;

impl TensorFormat for Q4_1 {
    #[inline(always)]
    fn dot_tile<S: TileSource>(tile: S, n_units: usize, x: &Q8_1Tile, sums: [f32; 2]) -> [f32; 2] {
        let lane = lane_id() as usize;
        let (group, member) = (lane / 4, lane % 4);
        let [q0, q1, q2, q3] = nibble_sums(nibble_words(tile, n_units.div_ceil(2), lane), x);
        if 2 * member >= n_units {
            return sums;
        }
        let [s0, s1, s2, s3] = tile.u32x4(scale_at(Place { n_units, row: group, unit: 2 * member }));
        let add = |sum: f32, word: u32, product: f32, d_sum: f32| {
            let (d, m) = (f16_to_f32(word as u16), f16_to_f32((word >> 16) as u16));
            mul_add(m, d_sum, mul_add(d, product, sum))
        };
        [
            add(add(sums[0], s0, q0, x.d_sum[0]), s1, q1, x.d_sum[1]),
            add(add(sums[1], s2, q2, x.d_sum[0]), s3, q3, x.d_sum[1]),
        ]
    }
}
