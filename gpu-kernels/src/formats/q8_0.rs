//! Q8_0: 32 signed bytes and one scale; `w = d * q` (llama.cpp, ggml-common.h).

use super::{
    ByteUnit, Format, InPlanes, LaneInTile, Place, WeightFormat, half_of_row, read_u16, read_u32,
    tile::TileSource,
};
use cuda_std::float::f16_to_f32;

/// 8-bit weights, one scale per 32.
///
/// A GGUF block holds `d` (f16) and the integers. A tile has a plane of the units' first 16 integers, one of the
/// other 16, and one of scales, rows side by side.
#[derive(Clone, Copy, Debug)]
pub struct Q8_0;

impl WeightFormat for Q8_0 {
    const FORMAT: Format = Format::Q8_0;
    const BLOCK_LEN: usize = 32;
    const BLOCK_BYTES: usize = 34;
    // On compute capability 12.0 some would be spilled.
    const IN_PAIRS: bool = cfg!(any(cuda_sm_90a, not(target_arch = "nvptx64")));
    const IN_STRIPS_OF_TWO: bool = false;
    type Unit = ByteUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        4 * n_units * 34
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit * Self::BLOCK_BYTES);
            let (first, plane) = (place.by_unit_swizzled(), 4 * place.n_units);
            let quants = |half: usize| core::array::from_fn(|i| read_u32(block.add(2 + 16 * half + 4 * i)));
            *tile.cast::<[u32; 4]>().add(first) = quants(0);
            *tile.cast::<[u32; 4]>().add(plane + first) = quants(1);
            *tile.add(2 * plane * 16).cast::<u16>().add(place.by_unit()) = read_u16(block);
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let (first, plane) = (place.by_unit_swizzled(), 4 * place.n_units);
        // Of all rows, which are read one after the other.
        let scale = half_of_row(tile.u32x2(2 * plane * 16 + place.unit * 8), place.row);
        let (low, high) = (tile.u32x4(first * 16), tile.u32x4((plane + first) * 16));
        Self::unit(([low, high], scale))
    }
}

impl InPlanes for Q8_0 {
    type Fetched = ([[u32; 4]; 2], u16);

    #[inline(always)]
    fn fetch(lane: LaneInTile, first: u32) -> Self::Fetched {
        ([lane.u32x4(0, first), lane.u32x4(1, first)], lane.u16(2, first))
    }

    #[inline(always)]
    fn unit(([low, high], scale): Self::Fetched) -> ByteUnit {
        ByteUnit {
            quants: core::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] } as i32),
            scale: f16_to_f32(scale),
        }
    }
}
