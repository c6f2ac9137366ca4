//! Activation vectors as the matrix kernels read them: Q8_1 (the fast path) or f32 (the exact one).
//!
//! Q8_1 holds blocks of 32 values: `d = max|x| / 127`, `q = round(x / d)` as signed bytes, and the sum of the
//! integers, which the minimum term of a weight format needs (llama.cpp's block_q8_1, with both numbers in full
//! precision). Integers and scales lie in two arrays, so that 16 integers are one aligned load.

use crate::formats::{RUN, UNIT, WeightFormat, WeightUnit};
use bytemuck::{Pod, Zeroable};

/// Values in a Q8_1 block.
pub const Q8_1_BLOCK: usize = 32;

/// What a Q8_1 block holds besides its integers.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Q8_1Scale {
    /// The factor: a value is `d * q`.
    pub d: f32,
    /// The sum of the block's 32 integers.
    pub sum: i32,
}

/// A vector that a weight row can be multiplied with.
pub trait Activations: Copy {
    /// What a lane holds of it for one unit of weights.
    type Unit;

    /// Reads the values in the columns of unit `unit`.
    ///
    /// # Safety
    /// The vector must have `n_cols` values and `unit` must be below `n_cols.div_ceil(UNIT)`.
    unsafe fn load<F: WeightFormat>(self, unit: usize, n_cols: usize) -> Self::Unit;

    /// The dot product of a unit of weights with the same columns of the vector.
    fn dot<W: WeightUnit>(weights: &W, x: &Self::Unit) -> f32;
}

/// A Q8_1 vector in device memory: `n_cols.div_ceil(32)` whole blocks, the last one filled up with zeros.
#[derive(Clone, Copy, Debug)]
pub struct Q8_1 {
    /// The integers, 16 to an element.
    pub quants: *const [i32; RUN / 4],
    /// One element per block.
    pub scales: *const Q8_1Scale,
}

/// The part of a Q8_1 vector that meets one unit of weights.
#[derive(Clone, Copy, Debug)]
pub struct Q8_1Unit {
    /// The integers of each run, four to a word.
    pub quants: [[i32; RUN / 4]; 2],
    /// The factor of each run.
    pub d: [f32; 2],
    /// `d * sum` of the block that [`WeightFormat::min_block`] names.
    pub block_sum: f32,
}

impl Activations for Q8_1 {
    type Unit = Q8_1Unit;

    #[inline(always)]
    unsafe fn load<F: WeightFormat>(self, unit: usize, _n_cols: usize) -> Q8_1Unit {
        let columns = F::columns(unit);
        // SAFETY: both runs and the block in charge are inside the vector, as the caller vouches.
        unsafe {
            let block = *self.scales.add(F::min_block(unit));
            Q8_1Unit {
                quants: columns.map(|column| *self.quants.add(column / RUN)),
                d: columns.map(|column| (*self.scales.add(column / Q8_1_BLOCK)).d),
                block_sum: block.d * block.sum as f32,
            }
        }
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &Q8_1Unit) -> f32 {
        weights.dot_q8_1(x)
    }
}

/// An f32 vector in device memory.
#[derive(Clone, Copy, Debug)]
pub struct F32Vector {
    /// The values.
    pub values: *const f32,
}

impl Activations for F32Vector {
    type Unit = [[f32; RUN]; 2];

    #[inline(always)]
    unsafe fn load<F: WeightFormat>(self, unit: usize, n_cols: usize) -> Self::Unit {
        F::columns(unit).map(|start| {
            core::array::from_fn(|i| {
                // Only formats with blocks of one weight can have a row that ends inside a unit.
                let inside = F::BLOCK_LEN.is_multiple_of(UNIT) || start + i < n_cols;
                // SAFETY: the column is inside the vector, as the caller vouches.
                if inside { unsafe { *self.values.add(start + i) } } else { 0.0 }
            })
        })
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &Self::Unit) -> f32 {
        let w = weights.dequantize();
        let mut sum = 0.0;
        for run in 0..2 {
            for i in 0..RUN {
                sum += w[run][i] * x[run][i];
            }
        }
        sum
    }
}
