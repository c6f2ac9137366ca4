//! Packing rows of GGUF blocks into tiles ([`crate::formats::tile`]), once when a model is loaded.

use crate::formats::tile::{Geometry, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, UNIT, WeightFormat};
use crate::rows::RowOrder;
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
/// - `tiles`: the packed matrix, of at least `first_row + n_rows` rows, as long as `geometry` says
/// - `order`: where the matrix's rows stand
///
/// # Thread mapping
/// One thread per row of a tile, any block size. Bytes moved: the rows twice.
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
) {
    let geometry = Geometry {
        n_units: (n_cols as usize).div_ceil(UNIT),
        tile_bytes: tile_bytes as usize,
        last_tile_bytes: last_tile_bytes as usize,
    };
    let index = index_1d() as usize;
    let (row, tile) = (index / geometry.n_tiles(), index % geometry.n_tiles());
    if row >= n_rows as usize {
        return;
    }
    let place = order.place_of(first_row as usize + row);
    let offset = geometry.offset(place / TILE_ROWS, tile);
    let n_units = geometry.units_of(tile);
    macro_rules! pack {
        ($(($Type:ident, $name:ident))*) => {
            match format {
                // SAFETY: the row is one of the input's and the tile is inside the matrix; only this thread writes
                // this row of it.
                $(f if f == Format::$Type as u32 => unsafe {
                    pack_row::<crate::formats::$Type>(
                        rows, row, n_cols as usize, tile, tiles.add(offset), n_units, place % TILE_ROWS,
                    );
                },)*
                _ => {}
            }
        };
    }
    crate::for_each_format!(pack);
}

/// One row of one tile.
///
/// # Safety
/// As [`WeightFormat::pack`], for all units of the tile.
#[inline(always)]
unsafe fn pack_row<F: WeightFormat>(
    rows: *const u8,
    row: usize,
    n_cols: usize,
    tile: usize,
    to: *mut u8,
    n_units: usize,
    row_of_tile: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let row = rows.add(row * (n_cols / F::BLOCK_LEN * F::BLOCK_BYTES));
        for unit in 0..n_units {
            F::pack(row, tile * TILE_UNITS + unit, n_cols, to, Place { n_units, row: row_of_tile, unit });
        }
    }
}
