//! What a strip of tiles is like, and which units of the vector meet it.

use crate::formats::tile::TILE_UNITS;
use cuda_std::warp::lane_id;

/// What a strip is like.
#[derive(Clone, Copy, Debug)]
pub struct StripShape {
    /// Quads, 1 or 2.
    pub quads: u32,
    /// Units in a row of a quad.
    pub n_units: u32,
}

impl StripShape {
    /// Units in a row of the strip.
    #[inline(always)]
    fn strip_units(self) -> u32 {
        self.quads * self.n_units
    }

    /// Tiles.
    #[inline(always)]
    pub fn n_tiles(self) -> u32 {
        self.strip_units().div_ceil(TILE_UNITS as u32)
    }

    /// Units in a row of tile `tile`.
    #[inline(always)]
    pub(super) fn units_of(self, tile: u32) -> u32 {
        (self.strip_units() - tile * TILE_UNITS as u32).min(TILE_UNITS as u32)
    }

    /// The unit of the vector that this lane's unit of tile `tile` meets. Lanes without a unit take another one's: it meets no
    /// weights.
    #[inline(always)]
    pub(super) fn vector_unit(self, tile: u32) -> u32 {
        let unit = (tile * TILE_UNITS as u32 + lane_id()).min(self.strip_units() - 1);
        if unit < self.n_units { unit } else { unit - self.n_units }
    }

    /// Whether the two halves of a tile may be of two quads.
    #[inline(always)]
    pub(super) fn is_of_halves(self) -> bool {
        self.quads > 1
    }
}
