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
use cuda_std::float::{mul_add, rsqrt};
use cuda_std::grid::{let_next_start, wait_for_previous};
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::launch::Kernel;
use cuda_std::pipeline::WarpCopies;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, sync_warp, warp_reduce_add_4};
use cuda_std::{dynamic_shared, kernel};
use epilogue::{Add, Epilogue, Prepared as _, Qkv, Store, StoreOrdered, Swiglu};
use input::Input;
use stream::{Deal, Share, Stream};

/// Most warps in a block, whatever the activations.
const MAX_WARPS: u32 = 12;
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
    /// Bytes of the last tile of a row, which may be shorter.
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
    /// Quads that each block has to finish.
    pub turns: u32,
    /// The first so many blocks have a quad more.
    pub blocks_with_more: u32,
    /// Tiles of a quad whose part of the vector fits into shared memory at once: all, unless the activations come in
    /// slabs.
    pub slab_tiles: u32,
    /// Tiles that a warp has in shared memory or on their way, at most 32.
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

    /// Words of shared memory for the sums of a block's quads, of each warp that shares one: from one place to the next
    /// it is another quad, another warp, or both.
    #[inline(always)]
    pub fn sums_words(self, n_warps: u32) -> u32 {
        (self.turns + 1 + n_warps) * TILE_ROWS as u32
    }

    /// Words of shared memory for what is known of each quad beforehand: which warps share it, and the `prepared_words`
    /// words that its epilogue needs.
    #[inline(always)]
    pub fn prepared_words(self, prepared_words: u32) -> u32 {
        (self.turns + 1).next_multiple_of(4) + (self.turns + 1) * prepared_words
    }

    /// Words of shared memory in all, for `n_warps` warps, `unit_words` words of the vector to a unit, and
    /// `prepared_words` words that the epilogue prepares.
    pub fn shared_words(self, n_warps: u32, unit_words: u32, prepared_words: u32) -> u32 {
        self.vector_words(unit_words)
            + SQUARES_WORDS
            + self.sums_words(n_warps)
            + self.prepared_words(prepared_words)
            + n_warps * WarpCopies::words(self.stages, self.stage_words)
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

/// The warp's part of the work on the slab of the vector that starts at tile `slab`: leaves its sums of each quad at
/// word `sums_at` and on, added to what is there unless the slab is the first.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<X: Activations, D: Dots, const N: usize>(
    stream: &mut Stream<N>,
    deal: Deal<N>,
    share: Share,
    memory: DynamicShared<u32>,
    sums_at: u32,
    slab: u32,
    n_units: u32,
) {
    let (warp, lane) = (thread_idx_x() / WARP_SIZE, lane_id());
    let mut walk = share.walk(warp, slab);
    let mut sums = [0.0f32; TILE_ROWS];
    while walk.left > 0 {
        let source = stream.next_tile();
        let tile_units = (n_units - walk.tile * TILE_UNITS as u32).min(TILE_UNITS as u32);
        if lane < tile_units {
            // The slab's part of the vector starts at the start of the memory.
            let x = X::load(memory, (walk.tile - slab) as usize, lane as usize);
            let format = deal.matrix(deal.quad(walk.turn).part).format;
            sums = D::dots::<X>(format, source, tile_units as usize, lane as usize, &x, sums);
        }
        let turn = walk.turn;
        // All lanes meet here after their last read of the tile: its place is free.
        if !walk.advance() && walk.left > 0 {
            sync_warp(FULL_MASK);
        } else {
            let mut sum = warp_reduce_add_4(sums);
            if lane.is_multiple_of(8) {
                let at = (sums_at + (turn + warp) * TILE_ROWS as u32 + lane / 8) as usize;
                if X::IN_SLABS && slab > 0 {
                    sum += f32::from_bits(memory.get(at));
                }
                memory.set(at, sum.to_bits());
            }
            sums = [0.0; TILE_ROWS];
        }
        // SAFETY: the matrices are as they say.
        unsafe { stream.refill() };
    }
}

/// Multiplies `matrices`, one below the other, with the vector, and finishes every quad.
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
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    let warp = thread / WARP_SIZE;
    let deal = Deal::new(matrices, schedule);
    let n_units = input.n_units();
    let n_tiles = n_units.div_ceil(TILE_UNITS as u32);
    let slab_tiles = if X::IN_SLABS { schedule.slab_tiles } else { n_tiles };
    let share = Share::new(n_warps, deal.turns, slab_tiles, n_tiles);

    let memory = dynamic_shared!(GEMV_MEMORY: [u32]);
    let squares = schedule.vector_words(X::UNIT_WORDS as u32);
    let sums_at = squares + SQUARES_WORDS;
    let ring_words = WarpCopies::words(schedule.stages, schedule.stage_words);
    let warps_at = sums_at + schedule.sums_words(n_warps);
    let prepared_at = warps_at + (schedule.turns + 1).next_multiple_of(4);
    let ring = warps_at + schedule.prepared_words(E::Prepared::WORDS) + warp * ring_words;
    let mut stream = Stream::new(deal, share, warp, memory, ring, schedule, X::IN_SLABS);
    // SAFETY: the matrices are as they say.
    unsafe { stream.fill() };

    let_next_start();
    // Whose sums make up a quad takes divisions to know: found out now, by the thread that will need it.
    let mut turn = thread;
    while turn < deal.turns {
        memory.set((warps_at + turn) as usize, share.warps_of(turn));
        turn += block_dim_x();
    }
    wait_for_previous();

    // What finishing needs besides the sums, on its way beside the vector.
    let prepared_place = |turn: u32| (prepared_at + turn * E::Prepared::WORDS) as usize;
    let mut prepared = E::Prepared::default();
    if thread < deal.turns {
        let quad = deal.quad(thread);
        // SAFETY: the quad is one of the matrix's; the epilogue keeps its contract.
        prepared = unsafe { epilogue.prepare(quad, deal.matrix(quad.part)) };
    }
    let mut square_sum = 0.0;
    let mut slab = 0;
    while slab < n_tiles {
        if slab > 0 {
            // The part of the vector before this one may still be read.
            sync_threads();
            // SAFETY: the matrices are as they say.
            unsafe { stream.begin_slab(warp, slab) };
        }
        let first_unit = slab * TILE_UNITS as u32;
        let slab_units = (share.slab_tiles * TILE_UNITS as u32).min(n_units - first_unit);
        // SAFETY: the units are inside the vector; the input keeps its contract.
        square_sum += unsafe { input.load::<X>(memory, first_unit, slab_units, E::NORMALISES) };
        if E::NORMALISES && input.is_normalised() {
            input::store_squares(memory, squares, square_sum);
        }
        if slab == 0 && thread < deal.turns {
            prepared.store(memory, prepared_place(thread));
        }
        sync_threads();

        // SAFETY: the caller's promise.
        unsafe { multiply::<X, D, N>(&mut stream, deal, share, memory, sums_at, slab, n_units) };
        if !X::IN_SLABS {
            break;
        }
        slab += share.slab_tiles;
    }
    sync_threads();

    // This is `thread`, told otherwise: the comparison above would be kept for this one, in a register that is missing then.
    let mut turn = warp * WARP_SIZE + lane_id();
    while turn < deal.turns {
        let quad = deal.quad(turn);
        let matrix = deal.matrix(quad.part);
        let warps = memory.get((warps_at + turn) as usize);
        let mut sums = [0.0f32; TILE_ROWS];
        for warp in (warps & 0xffff)..=(warps >> 16) {
            let at = sums_at + (turn + warp) * TILE_ROWS as u32;
            let [s0, s1, s2, s3] = memory.get4(at as usize).map(f32::from_bits);
            sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
        }
        if E::NORMALISES && input.is_normalised() {
            let factor = rsqrt(mul_add(input::load_squares(memory, squares), input.per_n, input.eps));
            sums = sums.map(|sum| sum * factor);
        }
        // SAFETY: the quad is one of the matrix's, finished by this thread alone; the epilogue keeps its contract.
        unsafe {
            let prepared = if turn == thread {
                E::Prepared::load(memory, prepared_place(turn))
            } else {
                epilogue.prepare(quad, matrix)
            };
            epilogue.finish(quad, matrix, sums, prepared);
        }
        turn += block_dim_x();
    }
}

/// The kernels of a module for activations `$X` and products `$D`.
macro_rules! define_kernels {
    ($module:ident, $threads:literal, $blocks:literal, $X:ident, $D:ty) => {
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
        /// A block takes a run of quads, each of its warps a run of their tiles, a lane one unit of four rows; one
        /// thread finishes a quad. Blocks of whole warps, at most as many threads as the launch bound says.
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, $blocks))]
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
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, $blocks))]
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
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, $blocks))]
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
    ($module:ident, $threads:literal, $blocks:literal, $X:ident, $D:ty) => {
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
        #[kernel(suffix = $module, overlapping, launch_bounds($threads, $blocks))]
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
        #[doc = concat!("Q8_1 activations, ", stringify!($Type), " weights.")]
        pub mod $module {
            use super::*;
            define_kernels!($module, 384, 2, Q8_1, One<crate::formats::$Type>);
            define_qkv!($module, 384, 2, Q8_1, One<crate::formats::$Type>);
        }
    )*};
}
define_format! { (Q8_0, q8_0) (Q4_1, q4_1) (Q4_K, q4_k) (Q6_K, q6_k) }

/// Q8_1 activations, Q4_K and Q6_K weights side by side, as Q4_K_M files have them.
pub mod q4_k_m {
    use super::*;
    define_qkv!(q4_k_m, 384, 2, Q8_1, Either<crate::formats::Q4_K, crate::formats::Q6_K>);
}

/// Q8_1 activations, weights of any format: too much in one kernel for two blocks' registers.
pub mod mixed {
    use super::*;
    define_kernels!(mixed, 384, 1, Q8_1, Any);
    define_qkv!(mixed, 384, 1, Q8_1, Any);
}

/// f32 activations, weights of any format.
pub mod exact {
    use super::*;
    define_kernels!(exact, 256, 2, F32Vector, Any);
    define_qkv!(exact, 256, 2, F32Vector, Any);
}

macro_rules! define_ordered {
    ($(($suffix:ident, $threads:literal, $X:ident))*) => {$(
        #[doc = concat!("`y = W x` or `y = W x + b` on ", stringify!($X), " activations, rows in any order.")]
        pub mod $suffix {
            use super::*;

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
    (ordered, 384, Q8_1)
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

/// The kernels for Q8_1 activations and weights of a format.
#[cfg(not(target_arch = "nvptx64"))]
pub fn kernels(format: Format) -> Kernels {
    match format {
        Format::Q8_0 => q8_0::KERNELS,
        Format::Q4_1 => q4_1::KERNELS,
        Format::Q4_K => q4_k::KERNELS,
        Format::Q6_K => q6_k::KERNELS,
        Format::F16 | Format::F32 => mixed::KERNELS,
    }
}

/// `gemv_qkv`.
#[cfg(not(target_arch = "nvptx64"))]
pub type QkvKernel = Kernel<(MatrixRef, MatrixRef, MatrixRef, Input, Schedule, Qkv)>;

/// The kernel for Q8_1 activations and weights of these formats.
#[cfg(not(target_arch = "nvptx64"))]
pub fn qkv_kernel(formats: [Format; 3]) -> &'static QkvKernel {
    match formats {
        [Format::Q8_0, Format::Q8_0, Format::Q8_0] => &q8_0::GEMV_QKV,
        [Format::Q4_1, Format::Q4_1, Format::Q4_1] => &q4_1::GEMV_QKV,
        [Format::Q4_K, Format::Q4_K, Format::Q4_K] => &q4_k::GEMV_QKV,
        [Format::Q6_K, Format::Q6_K, Format::Q6_K] => &q6_k::GEMV_QKV,
        _ if formats.iter().all(|format| matches!(format, Format::Q4_K | Format::Q6_K)) => &q4_k_m::GEMV_QKV,
        _ => &mixed::GEMV_QKV,
    }
}
