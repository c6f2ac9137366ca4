//! Q6_K: 256 weights of 6 bits in sixteen runs of 16, each with a signed 8-bit scale; `w = d * sc * (q - 32)`
//! (llama.cpp, ggml-common.h).

use super::{
    Format, Place, UNIT, UNIT_WORDS, WeightFormat, WeightUnit, half_dots, half_of_row, read_u16,
    tile::TileSource,
};
use crate::activations::Q8_1Unit;
use cuda_std::float::{f16_to_f32, mul_add};
use cuda_std::intrinsics::{byte_below_exponent, signed_byte};

/// 6-bit weights in super-blocks of 256.
///
/// Each half of a GGUF block holds 128 weights: byte `i` of its 64 bytes of low bits has the low four of weight `i`
/// below and of weight `i + 64` above; byte `i` of its 32 bytes of high bits has the high two of weights `i`,
/// `i + 32`, `i + 64` and `i + 96`, lowest first. Then follow sixteen scales and `d` (f16).
///
/// A unit in a tile is six words, of eight that have a weight in the low six bits of each byte: words 0 to 2 and 4 to 6
/// as they are, with the other two in their upper bits: two bits of word 3, lowest first, in words 0, 1 and 2, of word 7
/// in words 4, 5 and 6. The first four are a plane, the last two another; then follow planes of both scales of each
/// unit and of the blocks' `d`, rows side by side.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q6_K;

/// Where a tile's planes start, in bytes for each unit of a row.
const LAST_WORDS: usize = 4 * 16;
const SCALES: usize = LAST_WORDS + 4 * 8;
const D: usize = SCALES + 4 * 2;

/// The low six bits of each byte.
const SIX_BITS: u32 = 0x3f3f_3f3f;

/// Where the last words of a unit and row are in their plane: the pairs of rows of some units are exchanged, as
/// [`Place::by_unit_swizzled`] does it.
#[inline(always)]
fn last_words_index(place: Place) -> usize {
    place.unit * 4 + (place.row ^ (place.unit / 4 % 2 * 2))
}

/// Three words that have a fourth one in their upper bits.
#[inline(always)]
fn pack_words([w0, w1, w2, w3]: [u32; 4]) -> [u32; 3] {
    const TWO_BITS: u32 = 0x0303_0303;
    let upper = |word: u32, i: u32| word | (w3 >> (2 * i) & TWO_BITS) << 6;
    [upper(w0, 0), upper(w1, 1), upper(w2, 2)]
}

/// The four words that [`pack_words`] has packed.
#[inline(always)]
fn unpack_words([w0, w1, w2]: [u32; 3]) -> [i32; 4] {
    let w3 = w0 >> 6 & 0x0303_0303 | w1 >> 4 & 0x0c0c_0c0c | w2 >> 2 & 0x3030_3030;
    [w0 & SIX_BITS, w1 & SIX_BITS, w2 & SIX_BITS, w3].map(|word| word as i32)
}

/// A unit of two runs of 16 weights: `w = d * scale * (q - 32)`.
#[derive(Clone, Copy, Debug)]
pub struct SixBitUnit {
    /// The integers from 0 to 63, four to a word, lowest column in the lowest byte.
    pub quants: [i32; UNIT_WORDS],
    /// The factor of both runs.
    pub d: f32,
    /// That of each, from -128 to 127.
    pub scales: [i32; 2],
}

impl WeightUnit for SixBitUnit {
    /// An integer `q` becomes the number `64 + q`, whose mantissa starts with it; what is too much is subtracted.
    #[inline(always)]
    fn dequantize(&self) -> [f32; UNIT] {
        let words = self.quants.map(|word| (word as u32) << 1 | 0x8080_8080);
        let [low, high] = self.scales.map(|scale| self.d * scale as f32);
        let mut weights = [0.0; UNIT];
        let mut i = 0;
        while i < UNIT {
            let scale = if i < UNIT / 2 { low } else { high };
            weights[i] = scale * (byte_below_exponent(words[i / 4], i as u32 % 4, 0x42) - 96.0);
            i += 1;
        }
        weights
    }

    /// `d * d8 * sum(scale * dot(q - 32, q8))` over both runs.
    #[inline(always)]
    fn dot_q8_1(&self, x: &Q8_1Unit, sum: f32) -> f32 {
        let [low, high] = half_dots(self.quants, x.quants, x.sums.map(|sum| -32 * sum));
        // At most 2 * 128 * 16 * 32 * 127, less than the 2^24 up to which an f32 has every integer.
        let both = self.scales[0] * low + self.scales[1] * high;
        mul_add(self.d, x.d * both as f32, sum)
    }
}

impl WeightFormat for Q6_K {
    const FORMAT: Format = Format::Q6_K;
    const BLOCK_LEN: usize = 256;
    const BLOCK_BYTES: usize = 210;
    const IN_PAIRS: bool = false;
    const IN_STRIPS_OF_TWO: bool = true;
    type Unit = SixBitUnit;

    #[inline(always)]
    fn tile_bytes(n_units: usize) -> usize {
        n_units * D + n_units / 8 * 4 * 2
    }

    #[inline(always)]
    unsafe fn pack(row: *const u8, unit: usize, _n_cols: usize, tile: *mut u8, place: Place) {
        let (half, quarter) = (unit % 8 / 4, unit % 4);
        // SAFETY: the block is the row's and the place is inside the tile, as the caller vouches.
        unsafe {
            let block = row.add(unit / 8 * Self::BLOCK_BYTES);
            let low = block.add(64 * half + 32 * (quarter % 2));
            let high = block.add(128 + 32 * half);
            let weight = |i: usize| {
                let low = u32::from(*low.add(i) >> (4 * (quarter / 2))) & 15;
                low | (u32::from(*high.add(i) >> (2 * quarter)) & 3) << 4
            };
            let word = |i: usize| {
                weight(4 * i) | weight(4 * i + 1) << 8 | weight(4 * i + 2) << 16 | weight(4 * i + 3) << 24
            };
            let [w0, w1, w2] = pack_words([word(0), word(1), word(2), word(3)]);
            let [w3, w4, w5] = pack_words([word(4), word(5), word(6), word(7)]);
            *tile.cast::<[u32; 4]>().add(place.by_unit_swizzled()) = [w0, w1, w2, w3];
            let last_words = tile.add(place.n_units * LAST_WORDS).cast::<[u32; 2]>();
            *last_words.add(last_words_index(place)) = [w4, w5];
            let scales = block.add(192 + unit % 8 * 2);
            *tile.add(place.n_units * SCALES).cast::<u16>().add(place.by_unit()) = read_u16(scales);
            if unit.is_multiple_of(8) {
                let d = tile.add(place.n_units * D).cast::<u16>().add(place.by_block_of_8());
                *d = read_u16(block.add(208));
            }
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, place: Place) -> Self::Unit {
        let [w0, w1, w2, w3] = tile.u32x4(place.by_unit_swizzled() * 16);
        // Of two rows or all, which are read one after the other.
        let last = tile.u32x4(place.n_units * LAST_WORDS + last_words_index(place) / 2 * 16);
        let [w4, w5] = if place.row.is_multiple_of(2) { [last[0], last[1]] } else { [last[2], last[3]] };
        let scales = tile.u32x2(place.n_units * SCALES + place.unit * 8);
        let scales = if place.row < 2 { scales[0] } else { scales[1] };
        let scale = |half: u32| signed_byte(scales, place.row as u32 % 2 * 2 + half);
        let d = f16_to_f32(half_of_row(tile.u32x2(place.n_units * D + place.unit / 8 * 8), place.row));
        let ([q0, q1, q2, q3], [q4, q5, q6, q7]) = (unpack_words([w0, w1, w2]), unpack_words([w3, w4, w5]));
        SixBitUnit { quants: [q0, q1, q2, q3, q4, q5, q6, q7], d, scales: [scale(0), scale(1)] }
    }
}
