//! Matrix-vector products with quantized weights: `y = W x`, and the feed-forward network's
//! `y = silu(G x) * (U x)` in one pass.
//!
//! Each kernel exists per weight format and per kind of activations; [`kernels`] picks the instance. Bytes moved:
//! the matrix once, plus the vector, which stays in the caches.

use crate::activations::{Activations, F32Vector, Q8_1, Q8_1Scale};
use crate::formats::{RUN, UNIT, WeightFormat};
use crate::math::silu;
use cuda_std::kernel;
use cuda_std::thread::{block_idx_x, grid_dim_x, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add_n};

/// Rows that a warp works on at once: they share each load of the activations and one reduction.
pub const ROWS_PER_WARP: usize = 4;
/// Warps in a block.
pub const WARPS_PER_BLOCK: usize = 4;
/// Threads in a block.
pub const BLOCK_DIM: usize = WARPS_PER_BLOCK * WARP_SIZE as usize;
/// Rows that a block works on at once.
pub const ROWS_PER_BLOCK: usize = ROWS_PER_WARP * WARPS_PER_BLOCK;

/// What `y` gets besides the product.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addend {
    /// Nothing: `y = W x`.
    None = 0,
    /// A bias: `y = W x + addend`.
    Bias = 1,
    /// The residual: `y += W x`.
    Residual = 2,
}

/// The dot products of four rows with `x`, every lane getting all of them.
///
/// # Safety
/// As [`WeightFormat::load`] and [`Activations::load`] ask, for every row; all lanes of the warp must be here.
#[inline(always)]
unsafe fn row_dots<F: WeightFormat, X: Activations>(
    rows: [*const F::Block; ROWS_PER_WARP],
    x: X,
    n_cols: usize,
) -> [f32; ROWS_PER_WARP] {
    // Named one by one: LLVM does not unroll a loop over bodies of this size, and an array that is indexed at run
    // time lies in local memory.
    let [row0, row1, row2, row3] = rows;
    let [mut sum0, mut sum1, mut sum2, mut sum3] = [0.0; ROWS_PER_WARP];
    let mut unit = (thread_idx_x() % WARP_SIZE) as usize;
    while unit < n_cols.div_ceil(UNIT) {
        // SAFETY: the unit is inside the rows and the vector; the rest is the caller's promise.
        unsafe {
            let x = x.load::<F>(unit, n_cols);
            sum0 += X::dot(&F::load(row0, unit, n_cols), &x);
            sum1 += X::dot(&F::load(row1, unit, n_cols), &x);
            sum2 += X::dot(&F::load(row2, unit, n_cols), &x);
            sum3 += X::dot(&F::load(row3, unit, n_cols), &x);
        }
        unit += WARP_SIZE as usize;
    }
    warp_reduce_add_n(FULL_MASK, [sum0, sum1, sum2, sum3], WARP_SIZE)
}

/// Pointers to `ROWS` rows from `first` on; beyond the last row they repeat it, so that the warp stays whole.
#[inline(always)]
fn row_pointers<F: WeightFormat, const ROWS: usize>(
    weights: *const F::Block,
    first: usize,
    n_rows: usize,
    n_cols: usize,
) -> [*const F::Block; ROWS] {
    let blocks = n_cols / F::BLOCK_LEN;
    core::array::from_fn(|i| weights.wrapping_add((first + i).min(n_rows - 1) * blocks))
}

/// The first row of this warp, and how far apart its groups of `rows` rows are.
#[inline(always)]
fn first_row_and_stride(rows: usize) -> (usize, usize) {
    let warp = block_idx_x() as usize * WARPS_PER_BLOCK + (thread_idx_x() / WARP_SIZE) as usize;
    (warp * rows, grid_dim_x() as usize * WARPS_PER_BLOCK * rows)
}

/// `y = W x`, with a bias or onto `y` itself.
///
/// # Safety
/// `weights` holds `n_rows` rows of `n_cols` weights; `x` has `n_cols` values; `y` has room for `n_rows`; `bias`
/// has `n_rows` values when `addend` is [`Addend::Bias`].
#[inline(always)]
unsafe fn gemv<F: WeightFormat, X: Activations>(
    weights: *const F::Block,
    x: X,
    bias: *const f32,
    y: *mut f32,
    n_rows: usize,
    n_cols: usize,
    addend: u32,
) {
    let lane = (thread_idx_x() % WARP_SIZE) as usize;
    let (mut first, stride) = first_row_and_stride(ROWS_PER_WARP);
    while first < n_rows {
        // SAFETY: the row pointers stay inside the matrix, and `first` is the same in all lanes of the warp.
        let [sum0, sum1, sum2, sum3] =
            unsafe { row_dots::<F, X>(row_pointers::<F, _>(weights, first, n_rows, n_cols), x, n_cols) };
        let row = first + lane;
        if lane < ROWS_PER_WARP && row < n_rows {
            let sum = match lane {
                0 => sum0,
                1 => sum1,
                2 => sum2,
                _ => sum3,
            };
            // SAFETY: the row is inside `y` and, where it is read, `bias`.
            unsafe {
                let base = match addend {
                    0 => 0.0,
                    1 => *bias.add(row),
                    _ => *y.add(row),
                };
                *y.add(row) = base + sum;
            }
        }
        first += stride;
    }
}

/// `y = silu(G x) * (U x)`.
///
/// # Safety
/// As [`gemv`], for both matrices.
#[inline(always)]
unsafe fn gemv_swiglu<F: WeightFormat, X: Activations>(
    gate: *const F::Block,
    up: *const F::Block,
    x: X,
    y: *mut f32,
    n_rows: usize,
    n_cols: usize,
) {
    const ROWS: usize = ROWS_PER_WARP / 2;
    let lane = (thread_idx_x() % WARP_SIZE) as usize;
    let (mut first, stride) = first_row_and_stride(ROWS);
    while first < n_rows {
        let [gate0, gate1] = row_pointers::<F, ROWS>(gate, first, n_rows, n_cols);
        let [up0, up1] = row_pointers::<F, ROWS>(up, first, n_rows, n_cols);
        // SAFETY: the row pointers stay inside the matrices, and `first` is the same in all lanes of the warp.
        let [g0, g1, u0, u1] = unsafe { row_dots::<F, X>([gate0, gate1, up0, up1], x, n_cols) };
        let row = first + lane;
        if lane < ROWS && row < n_rows {
            let (g, u) = if lane == 0 { (g0, u0) } else { (g1, u1) };
            // SAFETY: the row is inside `y`.
            unsafe { *y.add(row) = silu(g) * u };
        }
        first += stride;
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod signatures {
    use super::*;
    use cuda_std::launch::Kernel;

    /// `gemv_q8_1` of any format.
    pub type GemvQ8_1 =
        Kernel<(*const u8, *const [i32; RUN / 4], *const Q8_1Scale, *const f32, *mut f32, u32, u32, u32)>;
    /// `gemv_f32` of any format.
    pub type GemvF32 = Kernel<(*const u8, *const f32, *const f32, *mut f32, u32, u32, u32)>;
    /// `gemv_swiglu_q8_1` of any format.
    pub type GemvSwigluQ8_1 =
        Kernel<(*const u8, *const u8, *const [i32; RUN / 4], *const Q8_1Scale, *mut f32, u32, u32)>;
    /// `gemv_swiglu_f32` of any format.
    pub type GemvSwigluF32 = Kernel<(*const u8, *const u8, *const f32, *mut f32, u32, u32)>;
}
#[cfg(not(target_arch = "nvptx64"))]
pub use signatures::*;

macro_rules! define_kernels {
    ($(($Type:ident, $name:ident))*) => {$(
        #[doc = concat!("The kernels for ", stringify!($Type), " weights.")]
        pub mod $name {
            use super::*;
            use crate::formats::$Type;

            /// `y = W x` with `x` in Q8_1: integer dot products (dp4a), scales and minimums per block.
            ///
            /// # Safety
            /// The pointers are to device memory of the sizes below.
            ///
            /// # Parameters
            /// - `weights`: `[n_rows, n_cols]` in blocks, row by row; `n_cols` a multiple of the block length
            /// - `x_quants`, `x_scales`: `[n_cols]` in Q8_1, the last block filled up with zeros
            /// - `bias`: `[n_rows]`, read only when `addend` is 1 ([`Addend`])
            /// - `y`: `[n_rows]`
            ///
            /// # Thread mapping
            /// Blocks of [`BLOCK_DIM`] threads, any grid in x. A warp takes [`ROWS_PER_WARP`] rows at a time, a
            /// lane every 32nd unit of 32 columns.
            #[kernel(suffix = $name)]
            pub unsafe fn gemv_q8_1(
                weights: *const u8,
                x_quants: *const [i32; RUN / 4],
                x_scales: *const Q8_1Scale,
                bias: *const f32,
                y: *mut f32,
                n_rows: u32,
                n_cols: u32,
                addend: u32,
            ) {
                let x = Q8_1 { quants: x_quants, scales: x_scales };
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { gemv::<$Type, _>(weights.cast(), x, bias, y, n_rows as usize, n_cols as usize, addend) }
            }

            /// `y = W x` with `x` in f32: weights dequantized in registers (the exact path).
            ///
            /// # Safety
            /// As [`gemv_q8_1`], with `x` in f32.
            ///
            /// # Parameters
            /// As [`gemv_q8_1`]; `x`: `[n_cols]`.
            ///
            /// # Thread mapping
            /// As [`gemv_q8_1`].
            #[kernel(suffix = $name)]
            pub unsafe fn gemv_f32(
                weights: *const u8,
                x: *const f32,
                bias: *const f32,
                y: *mut f32,
                n_rows: u32,
                n_cols: u32,
                addend: u32,
            ) {
                let x = F32Vector { values: x };
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { gemv::<$Type, _>(weights.cast(), x, bias, y, n_rows as usize, n_cols as usize, addend) }
            }

            /// `y = silu(G x) * (U x)` with `x` in Q8_1: the first half of the feed-forward network.
            ///
            /// # Safety
            /// As [`gemv_q8_1`], for both matrices.
            ///
            /// # Parameters
            /// - `gate`, `up`: `[n_rows, n_cols]` in blocks, row by row
            /// - `x_quants`, `x_scales`: `[n_cols]` in Q8_1
            /// - `y`: `[n_rows]`
            ///
            /// # Thread mapping
            /// As [`gemv_q8_1`], with half of [`ROWS_PER_WARP`] rows of each matrix at a time.
            #[kernel(suffix = $name)]
            pub unsafe fn gemv_swiglu_q8_1(
                gate: *const u8,
                up: *const u8,
                x_quants: *const [i32; RUN / 4],
                x_scales: *const Q8_1Scale,
                y: *mut f32,
                n_rows: u32,
                n_cols: u32,
            ) {
                let x = Q8_1 { quants: x_quants, scales: x_scales };
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { gemv_swiglu::<$Type, _>(gate.cast(), up.cast(), x, y, n_rows as usize, n_cols as usize) }
            }

            /// `y = silu(G x) * (U x)` with `x` in f32.
            ///
            /// # Safety
            /// As [`gemv_swiglu_q8_1`], with `x` in f32.
            ///
            /// # Parameters
            /// As [`gemv_swiglu_q8_1`]; `x`: `[n_cols]`.
            ///
            /// # Thread mapping
            /// As [`gemv_swiglu_q8_1`].
            #[kernel(suffix = $name)]
            pub unsafe fn gemv_swiglu_f32(
                gate: *const u8,
                up: *const u8,
                x: *const f32,
                y: *mut f32,
                n_rows: u32,
                n_cols: u32,
            ) {
                let x = F32Vector { values: x };
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { gemv_swiglu::<$Type, _>(gate.cast(), up.cast(), x, y, n_rows as usize, n_cols as usize) }
            }
        }
    )*

        /// The four kernels of one weight format.
        #[cfg(not(target_arch = "nvptx64"))]
        #[derive(Clone, Copy)]
        pub struct GemvKernels {
            /// `gemv_q8_1`.
            pub q8_1: &'static GemvQ8_1,
            /// `gemv_f32`.
            pub f32: &'static GemvF32,
            /// `gemv_swiglu_q8_1`.
            pub swiglu_q8_1: &'static GemvSwigluQ8_1,
            /// `gemv_swiglu_f32`.
            pub swiglu_f32: &'static GemvSwigluF32,
        }

        /// The kernels for weights in `format`.
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn kernels(format: crate::formats::Format) -> GemvKernels {
            match format {
                $(crate::formats::Format::$Type => GemvKernels {
                    q8_1: &$name::GEMV_Q8_1,
                    f32: &$name::GEMV_F32,
                    swiglu_q8_1: &$name::GEMV_SWIGLU_Q8_1,
                    swiglu_f32: &$name::GEMV_SWIGLU_F32,
                },)*
            }
        }
    };
}
crate::for_each_format!(define_kernels);
