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

/// A pair of values, rotated by an angle of which cosine and sine are given.
#[inline(always)]
pub fn rotate([a, b]: [f32; 2], [cos, sin]: [f32; 2]) -> [f32; 2] {
    [a * cos - b * sin, a * sin + b * cos]
}

/// Cosine and sine of `position * frequencies[pair]`, both times `magnitude`.
///
/// # Safety
/// `frequencies` must have the pair.
#[inline(always)]
pub unsafe fn angle(position: u32, frequencies: *const f64, pair: usize, magnitude: f32) -> [f32; 2] {
    // SAFETY: the caller vouches for the pair.
    let (sin, cos) = sin_cos(f64::from(position) * unsafe { *frequencies.add(pair) });
    [cos * magnitude, sin * magnitude]
}

/// Rotates the first `n_rot` values of every head, pair `i` by `position * frequencies[i]` radians, and multiplies them with
/// `magnitude`.
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
/// - `magnitude`: 1 unless the scaling of positions says otherwise (YaRN)
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
    magnitude: f32,
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
        let head = x.add(head * head_dim as usize);
        let rotation = angle((*step).position, frequencies, pair, magnitude);
        let [a, b] = rotate([*head.add(first), *head.add(second)], rotation);
        *head.add(first) = a;
        *head.add(second) = b;
    }
}
