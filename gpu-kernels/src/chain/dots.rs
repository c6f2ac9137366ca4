//! Products of a tile with a vector, for the formats that a model has.

use crate::activations::Activations;
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{F16, F32, Format, Place, Q4_1, Q4_K, Q6_K, Q8_0, WeightFormat};

/// Formats that a kernel knows: each more is code that takes room in the instruction caches.
pub trait Formats {
    /// The products of a tile's four rows with the vector's unit of this lane. The format is the same for all lanes of the
    /// warp.
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; TILE_ROWS];
}

/// Q4_K and Q6_K: files of the kinds Q4_K_S, Q4_K_M and Q6_K.
pub struct KQuants;

impl Formats for KQuants {
    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; TILE_ROWS] {
        if format == Format::Q4_K as u32 {
            at_once::<Q4_K, X>(tile, n_units, unit, x)
        } else {
            at_once::<Q6_K, X>(tile, n_units, unit, x)
        }
    }
}

/// Q4_1 and Q8_0.
pub struct Legacy;

impl Formats for Legacy {
    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; TILE_ROWS] {
        if format == Format::Q4_1 as u32 {
            at_once::<Q4_1, X>(tile, n_units, unit, x)
        } else {
            at_once::<Q8_0, X>(tile, n_units, unit, x)
        }
    }
}

/// All of them.
pub struct Any;

impl Formats for Any {
    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; TILE_ROWS] {
        macro_rules! dispatch {
            ($(($Type:ident, $name:ident))*) => {
                match format {
                    $(f if f == Format::$Type as u32 => row_by_row::<$Type, X>(tile, n_units, unit, x),)*
                    _ => [0.0; TILE_ROWS],
                }
            };
        }
        crate::for_each_format!(dispatch)
    }
}

/// The four rows written out: an array of closures' results would be filled in a loop, with `x` in local memory.
#[inline(always)]
fn at_once<F: WeightFormat, X: Activations>(
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    x: &X::Unit,
) -> [f32; TILE_ROWS] {
    [
        X::dot(&F::unpack(tile, Place { n_units, row: 0, unit }), x, 0.0),
        X::dot(&F::unpack(tile, Place { n_units, row: 1, unit }), x, 0.0),
        X::dot(&F::unpack(tile, Place { n_units, row: 2, unit }), x, 0.0),
        X::dot(&F::unpack(tile, Place { n_units, row: 3, unit }), x, 0.0),
    ]
}

/// Row by row, in a loop that the compiler cannot unroll since it does not know where it ends: all formats in one kernel
/// are much code as it is.
#[inline(always)]
fn row_by_row<F: WeightFormat, X: Activations>(
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    x: &X::Unit,
) -> [f32; TILE_ROWS] {
    let n_rows = if n_units <= TILE_UNITS { TILE_ROWS } else { 0 };
    let mut sums = [0.0; TILE_ROWS];
    let mut row = 0;
    while row < n_rows {
        // The rows' sums go round.
        sums = [sums[1], sums[2], sums[3], X::dot(&F::unpack(tile, Place { n_units, row, unit }), x, 0.0)];
        row += 1;
    }
    sums
}
