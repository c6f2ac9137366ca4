//! F32: plain floats.

use super::{FloatUnit, Format, Place, UNIT, WeightFormat, read_u32, tile::TileSource};

/// 32-bit floats, unquantized. A tile has eight planes, each with four weights of every unit.
#[derive(Clone, Copy, Debug)]
pub struct F32;

impl WeightFormat for F32 {
    const FORMAT: Format = Format::F32;
    const BLOCK_LEN: usize = 1;
    const BLOCK_BYTES: usize = 4;
    const IN_PAIRS: bool = false;
    const IN_STRIPS_OF_TWO: bool = false;
    type Unit = FloatUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        4 * n_units * 128
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, n_cols: usize, tile: *mut u8, place: Place) {
        for i in 0..UNIT {
            let column = unit * UNIT + i;
            let at = (i / 4 * 4 * place.n_units + place.index()) * 4 + i % 4;
            // SAFETY: the column is the row's and the place is inside the tile, as the caller vouches.
            unsafe {
                let weight = if column < n_cols { read_u32(row.add(4 * column)) } else { 0 };
                *tile.cast::<u32>().add(at) = weight;
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> FloatUnit {
        let words: [[u32; 4]; 8] =
            core::array::from_fn(|plane| tile.u32x4((plane * 4 * place.n_units + place.index()) * 16));
        FloatUnit(core::array::from_fn(|i| f32::from_bits(words[i / 4][i % 4])))
    }
}
