//! The tiles of a warp, from stage to stage, as they stream into its ring of shared memory.

use super::stage::Stage;
use cuda_std::copy_queue::CopyQueue;
use cuda_std::thread::block_idx_x;

/// How a block's tiles are dealt out to its warps: each has a run of neighbours, as long as any other's or one longer.
#[derive(Clone, Copy)]
pub struct Share {
    per_warp: u32,
    warps_with_more: u32,
    n_tiles: u32,
}

impl Share {
    /// For `2^log_warps` warps and `turns` quads of `n_tiles` tiles.
    #[inline(always)]
    pub fn new(log_warps: u32, turns: u32, n_tiles: u32) -> Self {
        let tiles = turns * n_tiles;
        Self { per_warp: tiles >> log_warps, warps_with_more: tiles & ((1 << log_warps) - 1), n_tiles }
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
        let first = turn * self.n_tiles;
        self.warp_of(first) | self.warp_of(first + self.n_tiles - 1) << 16
    }

    /// The way of a warp through its tiles.
    #[inline(always)]
    pub fn walk(self, warp: u32) -> Walk {
        let first = warp * self.per_warp + warp.min(self.warps_with_more);
        Walk {
            turn: first / self.n_tiles,
            tile: first % self.n_tiles,
            left: self.per_warp + u32::from(warp < self.warps_with_more),
            n_tiles: self.n_tiles,
        }
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
    n_tiles: u32,
}

impl Walk {
    /// No way at all.
    pub const NOWHERE: Self = Self { turn: 0, tile: 0, left: 0, n_tiles: 1 };

    /// Whether the tile is the quad's last.
    #[inline(always)]
    pub fn is_last(self) -> bool {
        self.tile + 1 == self.n_tiles
    }

    /// Goes on to the next tile, and says whether it is the next quad's.
    #[inline(always)]
    pub fn advance(&mut self) -> bool {
        let is_next = self.is_last();
        self.left -= 1;
        self.tile += 1;
        if is_next {
            self.tile = 0;
            self.turn += 1;
        }
        is_next
    }
}

/// The copies of a warp's tiles, which run ahead of its work as far as the ring has room: through the ends of stages,
/// since weights depend on nothing.
pub struct Feed {
    /// The tiles that are on their way or have come.
    pub queue: CopyQueue,
    stages: *const Stage,
    /// The stage that the next tile is of, and the one after the last.
    at: u32,
    end: u32,
    warp: u32,
    log_warps: u32,
    walk: Walk,
    /// Where the next tile is, and how long the matrix's are.
    from: *const u8,
    tile_bytes: u32,
    last_tile_bytes: u32,
}

impl Feed {
    /// Starts with the tiles of stage `first`; nothing is under way yet.
    #[inline(always)]
    pub fn new(
        queue: CopyQueue,
        stages: *const Stage,
        [first, end]: [u32; 2],
        warp: u32,
        log_warps: u32,
    ) -> Self {
        Self {
            queue,
            stages,
            // One before the first, even where that is none.
            at: first.wrapping_sub(1),
            end,
            warp,
            log_warps,
            walk: Walk::NOWHERE,
            from: core::ptr::null(),
            tile_bytes: 0,
            last_tile_bytes: 0,
        }
    }

    /// Starts as many copies as there is room for.
    ///
    /// # Safety
    /// The stages must be as they say.
    #[inline(always)]
    pub unsafe fn pump(&mut self) {
        loop {
            while self.walk.left == 0 {
                if self.at.wrapping_add(1) >= self.end {
                    return;
                }
                self.at = self.at.wrapping_add(1);
                // SAFETY: the stage is one of the list.
                let stage = unsafe { &*self.stages.add(self.at as usize) };
                let (_, turns) = stage.deal(block_idx_x());
                if stage.is_product() && turns > 0 {
                    self.walk = Share::new(self.log_warps, turns, stage.n_tiles).walk(self.warp);
                    if self.walk.left > 0 {
                        self.locate(stage);
                    }
                }
            }
            let bytes = if self.walk.is_last() { self.last_tile_bytes } else { self.tile_bytes };
            if !self.queue.has_room(bytes / 4) {
                return;
            }
            // SAFETY: the tile is inside the matrix, and there is room for it.
            unsafe { self.queue.push(self.from, bytes) };
            // The next quad starts where this one ends, unless it is another matrix's.
            self.from = self.from.wrapping_add(bytes as usize);
            if self.walk.advance() && self.walk.left > 0 {
                // SAFETY: as above.
                let stage = unsafe { &*self.stages.add(self.at as usize) };
                if stage.parts[1].n_quads > 0 {
                    self.locate(stage);
                }
            }
        }
    }

    /// Looks up where the walk is.
    #[inline(always)]
    fn locate(&mut self, stage: &Stage) {
        let (first_quad, _) = stage.deal(block_idx_x());
        let quad = stage.quad(first_quad + self.walk.turn);
        let part = &stage.parts[quad.part as usize];
        let offset = u64::from(quad.number) * u64::from(part.quad_bytes)
            + u64::from(self.walk.tile) * u64::from(part.tile_bytes);
        self.from = part.tiles.wrapping_add(offset as usize);
        (self.tile_bytes, self.last_tile_bytes) = (part.tile_bytes, part.last_tile_bytes);
    }
}
