//! A warp's stream of tiles: a ring in shared memory that is kept full by asynchronous copies.

use super::{MatrixRef, Schedule};
use crate::formats::tile::SharedTile;
use cuda_std::pipeline::WarpCopies;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_idx_x, grid_dim_x};

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

/// The tiles that a warp works on in one slab of the vector, in order: turn by turn, tile by tile.
pub struct Stream<const N: usize> {
    deal: Deal<N>,
    share: Share,
    copies: WarpCopies,
    memory: DynamicShared<u32>,
    /// What is copied next: the tile, its slab's first and end, and the turn.
    tile: u32,
    first: u32,
    end: u32,
    turn: u32,
    /// The turn's quad and the bytes of its tiles.
    quad: *const u8,
    tile_bytes: u32,
    last_tile_bytes: u32,
}

impl<const N: usize> Stream<N> {
    /// The stream of a warp whose ring starts at word `ring`; nothing is under way yet.
    #[inline(always)]
    pub fn new(
        deal: Deal<N>,
        share: Share,
        memory: DynamicShared<u32>,
        ring: u32,
        schedule: Schedule,
    ) -> Self {
        Self {
            deal,
            share,
            copies: WarpCopies::new(memory, ring, schedule.stages, schedule.stage_words),
            memory,
            tile: 0,
            first: 0,
            end: 0,
            turn: 0,
            quad: core::ptr::null(),
            tile_bytes: 0,
            last_tile_bytes: 0,
        }
    }

    /// Begins with the slab that starts at tile `slab`: starts as many copies as the ring has places.
    ///
    /// # Safety
    /// The matrices must be as they say.
    #[inline(always)]
    pub unsafe fn fill(&mut self, slab: u32) {
        self.first = slab + self.share.first_tile;
        self.end = self.share.slab_end(slab);
        self.tile = self.first;
        self.turn = if self.first < self.end { self.share.first_turn } else { self.share.turns };
        self.find_quad();
        for ahead in 0..self.copies.stages() {
            // SAFETY: the caller's promise.
            unsafe { self.start(ahead) };
        }
    }

    /// Looks up the quad of the turn.
    #[inline(always)]
    fn find_quad(&mut self) {
        if self.turn < self.share.turns {
            let quad = self.deal.quad(self.turn);
            let matrix = self.deal.matrix(quad.part);
            let offset = u64::from(quad.number) * u64::from(matrix.quad_bytes);
            self.quad = matrix.tiles.wrapping_add(offset as usize);
            (self.tile_bytes, self.last_tile_bytes) = (matrix.tile_bytes, matrix.last_tile_bytes);
        }
    }

    /// Starts copying the next tile, if there is one, to the place `ahead` places after the current one.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn start(&mut self, ahead: u32) {
        if self.turn < self.share.turns {
            let is_last = self.tile + 1 == self.share.n_tiles;
            let bytes = if is_last { self.last_tile_bytes } else { self.tile_bytes };
            let offset = u64::from(self.tile) * u64::from(self.tile_bytes);
            // SAFETY: the tile is inside the matrix, and fits a place of the ring.
            unsafe { self.copies.start(ahead, self.quad.wrapping_add(offset as usize), bytes) };
            self.tile += self.share.tile_stride;
            if self.tile >= self.end {
                self.tile = self.first;
                self.turn += self.share.n_groups;
                self.find_quad();
            }
        }
    }

    /// Waits for the next tile and says where it is.
    #[inline(always)]
    pub fn next_tile(&self) -> SharedTile {
        self.copies.wait();
        SharedTile { memory: self.memory, start: self.copies.place() as usize }
    }

    /// Gives back the place of the tile that was worked on, and starts the next copy to it. All lanes must have read
    /// what is there, and met since.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    pub unsafe fn refill(&mut self) {
        // SAFETY: the caller's promise.
        unsafe { self.start(0) };
        self.copies.advance();
    }
}
