//! Q4_1: 32 nibbles, a scale and a minimum; `w = d * q + m` (llama.cpp, ggml-common.h).

use super::{
    Format, InPlanes, LaneInTile, NibbleUnit, Place, WeightFormat, read_u32, tile::TileSource, word_of_row,
};
use cuda_std::float::f16_to_f32;

/// 4-bit weights, one scale and minimum per 32.
///
/// A GGUF block holds `d` and `m` (f16, the minimum is added) and 16 bytes of nibbles: byte `i` holds weight `i` below
/// and weight `i + 16` above. A tile has a plane of nibbles and one of scales and minimums, rows side by
/// side.
#[derive(Clone, Copy, Debug)]
pub struct Q4_1;

impl WeightFormat for Q4_1 {
    const FORMAT: Format = Format::Q4_1;
    const BLOCK_LEN: usize = 32;
    const BLOCK_BYTES: usize = 20;
    const IN_PAIRS: bool = true;
    const IN_STRIPS_OF_TWO: bool = false;
    type Unit = NibbleUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        4 * n_units * 20
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit * Self::BLOCK_BYTES);
            let nibbles = core::array::from_fn(|i| read_u32(block.add(4 + 4 * i)));
            *tile.cast::<[u32; 4]>().add(place.by_unit_swizzled()) = nibbles;
            *tile.add(4 * place.n_units * 16).cast::<u32>().add(place.by_unit()) = read_u32(block);
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let nibbles = tile.u32x4(place.by_unit_swizzled() * 16);
        // Of all rows, which are read one after the other.
        let scale_and_min = word_of_row(tile.u32x4((4 * place.n_units + place.unit) * 16), place.row);
        Self::unit((nibbles, scale_and_min))
    }
}

impl InPlanes for Q4_1 {
    type Fetched = ([u32; 4], u32);

    #[inline(always)]
    fn fetch(lane: LaneInTile, first: u32) -> Self::Fetched {
        (lane.u32x4(0, first), lane.u32(1, first))
    }

    #[inline(always)]
    fn unit((nibbles, scale_and_min): Self::Fetched) -> NibbleUnit {
        NibbleUnit {
            nibbles,
            scale: f16_to_f32(scale_and_min as u16),
            min: -f16_to_f32((scale_and_min >> 16) as u16),
        }
    }
}
