//! Quantizing activations to Q8_1 ([`crate::activations`]) as a step of its own; the matrix kernels also do it
//! themselves.

use crate::activations::{LANES_PER_BLOCK, OCTET, Q8_1_BLOCK, Q8_1Scale, quantize};
use cuda_std::intrinsics::dp4a;
use cuda_std::kernel;
use cuda_std::thread::index_1d;
use cuda_std::warp::{FULL_MASK, warp_reduce_add};

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;

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
/// One thread per eight values, 4 neighbouring lanes per Q8_1 block; whole warps, any grid that covers `n`.
/// Bytes moved: 5.25 n.
#[kernel]
pub unsafe fn quantize_q8_1(x: *const f32, quants: *mut u32, scales: *mut Q8_1Scale, n: u32) {
    let n = n as usize;
    let octet = index_1d() as usize;
    let values = core::array::from_fn(|i| {
        let column = OCTET * octet + i;
        // SAFETY: the column is below n.
        if column < n { unsafe { *x.add(column) } } else { 0.0 }
    });
    let quantized = quantize(values);
    const ONES: i32 = 0x0101_0101;
    let [low, high] = quantized.words.map(|word| word as i32);
    let sum = warp_reduce_add(FULL_MASK, dp4a(low, ONES, dp4a(high, ONES, 0)), LANES_PER_BLOCK);
    if OCTET * octet < n.next_multiple_of(Q8_1_BLOCK) {
        // SAFETY: the octet and its block are inside the padded output, and each is written by one thread.
        unsafe {
            *quants.add(2 * octet) = quantized.words[0];
            *quants.add(2 * octet + 1) = quantized.words[1];
            if octet.is_multiple_of(LANES_PER_BLOCK as usize) {
                let scale = Q8_1Scale { d: quantized.d, sum };
                *scales.add(octet / LANES_PER_BLOCK as usize) = scale;
            }
        }
    }
}
