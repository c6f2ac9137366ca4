//! Tiles: how a matrix lies in device memory.
//!
//! Rows are taken four at a time (a *quad*); the last ones are filled up with zeros. What lies together is a *strip*: a quad,
//! or, where its rows end in half a tile, two, packed as if the second one's rows went on where the first one's end; so
//! no tile is a half. A strip is a sequence of tiles of 32 units, the last of what is left, each starting at a multiple of
//! 16 bytes. A warp works on a tile at a time, a lane on one unit of each of the four rows: so the activations are read once
//! for four rows, and a tile of Q4_K is 2,304 consecutive bytes to stream.

use super::{Place, WeightFormat};
use core::cell::Cell;
use cuda_std::memory::{ld_stream_u16, ld_stream_u32, ld_stream_u32x2, ld_stream_u32x4};
use cuda_std::shared::DynamicShared;

/// Rows in a tile.
pub const TILE_ROWS: usize = 4;
/// Units in each row of a tile, but for the last tile of a row.
pub const TILE_UNITS: usize = 32;
/// Units in half of a tile, where the second quad of a strip begins.
pub const HALF_UNITS: usize = TILE_UNITS / 2;
/// Tiles start at multiples of this many bytes.
pub const ALIGNMENT: usize = 16;

/// Bytes of a tile of `n_units` units, rounded up to whole loads.
#[inline(always)]
pub fn aligned_bytes<F: WeightFormat>(n_units: usize) -> usize {
    F::tile_bytes(n_units).next_multiple_of(ALIGNMENT)
}

/// Quads in a strip of a matrix with `n_units` units in a row. In long rows half a tile is little, and two quads are much.
pub const fn strip_quads<F: WeightFormat>(n_units: usize) -> usize {
    let is_short = n_units < 4 * TILE_UNITS;
    if F::IN_STRIPS_OF_TWO && is_short && n_units % TILE_UNITS == HALF_UNITS { 2 } else { 1 }
}

/// Where the units of a matrix are.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Units in a row.
    pub n_units: usize,
    /// Quads in a strip, 1 or 2.
    pub strip_quads: usize,
    /// Bytes of a tile of 32 units.
    pub tile_bytes: usize,
    /// Bytes of the last tile of a strip, where it is shorter.
    pub last_tile_bytes: usize,
}

impl Geometry {
    /// Units in a row of a strip.
    #[inline(always)]
    fn strip_units(self) -> usize {
        self.strip_quads * self.n_units
    }

    /// Tiles in a strip.
    #[inline(always)]
    pub fn n_tiles(self) -> usize {
        self.strip_units().div_ceil(TILE_UNITS)
    }

    /// Bytes of tile `tile`.
    #[inline(always)]
    pub fn bytes_of(self, tile: usize) -> usize {
        if (tile + 1) * TILE_UNITS <= self.strip_units() { self.tile_bytes } else { self.last_tile_bytes }
    }

    /// Bytes of a strip.
    #[inline(always)]
    pub fn strip_bytes(self) -> usize {
        let n_units = self.strip_units();
        let short = if n_units.is_multiple_of(TILE_UNITS) { 0 } else { self.last_tile_bytes };
        n_units / TILE_UNITS * self.tile_bytes + short
    }

    /// Where the tile of unit `unit` of row `row` starts, in bytes, and the unit's place in it.
    #[inline(always)]
    pub fn find(self, row: usize, unit: usize) -> (usize, Place) {
        let quad = row / TILE_ROWS;
        let (strip, unit) = (quad / self.strip_quads, quad % self.strip_quads * self.n_units + unit);
        let tile = unit / TILE_UNITS;
        let n_units = TILE_UNITS.min(self.strip_units() - tile * TILE_UNITS);
        let place = Place { n_units, row: row % TILE_ROWS, unit: unit % TILE_UNITS };
        (strip * self.strip_bytes() + tile * self.tile_bytes, place)
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
    /// The byte at which the tile starts, a multiple of [`ALIGNMENT`].
    pub start: u32,
}

impl TileSource for SharedTile {
    #[inline(always)]
    fn u16(self, offset: usize) -> u16 {
        self.memory.view::<u16>().get_at(self.start + offset as u32)
    }

    #[inline(always)]
    fn u32(self, offset: usize) -> u32 {
        self.memory.get_at(self.start + offset as u32)
    }

    #[inline(always)]
    fn u32x2(self, offset: usize) -> [u32; 2] {
        let both = self.memory.view::<u64>().get_at(self.start + offset as u32);
        [both as u32, (both >> 32) as u32]
    }

    #[inline(always)]
    fn u32x4(self, offset: usize) -> [u32; 4] {
        self.memory.get4_at(self.start + offset as u32)
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

/// Most words of a unit that [`Fetched`] has room for: all formats but those of floating-point numbers.
pub const FETCHED_WORDS: usize = 12;

/// A unit on its way from device memory: what its format reads of the tile, word by word, none of it looked at yet. So
/// what is done between [`fetch`](Self::fetch) and [`unpack`](Self::unpack) does not wait for memory.
#[derive(Clone, Copy, Debug)]
pub struct Fetched {
    words: [u32; FETCHED_WORDS],
}

impl Fetched {
    /// Asks for the unit at `place` of `tile`. A format reads the same words in the same order, whatever they hold.
    #[inline(always)]
    pub fn fetch<F: WeightFormat>(tile: DeviceTile, place: Place) -> Self {
        let words = [const { Cell::new(0) }; FETCHED_WORDS];
        let n = Cell::new(0);
        // What it makes of them is of no interest: the compiler leaves it out.
        let _ = F::unpack(Recorder { tile, words: &words, n: &n }, place);
        Self { words: words.map(|word| word.get()) }
    }

    /// The unit, of the same format and place.
    #[inline(always)]
    pub fn unpack<F: WeightFormat>(self, place: Place) -> F::Unit {
        F::unpack(Replay { words: &self.words, n: &Cell::new(0) }, place)
    }
}

/// Keeps what is read.
#[derive(Clone, Copy)]
struct Recorder<'a> {
    tile: DeviceTile,
    words: &'a [Cell<u32>; FETCHED_WORDS],
    n: &'a Cell<usize>,
}

impl Recorder<'_> {
    #[inline(always)]
    fn keep(self, word: u32) -> u32 {
        let n = self.n.replace(self.n.get() + 1);
        self.words[n].set(word);
        word
    }
}

impl TileSource for Recorder<'_> {
    #[inline(always)]
    fn u16(self, offset: usize) -> u16 {
        self.keep(self.tile.u16(offset).into()) as u16
    }

    #[inline(always)]
    fn u32(self, offset: usize) -> u32 {
        self.keep(self.tile.u32(offset))
    }

    #[inline(always)]
    fn u32x2(self, offset: usize) -> [u32; 2] {
        let [a, b] = self.tile.u32x2(offset);
        [self.keep(a), self.keep(b)]
    }

    #[inline(always)]
    fn u32x4(self, offset: usize) -> [u32; 4] {
        let [a, b, c, d] = self.tile.u32x4(offset);
        [self.keep(a), self.keep(b), self.keep(c), self.keep(d)]
    }
}

/// Gives what was kept.
#[derive(Clone, Copy)]
struct Replay<'a> {
    words: &'a [u32; FETCHED_WORDS],
    n: &'a Cell<usize>,
}

impl Replay<'_> {
    #[inline(always)]
    fn next(self) -> u32 {
        self.words[self.n.replace(self.n.get() + 1)]
    }
}

impl TileSource for Replay<'_> {
    #[inline(always)]
    fn u16(self, _offset: usize) -> u16 {
        self.next() as u16
    }

    #[inline(always)]
    fn u32(self, _offset: usize) -> u32 {
        self.next()
    }

    #[inline(always)]
    fn u32x2(self, _offset: usize) -> [u32; 2] {
        [self.next(), self.next()]
    }

    #[inline(always)]
    fn u32x4(self, _offset: usize) -> [u32; 4] {
        [self.next(), self.next(), self.next(), self.next()]
    }
}
