//! What the operations work on, beyond plain buffers.

use super::{aligned, at_least};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use cuda_std::float::f16x2_to_f32;
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use gpu_kernels::formats::tile::TILE_ROWS;
use gpu_kernels::operand::{Operand as KernelOperand, SCALE, TILE_COLUMNS, place_of};
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

/// A vector as products read it ([`gpu_kernels::operand`]): the values for those of the fast path, and on both paths the sums
/// of squares from which a product knows the norm of its input.
#[derive(Debug)]
pub struct Operand {
    pub(super) len: usize,
    /// The values; none on the exact path.
    pub(super) words: Buffer<u32>,
    /// One for each quad of rows, or each block, that makes values, `n_squares` of them; none where the vector was not to be normalised.
    pub(super) squares: Buffer<f32>,
    pub(super) n_squares: usize,
}

impl Operand {
    /// Room for `len` values, on the exact path for their squares alone.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, len: usize, is_exact: bool) -> Result<Self> {
        let n_words = if is_exact { 0 } else { len.next_multiple_of(TILE_COLUMNS) / 2 };
        Ok(Self {
            len,
            words: device.alloc_zeroed(n_words)?,
            // No block makes fewer than a quad of values.
            squares: device.alloc_zeroed(len.div_ceil(TILE_ROWS).next_multiple_of(4))?,
            n_squares: 0,
        })
    }

    /// Waits for the device and brings the values; none on the exact path.
    ///
    /// # Errors
    /// When a kernel before it failed.
    pub fn to_f32(&self, device: &Device) -> Result<Vec<f32>> {
        let words = device.to_vec(&self.words)?;
        let values: Vec<f32> = words.into_iter().flat_map(f16x2_to_f32).collect();
        let n = if values.is_empty() { 0 } else { self.len };
        Ok((0..n).map(|column| values[place_of(column)] / SCALE).collect())
    }

    /// Waits for the device and brings the sum of the squares of the vector to be normalised.
    ///
    /// # Errors
    /// When a kernel before it failed.
    pub fn sum_of_squares(&self, device: &Device) -> Result<f64> {
        let squares = device.to_vec(&self.squares.part(0..self.n_squares))?;
        Ok(squares.into_iter().map(f64::from).sum())
    }
}

/// Where an operation leaves its result as the next product reads it.
#[derive(Debug)]
pub struct Next<'a> {
    /// Of as many values as the result.
    pub operand: &'a mut Operand,
    /// The factors of the norm before the product, where there is one: as many.
    pub gamma: Option<&'a Buffer<f32>>,
}

impl Next<'_> {
    /// What a launch that makes `n` values by `n_sums` quads or blocks is to leave, and notes that it does; nothing where nothing is
    /// wanted.
    pub(super) fn of_launch(
        next: Option<Self>,
        operation: &str,
        n: usize,
        n_sums: usize,
    ) -> Result<KernelOperand> {
        let Some(Self { operand, gamma }) = next else { return Ok(KernelOperand::NOTHING) };
        let Operand { len, words, squares, n_squares } = operand;
        ensure!(*len == n, "{operation}: an operand of {len} values for a result of {n}");
        let mut operand = KernelOperand::NOTHING;
        if !words.is_empty() {
            operand.words = words.as_mut_ptr();
        }
        *n_squares = 0;
        if let Some(gamma) = gamma {
            ensure!(gamma.len() == n, "{operation}: gamma has {} values, the vector {n}", gamma.len());
            aligned(operation, "gamma", gamma, n)?;
            at_least(operation, "squares", squares, n_sums)?;
            (operand.gamma, operand.squares, *n_squares) = (gamma.as_ptr(), squares.as_mut_ptr(), n_sums);
        }
        Ok(operand)
    }
}

/// The vector that a matrix is multiplied with.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Exact: weights are dequantized, products are in f32. To be normalised it needs the sums of its squares.
    F32(&'a Buffer<f32>, Option<&'a Operand>),
    /// Fast: quantized to Q8_1 by the kernel itself, integer products with dp4a.
    Operand(&'a Operand),
    /// Fast: in Q8_1 already.
    Q8_1(&'a Q8_1Vector),
}

impl Input<'_> {
    pub(super) fn is_exact(&self) -> bool {
        matches!(self, Input::F32(..))
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Input::F32(values, _) => values.len(),
            Input::Operand(operand) => operand.len,
            Input::Q8_1(vector) => vector.len(),
        }
    }
}

/// RMSNorm of an input that a kernel normalises itself. Where an operand is made, its values are multiplied with the factors
/// already.
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
