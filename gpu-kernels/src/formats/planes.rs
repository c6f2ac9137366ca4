//! Tiles of planes, of which a lane takes units of one row. Elsewhere it takes a unit of all four ([`super::tile`]).

use super::WeightFormat;
use super::tile::TILE_ROWS;
use cuda_std::codegen::no_sooner;
use cuda_std::shared::DynamicShared;

/// A format whose tiles are planes in which all units lie one after the other, the four rows of each side by side: a lane can take
/// units of one row from shared memory before it looks at them.
pub trait InPlanes: WeightFormat {
    /// What a lane reads of a unit.
    type Fetched: Copy + Default;

    /// Reads the lane's unit of those from unit `first` of the tile on, a multiple of the number of lanes that share the row. Where there is
    /// none it has factors of 0, and integers that may be those of what follows the tile.
    fn fetch(lane: LaneInTile, first: u32) -> Self::Fetched;

    /// The unit.
    fn unit(fetched: Self::Fetched) -> Self::Unit;
}

/// Where a lane finds its units of a row of a tile of planes, in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct LaneInTile {
    memory: DynamicShared<u32>,
    /// Units in each row of the tile.
    n_units: u32,
    row: u32,
    /// The lane, of those that share the row.
    member: u32,
    /// The word at which the tile starts, the lane's part of the index into a plane of 16 bytes a unit, and that of the row there.
    start: u32,
    unit_words: u32,
    row_words: u32,
}

impl LaneInTile {
    /// Of lane `member` of those that share row `row`, a power of two. The tile starts at word `start` and has `n_units` units in a row.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32, n_units: u32, row: u32, member: u32) -> Self {
        // Of them the compiler knows nothing: numbers that are added become part of the instructions that load.
        let row_words = no_sooner(4 * (row ^ (member / 2 % TILE_ROWS as u32)), member);
        let unit_words = no_sooner(start + 4 * TILE_ROWS as u32 * member, member);
        Self { memory, n_units, row, member, start, unit_words, row_words }
    }

    /// Sixteen bytes of plane `plane`, of those that have so many for each unit and begin the tile, with rows as
    /// [`Place::by_unit_swizzled`](super::Place::by_unit_swizzled) has them.
    #[inline(always)]
    pub(super) fn u32x4(self, plane: u32, first: u32) -> [u32; 4] {
        let row = self.row_words ^ (4 * (first / 2 % TILE_ROWS as u32));
        let unit = self.unit_words + 4 * TILE_ROWS as u32 * (plane * self.n_units + first);
        self.memory.get4((unit + row) as usize)
    }

    /// A word of a plane that starts `planes` planes of 16 bytes after the tile, or 0.
    #[inline(always)]
    pub(super) fn u32(self, planes: u32, first: u32) -> u32 {
        let plane = self.start + 4 * TILE_ROWS as u32 * planes * self.n_units;
        let at = no_sooner(plane + TILE_ROWS as u32 * self.member + self.row, self.member)
            + TILE_ROWS as u32 * first;
        if first + self.member < self.n_units { self.memory.get(at as usize) } else { 0 }
    }

    /// Likewise half a word.
    #[inline(always)]
    pub(super) fn u16(self, planes: u32, first: u32) -> u16 {
        let plane = 2 * (self.start + 4 * TILE_ROWS as u32 * planes * self.n_units);
        let at = no_sooner(plane + TILE_ROWS as u32 * self.member + self.row, self.member)
            + TILE_ROWS as u32 * first;
        if first + self.member < self.n_units { self.memory.view::<u16>().get(at as usize) } else { 0 }
    }
}
