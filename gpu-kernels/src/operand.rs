//! A vector as a matrix-vector product reads it, left by whatever makes the vector.
//!
//! The values are rounded to f16, times the factors of the norm that comes before the product, if one does (what every block of a
//! product has to read is half as much then, and no block has to read the factors), and times [`SCALE`]. They lie unit by unit like a
//! tile's: of the 32 units that meet a tile first the first eight columns of each, then the next eight ..., so that the
//! lanes of a warp read neighbouring 16 bytes. Beside them lie sums of the squares of the values before they were multiplied,
//! one for each quad of rows or block that has made some of them: the norm's own factor is a matter of the products' end.

use crate::activations::OCTET;
use crate::block::block_sum;
use crate::formats::UNIT;
use crate::formats::tile::TILE_UNITS;
use cuda_std::float::f32_to_f16x2_saturating;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::{ld_global_u32x4, st_global_u32x4};
use cuda_std::thread::{block_idx_x, index_1d, thread_idx_x};
use cuda_std::{kernel, shared_array};

/// What values are multiplied with: an operand has numbers up to a million, where an f16 has them up to 65,504, in steps of a millionth
/// where they are smallest. Larger ones become as large as there are. Of a model's hidden state a few values can be 100,000 times as large
/// as others (Sun et al., Massive Activations in Large Language Models, 2024).
pub const SCALE: f32 = 1.0 / 16.0;

/// Columns of a tile: operands are filled up to a multiple of as many.
pub const TILE_COLUMNS: usize = TILE_UNITS * UNIT;

/// Where column `column` lies: two columns are a word.
#[inline(always)]
pub fn place_of(column: usize) -> usize {
    let (tile, in_tile) = (column / TILE_COLUMNS, column % TILE_COLUMNS);
    let (unit, in_unit) = (in_tile / UNIT, in_tile % UNIT);
    tile * TILE_COLUMNS + (in_unit / OCTET * TILE_UNITS + unit) * OCTET + in_unit % OCTET
}

/// Where an operand goes, as a launch passes it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Columns, two to a word, at the places that [`place_of`] gives, zeros beyond the last one; null where only sums of
    /// squares are wanted.
    pub words: *mut u32,
    /// The factors of the norm to come, `[n]`, at a multiple of 16 bytes and readable up to one; null where there is none.
    pub gamma: *const f32,
    /// A sum of squares for each quad of rows, or each block, that makes values; null where they are not wanted.
    pub squares: *mut f32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Operand {}

impl Operand {
    /// None.
    pub const NOTHING: Self =
        Self { words: core::ptr::null_mut(), gamma: core::ptr::null(), squares: core::ptr::null_mut() };

    /// Where columns `column` and the next one go, `column` even; null where the operand is not wanted.
    #[inline(always)]
    pub fn place_of_2(self, column: usize) -> *mut u32 {
        if self.words.is_null() { self.words } else { self.words.wrapping_add(place_of(column) / 2) }
    }

    /// Where four columns from `column` on go, a multiple of 4; null where the operand is not wanted.
    #[inline(always)]
    pub fn place_of_4(self, column: usize) -> *mut u64 {
        self.place_of_2(column).cast()
    }

    /// Four columns as an operand holds them.
    #[inline(always)]
    pub fn words_of_4([a, b, c, d]: [f32; 4]) -> u64 {
        u64::from(Self::word_of_2(a, b)) | u64::from(Self::word_of_2(c, d)) << 32
    }

    /// Two columns as an operand holds them.
    #[inline(always)]
    pub fn word_of_2(a: f32, b: f32) -> u32 {
        f32_to_f16x2_saturating(a * SCALE, b * SCALE)
    }

    /// Leaves four columns from `column` on, a multiple of 4.
    ///
    /// # Safety
    /// The columns must be inside the operand, which must be wanted; nobody else may write them.
    #[inline(always)]
    pub unsafe fn store_4(self, column: usize, values: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { *self.place_of_4(column) = Self::words_of_4(values) };
    }

    /// Leaves eight columns from `column` on, a multiple of 8.
    ///
    /// # Safety
    /// As [`store_4`](Self::store_4).
    #[inline(always)]
    pub unsafe fn store_8(self, column: usize, [a, b, c, d, e, f, g, h]: [f32; OCTET]) {
        let words = [(a, b), (c, d), (e, f), (g, h)].map(|(a, b)| Self::word_of_2(a, b));
        // SAFETY: the caller's promise.
        unsafe { st_global_u32x4(self.words.add(place_of(column) / 2).cast(), words) };
    }
}

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;

/// The operand of a vector, as a step of its own.
///
/// # Safety
/// The pointers are to device memory of the sizes below, the operand's as its fields say.
///
/// # Parameters
/// - `x`: `[n]`, at a multiple of 16 bytes and readable up to one
/// - `operand`: words for `n` columns, a sum of squares for each block of the grid
///
/// # Thread mapping
/// One thread per eight columns, [`BLOCK_DIM`] to a block, a grid that covers the columns. Bytes moved: 6 n, and 4 n where
/// there are factors.
#[kernel(overlapping)]
pub unsafe fn make_operand(x: *const f32, n: u32, operand: Operand) {
    let scratch = shared_array!(MAKE_OPERAND_SUMS: [f32; 32]);
    let_next_start();
    wait_for_previous();
    let (octet, n) = (index_1d() as usize, n as usize);
    // SAFETY: the vectors are as the caller says.
    let (x, gamma) = unsafe { (octet_of(x, n, octet), octet_of(operand.gamma, n, octet)) };
    let [a, b, c, d, e, f, g, h] = x.map(|value| value * value);
    if !operand.squares.is_null() {
        let sum = block_sum(((a + b) + (c + d)) + ((e + f) + (g + h)), scratch);
        if thread_idx_x() == 0 {
            // SAFETY: the block's own sum.
            unsafe { *operand.squares.add(block_idx_x() as usize) = sum };
        }
    }
    if octet * OCTET < n && !operand.words.is_null() {
        // SAFETY: the octet is inside the operand, and this thread's own.
        unsafe { operand.store_8(octet * OCTET, core::array::from_fn(|i| x[i] * gamma[i])) };
    }
}

/// Values `8 * octet` and on of `n`, zeros beyond the last one; 1 where there is no vector.
///
/// # Safety
/// `values` must be null or to as many, at a multiple of 16 bytes and readable up to one.
#[inline(always)]
pub unsafe fn octet_of(values: *const f32, n: usize, octet: usize) -> [f32; OCTET] {
    let first = octet * OCTET;
    if first >= n {
        return [0.0; OCTET];
    }
    if values.is_null() {
        return [1.0; OCTET];
    }
    let last = n.div_ceil(4) - 1;
    // SAFETY: inside the vector.
    let four = |word: usize| unsafe { ld_global_u32x4(values.add(word.min(last) * 4).cast()) };
    let ([a, b, c, d], [e, f, g, h]) = (four(2 * octet), four(2 * octet + 1));
    let keep = |i: usize, bits: u32| if first + i < n { f32::from_bits(bits) } else { 0.0 };
    [f32::from_bits(a), keep(1, b), keep(2, c), keep(3, d), keep(4, e), keep(5, f), keep(6, g), keep(7, h)]
}
