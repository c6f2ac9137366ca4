//! Matrix-vector products with quantized weights, and what surrounds them in a layer.
//!
//! Every one of these kernels goes the same way, [`run`]: the last warp of a block asks for its [band](band) of the matrix; the
//! others wait for the kernel before, take the vector ([`input`]) and multiply; and the last one, which has meanwhile fetched
//! all else that it takes, finishes four rows a lane ([`epilogue`]). The kernels differ in what finishing means. From the end of
//! the wait to the last store everything is waited for by the next kernel, so what can be is done before the wait, or by the
//! last warp beside the products (docs/performance.md, version 9).
//!
//! Bands are small, and several blocks share a multiprocessor: while one multiplies, the others' weights are on their way, and
//! where a kernel has no more blocks to start, those of the next one take their places. Weights depend on nothing, so these ask
//! for theirs at once, and memory does not idle between two products. Which multiprocessor takes how many bands is a matter
//! of how fast it is.
//!
//! Bytes moved: the matrix once, plus the vector once per block, from the L2 cache.

pub mod band;
pub mod epilogue;
pub mod few;
pub mod input;
pub mod strip;
mod sums;

use crate::activations::{Activations, F32Vector, Q8_1, QuantizedOperand};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, WeightFormat};
use crate::rows::RowOrder;
use band::Band;
use core::marker::PhantomData;
use core::ops::Range;
use cuda_std::codegen::settled;
use cuda_std::grid::{let_next_start, wait_for_previous, wait_for_previous_knowing};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::launch::Kernel;
use cuda_std::pipeline::{PacedCopy, Window};
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{
    arrive_at_last_meeting, block_dim_x, meet_for_the_last_time, sync_threads, thread_idx_x,
};
use cuda_std::warp::{WARP_SIZE, lane_id, warp_id, warp_reduce_add_4, warp_uniform};
use cuda_std::{dynamic_shared, kernel};
use epilogue::{Add, Epilogue, Qkv, Ready as _, Store, StoreOrdered, Swiglu};
use input::Input;
use strip::StripShape;
use sums::Sums;

/// Warps that a multiprocessor has registers for, of kernels for one format; no block has more.
pub const WARPS: u32 = 24;
/// Likewise of those for three matrices, which have the numbers of all in registers.
pub const QKV_WARPS: u32 = 20;
/// Most warps in a block of the kernels for any format.
pub const ANY_WARPS: u32 = 8;
/// Most quads in a band: a lane of the last warp finishes each.
pub const MAX_QUADS: u32 = WARP_SIZE;

/// A packed matrix, as a launch passes it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef {
    /// The tiles.
    pub tiles: *const u8,
    /// A [`Format`].
    pub format: u32,
    /// Rows; the last quad is filled up.
    pub n_rows: u32,
    /// Quads of four rows.
    pub n_quads: u32,
    /// Quads in a [strip](crate::formats::tile), 1 or 2; the last one is filled up.
    pub strip_quads: u32,
    /// Bytes of a tile of 32 units.
    pub tile_bytes: u32,
    /// Bytes of the last tile of a strip, which may be shorter.
    pub last_tile_bytes: u32,
    /// Bytes of a strip.
    pub strip_bytes: u32,
    /// The order of the rows.
    pub order: RowOrder,
}

impl MatrixRef {
    /// What its strips are like, with `n_units` units in a row.
    #[inline(always)]
    pub fn strip_shape(&self, n_units: u32) -> StripShape {
        StripShape { quads: self.strip_quads, n_units }
    }
}

/// How the strips of a matrix are dealt out to blocks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Shares {
    /// Blocks that take them.
    pub blocks: u32,
    /// Strips of each.
    pub strips: u32,
    /// The first so many have one more.
    pub blocks_with_more: u32,
}

impl Shares {
    /// The first strip of block `block`.
    #[inline(always)]
    pub fn first(&self, block: u32) -> u32 {
        block * self.strips + block.min(self.blocks_with_more)
    }

    /// How many strips block `block` has.
    #[inline(always)]
    pub fn of(&self, block: u32) -> u32 {
        self.strips + u32::from(block < self.blocks_with_more)
    }
}

/// How the work is dealt out, chosen by the launcher.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// How the strips of each matrix are dealt out.
    pub shares: [Shares; 3],
    /// Strips of the largest band, of at most [`MAX_QUADS`] quads.
    pub strips: u32,
    /// Warps that share the tiles of a strip, no more than these are; the block has a multiple of as many.
    pub tile_warps: u32,
    /// Tiles of a strip that are in shared memory at once: all, unless a band of one strip is too long.
    pub slab_tiles: u32,
    /// Words of shared memory for the weights.
    pub weight_words: u32,
    /// Warps that multiply: a multiple of `tile_warps`. One more copies, where the block has one.
    pub warps: u32,
    /// Pieces of weights ([`PacedCopy`]) that a block has on their way at a time.
    pub window: Window,
}

impl Schedule {
    /// Words of shared memory for the sums of a band of strips of this shape.
    #[inline(always)]
    pub fn sums_words(self, strip: StripShape) -> u32 {
        self.strips * strip.quads * strip.sums_words_of_quad()
    }

    /// Words of shared memory for a band's weights and what says that they have arrived.
    #[inline(always)]
    pub fn band_words(self) -> u32 {
        self.weight_words + PacedCopy::state_words(4 * self.weight_words)
    }

    /// Words of shared memory in all, for strips of this shape.
    pub fn shared_words(self, strip: StripShape) -> u32 {
        self.band_words() + self.sums_words(strip)
    }
}

macro_rules! kernel_args {
    ($($Type:ty),*) => {$(
        #[cfg(not(target_arch = "nvptx64"))]
        // SAFETY: pointers and numbers in C's layout, alike on both sides.
        unsafe impl cuda_std::launch::KernelArg for $Type {}
    )*};
}
kernel_args!(MatrixRef, Schedule, Input, Store, Add, StoreOrdered, Swiglu, Qkv);

/// How the products of a tile are made.
pub trait Dots {
    /// Whether a strip may be too long for shared memory, and is then taken in slabs.
    const IN_SLABS: bool;
    /// Whether two strips are multiplied at a time.
    const IN_PAIRS: bool;

    /// `sums` plus the products of the tile's four rows with the vector's unit of this lane.
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
        sums: [f32; TILE_ROWS],
    ) -> [f32; TILE_ROWS];
}

/// Of tiles that all have one format.
pub struct One<F>(PhantomData<F>);

impl<F: WeightFormat> Dots for One<F> {
    const IN_SLABS: bool = false;
    const IN_PAIRS: bool = F::IN_PAIRS;

    #[inline(always)]
    fn dots<X: Activations>(
        _: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
        [s0, s1, s2, s3]: [f32; TILE_ROWS],
    ) -> [f32; TILE_ROWS] {
        // Written out: an array of closures' results would be filled in a loop, with `x` in local memory.
        [
            X::dot(&F::unpack(tile, Place { n_units, row: 0, unit }), x, s0),
            X::dot(&F::unpack(tile, Place { n_units, row: 1, unit }), x, s1),
            X::dot(&F::unpack(tile, Place { n_units, row: 2, unit }), x, s2),
            X::dot(&F::unpack(tile, Place { n_units, row: 3, unit }), x, s3),
        ]
    }
}

/// Of tiles that have one of two formats; it is the same for all lanes of the warp.
pub struct Either<F, G>(PhantomData<(F, G)>);

impl<F: WeightFormat, G: WeightFormat> Dots for Either<F, G> {
    const IN_SLABS: bool = false;
    const IN_PAIRS: bool = F::IN_PAIRS && G::IN_PAIRS;

    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
        sums: [f32; TILE_ROWS],
    ) -> [f32; TILE_ROWS] {
        if format == F::FORMAT as u32 {
            One::<F>::dots::<X>(format, tile, n_units, unit, x, sums)
        } else {
            One::<G>::dots::<X>(format, tile, n_units, unit, x, sums)
        }
    }
}

/// Of tiles of any format, which is the same for all lanes of the warp.
pub struct Any;

impl Dots for Any {
    const IN_SLABS: bool = true;
    const IN_PAIRS: bool = false;

    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
        sums: [f32; TILE_ROWS],
    ) -> [f32; TILE_ROWS] {
        // Row by row, in a loop that the compiler cannot unroll since it does not know where it ends: all formats in
        // one kernel are much code as it is.
        let n_rows = if n_units <= TILE_UNITS { TILE_ROWS } else { 0 };
        let mut sums = sums;
        let mut row = 0;
        while row < n_rows {
            let place = Place { n_units, row, unit };
            // The rows' sums go round.
            let [first, s1, s2, s3] = sums;
            macro_rules! dispatch {
                ($(($Type:ident, $name:ident))*) => {
                    match format {
                        $(f if f == Format::$Type as u32 =>
                            X::dot(&<crate::formats::$Type>::unpack(tile, place), x, first),)*
                        _ => first,
                    }
                };
            }
            sums = [s1, s2, s3, crate::for_each_format!(dispatch)];
            row += 1;
        }
        sums
    }
}

/// The products of the tile at byte `start` of the weights with the vector's unit of this lane.
#[inline(always)]
fn dots_at<X: Activations, D: Dots>(
    memory: DynamicShared<u32>,
    format: u32,
    start: u32,
    n_units: u32,
    x: &X::Unit,
) -> [f32; TILE_ROWS] {
    let tile = SharedTile { memory, start };
    D::dots::<X>(format, tile, n_units as usize, lane_id() as usize, x, [0.0; TILE_ROWS])
}

/// What a warp multiplies.
#[derive(Clone, Copy)]
struct Work {
    memory: DynamicShared<u32>,
    copy: PacedCopy,
    /// Which of the copies brings the tiles.
    round: u32,
    input: Input,
    schedule: Schedule,
    matrix: MatrixRef,
    band: Band,
    shape: StripShape,
    sums: Sums,
}

impl Work {
    /// Leaves the sums of this warp's share of tiles `tiles` of the band's strips. Waits for the kernel before, which makes the
    /// vector, if `waits`.
    ///
    /// # Safety
    /// As [`run`].
    #[inline(always)]
    unsafe fn multiply<X: Activations, D: Dots>(self, tiles: Range<u32>, waits: bool) {
        let Self { memory, copy, round, input, schedule, matrix, band, shape, sums } = self;
        let (warp, lane) = (warp_uniform(warp_id()), lane_id());
        let (first_strip, strip_warps) = (warp / schedule.tile_warps, schedule.warps / schedule.tile_warps);
        let first_tile = tiles.start + warp % schedule.tile_warps;
        let n_tiles = shape.n_tiles();
        let bytes_of =
            |tile: u32| if tile + 1 == n_tiles { matrix.last_tile_bytes } else { matrix.tile_bytes };
        let start_of =
            |tile: u32| first_strip * matrix.strip_bytes + (tile - tiles.start) * matrix.tile_bytes;
        let step = strip_warps * matrix.strip_bytes;
        let sums_step = strip_warps * shape.quads * shape.sums_words_of_quad();
        let of_halves = shape.is_of_halves();
        let sums_of = |tile: u32| sums.quad(first_strip * shape.quads) + sums.place_in_strip(tile);
        let mut tile = first_tile;
        let place = X::place(shape.vector_unit(tile.min(n_tiles - 1)));
        if waits {
            wait_for_previous_knowing(step | start_of(tile) | bytes_of(tile) | place);
        }
        // SAFETY: the unit is inside the vector; the input keeps its contract.
        let mut fetched = unsafe { X::fetch(&input, place) };
        if waits && thread_idx_x() == 0 {
            copy.hurry();
        }
        while tile < tiles.end && first_strip < band.n_strips {
            let (mut strip, mut at, bytes) = (first_strip, start_of(tile), bytes_of(tile));
            let mut sums_at = sums_of(tile);
            // Of a strip, and where two are multiplied at a time of the next one.
            let has_next = |strip: u32| D::IN_PAIRS && strip + strip_warps < band.n_strips;
            let have_arrived = |strip: u32, at: u32| {
                let next = if has_next(strip) { at + step } else { at };
                copy.have_arrived(round, at, at + bytes)
                    & (next == at || copy.have_arrived(round, next, next + bytes))
            };
            let wait = |at: u32, end: u32, have_arrived: bool| {
                if !have_arrived {
                    copy.wait_in_turn(round, at, end);
                }
            };
            // Asked while the vector is on its way.
            let mut are_there = have_arrived(strip, at);
            let x = X::unit(&input, fetched);
            let next_tile = tile + schedule.tile_warps;
            if next_tile < tiles.end {
                // SAFETY: as above.
                fetched = unsafe { X::fetch(&input, X::place(shape.vector_unit(next_tile))) };
            }
            let n_tile_units = shape.units_of(tile);
            let has_unit = lane < n_tile_units;
            // Two at a time: one's instructions need not wait for what the other's give.
            while has_next(strip) {
                wait(at, at + step + bytes, are_there);
                let (mut near, mut far) = ([0.0f32; TILE_ROWS], [0.0f32; TILE_ROWS]);
                if has_unit {
                    near = dots_at::<X, D>(memory, matrix.format, at, n_tile_units, &x);
                    far = dots_at::<X, D>(memory, matrix.format, at + step, n_tile_units, &x);
                }
                let (near, far) = (warp_reduce_add_4(near, of_halves), warp_reduce_add_4(far, of_halves));
                sums.store(sums_at, near);
                sums.store(sums_at + sums_step, far);
                (strip, at) = (strip + 2 * strip_warps, at + 2 * step);
                sums_at += 2 * sums_step;
                are_there = strip < band.n_strips && have_arrived(strip, at);
            }
            while strip < band.n_strips {
                wait(at, at + bytes, are_there);
                let mut products = [0.0f32; TILE_ROWS];
                if has_unit {
                    products = dots_at::<X, D>(memory, matrix.format, at, n_tile_units, &x);
                }
                sums.store(sums_at, warp_reduce_add_4(products, of_halves));
                (strip, at) = (strip + strip_warps, at + step);
                sums_at += sums_step;
                are_there = !D::IN_PAIRS && strip < band.n_strips && have_arrived(strip, at);
            }
            tile = next_tile;
        }
    }
}

/// Multiplies this block's band of one of `matrices`, which lie one below the other, with the vector, and finishes its quads.
///
/// # Safety
/// The matrices are as their fields say, all of `input.n` columns; the input and the epilogue keep their contracts;
/// the launch has the shared memory that [`Schedule::shared_words`] gives, and `schedule` is of the launch's grid.
#[inline(always)]
unsafe fn run<X: Activations, D: Dots, E: Epilogue, const N: usize>(
    matrices: [MatrixRef; N],
    input: Input,
    schedule: Schedule,
    epilogue: E,
) {
    let (warp, lane) = (warp_uniform(warp_id()), lane_id());
    let n_warps = block_dim_x() / WARP_SIZE;
    // The last warp copies and finishes, the others multiply; one that is alone does it all.
    let (is_last, multiplies) = (warp == n_warps - 1, warp < schedule.warps);
    let (matrix, band) = Band::of_block(matrices, schedule);
    let shape = matrix.strip_shape(input.n_units());
    let n_tiles = shape.n_tiles();

    let slab_tiles = if D::IN_SLABS { schedule.slab_tiles } else { n_tiles };
    let memory = dynamic_shared!(GEMV_MEMORY: [u32]);
    let sums = Sums { memory, at: schedule.band_words(), strip: shape };
    let copy = PacedCopy::new(memory, schedule.weight_words, 4 * schedule.weight_words);
    let from = matrix.tiles.wrapping_add(band.first_strip as usize * matrix.strip_bytes as usize);
    let_next_start();
    let (mut slab, mut round) = (0, 0);
    loop {
        if is_last {
            // The band's bytes, or a slab's of its only strip.
            let start = slab * matrix.tile_bytes;
            let end = (start + slab_tiles * matrix.tile_bytes).min(matrix.strip_bytes);
            let bytes = if D::IN_SLABS && slab_tiles < n_tiles {
                end - start
            } else {
                band.n_strips * matrix.strip_bytes
            };
            // SAFETY: the bytes are the matrix's, and fit the room for weights.
            unsafe { copy.run(round, 0, from.wrapping_add(start as usize), bytes, schedule.window) };
        }
        let slab_end = (slab + slab_tiles).min(n_tiles);
        if multiplies {
            let work = Work { memory, copy, round, input, schedule, matrix, band, shape, sums };
            // SAFETY: the caller's promise.
            unsafe { work.multiply::<X, D>(slab..slab_end, slab == 0) };
        }
        slab = slab_end;
        if !D::IN_SLABS || slab == n_tiles {
            break;
        }
        // All have read the slab.
        sync_threads();
        round += 1;
    }
    if !is_last {
        arrive_at_last_meeting();
        return;
    }

    // A lane finishes a quad: all but its sums is ready before they are there.
    sums.fill_up(band.n_quads);
    let own = lane.min(band.n_quads - 1);
    let at = settled(sums.quad(own));
    wait_for_previous();
    // SAFETY: the quad is one of the matrix's; input and epilogue keep their contracts.
    let (prepared, factor) = unsafe {
        let prepared = epilogue.prepare(band.quad(own), matrix);
        (prepared, if E::NORMALISES { settled(input.norm_factor()) } else { 1.0 })
    };
    let ready = epilogue.ready(band.quad(own), matrix, prepared);
    // All have left their sums.
    meet_for_the_last_time();
    let mut finished = None;
    if lane < band.n_quads {
        let sums = sums.add_up(at).map(|sum| sum * factor);
        finished = Some(sums);
        // SAFETY: the quad is finished by this thread alone; the epilogue keeps its contract.
        unsafe { ready.finish(sums) };
    }
    // SAFETY: as above.
    unsafe { epilogue.conclude(band.quad(own), matrix, finished) };
}

/// Refuses launch bounds, which have to be a number, of other than so many warps, or than those of the kernels for any format.
const fn check_launch_bounds<D: Dots>(threads: u32, warps: u32) {
    assert!(threads == WARP_SIZE * if D::IN_SLABS { ANY_WARPS } else { warps });
}

/// The kernels of a module for activations `$X` and products `$D`.
macro_rules! define_kernels {
    ($module:ident, $threads:literal, $X:ident, $D:ty) => {
        const _: () = check_launch_bounds::<$D>($threads, WARPS);

        /// `y = W x`, `x` normalised first where the input says so.
        ///
        /// # Safety
        /// The matrix, the input and the output are as their fields say, in device memory, and the matrix has the
        /// module's format and its rows in natural order; the launch has the shared memory that
        /// [`Schedule::shared_words`] gives, and the schedule is of the launch's grid.
        ///
        /// # Parameters
        /// - `matrix`: `[n_rows, input.n]`
        /// - `input`: the vector
        /// - `schedule`: how the work is dealt out
        /// - `output`: `y`
        ///
        /// # Thread mapping
        /// A block takes a band of strips, each of its warps some tiles of some of them, a lane one unit of four rows; one
        /// thread finishes a quad. Blocks of as many warps as the schedule says, and one more where that copies.
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, 1))]
        pub unsafe fn gemv(matrix: MatrixRef, input: Input, schedule: Schedule, output: Store) {
            // SAFETY: the caller keeps the contract above, which is the one asked for.
            unsafe { run::<$X, $D, _, 1>([matrix], input, schedule, output) }
        }

        /// `y += W x`.
        ///
        /// # Safety
        /// As [`gemv`].
        ///
        /// # Parameters
        /// As [`gemv`].
        ///
        /// # Thread mapping
        /// As [`gemv`].
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, 1))]
        pub unsafe fn gemv_add(matrix: MatrixRef, input: Input, schedule: Schedule, output: Add) {
            // SAFETY: the caller keeps the contract above, which is the one asked for.
            unsafe { run::<$X, $D, _, 1>([matrix], input, schedule, output) }
        }

        /// `y = silu(G x) * (U x)`: the first half of the feed-forward network.
        ///
        /// # Safety
        /// As [`gemv`], with the rows in [`Order::Halves`](crate::rows::Order::Halves).
        ///
        /// # Parameters
        /// - `matrix`: `[2 * n_ff, input.n]`, `G` above `U`
        /// - `input`, `schedule`: as for [`gemv`]
        /// - `output`: `y`
        ///
        /// # Thread mapping
        /// As [`gemv`].
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, 1))]
        pub unsafe fn gemv_swiglu(matrix: MatrixRef, input: Input, schedule: Schedule, output: Swiglu) {
            // SAFETY: the caller keeps the contract above, which is the one asked for.
            unsafe { run::<$X, $D, _, 1>([matrix], input, schedule, output) }
        }

        /// The module's kernels.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const KERNELS: Kernels = Kernels { gemv: &GEMV, gemv_add: &GEMV_ADD, gemv_swiglu: &GEMV_SWIGLU };
    };
}

macro_rules! define_qkv {
    ($module:ident, $threads:literal, $X:ident, $D:ty) => {
        const _: () = check_launch_bounds::<$D>($threads, QKV_WARPS);

        /// Queries, keys and values of a token in one pass: with their bias, rotated, keys and values appended to
        /// the cache.
        ///
        /// # Safety
        /// The matrices, the input and the output are as their fields say, in device memory; the matrices have the
        /// module's formats, `q` and `k` in an order that has the two values of a rotated pair side by side; the
        /// launch has the shared memory that [`Schedule::shared_words`] gives, and the schedule is of the launch's
        /// grid; the step's position is below the cache's `n_ctx`.
        ///
        /// # Parameters
        /// - `q`: `[n_head * head_dim, input.n]`
        /// - `k`, `v`: `[n_head_kv * head_dim, input.n]`
        /// - `input`: the vector
        /// - `schedule`: how the work is dealt out
        /// - `output`: the queries, the cache, bias and rotation
        ///
        /// # Thread mapping
        /// As [`q4_k::gemv`](super::q4_k::gemv).
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, 1))]
        pub unsafe fn gemv_qkv(
            q: MatrixRef,
            k: MatrixRef,
            v: MatrixRef,
            input: Input,
            schedule: Schedule,
            output: Qkv,
        ) {
            // SAFETY: the caller keeps the contract above, which is the one asked for.
            unsafe { run::<$X, $D, _, 3>([q, k, v], input, schedule, output) }
        }
    };
}

/// A kernel for each format: the code of one alone stays in the instruction caches from launch to launch.
macro_rules! define_format {
    ($(($Type:ident, $module:ident))*) => {$(
        #[doc = concat!("Q8_1 activations of an operand, which the input has to be, ", stringify!($Type), " weights.")]
        pub mod $module {
            use super::*;
            define_kernels!($module, 768, QuantizedOperand, One<crate::formats::$Type>);
            define_qkv!($module, 640, QuantizedOperand, One<crate::formats::$Type>);
        }
    )*};
}
define_format! { (Q8_0, q8_0) (Q4_1, q4_1) (Q4_K, q4_k) (Q6_K, q6_k) }

/// Q8_1 activations of an operand, which the input has to be, Q4_K and Q6_K weights side by side, as Q4_K_M files have them.
pub mod q4_k_m {
    use super::*;
    define_qkv!(q4_k_m, 640, QuantizedOperand, Either<crate::formats::Q4_K, crate::formats::Q6_K>);
}

/// Q8_1 activations, weights of any format, and strips of any length: much in one kernel.
pub mod mixed {
    use super::*;
    define_kernels!(mixed, 256, Q8_1, Any);
    define_qkv!(mixed, 256, Q8_1, Any);
}

/// f32 activations, weights of any format, and strips of any length.
pub mod exact {
    use super::*;
    define_kernels!(exact, 256, F32Vector, Any);
    define_qkv!(exact, 256, F32Vector, Any);
}

macro_rules! define_ordered {
    ($(($suffix:ident, $threads:literal, $X:ident))*) => {$(
        #[doc = concat!("`y = W x` or `y = W x + b` on ", stringify!($X), " activations, rows in any order.")]
        pub mod $suffix {
            use super::*;

            const _: () = check_launch_bounds::<Any>($threads, WARPS);

            /// `y = W x` or `y = W x + b`, rows in any order, weights of any format.
            ///
            /// # Safety
            /// As [`q4_k::gemv`], with rows in the order that the matrix names.
            ///
            /// # Parameters
            /// As [`q4_k::gemv`]; `output`: `y` and the bias.
            ///
            /// # Thread mapping
            /// As [`q4_k::gemv`].
            #[kernel(suffix = $suffix, overlapping, launch_bounds($threads, 1))]
            pub unsafe fn gemv(matrix: MatrixRef, input: Input, schedule: Schedule, output: StoreOrdered) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$X, Any, _, 1>([matrix], input, schedule, output) }
            }
        }
    )*};
}
define_ordered! {
    (ordered, 256, Q8_1)
    (ordered_exact, 256, F32Vector)
}

/// The kernels for one kind of activations and weights.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy)]
pub struct Kernels {
    /// `gemv`.
    pub gemv: &'static Kernel<(MatrixRef, Input, Schedule, Store)>,
    /// `gemv_add`.
    pub gemv_add: &'static Kernel<(MatrixRef, Input, Schedule, Add)>,
    /// `gemv_swiglu`.
    pub gemv_swiglu: &'static Kernel<(MatrixRef, Input, Schedule, Swiglu)>,
}

/// The kernels for Q8_1 activations and weights of a format that has its own: else there are those of [`mixed`].
#[cfg(not(target_arch = "nvptx64"))]
pub fn own_kernels(format: Format) -> Option<Kernels> {
    match format {
        Format::Q8_0 => Some(q8_0::KERNELS),
        Format::Q4_1 => Some(q4_1::KERNELS),
        Format::Q4_K => Some(q4_k::KERNELS),
        Format::Q6_K => Some(q6_k::KERNELS),
        Format::F16 | Format::F32 => None,
    }
}

/// `gemv_qkv`.
#[cfg(not(target_arch = "nvptx64"))]
pub type QkvKernel = Kernel<(MatrixRef, MatrixRef, MatrixRef, Input, Schedule, Qkv)>;

/// The kernel for Q8_1 activations and weights of these formats, where there is one of their own.
#[cfg(not(target_arch = "nvptx64"))]
pub fn own_qkv_kernel(formats: [Format; 3]) -> Option<&'static QkvKernel> {
    match formats {
        [Format::Q8_0, Format::Q8_0, Format::Q8_0] => Some(&q8_0::GEMV_QKV),
        [Format::Q4_1, Format::Q4_1, Format::Q4_1] => Some(&q4_1::GEMV_QKV),
        [Format::Q4_K, Format::Q4_K, Format::Q4_K] => Some(&q4_k::GEMV_QKV),
        [Format::Q6_K, Format::Q6_K, Format::Q6_K] => Some(&q6_k::GEMV_QKV),
        _ if formats.iter().all(|format| matches!(format, Format::Q4_K | Format::Q6_K)) => {
            Some(&q4_k_m::GEMV_QKV)
        }
        _ => None,
    }
}
