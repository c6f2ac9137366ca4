//! Which part of a launch's matrices is a block's.

use super::{MatrixRef, Schedule};
use cuda_std::thread::block_idx_x;

/// A quad: of which matrix, and its number there.
#[derive(Clone, Copy)]
pub struct Quad {
    /// The matrix.
    pub part: u32,
    /// Counted from the matrix's first.
    pub number: u32,
}

/// Neighbouring strips of one of a launch's matrices: a block's.
#[derive(Clone, Copy)]
pub struct Band {
    /// Which of the matrices.
    pub part: u32,
    /// The first strip.
    pub first_strip: u32,
    /// How many there are.
    pub n_strips: u32,
    /// The first quad.
    pub first_quad: u32,
    /// How many there are: not all of the strips', where the matrix's last one is filled up.
    pub n_quads: u32,
}

impl Band {
    /// The matrix and the band of this block.
    #[inline(always)]
    pub fn of_block<const N: usize>(matrices: [MatrixRef; N], schedule: Schedule) -> (MatrixRef, Self) {
        let mut block = block_idx_x();
        let (mut part, mut matrix, mut shares) = (0, matrices[0], schedule.shares[0]);
        // Written out: an array of arguments that is indexed at run time would be copied into local memory.
        if N > 1 && block >= shares.blocks {
            block -= shares.blocks;
            (part, matrix, shares) = (1, matrices[1 % N], schedule.shares[1]);
            if N > 2 && block >= shares.blocks {
                block -= shares.blocks;
                (part, matrix, shares) = (2, matrices[2 % N], schedule.shares[2]);
            }
        }
        let (first_strip, n_strips) = (shares.first(block), shares.of(block));
        let first_quad = first_strip * matrix.strip_quads;
        let n_quads = (n_strips * matrix.strip_quads).min(matrix.n_quads - first_quad);
        (matrix, Self { part, first_strip, n_strips, first_quad, n_quads })
    }

    /// Quad `i` of the band.
    #[inline(always)]
    pub fn quad(self, i: u32) -> Quad {
        Quad { part: self.part, number: self.first_quad + i }
    }
}
