//! Q6_K: 256 weights of 6 bits in sixteen runs of 16, each with a signed 8-bit scale; `w = d * sc * (q - 32)`
//! (llama.cpp, ggml-common.h).

use super::tile::{Place, TileSource};
use super::{Format, IntegerUnit, TensorFormat, WeightFormat, read_u16, read_u32};
use crate::activations::Q8_1Tile;
use cuda_std::float::{f16_to_f32, mul_add};
use cuda_std::intrinsics::signed_byte;
use cuda_std::tensor::{UNITS, mma_half_units};
use cuda_std::warp::lane_id;

/// 6-bit weights in super-blocks of 256.
///
/// Each half of a GGUF block holds 128 weights: byte `i` of its 64 bytes of low bits has the low four of weight `i`
/// below and of weight `i + 64` above; byte `i` of its 32 bytes of high bits has the high two of weights `i`,
/// `i + 32`, `i + 64` and `i + 96`, lowest first. Then follow sixteen scales and `d` (f16).
///
/// In a tile weights are signed, in the upper six bits of a byte: four times `q - 32`. A lane's four words of a row and
/// a pair of units (columns `8 * member` and `8 * member + 4` and on, of the even unit and of the odd one) are packed
/// into three, with the last one in the lower bits of the others, and lie in [`word_at`]. Then follow each lane's
/// scales, of row `group` four bytes and of row `group + 8`; and `d` of these rows.
#[derive(Clone, Copy, Debug)]
#[allow(non_camel_case_types, reason = "GGUF's name")]
pub struct Q6_K;

/// Where things start in a tile, in bytes.
const SCALES: usize = 6 * 32 * 16;
const D: usize = SCALES + 32 * 8;

/// The upper six bits of each byte.
const UPPER: u32 = 0xfcfc_fcfc;

/// Integers in a tile are four times their value.
const QUARTER: f32 = 0.25;

/// Where word `i` of three is that a lane has of a pair of units, for its first row or its second: of the lane's 24
/// words in a tile four are neighbours.
#[inline(always)]
fn word_at(lane: usize, pair: usize, second_row: usize, i: usize) -> usize {
    let word = pair * 6 + second_row * 3 + i;
    (word / 4 * 32 + lane) * 16 + word % 4 * 4
}

/// Three words that have a fourth one in the low two bits of their bytes.
#[inline(always)]
fn pack_words([w0, w1, w2, w3]: [u32; 4]) -> [u32; 3] {
    [w0 | w3 >> 6 & !UPPER, w1 | w3 >> 4 & !UPPER, w2 | w3 >> 2 & !UPPER]
}

/// The four words that [`pack_words`] has packed.
#[inline(always)]
fn unpack_words([w0, w1, w2]: [u32; 3]) -> [u32; 4] {
    [w0 & UPPER, w1 & UPPER, w2 & UPPER, w0 << 6 & 0xc0c0_c0c0 | w1 << 4 & 0x3030_3030 | w2 << 2 & 0x0c0c_0c0c]
}

impl WeightFormat for Q6_K {
    const FORMAT: Format = Format::Q6_K;
    const BLOCK_LEN: usize = 256;
    const BLOCK_BYTES: usize = 210;
    type Unit = IntegerUnit<2>;

    #[inline(always)]
    fn tile_bytes(_n_units: usize) -> usize {
        D + 16 * 2
    }

    #[inline(always)]
    unsafe fn pack(block: *const u8, _n_cols: usize, tile: *mut u8, _n_units: usize, row: usize) {
        // SAFETY: the block is there and the row is inside the tile, as the caller vouches.
        unsafe {
            // Four weights from column `column` of unit `unit` on.
            let word = |unit: usize, column: usize| {
                let (half, quarter) = (unit / 4, unit % 4);
                let low = read_u32(block.add(64 * half + 32 * (quarter % 2) + column));
                let high = read_u32(block.add(128 + 32 * half + column));
                let q = low >> (4 * (quarter / 2)) & 0x0f0f_0f0f | (high >> (2 * quarter) & 0x0303_0303) << 4;
                // Subtracting 32 flips the sign bit of six.
                (q ^ 0x2020_2020) << 2
            };
            for member in 0..4 {
                let lane = row % 8 * 4 + member;
                for pair in 0..4 {
                    let of_unit = |unit: usize| [word(unit, 8 * member), word(unit, 8 * member + 4)];
                    let ([w0, w1], [w2, w3]) = (of_unit(2 * pair), of_unit(2 * pair + 1));
                    for (i, word) in pack_words([w0, w1, w2, w3]).into_iter().enumerate() {
                        *tile.add(word_at(lane, pair, row / 8, i)).cast() = word;
                    }
                }
                *tile.add(SCALES + lane * 8 + row / 8 * 4).cast() = read_u32(block.add(192 + 4 * member));
            }
            *tile.add(D + (row % 8 * 2 + row / 8) * 2).cast() = read_u16(block.add(208));
        }
    }

    #[inline(always)]
    fn unpack<S: TileSource>(tile: S, Place { row, unit, .. }: Place) -> Self::Unit {
        let mut quants = [0; 8];
        for member in 0..4 {
            let word = |i: usize| tile.u32(word_at(row % 8 * 4 + member, unit / 2, row / 8, i));
            let [w0, w1, w2, w3] = unpack_words([word(0), word(1), word(2)]);
            let [first, second] = if unit.is_multiple_of(2) { [w0, w1] } else { [w2, w3] };
            (quants[2 * member], quants[2 * member + 1]) = (first as i32, second as i32);
        }
        let scales = tile.u16(SCALES + (row % 8 * 4 + unit / 2) * 8 + row / 8 * 4 + unit % 2 * 2);
        let d = QUARTER * f16_to_f32(tile.u16(D + (row % 8 * 2 + row / 8) * 2));
        let scale = |half: u32| d * signed_byte(scales.into(), half) as f32;
        IntegerUnit { quants, scales: [scale(0), scale(1)] }
    }
}

impl TensorFormat for Q6_K {
    #[inline(always)]
    fn dot_tile<S: TileSource>(tile: S, _n_units: usize, x: &Q8_1Tile, sums: [f32; 2]) -> [f32; 2] {
        let lane = lane_id() as usize;
        let mut rows = [[0; 4]; UNITS];
        for two_pairs in 0..2 {
            let four = |i: usize| tile.u32x4(((3 * two_pairs + i) * 32 + lane) * 16);
            let ([a0, a1, a2, b0], [b1, b2, c0, c1], [c2, d0, d1, d2]) = (four(0), four(1), four(2));
            let mut store = |unit: usize, first: [u32; 3], second: [u32; 3]| {
                let ([f0, f1, f2, f3], [s0, s1, s2, s3]) = (unpack_words(first), unpack_words(second));
                rows[unit] = [f0, s0, f1, s1];
                rows[unit + 1] = [f2, s2, f3, s3];
            };
            store(4 * two_pairs, [a0, a1, a2], [b0, b1, b2]);
            store(4 * two_pairs + 2, [c0, c1, c2], [d0, d1, d2]);
        }
        let [firsts, seconds] = mma_half_units::<i8>(rows, x.quants);
        let scales = tile.u32x2(SCALES + lane * 8);
        let d = tile.u32(D + lane / 4 * 4);
        let row = |sum: f32, row: usize, d: u16| {
            let scale = |i: u32| signed_byte(scales[row], i) as f32;
            let unit = |i: usize| {
                let (first, second) = (firsts[2 * row + i] as f32, seconds[2 * row + i] as f32);
                mul_add(scale(2 * i as u32), first, scale(2 * i as u32 + 1) * second)
            };
            mul_add(QUARTER * f16_to_f32(d), mul_add(x.d[0], unit(0), x.d[1] * unit(1)), sum)
        };
        [row(sums[0], 0, d as u16), row(sums[1], 1, (d >> 16) as u16)]
    }
}
