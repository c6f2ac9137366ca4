//! Q8_0: 32 signed bytes and one scale; `w = d * q` (llama.cpp, ggml-common.h).

use super::tile::{Place, TileSource, UNIT_BYTES, row_word};
use super::{Format, IntegerUnit, TensorFormat, WeightFormat, read_u16, read_u32};
use crate::activations::Q8_1Tile;
use cuda_std::float::{f16_to_f32, mul_add};
use cuda_std::tensor::{UNITS, mma_units};
use cuda_std::warp::lane_id;

/// 8-bit weights, one scale per 32.
///
/// A GGUF block holds `d` (f16) and the integers. After the units' integers a tile has for each pair of units and each
/// group of lanes four scales: of row `group` the even and the odd unit, then of row `group + 8`.
#[derive(Clone, Copy, Debug)]
pub struct Q8_0;

/// Where the scale of a row and unit starts.
#[inline(always)]
fn scale_at(Place { n_units, row, unit }: Place) -> usize {
    n_units * UNIT_BYTES + ((unit / 2 * 8 + row % 8) * 4 + row / 8 * 2 + unit % 2) * 2
}

impl WeightFormat for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const BLOCK_LEN: usize = 32;
    const BLOCK_BYTES: usize = 34;
    type Unit = IntegerUnit<1>;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        n_units * UNIT_BYTES + n_units.div_ceil(2) * 8 * 8
    }

    #[inline(always)]
    unsafe fn pack(block: *const u8, _n_cols: usize, tile: *mut u8, n_units: usize, row: usize) {
        // SAFETY: the blocks are there and the row is inside the tile, as the caller vouches.
        unsafe {
            for unit in 0..n_units {
                let block = block.add(unit * Self::BLOCK_BYTES);
                *tile.add(scale_at(Place { n_units, row, unit })).cast() = read_u16(block);
                for word in 0..8 {
                    *tile.add(unit * UNIT_BYTES + row_word(row, word) * 4).cast() =
                        read_u32(block.add(2 + 4 * word));
                }
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        IntegerUnit {
            quants: core::array::from_fn(|word| {
                tile.u32(place.unit * UNIT_BYTES + row_word(place.row, word) * 4) as i32
            }),
            scales: [f16_to_f32(tile.u16(scale_at(place)))],
        }
    }
}

impl TensorFormat for Q8_0 {
    #[inline(always)]
    fn dot_tile<S: TileSource>(tile: S, n_units: usize, x: &Q8_1Tile, sums: [f32; 2]) -> [f32; 2] {
        let lane = lane_id() as usize;
        let (group, member) = (lane / 4, lane % 4);
        let mut rows = [[0; 4]; UNITS];
        for (unit, row) in rows.iter_mut().enumerate() {
            if unit < n_units {
                *row = tile.u32x4(unit * UNIT_BYTES + lane * 16);
            }
        }
        let [q0, q1, q2, q3] = mma_units::<i8>(rows, x.quants).map(|q| q as f32);
        if 2 * member >= n_units {
            return sums;
        }
        let [first, second] = tile.u32x2(scale_at(Place { n_units, row: group, unit: 2 * member }));
        let row = |sum: f32, scales: u32, even: f32, odd: f32| {
            let (d0, d1) = (f16_to_f32(scales as u16), f16_to_f32((scales >> 16) as u16));
            mul_add(d1, x.d[1] * odd, mul_add(d0, x.d[0] * even, sum))
        };
        [row(sums[0], first, q0, q1), row(sums[1], second, q2, q3)]
    }
}
