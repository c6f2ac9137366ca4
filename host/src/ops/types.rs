//! What the operations work on, beyond plain buffers.

use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use gpu_kernels::attention::{HEAD_DIM_STEP, MAX_HEAD_DIM};
use gpu_kernels::formats::Format;
use gpu_kernels::rope::RopeLayout;
use half::f16;

/// A weight matrix in device memory: `n_rows` outputs, `n_cols` inputs, row by row in the blocks of its format.
#[derive(Debug)]
pub struct Matrix {
    pub(super) format: Format,
    pub(super) n_rows: usize,
    pub(super) n_cols: usize,
    pub(super) blocks: Buffer<u8>,
}

impl Matrix {
    /// Uploads a matrix.
    ///
    /// # Errors
    /// When `n_cols` is not a multiple of the format's block, the bytes are not exactly the matrix's, or the
    /// device has no room.
    pub fn upload(
        device: &Device,
        format: Format,
        n_rows: usize,
        n_cols: usize,
        bytes: &[u8],
    ) -> Result<Self> {
        ensure!(n_rows > 0 && n_cols > 0, "a matrix of {n_rows} x {n_cols} weights is empty");
        ensure!(
            n_cols.is_multiple_of(format.block_len()),
            "{} needs rows of a multiple of {} weights, found {n_cols}",
            format.name(),
            format.block_len()
        );
        let needed =
            n_rows.checked_mul(format.row_bytes(n_cols)).context("the matrix is too large to address")?;
        ensure!(
            bytes.len() == needed,
            "{n_rows} x {n_cols} weights in {} need {needed} bytes, found {}",
            format.name(),
            bytes.len()
        );
        Ok(Self { format, n_rows, n_cols, blocks: device.alloc_from(bytes)? })
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Inputs.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Size in device memory.
    pub fn n_bytes(&self) -> usize {
        self.blocks.n_bytes()
    }
}

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
}

/// The vector that a matrix is multiplied with.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Exact: weights are dequantized, products are in f32.
    F32(&'a Buffer<f32>),
    /// Fast: integer products with dp4a.
    Q8_1(&'a Q8_1Vector),
}

impl Input<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Input::F32(values) => values.len(),
            Input::Q8_1(vector) => vector.len(),
        }
    }
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
    /// When the head size is not a multiple of 32 up to 256, or the device has no room.
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

/// How queries and keys are rotated.
#[derive(Debug)]
pub struct Rope {
    /// Radians per position of each pair: `[n_rot / 2]`.
    pub frequencies: Buffer<f64>,
    /// Which values form a pair.
    pub layout: RopeLayout,
}
