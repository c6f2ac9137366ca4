//! A layer's KV cache.

use super::{at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use gpu_kernels::activations::OCTET;
use gpu_kernels::attention::{HEAD_DIM_STEP, MAX_HEAD_DIM};
use gpu_kernels::kv_cache::{self, KvFormat, KvRef, Q8_0_BLOCK};
use gpu_kernels::random::{self, Factor};
use gpu_kernels::step::Step;
use half::f16;
use std::ptr;

/// Room for a layer's keys and values in f16: two arrays of shape `[n_head_kv, n_ctx, head_dim]`.
#[derive(Debug)]
pub struct KvLayer {
    pub(super) n_head_kv: usize,
    pub(super) n_ctx: usize,
    pub(super) head_dim: usize,
    /// Keys, rotated.
    pub k: Buffer<f16>,
    /// Values.
    pub v: Buffer<f16>,
}

/// The number of values in a cache, where its shape is one that kernels take.
fn n_values(n_head_kv: usize, n_ctx: usize, head_dim: usize) -> Result<usize> {
    ensure!(
        head_dim > 0 && head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(HEAD_DIM_STEP),
        "the head size must be a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, found {head_dim}"
    );
    ensure!(n_head_kv > 0 && n_ctx > 0, "a KV cache of {n_head_kv} heads and {n_ctx} positions is empty");
    let len = n_head_kv.checked_mul(n_ctx).and_then(|n| n.checked_mul(head_dim));
    len.context("the KV cache is too large to address")
}

impl KvLayer {
    /// Room for `n_ctx` tokens, nothing in it.
    ///
    /// # Errors
    /// When the head size is not a multiple of 16 up to 256, or the device has no room.
    pub fn alloc(device: &Device, n_head_kv: usize, n_ctx: usize, head_dim: usize) -> Result<Self> {
        let len = n_values(n_head_kv, n_ctx, head_dim)?;
        Ok(Self { n_head_kv, n_ctx, head_dim, k: device.alloc(len)?, v: device.alloc(len)? })
    }

    /// Fills all positions with random numbers, for timing.
    ///
    /// # Errors
    /// When a launch fails.
    pub fn fill_with_noise(&mut self, device: &Device, seed: u32) -> Result<()> {
        for (buffer, seed) in [(&mut self.k, seed), (&mut self.v, !seed)] {
            let blocks = buffer.len().div_ceil(random::BLOCK_DIM).min(4096);
            let config = launch_1d(blocks, random::BLOCK_DIM)?;
            let arguments = (buffer.as_mut_ptr(), buffer.len() as u64, seed);
            // SAFETY: the buffer has as many values.
            unsafe { device.launch(&random::RANDOM_VALUES, config, arguments)? };
        }
        Ok(())
    }
}

/// Keys or values in Q8_0.
#[derive(Debug)]
struct Quantized {
    /// `[n_head_kv, n_ctx, head_dim]`.
    quants: Buffer<i8>,
    /// `[n_head_kv, n_ctx, head_dim / 32]`.
    scales: Buffer<f16>,
}

impl Quantized {
    fn as_ref(&self) -> KvRef {
        KvRef { values: self.quants.as_ptr().cast(), scales: self.scales.as_ptr() }
    }

    fn values(&self, device: &Device) -> Result<Vec<f32>> {
        let (quants, scales) = (device.to_vec(&self.quants)?, device.to_vec(&self.scales)?);
        let blocks = quants.chunks(Q8_0_BLOCK).zip(scales);
        Ok(blocks
            .flat_map(|(block, scale)| block.iter().map(move |&q| scale.to_f32() * f32::from(q)))
            .collect())
    }
}

/// Room for a layer's keys and values in Q8_0: a little more than half of what f16 takes.
#[derive(Debug)]
pub struct QuantizedKvLayer {
    n_head_kv: usize,
    n_ctx: usize,
    head_dim: usize,
    k: Quantized,
    v: Quantized,
}

impl QuantizedKvLayer {
    /// Room for `n_ctx` tokens, nothing in it.
    ///
    /// # Errors
    /// When the head size is not a multiple of 32 up to 256, or the device has no room.
    pub fn alloc(device: &Device, n_head_kv: usize, n_ctx: usize, head_dim: usize) -> Result<Self> {
        let len = n_values(n_head_kv, n_ctx, head_dim)?;
        ensure!(
            head_dim.is_multiple_of(Q8_0_BLOCK),
            "a KV cache in Q8_0 needs heads of a multiple of {Q8_0_BLOCK} values, found {head_dim}"
        );
        let alloc = || {
            Ok::<_, anyhow::Error>(Quantized {
                quants: device.alloc(len)?,
                scales: device.alloc(len / Q8_0_BLOCK)?,
            })
        };
        Ok(Self { n_head_kv, n_ctx, head_dim, k: alloc()?, v: alloc()? })
    }

    /// Fills all positions with random numbers, for timing.
    ///
    /// # Errors
    /// When a launch fails.
    pub fn fill_with_noise(&mut self, device: &Device, seed: u32) -> Result<()> {
        for (of, seed) in [(&mut self.k, seed), (&mut self.v, !seed)] {
            let n_words = of.quants.len() / 2;
            let config = launch_1d(n_words.div_ceil(random::BLOCK_DIM), random::BLOCK_DIM)?;
            // A block of one word has no second one, which would be the factor.
            let none = Factor { place: 1, bits: 0 };
            let arguments = (of.quants.as_mut_ptr().cast::<u16>(), dim(n_words)?, 1u32, none, none, seed);
            // SAFETY: the buffer has as many words.
            unsafe { device.launch(&random::RANDOM_BLOCKS, config, arguments)? };
            let scales = vec![f16::from_f32(1.0 / 127.0); of.scales.len()];
            device.upload(&mut of.scales, &scales)?;
        }
        Ok(())
    }
}

/// A layer's KV cache in one format or the other.
#[derive(Debug)]
pub enum KvCache {
    /// f16.
    F16(KvLayer),
    /// Q8_0, to which keys and values come by way of a stage ([`quantize_kv`]).
    Q8_0(QuantizedKvLayer),
}

impl KvCache {
    /// Room for `n_ctx` tokens, nothing in it.
    ///
    /// # Errors
    /// When the head size is not one that the format takes, or the device has no room.
    pub fn alloc(
        device: &Device,
        format: KvFormat,
        n_head_kv: usize,
        n_ctx: usize,
        head_dim: usize,
    ) -> Result<Self> {
        Ok(match format {
            KvFormat::F16 => Self::F16(KvLayer::alloc(device, n_head_kv, n_ctx, head_dim)?),
            KvFormat::Q8_0 => Self::Q8_0(QuantizedKvLayer::alloc(device, n_head_kv, n_ctx, head_dim)?),
        })
    }

    /// Fills all positions with random numbers, for timing.
    ///
    /// # Errors
    /// When a launch fails.
    pub fn fill_with_noise(&mut self, device: &Device, seed: u32) -> Result<()> {
        match self {
            Self::F16(layer) => layer.fill_with_noise(device, seed),
            Self::Q8_0(layer) => layer.fill_with_noise(device, seed),
        }
    }

    /// Waits for the device and brings all keys, then all values.
    ///
    /// # Errors
    /// When a kernel before it failed.
    pub fn to_f32(&self, device: &Device) -> Result<Vec<f32>> {
        match self {
            Self::F16(layer) => {
                let (k, v) = (device.to_vec(&layer.k)?, device.to_vec(&layer.v)?);
                Ok(k.into_iter().chain(v).map(f32::from).collect())
            }
            Self::Q8_0(layer) => Ok([layer.k.values(device)?, layer.v.values(device)?].concat()),
        }
    }
}

/// A cache that attention reads, whatever its format.
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    pub(super) format: KvFormat,
    pub(super) n_head_kv: usize,
    pub(super) n_ctx: usize,
    pub(super) head_dim: usize,
    pub(super) k: KvRef,
    pub(super) v: KvRef,
    cache: std::marker::PhantomData<&'a ()>,
}

impl<'a> From<&'a KvLayer> for KvView<'a> {
    fn from(layer: &'a KvLayer) -> Self {
        let &KvLayer { n_head_kv, n_ctx, head_dim, ref k, ref v } = layer;
        let [k, v] = [k, v].map(|values| KvRef { values: values.as_ptr().cast(), scales: ptr::null() });
        Self { format: KvFormat::F16, n_head_kv, n_ctx, head_dim, k, v, cache: std::marker::PhantomData }
    }
}

impl<'a> From<&'a QuantizedKvLayer> for KvView<'a> {
    fn from(layer: &'a QuantizedKvLayer) -> Self {
        let &QuantizedKvLayer { n_head_kv, n_ctx, head_dim, ref k, ref v } = layer;
        let [k, v] = [k, v].map(Quantized::as_ref);
        Self { format: KvFormat::Q8_0, n_head_kv, n_ctx, head_dim, k, v, cache: std::marker::PhantomData }
    }
}

impl<'a> From<&'a KvCache> for KvView<'a> {
    fn from(cache: &'a KvCache) -> Self {
        match cache {
            KvCache::F16(layer) => layer.into(),
            KvCache::Q8_0(layer) => layer.into(),
        }
    }
}

/// Where keys and values wait in f16 until they are quantized.
#[derive(Debug)]
pub struct KvStage {
    /// Tokens instead of positions.
    pub layer: KvLayer,
    /// What stands for the steps where kernels look up a position: each token's number.
    pub rows: Buffer<Step>,
}

impl KvStage {
    /// Room for `n_tokens` tokens.
    ///
    /// # Errors
    /// As [`KvLayer::alloc`].
    pub fn alloc(device: &Device, n_head_kv: usize, n_tokens: usize, head_dim: usize) -> Result<Self> {
        let rows: Vec<Step> = (0..n_tokens).map(|row| Step { token: 0, position: row as u32 }).collect();
        Ok(Self {
            layer: KvLayer::alloc(device, n_head_kv, n_tokens, head_dim)?,
            rows: device.alloc_from(&rows)?,
        })
    }
}

/// Takes the stage's first `n_tokens` keys and values to the steps' positions of a cache in Q8_0.
///
/// The positions are in device memory: whoever writes them keeps them below the cache's `n_ctx`.
///
/// # Errors
/// When stage and cache are of different heads, a buffer is too short, or the launch fails.
pub fn quantize_kv(
    device: &Device,
    stage: &KvStage,
    steps: &Buffer<Step>,
    n_tokens: usize,
    cache: &mut QuantizedKvLayer,
) -> Result<()> {
    let (from, &mut QuantizedKvLayer { n_head_kv, n_ctx, head_dim, .. }) = (&stage.layer, &mut *cache);
    ensure!(
        from.n_head_kv == n_head_kv && from.head_dim == head_dim,
        "quantize_kv: {} heads of {} values for a cache of {n_head_kv} heads of {head_dim}",
        from.n_head_kv,
        from.head_dim
    );
    ensure!(
        (1..=from.n_ctx).contains(&n_tokens),
        "quantize_kv: {n_tokens} tokens of a stage for {}",
        from.n_ctx
    );
    at_least("quantize_kv", "steps", steps, n_tokens)?;
    let threads = 2 * n_tokens * n_head_kv * head_dim / OCTET;
    let config = launch_1d(threads.div_ceil(kv_cache::BLOCK_DIM), kv_cache::BLOCK_DIM)?;
    let arguments = (
        from.k.as_ptr(),
        from.v.as_ptr(),
        cache.k.as_ref(),
        cache.v.as_ref(),
        steps.as_ptr(),
        dim(n_tokens)?,
        dim(n_head_kv)?,
        dim(head_dim)?,
        dim(from.n_ctx)?,
        dim(n_ctx)?,
    );
    // SAFETY: the shapes are checked, stage and cache are whole by construction, and the positions are below n_ctx.
    unsafe { device.launch(&kv_cache::QUANTIZE_KV, config, arguments) }
}
