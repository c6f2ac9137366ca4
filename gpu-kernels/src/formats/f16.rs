//! F16: IEEE half-precision floats.

use super::{FloatUnit, Format, Place, UNIT, WeightFormat, read_u16, tile::TileSource};
use cuda_std::float::f16_to_f32;

/// 16-bit floats, unquantized. A tile has four planes, each with eight weights of every unit.
#[derive(Clone, Copy, Debug)]
pub struct F16;

impl WeightFormat for F16 {
    const FORMAT: Format = Format::F16;
    const BLOCK_LEN: usize = 1;
    const BLOCK_BYTES: usize = 2;
    const IN_PAIRS: bool = false;
    const IN_STRIPS_OF_TWO: bool = false;
    type Unit = FloatUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        4 * n_units * 64
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, n_cols: usize, tile: *mut u8, place: Place) {
        for i in 0..UNIT {
            let column = unit * UNIT + i;
            let at = (i / 8 * 4 * place.n_units + place.index()) * 8 + i % 8;
            // SAFETY: the column is the row's and the place is inside the tile, as the caller vouches.
            unsafe {
                let weight = if column < n_cols { read_u16(row.add(2 * column)) } else { 0 };
                *tile.cast::<u16>().add(at) = weight;
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> FloatUnit {
        let words: [[u32; 4]; 4] =
            core::array::from_fn(|plane| tile.u32x4((plane * 4 * place.n_units + place.index()) * 16));
        FloatUnit(core::array::from_fn(|i| f16_to_f32((words[i / 8][i % 8 / 2] >> (16 * (i % 2))) as u16)))
    }
}
