//! Weight formats: how a GGUF file stores a row of weights, how the row lies in device memory, and how a kernel
//! reads it there.
//!
//! In device memory a matrix is a sequence of [tiles](tile): four rows by up to 32 *units* of 32 consecutive columns,
//! one unit per lane of a warp. A format takes its GGUF blocks apart into *planes* (all quants of the tile, then all
//! scales ...), so that the lanes of a warp read neighbouring words of any plane; the bytes stay as many. Everything
//! else about a format stays in its file, and a kernel over formats exists once.
//!
//! Adding a format: its file with [`WeightFormat`], a row in [`for_each_format!`].

mod f16;
mod f32;
mod planes;
mod q4_1;
mod q4_k;
mod q6_k;
mod q8_0;
pub mod tile;

pub use f16::F16;
pub use f32::F32;
pub use planes::{InPlanes, LaneInTile};
pub use q4_1::Q4_1;
pub use q4_k::Q4_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;

use crate::activations::Q8_1Unit;
use cuda_std::float::mul_add;
use cuda_std::intrinsics::{byte_as_mantissa, byte_below_exponent, dp4a, dp4a_nibbles, dp4a_sum};
use tile::{TILE_ROWS, TileSource};

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
    /// Whether a lane has registers for units of two strips at a time, in a matrix-vector product.
    const IN_PAIRS: bool;
    /// Whether two quads are a [strip](tile) where their rows end in half a tile: not where [`layers`](crate::layers) takes them
    /// one by one.
    const IN_STRIPS_OF_TWO: bool;
    /// What a lane holds of one unit.
    type Unit: WeightUnit + Copy;

    /// Bytes of a tile of `n_units` units by four rows, before rounding up to [`tile::ALIGNMENT`]. Formats with blocks
    /// of several units have tiles of whole blocks.
    fn tile_bytes(n_units: usize) -> usize;

    /// Writes unit `unit` of a row of GGUF blocks into a tile; columns beyond the row's end become 0.
    ///
    /// # Safety
    /// `row` must hold `n_cols / BLOCK_LEN` blocks, of which unit `unit` is one or a part; `place` must be inside the
    /// tile at `tile`, and nobody else may write the same row and block of it.
    unsafe fn pack(row: *const u8, unit: usize, n_cols: usize, tile: *mut u8, place: Place);

    /// Reads a unit of a tile.
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit;
}

/// A unit's place in a tile.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Units in each row of the tile, at most 32.
    pub n_units: usize,
    /// The row, 0 to 3.
    pub row: usize,
    /// The unit in its row.
    pub unit: usize,
}

impl Place {
    /// The unit's number in a plane that holds the tile's units row by row.
    #[inline(always)]
    pub fn index(self) -> usize {
        self.row * self.n_units + self.unit
    }

    /// The number of the unit and row in a plane that holds the rows of each unit side by side.
    #[inline(always)]
    pub fn by_unit(self) -> usize {
        self.unit * TILE_ROWS + self.row
    }

    /// Likewise of the unit's block, where a block has eight units.
    #[inline(always)]
    pub fn by_block_of_8(self) -> usize {
        self.unit / 8 * TILE_ROWS + self.row
    }

    /// As [`by_unit`](Self::by_unit) for a plane of 16 bytes each, with the rows exchanged from unit to unit so that
    /// eight lanes which read a row of neighbouring units use all banks of shared memory.
    #[inline(always)]
    pub fn by_unit_swizzled(self) -> usize {
        self.unit * TILE_ROWS + (self.row ^ (self.unit / 2 % TILE_ROWS))
    }
}

/// The word of row `row`, of those of all rows. Not by its index, which may be known at run time only: the words would
/// be put into local memory.
#[inline(always)]
fn word_of_row(words: [u32; TILE_ROWS], row: usize) -> u32 {
    let pair = if row < 2 { [words[0], words[1]] } else { [words[2], words[3]] };
    if row.is_multiple_of(2) { pair[0] } else { pair[1] }
}

/// Likewise the half word of row `row`.
#[inline(always)]
fn half_of_row(words: [u32; 2], row: usize) -> u16 {
    let pair = if row < 2 { words[0] } else { words[1] };
    (pair >> (row % 2 * 16)) as u16
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
    /// Byte `i` holds weight `i` below and weight `i + 16` above.
    pub nibbles: [u32; 4],
    /// The factor.
    pub scale: f32,
    /// What is subtracted from each weight.
    pub min: f32,
}

impl WeightUnit for NibbleUnit {
    /// A nibble `q` becomes the number `16 + q`, whose mantissa starts with it; what is too much is subtracted with the
    /// minimum.
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        const NIBBLES: u32 = 0x7878_7878;
        const LEADING_ONES: u32 = 0x8080_8080;
        // Written out, since an index that is not constant would put the words into local memory.
        let low = self.nibbles.map(|word| word << 3 & NIBBLES | LEADING_ONES);
        let high = self.nibbles.map(|word| word >> 1 & NIBBLES | LEADING_ONES);
        let offset = mul_add(-16.0, self.scale, -self.min);
        let mut weights = [0.0; UNIT];
        let mut i = 0;
        while i < UNIT / 2 {
            let weight = |words: [u32; 4]| {
                mul_add(self.scale, byte_below_exponent(words[i / 4], i as u32 % 4, 0x41), offset)
            };
            weights[i] = weight(low);
            weights[i + UNIT / 2] = weight(high);
            i += 1;
        }
        weights
    }

    /// `scale * d8 * dot(q, q8) - min * d8 * sum(q8)`.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let dot = dp4a_nibbles(self.nibbles, x.quants);
        mul_add(-self.min, x.d_sum, mul_add(self.scale, x.d * dot as f32, sum))
    }
}

/// A unit of signed bytes: `w = scale * q`.
#[derive(Clone, Copy, Debug)]
pub struct ByteUnit {
    /// The integers, four to a word, lowest column in the lowest byte.
    pub quants: [i32; UNIT_WORDS],
    /// The factor.
    pub scale: f32,
}

impl WeightUnit for ByteUnit {
    /// An integer `q` becomes the number `2^23 + 128 + q`, whose mantissa ends with it; what is too much is subtracted.
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        let words = self.quants.map(|word| word as u32 ^ 0x8080_8080);
        let mut weights = [0.0; UNIT];
        let mut i = 0;
        while i < UNIT {
            weights[i] = self.scale * (byte_as_mantissa(words[i / 4], i as u32 % 4, 0x4b) - 8_388_736.0);
            i += 1;
        }
        weights
    }

    /// `scale * d8 * dot(q, q8)`.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let [low, high] = half_dots(self.quants, x.quants, [0; 2]);
        mul_add(self.scale, x.d * (low + high) as f32, sum)
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

/// Both of `sums` plus the dot product of one half of two units' integers.
#[inline(always)]
fn half_dots(a: [i32; UNIT_WORDS], b: [i32; UNIT_WORDS], sums: [i32; 2]) -> [i32; 2] {
    let ([a0, a1, a2, a3, a4, a5, a6, a7], [b0, b1, b2, b3, b4, b5, b6, b7]) = (a, b);
    let low = dp4a_sum([a0, a1, a2, a3], [b0, b1, b2, b3], sums[0]);
    let high = dp4a_sum([a4, a5, a6, a7], [b4, b5, b6, b7], sums[1]);
    [low, high]
}

/// The sums of both halves of a unit's integers.
#[inline(always)]
pub fn half_sums(quants: [i32; UNIT_WORDS]) -> [i32; 2] {
    const ONES: i32 = 0x0101_0101;
    let sum = |words: [i32; 4]| words.iter().fold(0, |sum, &word| dp4a(word, ONES, sum));
    let [q0, q1, q2, q3, q4, q5, q6, q7] = quants;
    [sum([q0, q1, q2, q3]), sum([q4, q5, q6, q7])]
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

/// Packs 32 nibbles into 16 bytes: byte `i` holds weight `i` below and weight `i + 16` above.
#[inline(always)]
fn pack_nibbles(weight: impl Fn(usize) -> u8) -> [u32; 4] {
    core::array::from_fn(|word| {
        let byte = |i: usize| u32::from(weight(4 * word + i) | weight(4 * word + i + 16) << 4);
        byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
    })
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

            /// Quads in a strip of a matrix with `n_units` units in a row.
            pub const fn strip_quads(self, n_units: usize) -> usize {
                match self { $(Format::$Type => tile::strip_quads::<$Type>(n_units)),* }
            }

            /// Bytes of a tile of `n_units` units by four rows.
            pub fn tile_bytes(self, n_units: usize) -> usize {
                match self { $(Format::$Type => tile::aligned_bytes::<$Type>(n_units)),* }
            }
        }
    };
}
for_each_format!(define_format);
