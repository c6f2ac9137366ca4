//! Weight formats: how a row of a weight matrix is stored, and how a kernel reads it.
//!
//! Kernels take weights in *units* of 32, one unit per lane and step. A unit is two runs of 16 consecutive
//! columns, placed so that one 16-byte load of nibbles serves a whole unit: a byte of Q4_K, say, holds one
//! weight of each run. Everything else about a format stays in its file, and a kernel over formats exists once.
//!
//! Adding a format: its file with the block struct and [`WeightFormat`], a row in [`for_each_format!`].

mod f16;
mod f32;
mod q4_1;
mod q4_k;
mod q6_k;
mod q8_0;

pub use f16::F16;
pub use f32::F32;
pub use q4_1::{BlockQ4_1, Q4_1};
pub use q4_k::{BlockQ4_K, Q4_K};
pub use q6_k::{BlockQ6_K, Q6_K};
pub use q8_0::{BlockQ8_0, Q8_0};

use crate::activations::Q8_1Unit;
use cuda_std::intrinsics::dp4a_sum;

/// Weights in a run: consecutive columns that share one scale.
pub const RUN: usize = 16;
/// Weights in a unit: two runs.
pub const UNIT: usize = 2 * RUN;

/// The table of formats: `callback! { (Type, name) ... }`, where `name` ends the kernels' names in the PTX.
#[macro_export]
macro_rules! for_each_format {
    ($callback:ident) => {
        $callback! {
            (F32, f32)
            (F16, f16)
            (Q8_0, q8_0)
            (Q4_1, q4_1)
            (Q4_K, q4_k)
            (Q6_K, q6_k)
        }
    };
}

/// A weight format.
pub trait WeightFormat: Copy {
    /// One block as it lies in memory; a row is a sequence of them.
    type Block: Copy;
    /// Weights in a block: a row's length must be a multiple of it.
    const BLOCK_LEN: usize;
    /// What a lane holds of one unit.
    type Unit: WeightUnit;

    /// The first column of each of the unit's runs.
    fn columns(unit: usize) -> [usize; 2];

    /// The block of 32 columns whose minimum term the unit accounts for: over all units of a row, each block once.
    fn min_block(unit: usize) -> usize {
        unit
    }

    /// Reads unit `unit` of a row of `n_cols` weights; weights beyond the row's end read as 0.
    ///
    /// # Safety
    /// `row` must point to the row's `n_cols / BLOCK_LEN` blocks, 16-byte aligned at the matrix's start, and
    /// `unit` must be below `n_cols.div_ceil(UNIT)`.
    unsafe fn load(row: *const Self::Block, unit: usize, n_cols: usize) -> Self::Unit;
}

/// A unit in registers.
pub trait WeightUnit {
    /// The weights of both runs.
    fn dequantize(&self) -> [[f32; RUN]; 2];

    /// The dot product with the same columns of a Q8_1 vector.
    fn dot_q8_1(&self, x: &Q8_1Unit) -> f32;
}

/// A unit of an integer format: `w = scale * q - min`, per run.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedUnit<const HAS_MIN: bool> {
    /// The integers, four signed bytes to a word, lowest column in the lowest byte.
    pub quants: [[i32; RUN / 4]; 2],
    /// The factor of each run.
    pub scale: [f32; 2],
    /// What is subtracted from each run's weights.
    pub min: [f32; 2],
    /// The minimum of block [`WeightFormat::min_block`].
    pub block_min: f32,
}

impl<const HAS_MIN: bool> WeightUnit for QuantizedUnit<HAS_MIN> {
    #[inline(always)]
    fn dequantize(&self) -> [[f32; RUN]; 2] {
        core::array::from_fn(|run| {
            core::array::from_fn(|i| {
                let q = (self.quants[run][i / 4] >> (8 * (i % 4))) as i8;
                let w = self.scale[run] * q as f32;
                if HAS_MIN { w - self.min[run] } else { w }
            })
        })
    }

    /// `sum over runs of scale * d8 * dot(q, q8)`, less `min * d8 * sum(q8)` of the block in charge.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit) -> f32 {
        let dot = |run: usize| dp4a_sum(self.quants[run], x.quants[run]) as f32;
        let mut sum = self.scale[0] * x.d[0] * dot(0) + self.scale[1] * x.d[1] * dot(1);
        if HAS_MIN {
            sum -= self.block_min * x.block_sum;
        }
        sum
    }
}

/// A unit of a floating-point format.
#[derive(Clone, Copy, Debug)]
pub struct FloatUnit(
    /// The weights of both runs.
    pub [[f32; RUN]; 2],
);

impl WeightUnit for FloatUnit {
    #[inline(always)]
    fn dequantize(&self) -> [[f32; RUN]; 2] {
        self.0
    }

    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit) -> f32 {
        let mut sum = 0.0;
        for run in 0..2 {
            let mut dot = 0.0;
            for (i, &w) in self.0[run].iter().enumerate() {
                dot += w * ((x.quants[run][i / 4] >> (8 * (i % 4))) as i8) as f32;
            }
            sum += x.d[run] * dot;
        }
        sum
    }
}

macro_rules! define_format {
    ($(($Type:ident, $name:ident))*) => {
        /// A weight format by name, for code that chooses at run time.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "GGUF's names")]
        pub enum Format {
            $(#[doc = concat!("GGUF's ", stringify!($Type), ".")] $Type,)*
        }

        impl Format {
            /// Every format, in the table's order.
            pub const ALL: &[Format] = &[$(Format::$Type),*];

            /// GGUF's name of the format.
            pub const fn name(self) -> &'static str {
                match self { $(Format::$Type => stringify!($Type)),* }
            }

            /// Weights in a block.
            pub const fn block_len(self) -> usize {
                match self { $(Format::$Type => <$Type as WeightFormat>::BLOCK_LEN),* }
            }

            /// Bytes in a block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Format::$Type => size_of::<<$Type as WeightFormat>::Block>()),* }
            }

            /// Bytes in a row of `n_cols` weights, a multiple of [`block_len`](Self::block_len).
            pub const fn row_bytes(self, n_cols: usize) -> usize {
                n_cols / self.block_len() * self.block_bytes()
            }
        }
    };
}
for_each_format!(define_format);
