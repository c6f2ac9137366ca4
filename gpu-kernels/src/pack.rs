//! Packing rows of GGUF blocks into tiles ([`crate::formats::tile`]), once when a model is loaded.

use crate::formats::tile::{Geometry, TILE_UNITS};
use crate::formats::{Format, UNIT, WeightFormat};
use crate::rows::RowOrder;
use core::ops::Range;
use cuda_std::kernel;
use cuda_std::thread::index_1d;

/// Threads in a block.
pub const BLOCK_DIM: usize = 64;

/// Packs `n_rows` rows of GGUF blocks, which are the matrix's rows from `first_row` on, each to its place in `order`.
///
/// # Safety
/// The pointers are to device memory of the sizes below; `format` is a [`Format`].
///
/// # Parameters
/// - `rows`: `[n_rows, n_cols]` in GGUF blocks
/// - `tiles`: the packed matrix, of at least `first_row + n_rows` rows, as long as its geometry says
/// - `order`: where the matrix's rows stand
/// - `tile_bytes`, `last_tile_bytes`, `strip_quads`: as [`Geometry`] has them
///
/// # Thread mapping
/// One thread per 32 units of a row, any block size. Bytes moved: the rows twice.
#[kernel]
pub unsafe fn pack(
    rows: *const u8,
    first_row: u32,
    n_rows: u32,
    n_cols: u32,
    tiles: *mut u8,
    order: RowOrder,
    format: u32,
    tile_bytes: u32,
    last_tile_bytes: u32,
    strip_quads: u32,
) {
    let geometry = Geometry {
        n_units: (n_cols as usize).div_ceil(UNIT),
        strip_quads: strip_quads as usize,
        tile_bytes: tile_bytes as usize,
        last_tile_bytes: last_tile_bytes as usize,
    };
    let index = index_1d() as usize;
    let n_runs = geometry.n_units.div_ceil(TILE_UNITS);
    let (row, first_unit) = (index / n_runs, index % n_runs * TILE_UNITS);
    if row >= n_rows as usize {
        return;
    }
    let place = order.place_of(first_row as usize + row);
    let units = first_unit..(first_unit + TILE_UNITS).min(geometry.n_units);
    macro_rules! pack {
        ($(($Type:ident, $name:ident))*) => {
            match format {
                // SAFETY: the row is one of the input's and its place is inside the matrix; only this thread writes
                // these units of it.
                $(f if f == Format::$Type as u32 => unsafe {
                    pack_units::<crate::formats::$Type>(rows, row, n_cols as usize, tiles, geometry, place, units);
                },)*
                _ => {}
            }
        };
    }
    crate::for_each_format!(pack);
}

/// Some units of a row, to row `place` of the matrix.
///
/// # Safety
/// As [`WeightFormat::pack`], for all of the units.
#[inline(always)]
unsafe fn pack_units<F: WeightFormat>(
    rows: *const u8,
    row: usize,
    n_cols: usize,
    tiles: *mut u8,
    geometry: Geometry,
    place: usize,
    units: Range<usize>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let row = rows.add(row * (n_cols / F::BLOCK_LEN * F::BLOCK_BYTES));
        for unit in units {
            let (offset, place) = geometry.find(place, unit);
            F::pack(row, unit, n_cols, tiles.add(offset), place);
        }
    }
}
