//! Quantizing activations to Q8_1 ([`crate::activations`]).

use crate::activations::{Q8_1_BLOCK, Q8_1Scale};
use cuda_std::float::{abs, max, round_ties_even};
use cuda_std::kernel;
use cuda_std::thread::index_1d;
use cuda_std::warp::{FULL_MASK, warp_reduce_add, warp_reduce_max};

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;
/// Values of a thread: one word of integers.
pub const VALUES_PER_THREAD: usize = 4;
/// Neighbouring lanes that share a Q8_1 block.
const LANES: u32 = (Q8_1_BLOCK / VALUES_PER_THREAD) as u32;

/// Q8_1 of a vector: per 32 values `d = max|x| / 127`, `q = round(x / d)`, and the sum of the integers.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`: `[n]`
/// - `quants`: `[n.div_ceil(32) * 8]` words of four signed bytes; values beyond `n` become 0
/// - `scales`: `[n.div_ceil(32)]`
///
/// # Thread mapping
/// One thread per four values, 8 neighbouring lanes per Q8_1 block; whole warps, any grid that covers `n`.
/// Bytes moved: 5.25 n.
#[kernel]
pub unsafe fn quantize_q8_1(x: *const f32, quants: *mut u32, scales: *mut Q8_1Scale, n: u32) {
    let n = n as usize;
    let word = index_1d() as usize;
    let values: [f32; VALUES_PER_THREAD] = core::array::from_fn(|i| {
        let column = VALUES_PER_THREAD * word + i;
        // SAFETY: the column is below n.
        if column < n { unsafe { *x.add(column) } } else { 0.0 }
    });

    let amax = values.iter().fold(0.0, |amax, &value| max(amax, abs(value)));
    let amax = warp_reduce_max(FULL_MASK, amax, LANES);
    let d = amax / 127.0;
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    let integers = values.map(|value| round_ties_even(value * inverse) as i32);
    let sum = warp_reduce_add(FULL_MASK, integers.iter().sum::<i32>(), LANES);

    if VALUES_PER_THREAD * word < n.next_multiple_of(Q8_1_BLOCK) {
        let packed = integers.iter().rev().fold(0, |packed, &q| packed << 8 | (q as u32 & 0xff));
        // SAFETY: the word and its block are inside the padded output, and each is written by one thread.
        unsafe {
            *quants.add(word) = packed;
            if word.is_multiple_of(LANES as usize) {
                *scales.add(word / LANES as usize) = Q8_1Scale { d, sum };
            }
        }
    }
}
