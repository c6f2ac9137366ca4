//! Matrix-vector products with quantized weights, and what surrounds them in a layer.
//!
//! Every one of these kernels goes the same way, [`run`]: start streaming the matrix ([`stream`]), wait for the kernel
//! before, put the vector into shared memory, normalised and quantized ([`input`]), multiply, and let one thread
//! finish each four rows ([`epilogue`]). They differ in what finishing means. Weights are on their way before the
//! kernel before has ended, since they depend on nothing: between two products memory never idles.
//!
//! Bytes moved: the matrix once, plus the vector once per block, from the L2 cache.

pub mod epilogue;
pub mod input;
pub mod stream;

use crate::activations::{Activations, F32Vector, Q8_1};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, WeightFormat};
use crate::rows::RowOrder;
use core::marker::PhantomData;
use cuda_std::float::rsqrt;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, sync_warp, warp_reduce_add_n};
use cuda_std::{dynamic_shared, kernel};
use epilogue::{Epilogue, Qkv, Store, Swiglu};
use input::Input;
use stream::{Deal, Stream};

/// Most warps in a block: two blocks of them fit on a multiprocessor, so that the next kernel's starts beside this one's.
pub const MAX_WARPS: u32 = 8;
/// Words of shared memory for the warps' sums of squares.
const SQUARES_WORDS: u32 = MAX_WARPS;

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
    /// Bytes of a tile of 32 units.
    pub tile_bytes: u32,
    /// Bytes of the last tile of a row, where it is shorter.
    pub last_tile_bytes: u32,
    /// Bytes of a quad.
    pub quad_bytes: u32,
    /// The order of the rows.
    pub order: RowOrder,
}

/// How the work is dealt out and where things lie in shared memory, chosen by the launcher.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Warps that share a quad's tiles: a divisor of the block's warps, at most `slab_tiles`.
    pub warps_per_quad: u32,
    /// Quads that each group of warps takes, one after the other.
    pub steps: u32,
    /// Tiles of a quad whose part of the vector fits into shared memory at once.
    pub slab_tiles: u32,
    /// Tiles that a warp has in shared memory or on their way: 2 to [`stream::MAX_STAGES`].
    pub stages: u32,
    /// Words of shared memory for a tile.
    pub stage_words: u32,
}

impl Schedule {
    /// Words of shared memory that the vector takes, with `unit_words` to a unit.
    #[inline(always)]
    pub fn vector_words(self, unit_words: u32) -> u32 {
        self.slab_tiles * TILE_UNITS as u32 * unit_words
    }

    /// Words of shared memory in all, for `n_warps` warps and `unit_words` words of the vector to a unit.
    pub fn shared_words(self, n_warps: u32, unit_words: u32) -> u32 {
        self.vector_words(unit_words)
            + SQUARES_WORDS
            + self.steps * n_warps * TILE_ROWS as u32
            + n_warps * self.stages * self.stage_words
    }
}

macro_rules! kernel_args {
    ($($Type:ty),*) => {$(
        #[cfg(not(target_arch = "nvptx64"))]
        // SAFETY: pointers and numbers in C's layout, alike on both sides.
        unsafe impl cuda_std::launch::KernelArg for $Type {}
    )*};
}
kernel_args!(MatrixRef, Schedule, Input, Store, Swiglu, Qkv);

/// How the products of a tile are made.
trait Dots {
    /// The products of the tile's four rows with the vector's unit of this lane.
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; 4];
}

/// Of tiles that all have one format.
struct One<F>(PhantomData<F>);

impl<F: WeightFormat> Dots for One<F> {
    #[inline(always)]
    fn dots<X: Activations>(_: u32, tile: SharedTile, n_units: usize, unit: usize, x: &X::Unit) -> [f32; 4] {
        // Written out: an array of closures' results would be filled in a loop, with `x` in local memory.
        [
            X::dot(&F::unpack(tile, Place { n_units, row: 0, unit }), x),
            X::dot(&F::unpack(tile, Place { n_units, row: 1, unit }), x),
            X::dot(&F::unpack(tile, Place { n_units, row: 2, unit }), x),
            X::dot(&F::unpack(tile, Place { n_units, row: 3, unit }), x),
        ]
    }
}

/// Of tiles whose format may change from one to the next; it is the same for all lanes of the warp.
struct Any;

impl Dots for Any {
    #[inline(always)]
    fn dots<X: Activations>(
        format: u32,
        tile: SharedTile,
        n_units: usize,
        unit: usize,
        x: &X::Unit,
    ) -> [f32; 4] {
        macro_rules! dispatch {
            ($(($Type:ident, $name:ident))*) => {
                match format {
                    $(f if f == Format::$Type as u32 =>
                        One::<crate::formats::$Type>::dots::<X>(format, tile, n_units, unit, x),)*
                    _ => [0.0; TILE_ROWS],
                }
            };
        }
        crate::for_each_format!(dispatch)
    }
}

/// Where things are in shared memory, in words, and who this thread is.
#[derive(Clone, Copy)]
struct Layout {
    memory: DynamicShared<u32>,
    /// The sums of each warp's quads.
    sums: u32,
    warp: u32,
    n_warps: u32,
}

/// The warp's part of the work on one slab of the vector, which has `n_units` units in shared memory: leaves the sums
/// of each quad, added to what is there unless the slab is the first.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<X: Activations, D: Dots, const N: usize>(
    stream: &mut Stream<N>,
    schedule: Schedule,
    layout: Layout,
    n_units: u32,
    is_first: bool,
) {
    let Schedule { warps_per_quad, steps, slab_tiles, .. } = schedule;
    let Layout { memory, warp, n_warps, .. } = layout;
    let lane = lane_id();
    // A lane beyond the vector reads some other unit, and uses none.
    let load = |tile: u32| {
        X::load(memory, n_units as usize, (tile * TILE_UNITS as u32 + lane).min(n_units - 1) as usize)
    };
    let mut loaded = warp % warps_per_quad;
    let mut x = load(loaded);
    for step in 0..steps {
        let mut sums = [0.0f32; TILE_ROWS];
        let mut tile = warp % warps_per_quad;
        loop {
            if let Some((format, source, tile_units)) = stream.next()
                && lane < tile_units
            {
                if loaded != tile {
                    x = load(tile);
                    loaded = tile;
                }
                let [s0, s1, s2, s3] = D::dots::<X>(format, source, tile_units as usize, lane as usize, &x);
                sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
            }
            tile += warps_per_quad;
            if tile >= slab_tiles {
                break;
            }
            // All lanes have read the tile: its place is free.
            sync_warp(FULL_MASK);
            // SAFETY: the matrices are as they say.
            unsafe { stream.refill() };
        }
        // All lanes meet here after their last read of the tile: its place is free.
        let [t0, t1, t2, t3] = warp_reduce_add_n(FULL_MASK, sums, WARP_SIZE);
        if lane == 0 {
            let at = (layout.sums + (step * n_warps + warp) * TILE_ROWS as u32) as usize;
            let mut total = [t0, t1, t2, t3];
            if !is_first {
                let [b0, b1, b2, b3] = memory.get4(at).map(f32::from_bits);
                total = [b0 + t0, b1 + t1, b2 + t2, b3 + t3];
            }
            memory.set4(at, total.map(f32::to_bits));
        }
        // SAFETY: the matrices are as they say.
        unsafe { stream.refill() };
    }
}

/// Multiplies `matrices`, one below the other, with the vector, and finishes every quad.
///
/// # Safety
/// The matrices are as their fields say, all of `input.n` columns; the input and the epilogue keep their contracts;
/// the launch has the shared memory that [`Schedule::shared_words`] gives, and `schedule` covers all quads.
#[inline(always)]
unsafe fn run<X: Activations, E: Epilogue, const N: usize>(
    matrices: [MatrixRef; N],
    input: Input,
    schedule: Schedule,
    epilogue: E,
) {
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    let warp = thread / WARP_SIZE;
    let Schedule { warps_per_quad, steps, slab_tiles, .. } = schedule;
    let deal = Deal { matrices };

    let memory = dynamic_shared!(GEMV_MEMORY: [u32]);
    let squares = schedule.vector_words(X::UNIT_WORDS as u32);
    let sums_at = squares + SQUARES_WORDS;
    let rings = sums_at + steps * n_warps * TILE_ROWS as u32;
    let mut stream = Stream::new(deal, schedule, input.n_units(), memory, rings, warp, n_warps);
    // SAFETY: the matrices are as they say.
    unsafe { stream.fill() };

    wait_for_previous();
    let_next_start();

    // What finishing needs besides the sums is fetched now; it arrives while the products are made.
    let n_turns = steps * (n_warps / warps_per_quad);
    let first = deal.quad(thread).filter(|_| thread < n_turns);
    let first_prepared = match first {
        // SAFETY: the quad is one of the matrix's; the epilogue keeps its contract.
        Some(quad) => unsafe { epilogue.prepare(quad, deal.matrix(quad.part)) },
        None => E::Prepared::default(),
    };

    let mut square_sum = 0.0;
    let mut first_tile = 0;
    while first_tile * (TILE_UNITS as u32) < input.n_units() {
        if first_tile > 0 {
            // The part of the vector before this one may still be read.
            sync_threads();
        }
        let n_units = (slab_tiles * TILE_UNITS as u32).min(input.n_units() - first_tile * TILE_UNITS as u32);
        // SAFETY: the units are inside the vector; the input keeps its contract.
        square_sum += unsafe { input.load::<X>(memory, first_tile * TILE_UNITS as u32, n_units) };
        sync_threads();

        let layout = Layout { memory, sums: sums_at, warp, n_warps };
        macro_rules! dispatch {
            ($(($Type:ident, $name:ident))*) => {
                match matrices[0].format {
                    $(f if f == Format::$Type as u32 =>
                        // SAFETY: the caller's promise.
                        unsafe {
                            multiply::<X, One<crate::formats::$Type>, N>(
                                &mut stream, schedule, layout, n_units, first_tile == 0,
                            );
                        })*
                    _ => {}
                }
            };
        }
        if N == 1 {
            // The loop exists once per format: what one of them needs does not take up registers in another.
            crate::for_each_format!(dispatch)
        } else {
            // SAFETY: the caller's promise.
            unsafe { multiply::<X, Any, N>(&mut stream, schedule, layout, n_units, first_tile == 0) };
        }
        first_tile += slab_tiles;
    }
    if input.is_normalised() {
        input::store_squares(memory, squares as usize, square_sum);
    }
    sync_threads();

    let mut turn = thread;
    while turn < n_turns {
        let Some(quad) = deal.quad(turn) else { break };
        let mut factor = 1.0;
        if input.is_normalised() {
            let mut sum = 0.0;
            for i in 0..n_warps {
                sum += f32::from_bits(memory.get((squares + i) as usize));
            }
            factor = rsqrt(sum / input.n as f32 + input.eps);
        }
        let mut sums = [0.0f32; TILE_ROWS];
        for i in 0..warps_per_quad {
            let at = sums_at + (turn * warps_per_quad + i) * TILE_ROWS as u32;
            let [s0, s1, s2, s3] = memory.get4(at as usize).map(f32::from_bits);
            sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
        }
        let matrix = deal.matrix(quad.part);
        // SAFETY: the quad is one of the matrix's, finished by this thread alone; the epilogue keeps its contract.
        unsafe {
            let prepared = if turn == thread { first_prepared } else { epilogue.prepare(quad, matrix) };
            epilogue.finish(quad, matrix, sums.map(|sum| sum * factor), prepared);
        }
        turn += block_dim_x();
    }
}

macro_rules! define_kernels {
    ($(($Type:ident, $name:ident))*) => {$(
        #[doc = concat!("The kernels on ", stringify!($Type), " activations.")]
        pub mod $name {
            use super::*;

            /// `y = W x`, `y = W x + b` or `y += W x`, `x` normalised first where the input says so.
            ///
            /// # Safety
            /// The matrix, the input and the output are as their fields say, in device memory; the launch has the
            /// shared memory that [`Schedule::shared_words`] gives, and the schedule covers all quads.
            ///
            /// # Parameters
            /// - `matrix`: `[n_rows, input.n]`
            /// - `input`: the vector
            /// - `schedule`: how the work is dealt out
            /// - `output`: `y` and what is added
            ///
            /// # Thread mapping
            /// Block `b` of `n` takes quads `b`, `b + n`, ...; groups of `warps_per_quad` warps take one at a time, a
            /// warp every `warps_per_quad`-th tile, a lane one unit of four rows.
            #[kernel(suffix = $name, overlapping, launch_bounds(256, 2))]
            pub unsafe fn gemv(matrix: MatrixRef, input: Input, schedule: Schedule, output: Store) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$Type, _, 1>([matrix], input, schedule, output) }
            }

            /// `y = silu(G x) * (U x)`: the first half of the feed-forward network.
            ///
            /// # Safety
            /// As [`gemv`].
            ///
            /// # Parameters
            /// - `matrix`: `[2 * n_ff, input.n]`, `G` above `U`, in [`Order::Halves`](crate::rows::Order::Halves)
            /// - `input`, `schedule`: as for [`gemv`]
            /// - `output`: `y`
            ///
            /// # Thread mapping
            /// As [`gemv`].
            #[kernel(suffix = $name, overlapping, launch_bounds(256, 2))]
            pub unsafe fn gemv_swiglu(matrix: MatrixRef, input: Input, schedule: Schedule, output: Swiglu) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$Type, _, 1>([matrix], input, schedule, output) }
            }

            /// Queries, keys and values of a token in one pass: with their bias, rotated, keys and values appended
            /// to the cache.
            ///
            /// # Safety
            /// As [`gemv`], for the three matrices; the step's position is below the cache's `n_ctx`.
            ///
            /// # Parameters
            /// - `q`: `[n_head * head_dim, input.n]`
            /// - `k`, `v`: `[n_head_kv * head_dim, input.n]`; `q` and `k` in an order that has the two values of a
            ///   rotated pair side by side
            /// - `input`, `schedule`: as for [`gemv`]
            /// - `output`: the queries, the cache, bias and rotation
            ///
            /// # Thread mapping
            /// As [`gemv`].
            #[kernel(suffix = $name, overlapping, launch_bounds(256, 2))]
            pub unsafe fn gemv_qkv(
                q: MatrixRef,
                k: MatrixRef,
                v: MatrixRef,
                input: Input,
                schedule: Schedule,
                output: Qkv,
            ) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$Type, _, 3>([q, k, v], input, schedule, output) }
            }
        }
    )*};
}
define_kernels! {
    (Q8_1, q8_1)
    (F32Vector, f32)
}
