//! Quantizing activations to Q8_1 ([`crate::activations`]) as a step of its own; the matrix kernels also do it
//! themselves.

use crate::activations::{LANES_PER_BLOCK, OCTET, Q8_1_BLOCK, Q8_1Scale, quantize};
use crate::token_vector::TokenVector;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::intrinsics::dp4a;
use cuda_std::thread::{block_dim_x, block_idx_x, index_1d, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_reduce_add};
use cuda_std::{kernel, shared_array};

/// Threads in a block that quantizes a part of a vector.
pub const BLOCK_DIM: usize = 128;
/// Threads in a block that quantizes a token's vector.
pub const TOKEN_BLOCK_DIM: usize = 512;

/// Leaves eight values of a vector of `n` in Q8_1, zeros from column `n` on. All lanes of the warp take part, of which
/// neighbours have neighbouring octets, the first one's a multiple of four.
///
/// # Safety
/// `quants` and `scales` are to device memory for a vector of `n` values, of which nobody else writes this octet.
#[inline(always)]
unsafe fn store(values: [f32; OCTET], octet: usize, n: usize, quants: *mut u32, scales: *mut Q8_1Scale) {
    const ONES: i32 = 0x0101_0101;
    let quantized = quantize(values);
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
    // SAFETY: the output is as the caller vouches, and the octet this thread's own.
    unsafe { store(values, octet, n, quants, scales) };
}

/// Q8_1 of the vectors of many tokens, normalised first (RMSNorm, as [`crate::rms_norm`]) where `gamma` is not null.
///
/// # Safety
/// The pointers are to device memory of the sizes below.
///
/// # Parameters
/// - `x`: `[n_tokens, n]`, rows filled up to a multiple of 4 values, at a multiple of 16 bytes
/// - `gamma`: `[n]`, at a multiple of 16 bytes and readable up to one, or null
/// - `eps`: what RMSNorm adds to the mean square
/// - `quants`: `[n_tokens, n.div_ceil(32) * 8]` words of four signed bytes; values beyond `n` become 0
/// - `scales`: `[n_tokens, n.div_ceil(32)]`
///
/// # Thread mapping
/// A block per token, of [`TOKEN_BLOCK_DIM`] threads. A thread takes every so many octets, four neighbouring lanes a Q8_1
/// block. Bytes moved: 5.25 per value, and as much as the vector and `gamma` from the L1 cache where it is normalised.
#[kernel(overlapping)]
pub unsafe fn quantize_tokens(
    x: *const f32,
    gamma: *const f32,
    n: u32,
    eps: f32,
    quants: *mut u32,
    scales: *mut Q8_1Scale,
) {
    let_next_start();
    wait_for_previous();
    let scratch = shared_array!(QUANTIZE_TOKENS_SUMS: [f32; 32]);
    let token = block_idx_x();
    // SAFETY: the token is one of them; the vectors are as the caller vouches.
    let vector = unsafe { TokenVector::new(x, gamma, token, n, eps, scratch) };
    let n = n as usize;
    let n_blocks = n.div_ceil(Q8_1_BLOCK);
    let first_block = token as usize * n_blocks;
    let quants = quants.wrapping_add(first_block * (Q8_1_BLOCK / 4));
    let scales = scales.wrapping_add(first_block);
    let (thread, stride) = (thread_idx_x() as usize, block_dim_x() as usize);
    // Whole warps go on as long as their first lane has an octet.
    let lane = thread % WARP_SIZE as usize;
    let mut octet = thread;
    while octet - lane < n_blocks * LANES_PER_BLOCK as usize {
        let ([a, b, c, d], [e, f, g, h]) = (vector.four(OCTET * octet), vector.four(OCTET * octet + 4));
        // SAFETY: the token's output is as the caller vouches, and the octet this thread's own.
        unsafe { store([a, b, c, d, e, f, g, h], octet, n, quants, scales) };
        octet += stride;
    }
}
