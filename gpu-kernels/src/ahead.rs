//! Weights that a later kernel will read, asked of the L2 cache while memory has nothing else to do.

use cuda_std::memory::prefetch_l2;
use cuda_std::thread::{block_dim_x, block_idx_x, block_idx_y, grid_dim_x, grid_dim_y, thread_idx_x};

/// Pieces of memory, the same distance apart.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// The first, at a multiple of 16.
    pub from: *const u8,
    /// How many there are; 0 where nothing is to be prefetched.
    pub n_pieces: u32,
    /// Bytes of each, a multiple of 16.
    pub piece_bytes: u32,
    /// Bytes from one to the next, a multiple of 16.
    pub stride: u32,
}

impl Ahead {
    /// Nothing.
    pub const NOTHING: Ahead = Ahead { from: core::ptr::null(), n_pieces: 0, piece_bytes: 0, stride: 0 };

    /// Asks for the pieces; each block of the grid for its share, so that no multiprocessor has much to do.
    #[inline(always)]
    pub fn prefetch(self) {
        let n_blocks = grid_dim_x() * grid_dim_y();
        let block = block_idx_y() * grid_dim_x() + block_idx_x();
        let mut piece = block + thread_idx_x() * n_blocks;
        while piece < self.n_pieces {
            let offset = u64::from(piece) * u64::from(self.stride);
            prefetch_l2(self.from.wrapping_add(offset as usize), self.piece_bytes);
            piece += block_dim_x() * n_blocks;
        }
    }
}
