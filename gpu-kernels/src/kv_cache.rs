//! The KV cache, and appending to it.
//!
//! The cache of a layer is two arrays of shape `[n_head_kv, n_ctx, head_dim]`, keys and values: what one head reads during
//! attention is one contiguous range. They are f16, or Q8_0: signed bytes, and an array `[n_head_kv, n_ctx, head_dim / 32]`
//! of f16 factors. What makes keys and values leaves f16; for a cache in Q8_0 that is a *stage* of few positions, from which
//! [`quantize_kv`] takes them, since a factor needs 32 values that different threads have made.

use crate::activations::{LANES_PER_BLOCK, OCTET, Q8_1_BLOCK, quantize};
use crate::step::Step;
use cuda_std::float::{f16_to_f32, f32_to_f16, f32_to_f16x2};
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::intrinsics::signed_byte;
use cuda_std::kernel;
use cuda_std::memory::{ld_global_u16, ld_global_u32x2, ld_global_u32x4};
use cuda_std::thread::index_1d;
use half::f16;

/// Values that share a factor.
pub const Q8_0_BLOCK: usize = Q8_1_BLOCK;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvFormat {
    /// Half precision.
    #[default]
    F16,
    /// Blocks of 32 signed bytes with a factor: 17/32 of the memory.
    Q8_0,
}

/// Keys or values of a layer, as a launch passes them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KvRef {
    /// f16 or signed bytes, `[n_head_kv, n_ctx, head_dim]`, at a multiple of 16 bytes.
    pub values: *const u8,
    /// Of Q8_0 the factors, `[n_head_kv, n_ctx, head_dim / 32]`.
    pub scales: *const f16,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: two pointers, laid out alike on both sides.
unsafe impl cuda_std::launch::KernelArg for KvRef {}

/// How a kernel reads the cache: eight values at a time.
pub trait KvCodec: Copy {
    /// Bytes of a value, but for factors.
    const VALUE_BYTES: u32;
    /// What is read of eight values.
    type Raw: Copy;
    /// Eight zeros.
    const ZEROS: Self::Raw;

    /// What starts with value `at`, a multiple of 32 where values share factors.
    fn starting_at(cache: KvRef, at: usize) -> KvRef;

    /// Asks for values `at` to `at + 7`, a multiple of 8.
    ///
    /// # Safety
    /// They are written.
    unsafe fn fetch(from: KvRef, at: usize) -> Self::Raw;

    /// What they are, to the nearest f16, two to a word.
    fn halves(raw: Self::Raw) -> [u32; OCTET / 2];
}

/// f16.
#[derive(Clone, Copy, Debug)]
pub struct HalfKv;

impl KvCodec for HalfKv {
    const VALUE_BYTES: u32 = 2;
    type Raw = [u32; 4];
    const ZEROS: [u32; 4] = [0; 4];

    #[inline(always)]
    fn starting_at(cache: KvRef, at: usize) -> KvRef {
        KvRef { values: cache.values.wrapping_add(2 * at), scales: cache.scales }
    }

    #[inline(always)]
    unsafe fn fetch(from: KvRef, at: usize) -> [u32; 4] {
        // SAFETY: the caller's promise; eight values are 16 bytes.
        unsafe { ld_global_u32x4(from.values.add(2 * at).cast()) }
    }

    #[inline(always)]
    fn halves(words: [u32; 4]) -> [u32; OCTET / 2] {
        words
    }
}

impl HalfKv {
    /// What they are.
    #[inline(always)]
    pub fn widen(words: [u32; 4]) -> [f32; OCTET] {
        let half = |i: usize| f16_to_f32((words[i / 2] >> (16 * (i % 2))) as u16);
        [half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7)]
    }
}

/// Q8_0.
#[derive(Clone, Copy, Debug)]
pub struct Q8Kv;

impl KvCodec for Q8Kv {
    const VALUE_BYTES: u32 = 1;
    type Raw = ([u32; 2], u16);
    const ZEROS: ([u32; 2], u16) = ([0; 2], 0);

    #[inline(always)]
    fn starting_at(cache: KvRef, at: usize) -> KvRef {
        KvRef { values: cache.values.wrapping_add(at), scales: cache.scales.wrapping_add(at / Q8_0_BLOCK) }
    }

    #[inline(always)]
    unsafe fn fetch(from: KvRef, at: usize) -> ([u32; 2], u16) {
        // SAFETY: the caller's promise.
        unsafe {
            let words = ld_global_u32x2(from.values.add(at).cast());
            (words, ld_global_u16(from.scales.add(at / Q8_0_BLOCK).cast()))
        }
    }

    #[inline(always)]
    fn halves(([low, high], scale): ([u32; 2], u16)) -> [u32; OCTET / 2] {
        let scale = f16_to_f32(scale);
        let two = |word: u32, i: u32| {
            let value = |i: u32| scale * signed_byte(word, i) as f32;
            f32_to_f16x2(value(i), value(i + 1))
        };
        [two(low, 0), two(low, 2), two(high, 0), two(high, 2)]
    }
}

/// Threads in a block.
pub const BLOCK_DIM: usize = 128;

/// Writes a token's keys and values into the cache at its position.
///
/// # Safety
/// The pointers are to device memory of the sizes below, and the step's position is below `n_ctx`.
///
/// # Parameters
/// - `k`, `v`: `[n_head_kv, head_dim]`
/// - `k_cache`, `v_cache`: `[n_head_kv, n_ctx, head_dim]`
/// - `step`: holds the position
///
/// # Thread mapping
/// One thread per value of k and v, any block size. Bytes moved: 12 per value.
#[kernel]
pub unsafe fn kv_append(
    k: *const f32,
    v: *const f32,
    k_cache: *mut f16,
    v_cache: *mut f16,
    step: *const Step,
    n_head_kv: u32,
    head_dim: u32,
    n_ctx: u32,
) {
    let (head_dim, n_ctx) = (head_dim as usize, n_ctx as usize);
    let i = index_1d() as usize;
    if i >= n_head_kv as usize * head_dim {
        return;
    }
    // SAFETY: i is inside k and v, the position is below n_ctx, and only this thread writes the two elements.
    unsafe {
        let at = (i / head_dim * n_ctx + (*step).position as usize) * head_dim + i % head_dim;
        *k_cache.add(at) = f16::from_bits(f32_to_f16(*k.add(i)));
        *v_cache.add(at) = f16::from_bits(f32_to_f16(*v.add(i)));
    }
}

/// Takes tokens' keys and values from a stage to a cache in Q8_0, at their positions: per 32 values `d = max|x| / 127` and
/// `q = round(x / d)`.
///
/// # Safety
/// The pointers are to device memory of the sizes below, and the steps' positions are below `n_ctx`.
///
/// # Parameters
/// - `k`, `v`: `[n_head_kv, n_staged, head_dim]`, the first `n_tokens` of the positions written
/// - `k_cache`, `v_cache`: `[n_head_kv, n_ctx, head_dim]` in Q8_0; written
/// - `steps`: `[n_tokens]`, hold the positions
/// - `head_dim`: a multiple of 32
///
/// # Thread mapping
/// One thread per eight values, keys first, 4 neighbouring lanes per block of 32; whole warps, any grid that covers them.
/// Bytes moved: 3 per value.
#[kernel(overlapping)]
pub unsafe fn quantize_kv(
    k: *const f16,
    v: *const f16,
    k_cache: KvRef,
    v_cache: KvRef,
    steps: *const Step,
    n_tokens: u32,
    n_head_kv: u32,
    head_dim: u32,
    n_staged: u32,
    n_ctx: u32,
) {
    let_next_start();
    wait_for_previous();
    let row_octets = (head_dim as usize) / OCTET;
    let of_each = n_tokens as usize * n_head_kv as usize * row_octets;
    let index = index_1d() as usize;
    // Lanes beyond the last value go along with the others of their warp.
    let clamped = index.min(2 * of_each - 1);
    let (is_value, octet) = (clamped >= of_each, clamped % of_each);
    let (row, octet) = (octet / row_octets, octet % row_octets);
    let (head, token) = (row / n_tokens as usize, row % n_tokens as usize);
    let (staged, cache) = if is_value { (v, v_cache) } else { (k, k_cache) };
    // SAFETY: the head and token are in the stage, and the position is below n_ctx.
    let (raw, position) = unsafe {
        let at = (head * n_staged as usize + token) * head_dim as usize + OCTET * octet;
        (HalfKv::fetch(KvRef { values: staged.cast(), scales: staged }, at), (*steps.add(token)).position)
    };
    let quantized = quantize(HalfKv::widen(raw));
    if index < 2 * of_each {
        let at = (head * n_ctx as usize + position as usize) * head_dim as usize + OCTET * octet;
        // SAFETY: the values are the cache's, and this thread's own.
        unsafe {
            *cache.values.add(at).cast_mut().cast::<[u32; 2]>() = quantized.words;
            if octet.is_multiple_of(LANES_PER_BLOCK as usize) {
                *cache.scales.add(at / Q8_0_BLOCK).cast_mut() = f16::from_bits(f32_to_f16(quantized.d));
            }
        }
    }
}
