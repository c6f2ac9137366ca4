//! Activation vectors as the matrix kernels read them: Q8_1 (the fast path) or f32 (the exact one).
//!
//! Q8_1 holds blocks of 32 values: `d = max|x| / 127`, `q = round(x / d)` as signed bytes, and the sum of the
//! integers, which the minimum term of a weight format needs (llama.cpp's block_q8_1, with both numbers in full
//! precision).
//!
//! A matrix kernel puts its vector into shared memory once per block, the units that meet a tile together, in planes
//! like a tile's, and a lane reads the unit that meets its weights.

use crate::formats::tile::TILE_UNITS;
use crate::formats::{UNIT, UNIT_WORDS, WeightUnit, half_sums};
use bytemuck::{Pod, Zeroable};
use cuda_std::float::{abs, div_approx, max, mul_add, round_ties_even};
use cuda_std::shared::DynamicShared;
use cuda_std::warp::{FULL_MASK, warp_reduce_max};

/// Values in a Q8_1 block.
pub const Q8_1_BLOCK: usize = UNIT;
/// Values that a thread quantizes, an *octet*: two words of integers.
pub const OCTET: usize = 8;
/// Octets in a unit.
pub const UNIT_OCTETS: usize = UNIT / OCTET;
/// Neighbouring lanes that share a Q8_1 block.
pub const LANES_PER_BLOCK: u32 = UNIT_OCTETS as u32;

/// What a Q8_1 block holds besides its integers.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct Q8_1Scale {
    /// The factor: a value is `d * q`.
    pub d: f32,
    /// The sum of the block's 32 integers.
    pub sum: i32,
}

/// Eight values in Q8_1, with the factor of their block: what [`quantize`] gives each lane.
#[derive(Clone, Copy, Debug)]
pub struct Quantized {
    /// The integers, lowest column in the lowest byte.
    pub words: [u32; 2],
    /// Their block's factor.
    pub d: f32,
}

/// Q8_1 of 32 values that lie in four neighbouring lanes, eight each. All lanes of the warp take part.
#[inline(always)]
pub fn quantize([a, b, c, d, e, f, g, h]: [f32; OCTET]) -> Quantized {
    let of_4 = |a: f32, b: f32, c: f32, d: f32| max(max(abs(a), abs(b)), max(abs(c), abs(d)));
    let amax = warp_reduce_max(FULL_MASK, max(of_4(a, b, c, d), of_4(e, f, g, h)), LANES_PER_BLOCK);
    // Blocks of less than any number that matters are 0.
    let inverse = if amax > 1e-36 { div_approx(127.0, amax) } else { 0.0 };
    let word = |values: [f32; 4]| {
        let [q0, q1, q2, q3] = values.map(|value| round_ties_even(value * inverse) as i32 as u32 & 0xff);
        q0 | q1 << 8 | q2 << 16 | q3 << 24
    };
    Quantized { words: [word([a, b, c, d]), word([e, f, g, h])], d: amax * (1.0 / 127.0) }
}

/// A vector in shared memory that tiles of weights can be multiplied with.
pub trait Activations: Copy {
    /// Words of shared memory for a unit.
    const UNIT_WORDS: usize;
    /// Most warps in a block: as many as leave registers for two blocks on a multiprocessor, so that the next kernel's
    /// block starts beside this one's.
    const MAX_WARPS: u32;
    /// Whether a vector may be too long for shared memory, and is then taken in slabs.
    const IN_SLABS: bool;
    /// What a lane holds of it for one unit of weights.
    type Unit: Copy;

    /// Stores eight values, `octet` counting them from the start of the vector; all lanes of the warp take part, those
    /// beyond the vector with `octet >= n_octets`.
    fn store(memory: DynamicShared<u32>, n_octets: usize, octet: usize, values: [f32; OCTET]);

    /// Reads unit `unit` of those that meet tile `tile`.
    fn load(memory: DynamicShared<u32>, tile: usize, unit: usize) -> Self::Unit;

    /// `sum` plus the dot product of a unit of weights with the same columns of the vector.
    fn dot<W: WeightUnit>(weights: &W, x: &Self::Unit, sum: f32) -> f32;
}

/// Q8_1: for each tile planes of the units' first and second 16 integers, and one of their factors, 36 bytes a unit.
/// The sums are made again from the integers: sooner than lanes could exchange them.
#[derive(Clone, Copy, Debug)]
pub struct Q8_1;

/// A unit of a Q8_1 vector.
#[derive(Clone, Copy, Debug)]
pub struct Q8_1Unit {
    /// The integers, four to a word.
    pub quants: [i32; UNIT_WORDS],
    /// The factor.
    pub d: f32,
    /// `d` times the sum of the integers.
    pub d_sum: f32,
    /// The sums of the first and the second 16 integers.
    pub sums: [i32; 2],
}

impl Q8_1 {
    /// Stores eight values that are quantized already.
    #[inline(always)]
    pub fn store_quantized(memory: DynamicShared<u32>, octet: usize, Quantized { words, d }: Quantized) {
        let (unit, part) = (octet / UNIT_OCTETS, octet % UNIT_OCTETS);
        let (start, unit) = (tile_start::<Self>(unit / TILE_UNITS), unit % TILE_UNITS);
        // Two octets are half a unit.
        let at = start / 2 + (part / 2 * TILE_UNITS + unit) * 2 + part % 2;
        memory.view::<u64>().set(at, u64::from(words[0]) | u64::from(words[1]) << 32);
        if part == 0 {
            memory.set(start + UNIT_WORDS * TILE_UNITS + unit, d.to_bits());
        }
    }
}

/// The word at which the units that meet tile `tile` start.
#[inline(always)]
fn tile_start<X: Activations>(tile: usize) -> usize {
    tile * TILE_UNITS * X::UNIT_WORDS
}

impl Activations for Q8_1 {
    const UNIT_WORDS: usize = UNIT_WORDS + 1;
    const MAX_WARPS: u32 = 12;
    const IN_SLABS: bool = false;
    type Unit = Q8_1Unit;

    #[inline(always)]
    fn store(memory: DynamicShared<u32>, n_octets: usize, octet: usize, values: [f32; OCTET]) {
        let quantized = quantize(values);
        if octet < n_octets {
            Self::store_quantized(memory, octet, quantized);
        }
    }

    #[inline(always)]
    fn load(memory: DynamicShared<u32>, tile: usize, unit: usize) -> Q8_1Unit {
        let start = tile_start::<Self>(tile);
        let (low, high) = (memory.get4(start + unit * 4), memory.get4(start + (TILE_UNITS + unit) * 4));
        let quants = core::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] } as i32);
        let d = f32::from_bits(memory.get(start + UNIT_WORDS * TILE_UNITS + unit));
        let sums = half_sums(quants);
        Q8_1Unit { quants, d, d_sum: d * (sums[0] + sums[1]) as f32, sums }
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &Q8_1Unit, sum: f32) -> f32 {
        weights.dot_q8_1(x, sum)
    }
}

/// f32: for each tile eight planes of four values of each unit.
#[derive(Clone, Copy, Debug)]
pub struct F32Vector;

/// Where a unit of an f32 vector is: too large to be kept in registers beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct F32Unit {
    memory: DynamicShared<u32>,
    /// The word at which its first four values are.
    start: usize,
}

impl Activations for F32Vector {
    const UNIT_WORDS: usize = UNIT;
    const MAX_WARPS: u32 = 8;
    const IN_SLABS: bool = true;
    type Unit = F32Unit;

    #[inline(always)]
    fn store(memory: DynamicShared<u32>, n_octets: usize, octet: usize, values: [f32; OCTET]) {
        if octet < n_octets {
            let (unit, part) = (octet / UNIT_OCTETS, octet % UNIT_OCTETS);
            let (start, unit) = (tile_start::<Self>(unit / TILE_UNITS), unit % TILE_UNITS);
            let [a, b, c, d, e, f, g, h] = values.map(f32::to_bits);
            memory.set4(start + (2 * part * TILE_UNITS + unit) * 4, [a, b, c, d]);
            memory.set4(start + ((2 * part + 1) * TILE_UNITS + unit) * 4, [e, f, g, h]);
        }
    }

    #[inline(always)]
    fn load(memory: DynamicShared<u32>, tile: usize, unit: usize) -> F32Unit {
        F32Unit { memory, start: tile_start::<Self>(tile) + unit * 4 }
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &F32Unit, sum: f32) -> f32 {
        let w = weights.dequantize();
        let (before, mut sum) = (sum, 0.0);
        for part in 0..UNIT_WORDS {
            let values = x.memory.get4(x.start + part * TILE_UNITS * 4).map(f32::from_bits);
            for i in 0..4 {
                sum = mul_add(w[4 * part + i], values[i], sum);
            }
        }
        before + sum
    }
}
