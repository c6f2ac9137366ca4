//! Activation vectors as the matrix kernels read them: Q8_1 (the fast path) or f32 (the exact one).
//!
//! Q8_1 holds blocks of 32 values: `d = max|x| / 127`, `q = round(x / d)` as signed bytes, and the sum of the
//! integers, which the minimum term of a weight format needs (llama.cpp's block_q8_1, with both numbers in full
//! precision).
//!
//! A lane of a matrix kernel takes the unit of the vector that meets its weights into registers, for all the tiles it meets.
//! On the fast path that is an [operand](crate::operand), which the lane quantizes, or a vector in Q8_1.

use crate::formats::tile::TILE_UNITS;
use crate::formats::{UNIT, UNIT_WORDS, WeightUnit, half_sums};
use crate::gemv::input::Input;
use crate::operand::{SCALE, octet_of};
use bytemuck::{Pod, Zeroable};
use cuda_std::float::{
    abs, div_normal, f16x2_max_magnitudes, f16x2_mul, f16x2_to_bytes, f16x2_to_f32, f32_to_f16x2,
    low_bits_of_integer, max, mul_add, rcp,
};
use cuda_std::intrinsics::low_bytes;
use cuda_std::memory::{ld_global_u32x2, ld_global_u32x4};
use cuda_std::warp::{FULL_MASK, warp_reduce_max};
use half::f16;

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
    let inverse = inverse(amax);
    let words = [word_of([a, b, c, d], inverse), word_of([e, f, g, h], inverse)];
    Quantized { words, d: amax * (1.0 / 127.0) }
}

/// What values of a block whose largest one is `amax` are multiplied with.
#[inline(always)]
fn inverse(amax: f32) -> f32 {
    // Blocks of less than any number that matters are 0. Rounded as IEEE 754 says: values that are half of the largest one lie
    // in the middle between two integers, and should go the same way on every device.
    if amax > 1e-36 { div_normal(127.0, amax) } else { 0.0 }
}

/// Four values, times `inverse`, as integers.
#[inline(always)]
fn word_of(values: [f32; 4], inverse: f32) -> u32 {
    low_bytes(values.map(|value| low_bits_of_integer(value * inverse)))
}

/// A vector that tiles of weights can be multiplied with.
pub trait Activations: Copy {
    /// What a lane reads of it for one unit of weights.
    type Fetched: Copy;
    /// What it makes of that.
    type Unit: Copy;

    /// What [`fetch`](Self::fetch) takes to find unit `unit`, which can be worked out before the vector is there.
    fn place(unit: u32) -> u32 {
        unit
    }

    /// Asks for the unit at `place`: what is done between this and [`unit`](Self::unit) does not wait for memory.
    ///
    /// # Safety
    /// The input must be as its fields say, in device memory, and the unit inside it.
    unsafe fn fetch(input: &Input, place: u32) -> Self::Fetched;

    /// The unit.
    fn unit(input: &Input, fetched: Self::Fetched) -> Self::Unit;

    /// `sum` plus the dot product of a unit of weights with the same columns of the vector.
    fn dot<W: WeightUnit>(weights: &W, x: &Self::Unit, sum: f32) -> f32;
}

/// Q8_1, of an operand or of a vector that is in Q8_1 already.
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

impl Q8_1Unit {
    #[inline(always)]
    fn new(words: [u32; UNIT_WORDS], d: f32) -> Self {
        let quants = words.map(|word| word as i32);
        let sums = half_sums(quants);
        Self { quants, d, d_sum: d * (sums[0] + sums[1]) as f32, sums }
    }

    /// Of 32 columns of an operand, two to a word.
    ///
    /// The factor is an f16 as well, and `d` its inverse: so the integers are the nearest ones. The factor is off by a part in 4,096 at
    /// most, so the largest magnitude is 127.
    #[inline(always)]
    fn quantize(pairs: [u32; UNIT / 2]) -> Self {
        let mut largest = pairs;
        let mut n = UNIT / 2;
        while n > 1 {
            n /= 2;
            let mut i = 0;
            while i < n {
                largest[i] = f16x2_max_magnitudes(largest[i], largest[i + n]);
                i += 1;
            }
        }
        let [low, high] = f16x2_to_f32(largest[0]);
        // Zeros are 0 times whatever the smallest number is.
        let amax = max(max(low, high), SMALLEST);
        // Of small numbers no f16 is the inverse: they are raised first.
        let is_small = amax < SMALL;
        let (raise, lower) = if is_small { (RAISE, 1.0 / (RAISE * SCALE)) } else { (1.0, 1.0 / SCALE) };
        let factor = div_normal(127.0, amax * raise);
        let factors = f32_to_f16x2(factor, factor);
        let [factor, _] = f16x2_to_f32(factors);
        let mut words = [0; UNIT_WORDS];
        let mut i = 0;
        if is_small {
            while i < UNIT_WORDS {
                let raised = [pairs[2 * i], pairs[2 * i + 1]].map(|pair| f16x2_mul(pair, f16_twice(RAISE)));
                words[i] = f16x2_to_bytes(raised, factors);
                i += 1;
            }
        } else {
            while i < UNIT_WORDS {
                words[i] = f16x2_to_bytes([pairs[2 * i], pairs[2 * i + 1]], factors);
                i += 1;
            }
        }
        Self::new(words, lower * rcp(factor))
    }
}

/// The smallest f16 above 0.
const SMALLEST: f32 = 1.0 / (1 << 24) as f32;
/// Largest magnitudes below this one are small: 127 over it is about the largest f16.
const SMALL: f32 = 1.0 / 512.0;
/// What small numbers are multiplied with before their factor is.
const RAISE: f32 = 32_768.0;

/// A number as an f16, in both halves of a word.
const fn f16_twice(value: f32) -> u32 {
    f16::from_f32_const(value).to_bits() as u32 * 0x1_0001
}

/// A unit of a vector in Q8_1 on its way from device memory: nothing has looked at it yet.
#[derive(Clone, Copy, Debug)]
pub struct FetchedQ8_1 {
    words: [u32; UNIT_WORDS],
    d: f32,
}

impl FetchedQ8_1 {
    /// Asks for unit `unit`.
    ///
    /// # Safety
    /// The pointers are to the integers and scales of a vector in device memory, as [`Input`] has them, that has the unit.
    #[inline(always)]
    pub unsafe fn fetch(quants: *const u32, scales: *const Q8_1Scale, unit: usize) -> Self {
        // SAFETY: the unit is inside the vector, as the caller vouches.
        let ([a, b, c, d], [e, f, g, h], [scale, _]) = unsafe {
            let quants = quants.add(unit * UNIT_WORDS).cast::<[u32; 4]>();
            let scale = scales.add(unit).cast();
            (ld_global_u32x4(quants), ld_global_u32x4(quants.add(1)), ld_global_u32x2(scale))
        };
        Self { words: [a, b, c, d, e, f, g, h], d: f32::from_bits(scale) }
    }

    /// The unit.
    #[inline(always)]
    pub fn unit(self) -> Q8_1Unit {
        Q8_1Unit::new(self.words, self.d)
    }
}

/// Q8_1 of an operand, and of nothing else: with [`Q8_1`], which looks at what the vector is, instructions would lie between those that a
/// product waits for.
#[derive(Clone, Copy, Debug)]
pub struct QuantizedOperand;

impl Activations for QuantizedOperand {
    type Fetched = [u32; UNIT / 2];
    type Unit = Q8_1Unit;

    #[inline(always)]
    fn place(unit: u32) -> u32 {
        place_in_operand(unit)
    }

    #[inline(always)]
    unsafe fn fetch(input: &Input, place: u32) -> [u32; UNIT / 2] {
        // SAFETY: the caller's promise.
        unsafe { fetch_operand(input, place) }
    }

    #[inline(always)]
    fn unit(_input: &Input, words: [u32; UNIT / 2]) -> Q8_1Unit {
        Q8_1Unit::quantize(words)
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &Q8_1Unit, sum: f32) -> f32 {
        weights.dot_q8_1(x, sum)
    }
}

/// Where in an operand unit `unit` begins, in pieces of 16 bytes.
#[inline(always)]
fn place_in_operand(unit: u32) -> u32 {
    const TILE: u32 = TILE_UNITS as u32;
    unit / TILE * TILE * UNIT_OCTETS as u32 + unit % TILE
}

/// Asks for the 32 columns of the unit at `place`.
///
/// # Safety
/// The input must be an operand that has the unit.
#[inline(always)]
unsafe fn fetch_operand(input: &Input, place: u32) -> [u32; UNIT / 2] {
    // SAFETY: the unit is inside the vector, as the caller vouches.
    let part = |i: usize| unsafe {
        let parts = input.words.cast::<[u32; 4]>();
        ld_global_u32x4(parts.add(place as usize + i * TILE_UNITS))
    };
    let ([a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]) = (part(0), part(1), part(2), part(3));
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

impl Activations for Q8_1 {
    /// Of an operand 32 columns, of Q8_1 eight words of integers and a factor.
    type Fetched = [u32; UNIT / 2];
    type Unit = Q8_1Unit;

    #[inline(always)]
    unsafe fn fetch(input: &Input, unit: u32) -> [u32; UNIT / 2] {
        if input.words.is_null() {
            // SAFETY: the unit is inside the vector, as the caller vouches.
            let FetchedQ8_1 { words: [a, b, c, d, e, f, g, h], d: scale } =
                unsafe { FetchedQ8_1::fetch(input.quants, input.scales, unit as usize) };
            return [a, b, c, d, e, f, g, h, scale.to_bits(), 0, 0, 0, 0, 0, 0, 0];
        }
        // SAFETY: the caller's promise.
        unsafe { fetch_operand(input, place_in_operand(unit)) }
    }

    #[inline(always)]
    fn unit(input: &Input, words: [u32; UNIT / 2]) -> Q8_1Unit {
        if input.words.is_null() {
            let [a, b, c, d, e, f, g, h, scale, ..] = words;
            Q8_1Unit::new([a, b, c, d, e, f, g, h], f32::from_bits(scale))
        } else {
            Q8_1Unit::quantize(words)
        }
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &Q8_1Unit, sum: f32) -> f32 {
        weights.dot_q8_1(x, sum)
    }
}

/// f32.
#[derive(Clone, Copy, Debug)]
pub struct F32Vector;

impl Activations for F32Vector {
    type Fetched = [f32; UNIT];
    type Unit = [f32; UNIT];

    #[inline(always)]
    unsafe fn fetch(input: &Input, unit: u32) -> [f32; UNIT] {
        let first = unit as usize * UNIT_OCTETS;
        let mut values = [0.0; UNIT];
        let mut part = 0;
        while part < UNIT_OCTETS {
            // SAFETY: the caller's promise.
            let (x, gamma) = unsafe {
                (
                    octet_of(input.values, input.n as usize, first + part),
                    octet_of(input.gamma, input.n as usize, first + part),
                )
            };
            let mut i = 0;
            while i < OCTET {
                values[OCTET * part + i] = x[i] * gamma[i];
                i += 1;
            }
            part += 1;
        }
        values
    }

    #[inline(always)]
    fn unit(_input: &Input, values: [f32; UNIT]) -> [f32; UNIT] {
        values
    }

    #[inline(always)]
    fn dot<W: WeightUnit>(weights: &W, x: &[f32; UNIT], before: f32) -> f32 {
        let w = weights.dequantize();
        let mut sum = 0.0;
        let mut i = 0;
        while i < UNIT {
            sum = mul_add(w[i], x[i], sum);
            i += 1;
        }
        before + sum
    }
}
