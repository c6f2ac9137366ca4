//! Matrix-vector products for a few tokens at once, on Q8_1 activations.
//!
//! As the products for one token ([`super`]) go, but a lane holds its unit of the vector of each token, and what it unpacks
//! of a unit of weights meets all of them: weights are read and unpacked once for up to [`FEW_TOKENS`] tokens. The vectors
//! are in Q8_1 ([`crate::quantize`]), normalised already. What becomes of the products is chosen at run time
//! ([`crate::many_output`]).
//!
//! Bytes moved: the matrix once, plus the vectors once per block, from the L2 cache.

use super::band::{Band, Quad};
use super::epilogue::{Epilogue, Prepared as _, Ready as _};
use super::strip::StripShape;
use super::sums::{LANES_OF_ROW, Sums};
use super::{Either, MatrixRef, One, Schedule};
use crate::activations::{FetchedQ8_1, Q8_1Scale, Q8_1Unit};
#[cfg(not(target_arch = "nvptx64"))]
use crate::formats::Format;
use crate::formats::tile::{SharedTile, TILE_ROWS};
use crate::formats::{Place, UNIT_WORDS, WeightFormat, WeightUnit as _};
use crate::many_output::{ForTokens, Output};
use cuda_std::grid::{let_next_start, wait_for_previous};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::launch::Kernel;
use cuda_std::pipeline::PacedCopy;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{WARP_SIZE, lane_id, warp_id, warp_reduce_add_4, warp_uniform};
use cuda_std::{dynamic_shared, kernel};

/// Most tokens at once: a lane has a unit of each in registers.
pub const FEW_TOKENS: usize = 4;
const _: () = assert!(FEW_TOKENS <= LANES_OF_ROW as usize);
/// Warps that a multiprocessor has registers for; no block has more.
pub const FEW_WARPS: u32 = 16;

/// The vectors of a few tokens in Q8_1, as a launch passes them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Vectors {
    /// `[n_tokens, n_units * 8]` words of four integers, at a multiple of 16 bytes.
    pub quants: *const u32,
    /// `[n_tokens, n_units]`.
    pub scales: *const Q8_1Scale,
    /// Units of 32 columns, the last one filled up with zeros.
    pub n_units: u32,
    /// Tokens, 1 to [`FEW_TOKENS`].
    pub n_tokens: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Vectors {}

/// Words of shared memory in all, for strips of this shape, of which each quad has `prepared_words` words prepared for each of
/// `n_tokens` tokens.
pub fn shared_words(schedule: Schedule, strip: StripShape, n_tokens: u32, prepared_words: u32) -> u32 {
    let quads = schedule.strips * strip.quads;
    schedule.band_words() + n_tokens * (schedule.sums_words(strip) + quads * prepared_words)
}

impl Vectors {
    /// Asks for unit `unit` of each token's vector; where there are fewer tokens, for the last one's again.
    ///
    /// # Safety
    /// The vectors must be as their fields say, and have the unit.
    #[inline(always)]
    unsafe fn fetch(self, unit: u32) -> [FetchedQ8_1; FEW_TOKENS] {
        let of_token = |token: u32| {
            let first = token.min(self.n_tokens - 1) as usize * self.n_units as usize;
            let (quants, scales) =
                (self.quants.wrapping_add(first * UNIT_WORDS), self.scales.wrapping_add(first));
            // SAFETY: the caller's promise.
            unsafe { FetchedQ8_1::fetch(quants, scales, unit as usize) }
        };
        [of_token(0), of_token(1), of_token(2), of_token(3)]
    }
}

/// For each token the products of a tile's four rows with this lane's unit of its vector.
#[inline(always)]
fn dots<F: WeightFormat>(
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    [xa, xb, xc, xd]: &[Q8_1Unit; FEW_TOKENS],
) -> [[f32; TILE_ROWS]; FEW_TOKENS] {
    let row = |row: usize| {
        let weights = F::unpack(tile, Place { n_units, row, unit });
        let dot = |x: &Q8_1Unit| weights.dot_q8_1(x, 0.0);
        [dot(xa), dot(xb), dot(xc), dot(xd)]
    };
    // Written out: an array that is filled in a loop would be in local memory.
    let ([a0, b0, c0, d0], [a1, b1, c1, d1]) = (row(0), row(1));
    let ([a2, b2, c2, d2], [a3, b3, c3, d3]) = (row(2), row(3));
    [[a0, a1, a2, a3], [b0, b1, b2, b3], [c0, c1, c2, c3], [d0, d1, d2, d3]]
}

/// Which format the matrices have.
trait Formats {
    /// Does a warp's share of the products, with that of the matrix, which is one for all of the block.
    ///
    /// # Safety
    /// As [`Work::multiply`].
    unsafe fn multiply(work: Work, format: u32, fetched: [FetchedQ8_1; FEW_TOKENS]);
}

impl<F: WeightFormat> Formats for One<F> {
    #[inline(always)]
    unsafe fn multiply(work: Work, _format: u32, fetched: [FetchedQ8_1; FEW_TOKENS]) {
        // SAFETY: the caller's promise.
        unsafe { work.multiply::<F>(fetched) };
    }
}

impl<F: WeightFormat, G: WeightFormat> Formats for Either<F, G> {
    #[inline(always)]
    unsafe fn multiply(work: Work, format: u32, fetched: [FetchedQ8_1; FEW_TOKENS]) {
        // A loop for each: what one format needs of the vectors takes no registers in the other's.
        // SAFETY: the caller's promise.
        unsafe {
            if format == F::FORMAT as u32 {
                work.multiply::<F>(fetched);
            } else {
                work.multiply::<G>(fetched);
            }
        }
    }
}

/// What a warp multiplies: some tiles of some of the band's strips.
#[derive(Clone, Copy)]
struct Work {
    memory: DynamicShared<u32>,
    copy: PacedCopy,
    vectors: Vectors,
    /// Strips of the band.
    n_strips: u32,
    strip_bytes: u32,
    tile_bytes: u32,
    last_tile_bytes: u32,
    shape: StripShape,
    /// The warp's first strip, and how many further the next one is.
    strips: [u32; 2],
    /// Likewise its tiles.
    tiles: [u32; 2],
    /// Of each token those of the band's quads.
    sums: Sums,
}

impl Work {
    /// Asks for what meets this lane's unit of tile `tile`.
    ///
    /// # Safety
    /// As [`Vectors::fetch`], and the vectors have the tile.
    #[inline(always)]
    unsafe fn fetch(self, tile: u32) -> [FetchedQ8_1; FEW_TOKENS] {
        // SAFETY: the caller's promise.
        unsafe { self.vectors.fetch(self.shape.vector_unit(tile)) }
    }

    /// Leaves the sums of the warp's tiles, given what it has fetched for the first one.
    ///
    /// # Safety
    /// The vectors must be as their fields say; the copy brings tiles of format `F`.
    #[inline(always)]
    unsafe fn multiply<F: WeightFormat>(self, fetched: [FetchedQ8_1; FEW_TOKENS]) {
        let (memory, lane, n_tiles) = (self.memory, lane_id(), self.shape.n_tiles());
        let ([first_strip, strip_step], [mut tile, tile_step]) = (self.strips, self.tiles);
        let mut fetched = fetched;
        loop {
            let [a, b, c, d] = fetched;
            let x = [a.unit(), b.unit(), c.unit(), d.unit()];
            let n_units = self.shape.units_of(tile);
            let of_halves = self.shape.is_of_halves();
            let in_strip = self.sums.place_in_strip(tile);
            let bytes = if tile + 1 == n_tiles { self.last_tile_bytes } else { self.tile_bytes };
            let mut strip = first_strip;
            while strip < self.n_strips {
                let start = strip * self.strip_bytes + tile * self.tile_bytes;
                self.copy.wait(0, start, start + bytes);
                let source = SharedTile { memory, start };
                let mut sums = [[0.0f32; TILE_ROWS]; FEW_TOKENS];
                if lane < n_units {
                    sums = dots::<F>(source, n_units as usize, lane as usize, &x);
                }
                let [a, b, c, d] = sums;
                let (a, b) = (warp_reduce_add_4(a, of_halves), warp_reduce_add_4(b, of_halves));
                let (c, d) = (warp_reduce_add_4(c, of_halves), warp_reduce_add_4(d, of_halves));
                // Four lanes have each row's sums: one of them stores one token's.
                let token = lane % LANES_OF_ROW;
                if token < self.vectors.n_tokens && lane < self.shape.lanes_that_store() {
                    let (low, high) = (if token == 0 { a } else { b }, if token == 2 { c } else { d });
                    let sum = if token < 2 { low } else { high };
                    let of_strip = (token * self.n_strips + strip) * self.shape.quads;
                    memory.set((self.sums.quad(of_strip) + in_strip) as usize, sum.to_bits());
                }
                strip += strip_step;
            }
            tile += tile_step;
            if tile >= n_tiles {
                break;
            }
            // SAFETY: the tile is one of them.
            fetched = unsafe { self.fetch(tile) };
        }
    }
}

/// A block's quads, each once for every token. Those of a token follow each other, in sums and in what is prepared.
#[derive(Clone, Copy)]
struct Pairs<'a> {
    memory: DynamicShared<u32>,
    /// By reference: a copy would be in local memory.
    matrix: &'a MatrixRef,
    band: Band,
    n_tokens: u32,
    /// The word at which what is prepared for each starts.
    prepared_at: u32,
}

impl Pairs<'_> {
    /// Quads of all the band's strips, also those that the matrix lacks.
    #[inline(always)]
    fn n_quads(self) -> u32 {
        self.band.n_strips * self.matrix.strip_quads
    }

    /// Calls `each` for this thread's pairs, of `n_threads` threads that take part: with the pair's number, its token and its quad.
    #[inline(always)]
    fn for_each(self, n_threads: u32, each: impl Fn(u32, u32, Quad)) {
        let mut pair = thread_idx_x();
        while pair < self.n_tokens * self.n_quads() {
            let (token, quad) = (pair / self.n_quads(), pair % self.n_quads());
            if quad < self.band.n_quads {
                each(pair, token, self.band.quad(quad));
            }
            pair += n_threads;
        }
    }
}

/// Fetches what finishing will need, before the sums are there, and leaves it in shared memory.
struct Prepare<'a> {
    pairs: Pairs<'a>,
    /// Threads that take part.
    n_threads: u32,
}

impl ForTokens for Prepare<'_> {
    #[inline(always)]
    unsafe fn with<E: Epilogue>(self, epilogue: impl Fn(u32) -> E) {
        let Pairs { memory, matrix, prepared_at, .. } = self.pairs;
        if E::Prepared::WORDS == 0 {
            return;
        }
        self.pairs.for_each(self.n_threads, |pair, token, quad| {
            // SAFETY: the quad is one of the matrix's; the epilogue keeps its contract.
            let prepared = unsafe { epilogue(token).prepare(quad, *matrix) };
            prepared.store(memory, (prepared_at + pair * E::Prepared::WORDS) as usize);
        });
    }
}

/// Finishes the quads, by all threads.
struct Finish<'a> {
    pairs: Pairs<'a>,
    sums: Sums,
}

impl ForTokens for Finish<'_> {
    #[inline(always)]
    unsafe fn with<E: Epilogue>(self, epilogue: impl Fn(u32) -> E) {
        let Pairs { memory, matrix, prepared_at, .. } = self.pairs;
        self.pairs.for_each(block_dim_x(), |pair, token, quad| {
            let sums = self.sums.add_up(self.sums.quad(pair));
            let prepared = E::Prepared::load(memory, (prepared_at + pair * E::Prepared::WORDS) as usize);
            // SAFETY: the quad is one of the matrix's, finished by this thread alone for this token; the epilogue keeps its
            // contract.
            unsafe { epilogue(token).ready(quad, *matrix, prepared).finish(sums) };
        });
    }
}

/// Multiplies this block's band of one of `matrices`, which lie one below the other, with each vector, and finishes its quads.
///
/// # Safety
/// As the kernels below.
#[inline(always)]
unsafe fn run<F: Formats>(matrices: [MatrixRef; 3], vectors: Vectors, schedule: Schedule, output: Output) {
    let (warp, n_warps) = (warp_uniform(warp_id()), block_dim_x() / WARP_SIZE);
    let (is_copier, multiplies) = (warp == n_warps - 1, warp < schedule.warps);
    let (matrix, band) = Band::of_block(matrices, schedule);
    let shape = matrix.strip_shape(vectors.n_units);

    let memory = dynamic_shared!(GEMV_FEW_MEMORY: [u32]);
    let sums = Sums { memory, at: schedule.band_words(), strip: shape };
    let prepared_at = sums.at + vectors.n_tokens * schedule.sums_words(shape);
    let pairs = Pairs { memory, matrix: &matrix, band, n_tokens: vectors.n_tokens, prepared_at };
    let copy = PacedCopy::new(memory, schedule.weight_words, 4 * schedule.weight_words);
    let_next_start();
    // The weights depend on nothing, all else on the kernel before.
    if is_copier {
        let from = matrix.tiles.wrapping_add(band.first_strip as usize * matrix.strip_bytes as usize);
        // SAFETY: the bytes are the matrix's, and fit the room for weights.
        unsafe { copy.run(0, 0, from, band.n_strips * matrix.strip_bytes, schedule.window) };
        sums.fill_up(vectors.n_tokens * pairs.n_quads());
    }
    if multiplies {
        wait_for_previous();
        let work = Work {
            memory,
            copy,
            vectors,
            n_strips: band.n_strips,
            strip_bytes: matrix.strip_bytes,
            tile_bytes: matrix.tile_bytes,
            last_tile_bytes: matrix.last_tile_bytes,
            shape,
            strips: [warp / schedule.tile_warps, schedule.warps / schedule.tile_warps],
            tiles: [warp % schedule.tile_warps, schedule.tile_warps],
            sums,
        };
        // SAFETY: the vectors and the output are as their fields say, the copy brings tiles of the matrix's format.
        unsafe {
            // The vectors, and what finishing needs besides the sums, on their way at once.
            let fetched = work.fetch(warp % schedule.tile_warps);
            if thread_idx_x() == 0 {
                copy.hurry();
            }
            output.dispatch(Prepare { pairs, n_threads: schedule.warps * WARP_SIZE });
            F::multiply(work, matrix.format, fetched);
        }
    }
    // All have left their sums, and what was prepared.
    sync_threads();
    // SAFETY: the output is as its fields say.
    unsafe { output.dispatch(Finish { pairs, sums }) };
}

/// The kernel of a module for matrices of formats `$F`.
macro_rules! define_kernels {
    ($($(#[$doc:meta])* ($module:ident, $F:ty))*) => {$(
        $(#[$doc])*
        pub mod $module {
            use super::*;

            const _: () = assert!(FEW_WARPS * WARP_SIZE == 512);

            /// The product of up to three matrices, one below the other, and the vectors of a few tokens.
            ///
            /// # Safety
            /// The matrices, the vectors and the output are as their fields say, in device memory, all of as many columns; the
            /// matrices have the module's formats, and rows in the order that the output asks for; the launch has the
            /// shared memory that [`shared_words`] gives, and the schedule is of the launch's grid.
            ///
            /// # Parameters
            /// - `first`, `second`, `third`: `[n_rows, 32 * vectors.n_units]` each; those that the schedule deals out to no
            ///   block are not read
            /// - `vectors`: the vectors
            /// - `schedule`: how the work is dealt out, a whole band at a time
            /// - `output`: where the products go
            ///
            /// # Thread mapping
            /// A block takes a band of strips, each of its warps some tiles of some of them, a lane one unit of four rows and of all
            /// vectors; one thread finishes a quad for a token. Blocks of as many warps as the schedule says, and one more
            /// where that copies.
            #[kernel(suffix = $module, overlapping, launch_bounds(512, 1))]
            pub unsafe fn gemv_few(
                first: MatrixRef,
                second: MatrixRef,
                third: MatrixRef,
                vectors: Vectors,
                schedule: Schedule,
                output: Output,
            ) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$F>([first, second, third], vectors, schedule, output) }
            }
        }
    )*};
}
define_kernels! {
    /// Q8_0 weights.
    (q8_0, One<crate::formats::Q8_0>)
    /// Q4_1 weights.
    (q4_1, One<crate::formats::Q4_1>)
    /// Q4_K weights.
    (q4_k, One<crate::formats::Q4_K>)
    /// Q6_K weights.
    (q6_k, One<crate::formats::Q6_K>)
    /// Q4_K and Q6_K weights side by side, as Q4_K_M files have them.
    (q4_k_m, Either<crate::formats::Q4_K, crate::formats::Q6_K>)
}

/// `gemv_few`.
#[cfg(not(target_arch = "nvptx64"))]
pub type FewKernel = Kernel<(MatrixRef, MatrixRef, MatrixRef, Vectors, Schedule, Output)>;

/// The kernel for matrices of these formats, where there is one.
#[cfg(not(target_arch = "nvptx64"))]
pub fn kernel_for(formats: impl Iterator<Item = Format> + Clone) -> Option<&'static FewKernel> {
    let all = |wanted: &[Format]| formats.clone().all(|format| wanted.contains(&format));
    let kernels: [(&[Format], &FewKernel); 5] = [
        (&[Format::Q8_0], &q8_0::GEMV_FEW),
        (&[Format::Q4_1], &q4_1::GEMV_FEW),
        (&[Format::Q4_K], &q4_k::GEMV_FEW),
        (&[Format::Q6_K], &q6_k::GEMV_FEW),
        (&[Format::Q4_K, Format::Q6_K], &q4_k_m::GEMV_FEW),
    ];
    kernels.into_iter().find(|(wanted, _)| all(wanted)).map(|(_, kernel)| kernel)
}
