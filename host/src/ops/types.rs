//! What the operations work on, beyond plain buffers.

use crate::device::{Buffer, Device};
use anyhow::Result;
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use gpu_kernels::rope::RopeLayout;

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
