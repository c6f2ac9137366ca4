//! A warp's stream of tiles: a ring in shared memory that is kept full by asynchronous copies.

use super::{MatrixRef, Schedule};
use crate::formats::tile::SharedTile;
use cuda_std::pipeline::WarpCopies;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::block_idx_x;

/// The matrices of a launch, one below the other, and which of their quads are this block's: neighbours, a *turn* each.
#[derive(Clone, Copy)]
pub struct Deal<const N: usize> {
    /// The matrices, at most three.
    pub matrices: [MatrixRef; N],
    /// The block's first quad, counted through all matrices.
    pub first_quad: u32,
    /// The block's quads.
    pub turns: u32,
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
    /// This block's quads.
    #[inline(always)]
    pub fn new(matrices: [MatrixRef; N], schedule: Schedule) -> Self {
        let block = block_idx_x();
        let with_more = schedule.blocks_with_more;
        Self {
            matrices,
            first_quad: block * schedule.turns + block.min(with_more),
            turns: schedule.turns + u32::from(block < with_more),
        }
    }

    /// The block's quad of turn `turn`.
    #[inline(always)]
    pub fn quad(&self, turn: u32) -> Quad {
        let mut number = self.first_quad + turn;
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

/// How a block's tiles are dealt out to its warps: each has a run of neighbours, as long as any other's or one longer.
///
/// Of each quad there are `slab_tiles` tiles at a time. In the last slab some of these may not exist; they count all
/// the same, so that a warp has the same part of each slab.
#[derive(Clone, Copy)]
pub struct Share {
    /// Tiles of a warp, and how many warps have one more.
    per_warp: u32,
    warps_with_more: u32,
    /// Tiles of a slab.
    pub slab_tiles: u32,
    /// Tiles of a quad.
    pub n_tiles: u32,
}

impl Share {
    /// For `n_warps` warps and `turns` quads of `n_tiles` tiles.
    #[inline(always)]
    pub fn new(n_warps: u32, turns: u32, slab_tiles: u32, n_tiles: u32) -> Self {
        let tiles = turns * slab_tiles;
        Self { per_warp: tiles / n_warps, warps_with_more: tiles % n_warps, slab_tiles, n_tiles }
    }

    /// The warp that has tile `tile`, counted through the block's turns.
    #[inline(always)]
    fn warp_of(self, tile: u32) -> u32 {
        let with_more = self.warps_with_more * (self.per_warp + 1);
        if tile < with_more {
            tile / (self.per_warp + 1)
        } else {
            self.warps_with_more + (tile - with_more) / self.per_warp
        }
    }

    /// The warps that share the quad of turn `turn`: the first, and in the upper half the last.
    #[inline(always)]
    pub fn warps_of(self, turn: u32) -> u32 {
        let first = turn * self.slab_tiles;
        self.warp_of(first) | self.warp_of(first + self.slab_tiles - 1) << 16
    }

    /// The way of warp `warp` through the slab that starts at tile `slab`.
    #[inline(always)]
    pub fn walk(self, warp: u32, slab: u32) -> Walk {
        let first = warp * self.per_warp + warp.min(self.warps_with_more);
        let (turn, tile) = (first / self.slab_tiles, first % self.slab_tiles);
        let end = (slab + self.slab_tiles).min(self.n_tiles);
        let mut walk = Walk {
            turn,
            tile: slab + tile,
            left: self.per_warp + u32::from(warp < self.warps_with_more),
            slab,
            end,
            missing: slab + self.slab_tiles - end,
        };
        if walk.tile >= end {
            walk.left = walk.left.saturating_sub(self.slab_tiles - tile);
            (walk.turn, walk.tile) = (turn + 1, slab);
        }
        walk
    }
}

/// Where a warp is on its way through its tiles.
#[derive(Clone, Copy)]
pub struct Walk {
    /// The turn.
    pub turn: u32,
    /// The tile of the turn's quad.
    pub tile: u32,
    /// Tiles left, this one counted.
    pub left: u32,
    /// The slab's first tile and the one after its last.
    slab: u32,
    end: u32,
    /// Tiles of the slab that do not exist.
    missing: u32,
}

impl Walk {
    /// Goes on to the next tile, and says whether it is the next quad's.
    #[inline(always)]
    pub fn advance(&mut self) -> bool {
        self.left -= 1;
        self.tile += 1;
        let is_next = self.tile == self.end;
        if is_next {
            self.left = self.left.saturating_sub(self.missing);
            self.tile = self.slab;
            self.turn += 1;
        }
        is_next
    }
}

/// The tiles that a warp works on in one slab of the vector, in order: turn by turn, tile by tile.
pub struct Stream<const N: usize> {
    deal: Deal<N>,
    share: Share,
    copies: WarpCopies,
    memory: DynamicShared<u32>,
    /// Where the copies are.
    walk: Walk,
    /// Where the next one starts.
    from: *const u8,
    /// Bytes of the matrix's tiles.
    tile_bytes: u32,
    last_tile_bytes: u32,
    /// Whether slabs leave out parts of each quad.
    in_slabs: bool,
}

impl<const N: usize> Stream<N> {
    /// The stream of warp `warp`, whose ring starts at word `ring`; nothing is under way yet.
    #[inline(always)]
    pub fn new(
        deal: Deal<N>,
        share: Share,
        warp: u32,
        memory: DynamicShared<u32>,
        ring: u32,
        schedule: Schedule,
        in_slabs: bool,
    ) -> Self {
        let mut stream = Self {
            deal,
            share,
            copies: WarpCopies::new(memory, ring, schedule.stages, schedule.stage_words),
            memory,
            walk: share.walk(warp, 0),
            from: core::ptr::null(),
            tile_bytes: 0,
            last_tile_bytes: 0,
            in_slabs,
        };
        stream.find_quad();
        stream
    }

    /// Starts as many copies as the ring has places.
    ///
    /// # Safety
    /// The matrices must be as they say.
    #[inline(always)]
    pub unsafe fn fill(&mut self) {
        for ahead in 0..self.copies.stages() {
            // SAFETY: the caller's promise.
            unsafe { self.start(ahead) };
        }
    }

    /// Begins anew with the slab that starts at tile `slab`.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    pub unsafe fn begin_slab(&mut self, warp: u32, slab: u32) {
        self.walk = self.share.walk(warp, slab);
        self.find_quad();
        // SAFETY: the caller's promise.
        unsafe { self.fill() };
    }

    /// Looks up where the walk is.
    #[inline(always)]
    fn find_quad(&mut self) {
        if self.walk.left > 0 {
            let quad = self.deal.quad(self.walk.turn);
            let matrix = self.deal.matrix(quad.part);
            let offset = u64::from(quad.number) * u64::from(matrix.quad_bytes)
                + u64::from(self.walk.tile) * u64::from(matrix.tile_bytes);
            self.from = matrix.tiles.wrapping_add(offset as usize);
            (self.tile_bytes, self.last_tile_bytes) = (matrix.tile_bytes, matrix.last_tile_bytes);
        }
    }

    /// Starts copying the next tile, if there is one, to the place `ahead` places after the current one.
    ///
    /// # Safety
    /// As [`fill`](Self::fill).
    #[inline(always)]
    unsafe fn start(&mut self, ahead: u32) {
        if self.walk.left > 0 {
            let is_last = self.walk.tile + 1 == self.share.n_tiles;
            let bytes = if is_last { self.last_tile_bytes } else { self.tile_bytes };
            // SAFETY: the tile is inside the matrix, and fits a place of the ring.
            unsafe { self.copies.start(ahead, self.from, bytes) };
            // The next quad starts where this one ends, unless it is another matrix's.
            self.from = self.from.wrapping_add(bytes as usize);
            let is_next = self.walk.advance();
            if is_next && (self.in_slabs || N > 1) {
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
