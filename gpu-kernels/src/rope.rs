//! Rotary position embedding (Su et al., 2021).

use crate::math::sin_cos;
use crate::step::Step;
use cuda_std::kernel;
use cuda_std::thread::index_1d;

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;

/// Which two values of a head are rotated together as pair `i`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(2 i, 2 i + 1)`, as GGUFs of the llama architecture are permuted for.
    Interleaved = 0,
    /// `(i, i + n_rot / 2)`, as in qwen2.
    HalfSplit = 1,
}

/// Rotates the first `n_rot` values of every head: pair `i` by `position * frequencies[i]` radians.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`: `[n_head, head_dim]`, changed in place
/// - `frequencies`: `[n_rot / 2]`, radians per position
/// - `step`: holds the position
/// - `n_rot`: even, at most `head_dim`
/// - `layout`: a [`RopeLayout`]
///
/// # Thread mapping
/// One thread per pair of each head, any block size. Bytes moved: 8 per rotated value.
#[kernel]
pub unsafe fn rope(
    x: *mut f32,
    frequencies: *const f64,
    step: *const Step,
    n_head: u32,
    head_dim: u32,
    n_rot: u32,
    layout: u32,
) {
    let pairs = (n_rot / 2) as usize;
    let index = index_1d() as usize;
    if index >= n_head as usize * pairs {
        return;
    }
    let (head, pair) = (index / pairs, index % pairs);
    let (first, second) = if layout == RopeLayout::Interleaved as u32 {
        (2 * pair, 2 * pair + 1)
    } else {
        (pair, pair + pairs)
    };
    // SAFETY: the pair is inside the head, and only this thread touches it.
    unsafe {
        let (sin, cos) = sin_cos((*step).position as f64 * *frequencies.add(pair));
        let head = x.add(head * head_dim as usize);
        let (a, b) = (*head.add(first), *head.add(second));
        *head.add(first) = a * cos - b * sin;
        *head.add(second) = a * sin + b * cos;
    }
}
