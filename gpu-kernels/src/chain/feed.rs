//! What a warp works on, stage after stage, as it streams into the warp's ring of shared memory: tiles of matrices, keys
//! and values.

use super::List;
use super::attention::{Item, n_items};
use super::stage::{Kind, StageRef};
use cuda_std::pipeline::WarpCopies;
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// The copies of a warp's pieces, which run ahead of its work as far as the ring has room: through the ends of stages,
/// since weights depend on nothing, and keys and values only on earlier steps.
pub(super) struct Feed {
    /// The ring, and how many of its places have no piece.
    copies: WarpCopies,
    n_free: u32,
    list: List,
    warp: u32,
    n_warps: u32,
    /// The step's position.
    position: u32,
    /// The stage that the next piece is of, and how many pieces the warp still has there.
    at: u32,
    left: u32,
    /// The next piece: where it is, the second half of one that has two, and the bytes of either.
    from: *const u8,
    second: *const u8,
    bytes: u32,
    /// Of a product: the band and the tile, the band's tiles, the bytes of tiles, and whether there are more matrices.
    band: u32,
    tile: u32,
    n_tiles: u32,
    tile_bytes: u32,
    last_tile_bytes: u32,
    has_parts: bool,
    /// Of attention: the next item, all items, bytes of a position, and the item's positions from the next piece on.
    item: u32,
    n_items: u32,
    row_bytes: u32,
    positions: u32,
    /// How far the warp's pieces are apart, in positions, and how many a piece has.
    step: u32,
    chunk: u32,
}

impl Feed {
    /// Starts with stage `first`; nothing is under way yet.
    #[inline(always)]
    pub(super) fn new(copies: WarpCopies, list: List, first: u32, warp: u32, n_warps: u32, position: u32) -> Self {
        Self {
            copies,
            n_free: copies.stages(),
            list,
            warp,
            n_warps,
            position,
            // One before the first, even where that is none.
            at: first.wrapping_sub(1),
            left: 0,
            from: core::ptr::null(),
            second: core::ptr::null(),
            bytes: 0,
            band: 0,
            tile: 0,
            n_tiles: 0,
            tile_bytes: 0,
            last_tile_bytes: 0,
            has_parts: false,
            item: 0,
            n_items: 0,
            row_bytes: 0,
            positions: 0,
            step: 0,
            chunk: 0,
        }
    }

    /// Starts as many copies as there are places free, of stages before `end`, which the list must hold.
    ///
    /// # Safety
    /// The stages must be as they say.
    #[inline(always)]
    pub(super) unsafe fn pump(&mut self, end: u32) {
        while self.n_free > 0 {
            while self.left == 0 {
                if self.item < self.n_items {
                    self.begin_item(self.list.stage(self.at));
                    continue;
                }
                let next = self.at.wrapping_add(1);
                if next >= end {
                    return;
                }
                self.at = next;
                self.begin(self.list.stage(next));
            }
            // SAFETY: the piece is inside the matrix or the cache, and a place is free.
            unsafe {
                self.copies.start(self.copies.stages() - self.n_free, self.from, self.second, self.bytes);
            }
            self.n_free -= 1;
            self.left -= 1;
            if self.second.is_null() {
                self.next_tile();
            } else {
                let skipped = (self.step * self.row_bytes) as usize;
                self.from = self.from.wrapping_add(skipped);
                self.second = self.second.wrapping_add(skipped);
                self.positions = self.positions.saturating_sub(self.step);
                self.bytes = self.positions.min(self.chunk) * self.row_bytes;
            }
        }
    }

    /// Waits for the next piece, and gives the word at which it starts: all lanes can read it then.
    #[inline(always)]
    pub(super) fn front(&self) -> u32 {
        self.copies.wait();
        self.copies.place()
    }

    /// As [`front`](Self::front), of the next two.
    #[inline(always)]
    pub(super) fn front_two(&self) -> (u32, u32) {
        self.copies.wait();
        self.copies.wait_next();
        (self.copies.place(), self.copies.next_place())
    }

    /// As [`pop`](Self::pop), of two pieces.
    ///
    /// # Safety
    /// As [`pump`](Self::pump).
    #[inline(always)]
    pub(super) unsafe fn pop_two(&mut self, end: u32) {
        self.copies.advance();
        self.copies.advance();
        self.n_free += 2;
        // Most of the time two tiles take their places that are like those before: what `pump` would do, without looking
        // left or right.
        if self.n_free == 2 && self.left >= 2 && self.tile + 3 < self.n_tiles {
            // SAFETY: as in `pump`.
            unsafe {
                let (stages, bytes) = (self.copies.stages(), self.bytes);
                self.copies.start(stages - 2, self.from, core::ptr::null(), bytes);
                self.from = self.from.wrapping_add(bytes as usize);
                self.copies.start(stages - 1, self.from, core::ptr::null(), bytes);
                self.from = self.from.wrapping_add(bytes as usize);
            }
            self.left -= 2;
            self.tile += 2;
            self.n_free = 0;
        } else {
            // SAFETY: the caller's promise.
            unsafe { self.pump(end) };
        }
    }

    /// Gives back the place of the piece that was worked on, and pumps. All lanes must have read what is there, and met
    /// since.
    ///
    /// # Safety
    /// As [`pump`](Self::pump).
    #[inline(always)]
    pub(super) unsafe fn pop(&mut self, end: u32) {
        self.copies.advance();
        self.n_free += 1;
        // SAFETY: the caller's promise.
        unsafe { self.pump(end) };
    }

    /// Finds the warp's first tile of a stage that multiplies, or the block's first item of attention.
    #[inline(always)]
    fn begin(&mut self, stage: StageRef) {
        let block = block_idx_x();
        if stage.kind() == Kind::Attention as u32 {
            (self.item, self.n_items) = (block, n_items(stage.heads(), self.position + 1));
        } else if stage.kind() != Kind::Combine as u32 {
            self.n_items = 0;
            let (first_band, turns) = stage.deal(block);
            if turns > 0 {
                let (first, n) = stage.share(block).of(self.warp);
                let turn = stage.turn_of(first);
                (self.left, self.n_tiles) = (n, stage.n_tiles());
                (self.band, self.tile) = (first_band + turn, first - turn * self.n_tiles);
                self.second = core::ptr::null();
                self.has_parts = stage.part(1).n_bands() > 0;
                if n > 0 {
                    self.look_up(stage);
                }
                if !self.has_parts && self.tile_bytes == self.last_tile_bytes {
                    // All bands are like one.
                    self.n_tiles = u32::MAX;
                }
            }
        }
    }

    /// Finds the warp's first piece of an item.
    #[inline(always)]
    fn begin_item(&mut self, stage: StageRef) {
        let heads = stage.heads();
        let item = Item::new(heads, self.item, self.position + 1);
        self.item += grid_dim_x();
        // None of these are tiles.
        self.n_tiles = 0;
        self.chunk = heads.chunk();
        self.step = self.n_warps * self.chunk;
        let first = self.warp * self.chunk;
        self.row_bytes = heads.head_dim() * 2;
        self.positions = item.n_cached(self.position).saturating_sub(first);
        self.left = self.positions.div_ceil(self.step);
        self.bytes = self.positions.min(self.chunk) * self.row_bytes;
        let row = u64::from(item.kv_head) * u64::from(heads.n_ctx()) + u64::from(item.start + first);
        let offset = (row * u64::from(self.row_bytes)) as usize;
        self.from = (heads.k_cache() as *const u8).wrapping_add(offset);
        self.second = (heads.v_cache() as *const u8).wrapping_add(offset);
    }

    /// Goes on to the next tile, which lies behind this one unless it is another matrix's.
    #[inline(always)]
    fn next_tile(&mut self) {
        self.from = self.from.wrapping_add(self.bytes as usize);
        self.tile += 1;
        if self.tile == self.n_tiles {
            self.tile = 0;
            self.band += 1;
            if self.has_parts && self.left > 0 {
                self.look_up(self.list.stage(self.at));
                return;
            }
        }
        self.bytes = if self.tile + 1 == self.n_tiles { self.last_tile_bytes } else { self.tile_bytes };
    }

    /// Finds the tile in its matrix.
    #[inline(always)]
    fn look_up(&mut self, stage: StageRef) {
        let band = stage.band(self.band);
        let part = stage.part(band.part);
        (self.tile_bytes, self.last_tile_bytes) = (part.tile_bytes(), part.last_tile_bytes());
        self.bytes = if self.tile + 1 == self.n_tiles { self.last_tile_bytes } else { self.tile_bytes };
        let offset = u64::from(band.number) * u64::from(part.band_bytes()) + u64::from(self.tile * self.tile_bytes);
        self.from = (part.tiles() as *const u8).wrapping_add(offset as usize);
    }
}
