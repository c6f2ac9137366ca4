//! Random weights and caches, for timing models that nobody has to download.

use cuda_std::kernel;
use cuda_std::thread::index_1d;
use half::f16;

/// Threads in a block.
pub const BLOCK_DIM: usize = 256;

/// A well-mixed number for each index: the finisher of MurmurHash3 (Appleby, public domain).
#[inline(always)]
fn hash(seed: u32, index: u32) -> u32 {
    let mut h = index.wrapping_mul(0x9e37_79b9) ^ seed;
    h = (h ^ h >> 16).wrapping_mul(0x85eb_ca6b);
    h = (h ^ h >> 13).wrapping_mul(0xc2b2_ae35);
    h ^ h >> 16
}

/// A factor in a GGUF block that is not to be random.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    /// Where it stands in the block, in 16-bit words.
    pub place: u32,
    /// Its value as f16.
    pub bits: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: two numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Factor {}

/// Fills GGUF blocks with random bits, except for two factors that all blocks have alike.
///
/// # Safety
/// `blocks` must have `n_words` words of 16 bits, in device memory.
///
/// # Parameters
/// - `blocks`: `[n_words / block_words, block_words]`
/// - `block_words`: 16-bit words in a block
/// - `first`, `second`: the factors; the same one twice where there is one
/// - `seed`: another one gives other bits
///
/// # Thread mapping
/// One thread per word, any block size. Bytes moved: the blocks once.
#[kernel]
pub unsafe fn random_blocks(
    blocks: *mut u16,
    n_words: u32,
    block_words: u32,
    first: Factor,
    second: Factor,
    seed: u32,
) {
    let index = index_1d();
    if index >= n_words {
        return;
    }
    let place = index % block_words;
    let bits = match place {
        _ if place == first.place => first.bits,
        _ if place == second.place => second.bits,
        _ => hash(seed, index),
    };
    // SAFETY: the word is one of the blocks', and this thread's own.
    unsafe { *blocks.add(index as usize) = bits as u16 };
}

/// Fills a cache with random numbers between -1 and 1.
///
/// # Safety
/// `values` must have `n` values, in device memory.
///
/// # Parameters
/// - `values`: `[n]`
/// - `seed`: another one gives other numbers
///
/// # Thread mapping
/// A grid of any size, each thread every so many values. Bytes moved: the values once.
#[kernel]
pub unsafe fn random_values(values: *mut f16, n: u64, seed: u32) {
    let stride = u64::from(cuda_std::thread::grid_dim_x()) * u64::from(cuda_std::thread::block_dim_x());
    let mut index = u64::from(index_1d());
    while index < n {
        let number = hash(seed ^ (index >> 32) as u32, index as u32) as i32 as f32 / (1u32 << 31) as f32;
        // SAFETY: the value is one of the cache's, and this thread's own.
        unsafe { *values.add(index as usize) = f16::from_bits(cuda_std::float::f32_to_f16(number)) };
        index += stride;
    }
}
