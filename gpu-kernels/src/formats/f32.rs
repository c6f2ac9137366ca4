//! F32: plain floats.

use super::tile::{Place, TileSource};
use super::{FloatUnit, Format, UNIT, WeightFormat, read_u32};

/// 32-bit floats, unquantized. A tile has eight planes, each with four weights of every unit.
#[derive(Clone, Copy, Debug)]
pub struct F32;

impl WeightFormat for F32 {
    const FORMAT: Format = Format::F32;
    const BLOCK_LEN: usize = 1;
    const BLOCK_BYTES: usize = 4;
    type Unit = FloatUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        16 * n_units * 128
    }

    #[inline(always)]
    unsafe fn pack(weights: *const u8, n_cols: usize, tile: *mut u8, n_units: usize, row: usize) {
        for column in 0..n_units * UNIT {
            let place = Place { n_units, row, unit: column / UNIT };
            let at = place.plane(column % UNIT / 4) * 4 + column % 4;
            // SAFETY: the column is the row's and the place is inside the tile, as the caller vouches.
            unsafe {
                let weight = if column < n_cols { read_u32(weights.add(4 * column)) } else { 0 };
                *tile.cast::<u32>().add(at) = weight;
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> FloatUnit {
        let words: [[u32; 4]; 8] =
            core::array::from_fn(|plane| tile.u32x4(place.plane(plane) * 16));
        FloatUnit(core::array::from_fn(|i| f32::from_bits(words[i / 4][i % 4])))
    }
}
