//! Activations of many tokens as the tensor cores take them: bfloat16, in panels of 64 columns.
//!
//! A panel holds 64 columns of all tokens, a row of 128 bytes for each token, its 16-byte pieces at the places that
//! [`swizzled`] gives: what a block copies of it to shared memory is one run of bytes. Two panels make a group of 128
//! columns, four units of 32. In a group the columns are exchanged so that what a lane needs of its matrix for all eight
//! steps is one unit of weights: of a step's 16 columns, lanes whose number is `m` modulo 4 hold `2 m`, `2 m + 1`, `2 m + 8`
//! and `2 m + 9`, and those are four neighbouring columns of unit `m`, step after step. Columns beyond the last one are zeros.
//!
//! On the exact path a value is the sum of two bfloat16, the nearest one and the nearest one of what is left: 16 bits,
//! each in panels of its own.

use crate::formats::UNIT;
use crate::token_vector::TokenVector;
use bytemuck::{Pod, Zeroable};
use cuda_std::float::{bf16x2_to_f32, f32_to_bf16x2};
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::st_global_u32x4;
use cuda_std::tensor::{PANEL_DEPTH, STEP_DEPTH, swizzled};
use cuda_std::thread::{block_dim_x, block_idx_x, thread_idx_x};
use cuda_std::{kernel, shared_array};

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;
/// Columns in a group.
pub const GROUP: usize = 128;
/// Panels that hold a group.
pub const GROUP_PANELS: usize = GROUP / PANEL_DEPTH;
/// Units in a group.
pub const GROUP_UNITS: usize = GROUP / UNIT;
/// Steps of a tensor core through a group.
pub const GROUP_STEPS: usize = GROUP / STEP_DEPTH;
/// Bytes of a token's row in a panel.
pub const ROW_BYTES: usize = 2 * PANEL_DEPTH;
/// Rows of tokens in a panel are a multiple of this.
pub const TOKEN_STEP: usize = 8;

/// Sixteen bytes of panels: eight values.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PanelPiece(pub [u32; 4]);

/// Panels in device memory, as a launch passes them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Panels {
    /// `[n_groups * GROUP_PANELS, n_rows, 64]` numbers: the values, rounded.
    pub high: *const PanelPiece,
    /// Likewise what is left of them; null on the fast path.
    pub low: *const PanelPiece,
    /// Rows of tokens, a multiple of [`TOKEN_STEP`].
    pub n_rows: u32,
    /// Units of 32 columns.
    pub n_units: u32,
}

impl Panels {
    /// Groups of [`GROUP`] columns, the last one filled up with zeros.
    #[inline(always)]
    pub fn n_groups(self) -> u32 {
        self.n_units.div_ceil(GROUP_UNITS as u32)
    }
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Panels {}

/// Puts `n_tokens` vectors of `n` values into panels, normalised first (RMSNorm, as [`crate::rms_norm`]) where `gamma` is
/// not null.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`: `[n_tokens, n]`, rows filled up to a multiple of 4 values, at a multiple of 16 bytes
/// - `gamma`: `[n]`, at a multiple of 16 bytes and readable up to one, or null
/// - `panels`: of at least `n_tokens` rows and `n` columns; written
///
/// # Thread mapping
/// A block per token, of [`BLOCK_DIM`] threads. A thread takes every so many of the vector's steps: four columns of each of
/// the four units of a group. Bytes moved: 6 per value, and 4 from the L1 cache where it is normalised.
#[kernel(overlapping)]
pub unsafe fn pack_panels(x: *const f32, gamma: *const f32, n: u32, eps: f32, panels: Panels) {
    let_next_start();
    wait_for_previous();
    let scratch = shared_array!(PACK_PANELS_SUMS: [f32; 32]);
    let (token, thread, stride) = (block_idx_x() as usize, thread_idx_x() as usize, block_dim_x() as usize);
    // SAFETY: the token is one of them; the vectors are as the caller vouches.
    let vector = unsafe { TokenVector::new(x, gamma, block_idx_x(), n, eps, scratch) };

    let mut index = thread;
    while index < panels.n_groups() as usize * GROUP_STEPS {
        let (group, step) = (index / GROUP_STEPS, index % GROUP_STEPS);
        let values = |member: usize| vector.four(group * GROUP + member * UNIT + 4 * step);
        let [m0, m1, m2, m3] = [values(0), values(1), values(2), values(3)];
        let panel = group * GROUP_PANELS + step / (GROUP_STEPS / GROUP_PANELS);
        let row = panel * panels.n_rows as usize + token;
        // Both halves of the step: the first two columns of each unit, then the other two.
        for half in 0..2 {
            let piece = step % (GROUP_STEPS / GROUP_PANELS) * 2 + half;
            let at = row * (ROW_BYTES / 16) + swizzled(token, piece);
            let pair = |m: [f32; 4]| if half == 0 { [m[0], m[1]] } else { [m[2], m[3]] };
            let pairs = [pair(m0), pair(m1), pair(m2), pair(m3)];
            let high = pairs.map(|[a, b]| f32_to_bf16x2(a, b));
            // SAFETY: the row and the piece are in the panels, and this thread's own.
            unsafe {
                st_global_u32x4(panels.high.add(at).cast_mut().cast(), high);
                if !panels.low.is_null() {
                    let low = [
                        rest(pairs[0], high[0]),
                        rest(pairs[1], high[1]),
                        rest(pairs[2], high[2]),
                        rest(pairs[3], high[3]),
                    ];
                    st_global_u32x4(panels.low.add(at).cast_mut().cast(), low);
                }
            }
        }
        index += stride;
    }
}

/// What two values are more than `rounded`, rounded itself.
#[inline(always)]
pub fn rest([a, b]: [f32; 2], rounded: u32) -> u32 {
    let [high_a, high_b] = bf16x2_to_f32(rounded);
    f32_to_bf16x2(a - high_a, b - high_b)
}
