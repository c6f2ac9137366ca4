//! What the operations work on, beyond plain buffers.

use super::launch_1d;
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use gpu_kernels::attention::{HEAD_DIM_STEP, MAX_HEAD_DIM};
use gpu_kernels::random;
use gpu_kernels::rope::RopeLayout;
use half::f16;

/// A Q8_1 vector in device memory ([`gpu_kernels::activations`]).
#[derive(Debug)]
pub struct Q8_1Vector {
    pub(super) len: usize,
    /// The integers, four signed bytes to a word, filled up with zeros to a whole block.
    pub quants: Buffer<u32>,
    /// One element per block of 32.
    pub scales: Buffer<Q8_1Scale>,
}

impl Q8_1Vector {
    /// Room for `len` values.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, len: usize) -> Result<Self> {
        let blocks = len.div_ceil(Q8_1_BLOCK);
        Ok(Self { len, quants: device.alloc(blocks * Q8_1_BLOCK / 4)?, scales: device.alloc(blocks)? })
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Waits for the device and brings the numbers that the integers stand for.
    ///
    /// # Errors
    /// When a kernel before it failed.
    pub fn to_f32(&self, device: &Device) -> Result<Vec<f32>> {
        let (words, scales) = (device.to_vec(&self.quants)?, device.to_vec(&self.scales)?);
        let quants: &[i8] = bytemuck::cast_slice(&words);
        let blocks = quants.chunks(Q8_1_BLOCK).zip(&scales);
        let values = blocks.flat_map(|(block, scale)| block.iter().map(|&q| scale.d * f32::from(q)));
        Ok(values.take(self.len).collect())
    }
}

/// The vector that a matrix is multiplied with.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Exact: weights are dequantized, products are in f32.
    F32(&'a Buffer<f32>),
    /// Fast: quantized to Q8_1 by the kernel itself, integer products with dp4a.
    Quantized(&'a Buffer<f32>),
    /// Fast: in Q8_1 already.
    Q8_1(&'a Q8_1Vector),
}

impl Input<'_> {
    pub(super) fn is_exact(&self) -> bool {
        matches!(self, Input::F32(_))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Input::F32(values) | Input::Quantized(values) => values.len(),
            Input::Q8_1(vector) => vector.len(),
        }
    }
}

/// RMSNorm of an input that a kernel normalises itself.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// The factors, as many as the input has values.
    pub gamma: &'a Buffer<f32>,
    /// What is added to the mean square.
    pub eps: f32,
}

/// Tokens that follow each other: as many, from this position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Tokens before them, which are in the cache.
    pub position: usize,
    /// The tokens.
    pub n_tokens: usize,
}

/// A layer's KV cache: two arrays of shape `[n_head_kv, n_ctx, head_dim]`.
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

impl KvLayer {
    /// Room for `n_ctx` tokens, nothing in it.
    ///
    /// # Errors
    /// When the head size is not a multiple of 16 up to 256, or the device has no room.
    pub fn alloc(device: &Device, n_head_kv: usize, n_ctx: usize, head_dim: usize) -> Result<Self> {
        ensure!(
            head_dim > 0 && head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(HEAD_DIM_STEP),
            "the head size must be a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}, found {head_dim}"
        );
        ensure!(n_head_kv > 0 && n_ctx > 0, "a KV cache of {n_head_kv} heads and {n_ctx} positions is empty");
        let len = n_head_kv.checked_mul(n_ctx).and_then(|n| n.checked_mul(head_dim));
        let len = len.context("the KV cache is too large to address")?;
        Ok(Self { n_head_kv, n_ctx, head_dim, k: device.alloc(len)?, v: device.alloc(len)? })
    }
}

impl KvLayer {
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

/// How queries and keys are rotated.
#[derive(Debug)]
pub struct Rope {
    /// Radians per position of each pair: `[n_rot / 2]`.
    pub frequencies: Buffer<f64>,
    /// Which values form a pair.
    pub layout: RopeLayout,
    /// What rotated values are multiplied with: 1 unless positions are scaled by YaRN.
    pub magnitude: f32,
}
