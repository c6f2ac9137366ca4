//! A warp's stream of tiles: a ring in shared memory that is kept full by asynchronous copies.

use super::{MatrixRef, Schedule};
use crate::formats::tile::{SharedTile, TILE_UNITS};
use cuda_std::pipeline::{commit_copies, copy_async_u32x4, wait_copies};
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_idx_x, grid_dim_x};
#[cfg(target_arch = "nvptx64")]
use cuda_std::warp::{FULL_MASK, sync_warp};
use cuda_std::warp::{WARP_SIZE, lane_id};

/// How many tiles a warp can have in its ring, most first.
pub const STAGES: [u32; 3] = [8, 4, 2];

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
    /// This block's quad of turn `turn`, which must be one of [`Schedule::turns_of_block`].
    #[inline(always)]
    pub fn quad(&self, turn: u32) -> Quad {
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
        Quad { part, number }
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

/// A warp's share of the work: every `n_groups`-th turn of its block, and of each quad every `warps_per_quad`-th tile.
#[derive(Clone, Copy)]
pub struct Share {
    /// The first turn, and how far apart they are.
    pub first_turn: u32,
    /// Groups of warps in the block.
    pub n_groups: u32,
    /// Turns of the block.
    pub turns: u32,
    /// The first tile of each slab.
    pub first_tile: u32,
    /// How far apart tiles are.
    pub tile_stride: u32,
    /// Tiles of a slab.
    pub slab_tiles: u32,
    /// Tiles of a quad.
    pub n_tiles: u32,
}

impl Share {
    /// The end of the slab that starts at tile `slab`.
    #[inline(always)]
    pub fn slab_end(&self, slab: u32) -> u32 {
        (slab + self.slab_tiles).min(self.n_tiles)
    }
}

/// The tiles that a warp works on, in order: slab by slab of the vector, turn by turn, tile by tile.
pub struct Stream<const N: usize> {
    deal: Deal<N>,
    share: Share,
    stages: u32,
    stage_words: u32,
    n_units: u32,
    memory: DynamicShared<u32>,
    /// Where this warp's ring starts, in words.
    ring: u32,
    /// The place in the ring of what is worked on next.
    here: u32,
    /// The same of what is copied next, and which tile that is.
    ahead: u32,
    slab: u32,
    turn: u32,
    tile: u32,
}

impl<const N: usize> Stream<N> {
    /// The stream of a warp whose ring starts at word `ring`; nothing is under way yet.
    #[inline(always)]
    pub fn new(
        deal: Deal<N>,
        share: Share,
        schedule: Schedule,
        n_units: u32,
        memory: DynamicShared<u32>,
        ring: u32,
    ) -> Self {
        let Schedule { stages, stage_words, .. } = schedule;
        let mut stream = Self {
            deal,
            share,
            stages,
            stage_words,
            n_units,
            memory,
            ring,
            here: ring,
            ahead: ring,
            slab: 0,
            turn: share.first_turn,
            tile: share.first_tile,
        };
        if share.first_turn >= share.turns {
            stream.slab = share.n_tiles;
        }
        stream
    }

    /// Starts as many copies as the ring has places.
    ///
    /// # Safety
    /// The matrices must be as they say.
    #[inline(always)]
    pub unsafe fn fill(&mut self) {
        for _ in 0..self.stages {
            // SAFETY: the caller's promise.
            unsafe { self.refill() };
        }
    }

    /// Starts copying the next tile, if there is one, to the place that was worked on longest ago. All lanes must have
    /// read what is there, and met since.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    pub unsafe fn refill(&mut self) {
        if self.slab < self.share.n_tiles {
            // SAFETY: the caller's promise.
            unsafe { self.copy() };
            self.ahead = self.after(self.ahead);
            self.tile += self.share.tile_stride;
            if self.tile >= self.share.slab_end(self.slab) {
                self.turn += self.share.n_groups;
                if self.turn >= self.share.turns {
                    self.turn = self.share.first_turn;
                    self.slab += self.share.slab_tiles;
                    if self.slab + self.share.first_tile >= self.share.n_tiles {
                        self.slab = self.share.n_tiles;
                    }
                }
                self.tile = self.slab + self.share.first_tile;
            }
        }
        // Also where nothing was copied: groups are counted.
        commit_copies();
    }

    /// Starts the copies of one tile, 16 bytes each.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn copy(&self) {
        let quad = self.deal.quad(self.turn);
        let matrix = self.deal.matrix(quad.part);
        let is_whole = (self.tile + 1) * TILE_UNITS as u32 <= self.n_units;
        let bytes = if is_whole { matrix.tile_bytes } else { matrix.last_tile_bytes };
        let start = u64::from(quad.number) * u64::from(matrix.quad_bytes)
            + u64::from(self.tile) * u64::from(matrix.tile_bytes);
        let from = matrix.tiles.wrapping_add(start as usize);
        let mut at = lane_id() * 16;
        while at < bytes {
            // SAFETY: the piece is inside the tile, which is inside the matrix, and starts at a multiple of 16.
            unsafe {
                let piece = from.add(at as usize).cast();
                copy_async_u32x4(self.memory, (self.ahead + at / 4) as usize, piece);
            }
            at += WARP_SIZE * 16;
        }
    }

    /// Waits for the next tile and says where it is.
    #[inline(always)]
    pub fn next_tile(&mut self) -> SharedTile {
        // How many groups may be pending is part of the instruction.
        match self.stages {
            2 => wait_copies::<1>(),
            4 => wait_copies::<3>(),
            _ => wait_copies::<7>(),
        }
        // Each lane has waited for its own pieces. On the emulator they came when the copy was started, and the warp
        // has met since.
        #[cfg(target_arch = "nvptx64")]
        sync_warp(FULL_MASK);
        let tile = SharedTile { memory: self.memory, start: self.here as usize };
        self.here = self.after(self.here);
        tile
    }

    /// The place in the ring after this one.
    #[inline(always)]
    fn after(&self, place: u32) -> u32 {
        let next = place + self.stage_words;
        if next == self.ring + self.stages * self.stage_words { self.ring } else { next }
    }
}
