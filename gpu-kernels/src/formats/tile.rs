//! Tiles: how a matrix lies in device memory.
//!
//! Rows are taken sixteen at a time (a *band*); the last ones are filled up with zeros. A band is a sequence of tiles of
//! eight units, the last of what is left, each starting at a multiple of 16 bytes. A warp multiplies a tile at a time; a
//! tile of Q4_K is 2,304 consecutive bytes to stream.
//!
//! Tensor cores spread the rows of a unit over a warp: the four lanes of group `lane / 4` have rows `group` and
//! `group + 8`, and member `lane % 4` of these columns `8 * member` to `8 * member + 7`. So a
//! unit of bytes is four words a lane ([`row_word`]). Nibbles are stored in pairs of units, the even one below, the odd
//! one above: four words a lane again.

use super::{UNIT, UNIT_WORDS};
use crate::activations::Q8_1Tile;
use cuda_std::memory::{ld_stream_u16, ld_stream_u32, ld_stream_u32x2, ld_stream_u32x4};
use cuda_std::shared::DynamicShared;
use cuda_std::tensor::{UNITS, mma_units};

/// Rows in a tile.
pub const TILE_ROWS: usize = 16;
/// Units in each row of a tile, but for the last tile of a row.
pub const TILE_UNITS: usize = UNITS;
/// Bytes of a unit of bytes.
pub const UNIT_BYTES: usize = TILE_ROWS * UNIT;
/// Bytes of a pair of units of nibbles.
pub const PAIR_BYTES: usize = UNIT_BYTES;

/// The low nibble of each byte.
const LOW: u32 = 0x0f0f_0f0f;

/// A unit's place in a tile.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Units in each row of the tile, at most [`TILE_UNITS`].
    pub n_units: usize,
    /// The row.
    pub row: usize,
    /// The unit in its row.
    pub unit: usize,
}

impl Place {
    /// The unit's number in plane `plane`, of planes that hold the tile's units row by row.
    #[inline(always)]
    pub fn plane(self, plane: usize) -> usize {
        (plane * TILE_ROWS + self.row) * self.n_units + self.unit
    }
}

/// Which word of a unit of bytes holds word `word` of row `row`: four words of a lane are neighbours.
#[inline(always)]
pub fn row_word(row: usize, word: usize) -> usize {
    (row % 8 * 4 + word / 2) * 4 + word % 2 * 2 + row / 8
}

/// Writes a row of a pair of units of nibbles: `words` as [`row_word`] counts them, the even unit below.
///
/// # Safety
/// The pair must be inside the tile at `tile`, and nobody else may write this row of it.
#[inline(always)]
pub unsafe fn pack_nibbles(tile: *mut u8, pair: usize, row: usize, words: [u32; UNIT_WORDS]) {
    for (i, word) in words.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { *tile.add(pair * PAIR_BYTES + row_word(row, i) * 4).cast() = word };
    }
}

/// The integers of a unit of nibbles, lowest column in the lowest byte.
#[inline(always)]
pub fn nibbles<S: TileSource>(tile: S, Place { row, unit, .. }: Place) -> [i32; UNIT_WORDS] {
    core::array::from_fn(|i| {
        (tile.u32(unit / 2 * PAIR_BYTES + row_word(row, i) * 4) >> (unit % 2 * 4) & LOW) as i32
    })
}

/// A lane's words of each pair of units of nibbles, zeros for those that do not exist.
#[inline(always)]
pub fn nibble_words<S: TileSource>(tile: S, n_pairs: usize, lane: usize) -> [[u32; 4]; UNITS / 2] {
    let mut words = [[0; 4]; UNITS / 2];
    for pair in 0..UNITS / 2 {
        if pair < n_pairs {
            words[pair] = tile.u32x4(pair * PAIR_BYTES + lane * 16);
        }
    }
    words
}

/// The products of nibbles with the same columns of a vector, times the vector's factors, as [`mma_units`] gives them.
#[inline(always)]
pub fn nibble_sums(words: [[u32; 4]; UNITS / 2], x: &Q8_1Tile) -> [f32; 4] {
    let mut rows = [[0; 4]; UNITS];
    for pair in 0..UNITS / 2 {
        let [w0, w1, w2, w3] = words[pair];
        rows[2 * pair] = [w0 & LOW, w1 & LOW, w2 & LOW, w3 & LOW];
        // Odd units stay where they are, sixteen times their value.
        rows[2 * pair + 1] = [w0 & !LOW, w1 & !LOW, w2 & !LOW, w3 & !LOW];
    }
    let [q0, q1, q2, q3] = mma_units::<u8>(rows, x.quants);
    let (even, odd) = (x.d[0], x.d[1] * (1.0 / 16.0));
    [even * q0 as f32, odd * q1 as f32, even * q2 as f32, odd * q3 as f32]
}

/// Where tiles and bands of a matrix start.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Units in a row.
    pub n_units: usize,
    /// Bytes of a tile of 32 units.
    pub tile_bytes: usize,
    /// Bytes of the last tile of a row, where it is shorter.
    pub last_tile_bytes: usize,
}

impl Geometry {
    /// Tiles in a band.
    #[inline(always)]
    pub fn n_tiles(self) -> usize {
        self.n_units.div_ceil(TILE_UNITS)
    }

    /// Units in each row of tile `tile`.
    #[inline(always)]
    pub fn units_of(self, tile: usize) -> usize {
        TILE_UNITS.min(self.n_units - tile * TILE_UNITS)
    }

    /// Bytes of tile `tile`.
    #[inline(always)]
    pub fn bytes_of(self, tile: usize) -> usize {
        if (tile + 1) * TILE_UNITS <= self.n_units { self.tile_bytes } else { self.last_tile_bytes }
    }

    /// Bytes of a band.
    #[inline(always)]
    pub fn band_bytes(self) -> usize {
        let short = if self.n_units.is_multiple_of(TILE_UNITS) { 0 } else { self.last_tile_bytes };
        self.n_units / TILE_UNITS * self.tile_bytes + short
    }

    /// Where tile `tile` of band `band` starts, in bytes.
    #[inline(always)]
    pub fn offset(self, band: usize, tile: usize) -> usize {
        band * self.band_bytes() + tile * self.tile_bytes
    }
}

/// A tile's bytes, in shared or in device memory. Offsets are multiples of the size of what is read.
pub trait TileSource: Copy {
    /// Two bytes.
    fn u16(self, offset: usize) -> u16;
    /// Four bytes.
    fn u32(self, offset: usize) -> u32;
    /// Eight bytes.
    fn u32x2(self, offset: usize) -> [u32; 2];
    /// Sixteen bytes.
    fn u32x4(self, offset: usize) -> [u32; 4];
}

/// A tile in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct SharedTile {
    /// The launch's shared memory.
    pub memory: DynamicShared<u32>,
    /// Where the tile starts, in words; a multiple of 4.
    pub start: usize,
}

impl TileSource for SharedTile {
    #[inline(always)]
    fn u16(self, offset: usize) -> u16 {
        self.memory.view::<u16>().get(2 * self.start + offset / 2)
    }

    #[inline(always)]
    fn u32(self, offset: usize) -> u32 {
        self.memory.get(self.start + offset / 4)
    }

    #[inline(always)]
    fn u32x2(self, offset: usize) -> [u32; 2] {
        let both = self.memory.view::<u64>().get(self.start / 2 + offset / 8);
        [both as u32, (both >> 32) as u32]
    }

    #[inline(always)]
    fn u32x4(self, offset: usize) -> [u32; 4] {
        self.memory.get4(self.start + offset / 4)
    }
}

/// A tile in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTile {
    start: *const u8,
}

impl DeviceTile {
    /// The tile at `start`.
    ///
    /// # Safety
    /// All of the tile must be there, and stay unchanged.
    #[inline(always)]
    pub unsafe fn at(start: *const u8) -> Self {
        Self { start }
    }
}

impl TileSource for DeviceTile {
    #[inline(always)]
    fn u16(self, offset: usize) -> u16 {
        // SAFETY: inside the tile, by the promise of `at`.
        unsafe { ld_stream_u16(self.start.add(offset).cast()) }
    }

    #[inline(always)]
    fn u32(self, offset: usize) -> u32 {
        // SAFETY: inside the tile, by the promise of `at`.
        unsafe { ld_stream_u32(self.start.add(offset).cast()) }
    }

    #[inline(always)]
    fn u32x2(self, offset: usize) -> [u32; 2] {
        // SAFETY: inside the tile, by the promise of `at`.
        unsafe { ld_stream_u32x2(self.start.add(offset).cast()) }
    }

    #[inline(always)]
    fn u32x4(self, offset: usize) -> [u32; 4] {
        // SAFETY: inside the tile, by the promise of `at`.
        unsafe { ld_stream_u32x4(self.start.add(offset).cast()) }
    }
}
