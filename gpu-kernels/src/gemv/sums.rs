//! The sums that the warps of a block leave, and that its last one adds up.

use super::strip::StripShape;
use crate::formats::tile::TILE_ROWS;
use cuda_std::shared::DynamicShared;
use cuda_std::warp::{WARP_SIZE, lane_id};

/// Half of a warp.
const HALF_WARP: u32 = WARP_SIZE / 2;
/// Neighbouring lanes that have a row's sum, of each half of a warp.
pub(super) const LANES_OF_ROW: u32 = HALF_WARP / TILE_ROWS as u32;
/// Sums of a row that are added up at a time.
const SUMS_AT_ONCE: u32 = 4;

impl StripShape {
    /// Lanes up to which there is something to store: where a warp's sums are of one quad both halves of it have them.
    #[inline(always)]
    pub(super) fn lanes_that_store(self) -> u32 {
        HALF_WARP * self.quads
    }

    /// Words for the sums of a quad: four for each tile, or of strips of two for each half of one, which are as many; filled up.
    #[inline(always)]
    pub(super) fn sums_words_of_quad(self) -> u32 {
        self.n_tiles().next_multiple_of(SUMS_AT_ONCE) * TILE_ROWS as u32
    }
}

/// The sums of a band's quads in shared memory, quad by quad, of each tile by tile, or half by half, and zeros up to a multiple
/// of four.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) memory: DynamicShared<u32>,
    /// The word at which they start.
    pub(super) at: u32,
    pub(super) strip: StripShape,
}

impl Sums {
    /// Where quad `quad` starts.
    #[inline(always)]
    pub(super) fn quad(self, quad: u32) -> u32 {
        self.at + quad * self.strip.sums_words_of_quad()
    }

    /// Writes the zeros of `n_quads` quads, by the lanes of a warp.
    #[inline(always)]
    pub(super) fn fill_up(self, n_quads: u32) {
        let n_tiles = self.strip.n_tiles();
        let missing = n_tiles.next_multiple_of(SUMS_AT_ONCE) - n_tiles;
        let mut quad = lane_id();
        while missing > 0 && quad < n_quads {
            for tile in n_tiles..n_tiles + missing {
                self.memory.set4((self.quad(quad) + tile * TILE_ROWS as u32) as usize, [0; 4]);
            }
            quad += WARP_SIZE;
        }
    }

    /// Where in a strip's sums the one goes that this lane has of tile `tile`, of one row of one quad.
    #[inline(always)]
    pub(super) fn place_in_strip(self, tile: u32) -> u32 {
        let n_tiles = self.strip.n_tiles();
        // Which of its quad's sums, of as many as the strip has tiles.
        let number =
            self.strip.quads * tile + if self.strip.is_of_halves() { lane_id() / HALF_WARP } else { 0 };
        let (quad, number) = if number < n_tiles { (0, number) } else { (1, number - n_tiles) };
        let row = lane_id() / LANES_OF_ROW % TILE_ROWS as u32;
        quad * self.strip.sums_words_of_quad() + number * TILE_ROWS as u32 + row
    }

    /// Leaves a sum at word `at`.
    #[inline(always)]
    pub(super) fn store(self, at: u32, sum: f32) {
        if lane_id().is_multiple_of(LANES_OF_ROW) && lane_id() < self.strip.lanes_that_store() {
            self.memory.set(at as usize, sum.to_bits());
        }
    }

    /// Adds up the sums of the quad that starts at word `at`.
    #[inline(always)]
    pub(super) fn add_up(self, at: u32) -> [f32; TILE_ROWS] {
        let of_tile =
            |tile: u32| self.memory.get4((at + tile * TILE_ROWS as u32) as usize).map(f32::from_bits);
        let add = |[a0, a1, a2, a3]: [f32; TILE_ROWS], [b0, b1, b2, b3]: [f32; TILE_ROWS]| {
            [a0 + b0, a1 + b1, a2 + b2, a3 + b3]
        };
        let four =
            |tile: u32| add(add(of_tile(tile), of_tile(tile + 1)), add(of_tile(tile + 2), of_tile(tile + 3)));
        let mut sums = four(0);
        let mut tile = SUMS_AT_ONCE;
        while tile < self.strip.n_tiles() {
            sums = add(sums, four(tile));
            tile += SUMS_AT_ONCE;
        }
        sums
    }
}
