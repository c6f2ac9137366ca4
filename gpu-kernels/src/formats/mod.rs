//! Weight formats: how a GGUF file stores a row of weights, how the row lies in device memory, and how a kernel
//! reads it there.
//!
//! In device memory a matrix is a sequence of [tiles](tile): sixteen rows by up to eight *units* of 32 consecutive
//! columns, laid out so that tensor cores can take them: a lane of a warp finds its part of both operands and scales in
//! a few loads. The bytes stay as many. Everything else about a format stays in its file, and a kernel over formats
//! exists once.
//!
//! Adding a format: its file with [`WeightFormat`], and [`TensorFormat`] if it has integers, a row in [`for_each_format!`].

mod f16;
mod f32;
mod q4_1;
mod q4_k;
mod q6_k;
mod q8_0;
pub mod tile;

pub use f16::F16;
pub use f32::F32;
pub use q4_1::Q4_1;
pub use q4_k::Q4_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;

use crate::activations::{Q8_1Tile, Q8_1Unit};
use cuda_std::float::mul_add;
use cuda_std::intrinsics::dp4a_sum;
use tile::{Place, TileSource};

/// Columns in a unit: what a lane works on at a time, and as many as a Q8_1 block has.
pub const UNIT: usize = 32;
/// Words of four 8-bit integers in a unit.
pub const UNIT_WORDS: usize = UNIT / 4;

/// The table of formats: `callback! { (Type, name) ... }`.
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
    /// Its name in the table.
    const FORMAT: Format;
    /// Weights in a GGUF block: a row's length must be a multiple of it.
    const BLOCK_LEN: usize;
    /// Bytes in a GGUF block.
    const BLOCK_BYTES: usize;
    /// What a lane holds of one unit.
    type Unit: WeightUnit;

    /// Bytes of a tile of `n_units` units, a multiple of 16. Blocks of several units are tiles of that many.
    fn tile_bytes(n_units: usize) -> usize;

    /// Writes row `row` of a tile of `n_units` units; columns beyond the row's end become 0.
    ///
    /// # Safety
    /// `blocks` must be the GGUF blocks of these units, or `n_cols` single weights where that is fewer; the row must be
    /// inside the tile at `tile`, which was zeros before, and nobody else may write it.
    unsafe fn pack(blocks: *const u8, n_cols: usize, tile: *mut u8, n_units: usize, row: usize);

    /// Reads a unit of a tile.
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit;
}

/// A format of integers, of which tensor cores multiply a tile at a time.
pub trait TensorFormat: WeightFormat {
    /// `sums` plus this lane's part of the products of a tile of `n_units` units with the same columns of a Q8_1 vector:
    /// of row `lane / 4` and of row `lane / 4 + 8`. The four lanes of a row have the whole. All lanes of the warp take
    /// part.
    fn dot_tile<S: TileSource>(tile: S, n_units: usize, x: &Q8_1Tile, sums: [f32; 2]) -> [f32; 2];
}

/// A unit in registers.
pub trait WeightUnit {
    /// The weights.
    fn dequantize(&self) -> [f32; UNIT];

    /// `sum` plus the dot product with the same columns of a Q8_1 vector.
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32;
}

/// A unit of a 4-bit format: `w = scale * q - min`.
#[derive(Clone, Copy, Debug)]
pub struct NibbleUnit {
    /// The integers, four to a word, lowest column in the lowest byte.
    pub quants: [i32; UNIT_WORDS],
    /// The factor.
    pub scale: f32,
    /// What is subtracted from each weight.
    pub min: f32,
}

impl WeightUnit for NibbleUnit {
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        core::array::from_fn(|i| self.scale * (self.quants[i / 4] >> (8 * (i % 4)) & 15) as f32 - self.min)
    }

    /// `scale * d8 * dot(q, q8) - min * d8 * sum(q8)`.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let dot = dp4a_sum(self.quants, x.quants, 0);
        mul_add(-self.min, x.d_sum, mul_add(self.scale, x.d * dot as f32, sum))
    }
}

/// A unit of an integer format: `w = scale * q`, with one scale or with one for each half.
#[derive(Clone, Copy, Debug)]
pub struct IntegerUnit<const SCALES: usize> {
    /// The integers, four signed bytes to a word, lowest column in the lowest byte.
    pub quants: [i32; UNIT_WORDS],
    /// The factors.
    pub scales: [f32; SCALES],
}

impl<const SCALES: usize> WeightUnit for IntegerUnit<SCALES> {
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        core::array::from_fn(|i| {
            let q = i32::from((self.quants[i / 4] >> (8 * (i % 4))) as i8);
            self.scales[i * SCALES / UNIT] * q as f32
        })
    }

    /// `scale * d8 * dot(q, q8)` for each scale.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let [q0, q1, q2, q3, q4, q5, q6, q7] = self.quants;
        let [x0, x1, x2, x3, x4, x5, x6, x7] = x.quants;
        let low = dp4a_sum([q0, q1, q2, q3], [x0, x1, x2, x3], 0);
        let high = dp4a_sum([q4, q5, q6, q7], [x4, x5, x6, x7], 0);
        if SCALES == 1 {
            mul_add(self.scales[0], x.d * (low + high) as f32, sum)
        } else {
            let both = mul_add(self.scales[0], low as f32, self.scales[SCALES - 1] * high as f32);
            mul_add(x.d, both, sum)
        }
    }
}

/// A unit of a floating-point format.
#[derive(Clone, Copy, Debug)]
pub struct FloatUnit(
    /// The weights.
    pub [f32; UNIT],
);

impl WeightUnit for FloatUnit {
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        self.0
    }

    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let mut dot = 0.0;
        for (i, &w) in self.0.iter().enumerate() {
            dot = mul_add(w, f32::from((x.quants[i / 4] >> (8 * (i % 4))) as i8), dot);
        }
        mul_add(x.d, dot, sum)
    }
}

/// Reads two bytes at any address.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn read_u16(bytes: *const u8) -> u16 {
    // SAFETY: the caller vouches for both.
    unsafe { u16::from_le_bytes([*bytes, *bytes.add(1)]) }
}

/// Reads four bytes at an even address, as all blocks have.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn read_u32(bytes: *const u8) -> u32 {
    // SAFETY: the caller vouches for both halves.
    unsafe { u32::from(read_u16(bytes)) | u32::from(read_u16(bytes.add(2))) << 16 }
}

macro_rules! define_format {
    ($(($Type:ident, $name:ident))*) => {
        /// A weight format by name, for code that chooses at run time.
        #[repr(u32)]
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

            /// Weights in a GGUF block.
            pub const fn block_len(self) -> usize {
                match self { $(Format::$Type => <$Type as WeightFormat>::BLOCK_LEN),* }
            }

            /// Bytes in a GGUF block.
            pub const fn block_bytes(self) -> usize {
                match self { $(Format::$Type => <$Type as WeightFormat>::BLOCK_BYTES),* }
            }

            /// Bytes in a GGUF row of `n_cols` weights, a multiple of [`block_len`](Self::block_len).
            pub const fn row_bytes(self, n_cols: usize) -> usize {
                n_cols / self.block_len() * self.block_bytes()
            }

            /// Bytes of a tile of `n_units` units.
            pub fn tile_bytes(self, n_units: usize) -> usize {
                match self { $(Format::$Type => <$Type as WeightFormat>::tile_bytes(n_units)),* }
            }
        }
    };
}
for_each_format!(define_format);
