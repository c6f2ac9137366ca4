//! A warp's stream of tiles: a ring in shared memory that is kept full by asynchronous copies.

use super::{MatrixRef, Schedule};
use crate::formats::tile::{SharedTile, TILE_UNITS};
use cuda_std::pipeline::{commit_copies, copy_async_u32x4, wait_copies};
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_idx_x, grid_dim_x};
#[cfg(target_arch = "nvptx64")]
use cuda_std::warp::{FULL_MASK, sync_warp};
use cuda_std::warp::{WARP_SIZE, lane_id};

/// Most tiles that a warp has in its ring.
pub const MAX_STAGES: u32 = 8;

/// The matrices of a launch, one below the other, and how its quads are dealt out to the blocks: in turns, block `b`
/// of `n` has quad `b + n * turn`.
#[derive(Clone, Copy)]
pub struct Deal<const N: usize> {
    /// The matrices, at most three.
    pub matrices: [MatrixRef; N],
}

/// A quad: of which matrix, and its number there.
#[derive(Clone, Copy)]
pub struct Quad {
    /// The matrix.
    pub part: u32,
    /// Counted from the matrix's first.
    pub number: u32,
}

impl<const N: usize> Deal<N> {
    /// This block's quad of turn `turn`, if there is one.
    #[inline(always)]
    pub fn quad(&self, turn: u32) -> Option<Quad> {
        let mut number = block_idx_x() + grid_dim_x() * turn;
        let mut part = 0;
        // Written out: an array of arguments that is indexed at run time would be copied into local memory.
        if N > 1 && number >= self.matrices[0].n_quads {
            number -= self.matrices[0].n_quads;
            part = 1;
            if N > 2 && number >= self.matrices[1].n_quads {
                number -= self.matrices[1].n_quads;
                part = 2;
            }
        }
        (number < self.matrix(part).n_quads).then_some(Quad { part, number })
    }

    /// Matrix `part`.
    #[inline(always)]
    pub fn matrix(&self, part: u32) -> MatrixRef {
        match part {
            1 if N > 1 => self.matrices[1 % N],
            2 if N > 2 => self.matrices[2 % N],
            _ => self.matrices[0],
        }
    }
}

/// Which tile comes next: slab by slab of the vector, turn by turn, then the warp's tiles of the quad.
#[derive(Clone, Copy)]
struct Cursor {
    /// The first tile of the slab.
    slab: u32,
    turn: u32,
    /// Counted from the slab's first tile.
    tile: u32,
    /// Its place in the ring, in words of the shared memory.
    place: u32,
}

/// The tiles that a warp works on, in order.
pub struct Stream<const N: usize> {
    deal: Deal<N>,
    schedule: Schedule,
    memory: DynamicShared<u32>,
    n_units: u32,
    n_warps: u32,
    warp: u32,
    /// Where this warp's ring starts, in words.
    ring: u32,
    /// What is copied next.
    ahead: Cursor,
    /// What is worked on next.
    here: Cursor,
}

impl<const N: usize> Stream<N> {
    /// The stream of warp `warp` of `n_warps`, whose rings start at word `rings`; nothing is under way yet.
    #[inline(always)]
    pub fn new(
        deal: Deal<N>,
        schedule: Schedule,
        n_units: u32,
        memory: DynamicShared<u32>,
        rings: u32,
        warp: u32,
        n_warps: u32,
    ) -> Self {
        let ring = rings + warp * schedule.stages * schedule.stage_words;
        let start = Cursor {
            slab: 0,
            turn: warp / schedule.warps_per_quad,
            tile: warp % schedule.warps_per_quad,
            place: ring,
        };
        Self { deal, schedule, memory, n_units, n_warps, warp, ring, ahead: start, here: start }
    }

    /// Starts as many copies as the ring has places.
    ///
    /// # Safety
    /// The matrices must be as they say.
    #[inline(always)]
    pub unsafe fn fill(&mut self) {
        for _ in 0..self.schedule.stages {
            // SAFETY: the caller's promise.
            unsafe { self.refill() };
        }
    }

    /// Starts copying the next tile to the place that was worked on longest ago. All lanes must have read what is
    /// there, and met since.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    pub unsafe fn refill(&mut self) {
        let tile = self.ahead.slab + self.ahead.tile;
        if let Some(quad) = self.deal.quad(self.ahead.turn).filter(|_| self.is_in_vector(tile)) {
            let matrix = self.deal.matrix(quad.part);
            let full = (tile + 1) * TILE_UNITS as u32 <= self.n_units;
            let pieces = if full { matrix.tile_bytes } else { matrix.last_tile_bytes } / 16;
            let start =
                u64::from(quad.number) * u64::from(matrix.quad_bytes) + u64::from(tile * matrix.tile_bytes);
            let mut piece = lane_id();
            while piece < pieces {
                // SAFETY: the piece is inside the tile, which is inside the matrix, and starts at a multiple of 16.
                unsafe {
                    let from = matrix.tiles.add(start as usize).cast::<[u32; 4]>().add(piece as usize);
                    copy_async_u32x4(self.memory, (self.ahead.place + 4 * piece) as usize, from);
                }
                piece += WARP_SIZE;
            }
        }
        // Also where nothing was copied: groups are counted.
        commit_copies();
        self.ahead = self.after(self.ahead);
    }

    /// Waits for the next tile: its format, where it is, and the units in each of its rows. `None` where this warp has
    /// nothing to do while others have.
    #[inline(always)]
    pub fn next(&mut self) -> Option<(u32, SharedTile, u32)> {
        // How many groups may be pending is part of the instruction.
        match self.schedule.stages {
            2 => wait_copies::<1>(),
            3 => wait_copies::<2>(),
            4 => wait_copies::<3>(),
            5 => wait_copies::<4>(),
            6 => wait_copies::<5>(),
            7 => wait_copies::<6>(),
            _ => wait_copies::<7>(),
        }
        // Each lane has waited for its own pieces. On the emulator they came when the copy was started, and the warp
        // has met since.
        #[cfg(target_arch = "nvptx64")]
        sync_warp(FULL_MASK);
        let here = self.here;
        self.here = self.after(here);
        let tile = here.slab + here.tile;
        let quad = self.deal.quad(here.turn).filter(|_| self.is_in_vector(tile))?;
        let n_units = (self.n_units - tile * TILE_UNITS as u32).min(TILE_UNITS as u32);
        let source = SharedTile { memory: self.memory, start: here.place as usize };
        Some((self.deal.matrix(quad.part).format, source, n_units))
    }

    #[inline(always)]
    fn is_in_vector(&self, tile: u32) -> bool {
        tile * (TILE_UNITS as u32) < self.n_units
    }

    #[inline(always)]
    fn after(&self, mut at: Cursor) -> Cursor {
        let Schedule { warps_per_quad, steps, slab_tiles, stages, stage_words } = self.schedule;
        at.place += stage_words;
        if at.place == self.ring + stages * stage_words {
            at.place = self.ring;
        }
        at.tile += warps_per_quad;
        if at.tile >= slab_tiles {
            at.tile = self.warp % warps_per_quad;
            at.turn += self.n_warps / warps_per_quad;
            if at.turn >= steps * (self.n_warps / warps_per_quad) {
                at.turn = self.warp / warps_per_quad;
                at.slab += slab_tiles;
            }
        }
        at
    }
}
