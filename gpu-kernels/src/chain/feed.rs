//! The tiles of a warp, from stage to stage, as they stream into its ring of shared memory.

use super::List;
use super::stage::StageRef;
use cuda_std::copy_queue::CopyQueue;
use cuda_std::thread::block_idx_x;

/// A warp's way through a block's tiles of a stage: of `n` warps it takes every `n`-th.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    /// Tiles before this one, of all of the block's.
    pub(super) number: u32,
    /// The quad it is of, counted from the block's first, and which of the quad's tiles it is.
    pub(super) turn: u32,
    pub(super) tile: u32,
    n_tiles: u32,
    step_quads: u32,
    step_tiles: u32,
}

impl Walk {
    /// The start of warp `warp`'s way.
    #[inline(always)]
    pub(super) fn new(stage: StageRef, warp: u32) -> Self {
        let n_tiles = stage.n_tiles();
        let turn = (warp * stage.per_n_tiles()) >> 16;
        Self {
            number: warp,
            turn,
            tile: warp - turn * n_tiles,
            n_tiles,
            step_quads: stage.step_quads(),
            step_tiles: stage.step_tiles(),
        }
    }

    /// Whether the tile is its quad's last.
    #[inline(always)]
    pub(super) fn is_last(self) -> bool {
        self.tile + 1 == self.n_tiles
    }

    /// Goes on to the warp's next tile.
    #[inline(always)]
    pub(super) fn advance(&mut self, n_warps: u32) {
        self.number += n_warps;
        self.turn += self.step_quads;
        self.tile += self.step_tiles;
        if self.tile >= self.n_tiles {
            self.tile -= self.n_tiles;
            self.turn += 1;
        }
    }
}

/// The copies of a warp's tiles, which run ahead of its work as far as the ring has room: through the ends of stages,
/// since weights depend on nothing.
pub(super) struct Feed {
    /// The tiles that are on their way or have come.
    pub(super) queue: CopyQueue,
    list: List,
    /// The stage that the next tile is of, and how many tiles the block has there.
    at: u32,
    n: u32,
    first_quad: u32,
    walk: Walk,
    warp: u32,
    n_warps: u32,
    /// The matrix.
    tiles: usize,
    quad_bytes: u32,
    tile_bytes: u32,
    last_tile_bytes: u32,
}

impl Feed {
    /// Starts with the tiles of stage `first`; nothing is under way yet.
    #[inline(always)]
    pub(super) fn new(queue: CopyQueue, list: List, first: u32, warp: u32, n_warps: u32) -> Self {
        let walk = Walk { number: 0, turn: 0, tile: 0, n_tiles: 1, step_quads: 0, step_tiles: 0 };
        Self {
            queue,
            list,
            // One before the first, even where that is none.
            at: first.wrapping_sub(1),
            n: 0,
            first_quad: 0,
            walk,
            warp,
            n_warps,
            tiles: 0,
            quad_bytes: 0,
            tile_bytes: 0,
            last_tile_bytes: 0,
        }
    }

    /// Starts as many copies as there is room for, of tiles of stages before `end`, which the list must hold.
    ///
    /// # Safety
    /// The stages must be as they say.
    #[inline(always)]
    pub(super) unsafe fn pump(&mut self, end: u32) {
        loop {
            while self.walk.number >= self.n {
                let next = self.at.wrapping_add(1);
                if next >= end {
                    return;
                }
                self.at = next;
                let stage = self.list.stage(next);
                // No tiles where nothing is multiplied.
                let (first_quad, turns) = stage.deal(block_idx_x());
                self.first_quad = first_quad;
                self.walk = Walk::new(stage, self.warp);
                self.n = turns * self.walk.n_tiles;
                self.look_up(stage);
            }
            let bytes = if self.walk.is_last() { self.last_tile_bytes } else { self.tile_bytes };
            if !self.queue.has_room(bytes / 4) {
                return;
            }
            let quad = u64::from(self.first_quad + self.walk.turn);
            let offset = quad * u64::from(self.quad_bytes) + u64::from(self.walk.tile * self.tile_bytes);
            // SAFETY: the tile is inside the matrix, and there is room for it.
            unsafe { self.queue.push(self.tiles.wrapping_add(offset as usize) as *const u8, bytes) };
            self.walk.advance(self.n_warps);
            let stage = self.list.stage(self.at);
            if stage.part(1).n_quads() > 0 {
                self.look_up(stage);
            }
        }
    }

    /// Looks up the matrix that the walk is at.
    #[inline(always)]
    fn look_up(&mut self, stage: StageRef) {
        let number = self.first_quad + self.walk.turn;
        let quad = stage.quad(number);
        let part = stage.part(quad.part);
        (self.tile_bytes, self.last_tile_bytes) = (part.tile_bytes(), part.last_tile_bytes());
        self.quad_bytes = part.quad_bytes();
        // Where the matrix would start if it had the quads of those before it.
        let before = u64::from(number - quad.number) * u64::from(self.quad_bytes);
        self.tiles = part.tiles().wrapping_sub(before as usize);
    }
}
