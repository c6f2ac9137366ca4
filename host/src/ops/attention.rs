//! Launchers of the operations on heads: rotation, the KV cache, attention.

use super::{KvLayer, Rope, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use gpu_kernels::step::Step;
use gpu_kernels::{attention as attention_kernel, kv_cache, rope as rope_kernel};

/// The shape of an attention operation over a [`KvLayer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of the cache's heads (GQA).
    pub n_head: usize,
    /// The factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// Rotates `n_head` heads of `head_dim` values in place, by the step's position.
///
/// # Errors
/// When a buffer is too short, there are more frequencies than pairs in a head, or the launch fails.
pub fn rope(
    device: &Device,
    x: &mut Buffer<f32>,
    rope: &Rope,
    step: &Buffer<Step>,
    n_head: usize,
    head_dim: usize,
) -> Result<()> {
    let pairs = rope.frequencies.len();
    ensure!(
        pairs > 0 && 2 * pairs <= head_dim,
        "rope: {pairs} pairs to rotate in heads of {head_dim} values"
    );
    at_least("rope", "x", x, n_head * head_dim)?;
    at_least("rope", "step", step, 1)?;
    let config = launch_1d((n_head * pairs).div_ceil(rope_kernel::BLOCK_DIM), rope_kernel::BLOCK_DIM)?;
    let arguments = (
        x.as_mut_ptr(),
        rope.frequencies.as_ptr(),
        step.as_ptr(),
        dim(n_head)?,
        dim(head_dim)?,
        dim(2 * pairs)?,
        rope.layout as u32,
    );
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&rope_kernel::ROPE, config, arguments) }
}

/// Writes a token's keys and values, `[n_head_kv, head_dim]` each, into the cache at the step's position.
///
/// The position is in device memory: whoever writes it keeps it below the cache's `n_ctx`.
///
/// # Errors
/// When a buffer is too short or the launch fails.
pub fn kv_append(
    device: &Device,
    k: &Buffer<f32>,
    v: &Buffer<f32>,
    cache: &mut KvLayer,
    step: &Buffer<Step>,
) -> Result<()> {
    let n = cache.n_head_kv * cache.head_dim;
    at_least("kv_append", "k", k, n)?;
    at_least("kv_append", "v", v, n)?;
    at_least("kv_append", "step", step, 1)?;
    let arguments = (
        k.as_ptr(),
        v.as_ptr(),
        cache.k.as_mut_ptr(),
        cache.v.as_mut_ptr(),
        step.as_ptr(),
        dim(cache.n_head_kv)?,
        dim(cache.head_dim)?,
        dim(cache.n_ctx)?,
    );
    let config = launch_1d(n.div_ceil(kv_cache::BLOCK_DIM), kv_cache::BLOCK_DIM)?;
    // SAFETY: the lengths are checked, the cache is whole by construction, and the position is below n_ctx.
    unsafe { device.launch(&kv_cache::KV_APPEND, config, arguments) }
}

/// Attention of one query token, `[n_head, head_dim]`, over the cache's positions up to the step's.
///
/// # Errors
/// When `n_head` is not a multiple of the cache's heads, a buffer is too short, or the launch fails.
pub fn attention(
    device: &Device,
    q: &Buffer<f32>,
    cache: &KvLayer,
    step: &Buffer<Step>,
    shape: AttentionShape,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let AttentionShape { n_head, scale } = shape;
    ensure!(
        n_head > 0 && n_head.is_multiple_of(cache.n_head_kv),
        "attention: {n_head} query heads over {} key-value heads",
        cache.n_head_kv
    );
    at_least("attention", "q", q, n_head * cache.head_dim)?;
    at_least("attention", "out", out, n_head * cache.head_dim)?;
    at_least("attention", "step", step, 1)?;
    let arguments = (
        q.as_ptr(),
        cache.k.as_ptr(),
        cache.v.as_ptr(),
        out.as_mut_ptr(),
        step.as_ptr(),
        dim(n_head / cache.n_head_kv)?,
        dim(cache.head_dim)?,
        dim(cache.n_ctx)?,
        scale,
    );
    // SAFETY: the lengths are checked, the cache is whole by construction, and its positions are written.
    unsafe {
        device.launch(
            &attention_kernel::ATTENTION,
            launch_1d(n_head, attention_kernel::BLOCK_DIM)?,
            arguments,
        )
    }
}
