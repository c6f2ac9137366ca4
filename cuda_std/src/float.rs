//! Functions of `f32`, and half-precision conversions.
//!
//! On a GPU they use its fast instructions, elsewhere plain arithmetic without a call into a mathematics library. Each
//! is within two units in the last place where nothing else is said, so GPU and CPU may differ by a few.

/// One PTX instruction of one operand or two.
#[cfg(target_arch = "nvptx64")]
macro_rules! ptx {
    (@operand $x:expr) => {
        ", {}"
    };
    ($instruction:literal $(, $x:expr)+) => {{
        let result;
        // SAFETY: arithmetic alone.
        unsafe {
            core::arch::asm!(
                concat!($instruction, " {}" $(, ptx!(@operand $x))+, ";"),
                out(reg32) result,
                $(in(reg32) $x,)+
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        result
    }};
}

mod bfloat;
mod half;

pub use bfloat::{bf16x2_to_f32, f32_to_bf16x2};
pub use half::{
    f16_to_f32, f16x2_max_magnitudes, f16x2_mul, f16x2_to_bytes, f16x2_to_f32, f32_to_f16, f32_to_f16x2,
    f32_to_f16x2_saturating,
};

#[cfg(not(target_arch = "nvptx64"))]
use core::f32::consts::LN_2;
use core::f32::consts::LOG2_E;

/// Adding and taking away 1.5 * 2^23 rounds to an integer, which then ends the mantissa.
const ROUND: f32 = 12_582_912.0;

/// `|x|`.
#[inline(always)]
pub fn abs(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0x7fff_ffff)
}

/// The smaller one. A NaN loses against a number; which zero of two with different signs is returned is not fixed.
#[inline(always)]
pub fn min(a: f32, b: f32) -> f32 {
    a.min(b)
}

/// The larger one. A NaN loses against a number; which zero of two with different signs is returned is not fixed.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    a.max(b)
}

/// `a * b + c`, rounded once on a GPU and on a CPU that was compiled for with FMA; otherwise rounded twice, since doing
/// it in software is some fifty times slower.
#[inline(always)]
pub fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("fma.rn.f32", a, b, c),
        any(target_feature = "fma", target_arch = "aarch64") => a.mul_add(b, c),
        _ => a * b + c,
    }
}

/// The square root, correctly rounded.
#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("sqrt.rn.f32", x),
        _ => x.sqrt(),
    }
}

/// `a / b`, off by at most two units in the last place on a GPU; 0 there where `|b|` is above 2^126.
#[inline(always)]
pub fn div_approx(a: f32, b: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("div.approx.f32", a, b),
        _ => a / b,
    }
}

/// `1 / x`, off by at most one unit in the last place on a GPU; there the reciprocals of numbers below 2^-126 are infinite, and
/// those of numbers above 2^126 are 0.
#[inline(always)]
pub fn rcp(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("rcp.approx.ftz.f32", x),
        _ => 1.0 / x,
    }
}

/// `a / b`, correctly rounded, for `b` from 2^-126 to 2^126 and where neither the quotient nor what it leaves of `a` is below 2^-126.
/// On a GPU this is a division without its branch for all other numbers.
#[inline(always)]
pub fn div_normal(a: f32, b: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            // A reciprocal, its correction, and that of the quotient (Markstein, 1990).
            let approximate = rcp(b);
            let reciprocal = mul_add(mul_add(-b, approximate, 1.0), approximate, approximate);
            let quotient = a * reciprocal;
            mul_add(mul_add(-b, quotient, a), reciprocal, quotient)
        }
        _ => a / b,
    }
}

/// `1 / sqrt(x)`.
#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("rsqrt.approx.f32", x),
        _ => 1.0 / x.sqrt(),
    }
}

/// The nearest integer, the even one of two that are equally near. Exact.
#[inline(always)]
pub fn round_ties_even(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("cvt.rni.f32.f32", x),
        _ => {
            // From 2^23 on every f32 is an integer; below, adding 2^23 leaves no place for a fraction.
            const INTEGERS: f32 = 8_388_608.0;
            let magnitude = abs(x);
            let rounded = (magnitude + INTEGERS) - INTEGERS;
            if magnitude < INTEGERS { rounded.copysign(x) } else { x }
        }
    }
}

/// The nearest integer, the even one of two that are equally near, in two's complement in the lowest 22 bits; what is above
/// them means nothing. For `x` from -2^21 to 2^21 - 1. One addition, where a conversion takes an instruction that comes eight times
/// as slowly and others that see to numbers which are too large.
#[inline(always)]
pub fn low_bits_of_integer(x: f32) -> u32 {
    (x + ROUND).to_bits()
}

/// The largest integer that is not above `x`. Exact.
#[inline(always)]
pub fn floor(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("cvt.rmi.f32.f32", x),
        _ => {
            let rounded = round_ties_even(x);
            if rounded > x { rounded - 1.0 } else { rounded }
        }
    }
}

/// An integer that is larger for a larger number: the bits of negative ones, or else the sign, inverted (Herf, 2001). That of a
/// NaN is beyond those of both infinities, on the side of its sign.
#[inline(always)]
pub fn order_key(x: f32) -> u32 {
    let bits = x.to_bits();
    bits ^ ((bits as i32 >> 31) as u32 | 1 << 31)
}

/// The number with this [`order_key`].
#[inline(always)]
pub fn from_order_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key ^ 1 << 31 } else { !key })
}

/// `e^x`; 0 below about -104, infinity above about 88.7.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = clamp(x, -104.0, 89.0);
    let shifted = mul_add(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let fraction = cfg_select! {
        target_arch = "nvptx64" => ptx!("ex2.approx.f32", mul_add(x, LOG2_E_LOW, mul_add(x, LOG2_E, -n))),
        _ => exp_fraction((x - n * LN_2_HIGH) - n * LN_2_LOW),
    };
    scale(fraction, shifted)
}

/// `2^x`; 0 below -150, infinity from 128 on. On a GPU results below 2^-126 are 0.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("ex2.approx.ftz.f32", x),
        _ => {
            let x = clamp(x, -151.0, 129.0);
            let shifted = x + ROUND;
            scale(exp_fraction((x - (shifted - ROUND)) * LN_2), shifted)
        }
    }
}

/// The natural logarithm; NaN below 0.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    match special_logarithm(x) {
        Some(result) => result,
        None => {
            let (ln, exponent) = ln_mantissa(x);
            // fdlibm's halves of ln 2: the first times any exponent is exact.
            mul_add(exponent, 0.693_138_1, mul_add(exponent, 9.058_001e-6, ln))
        }
    }
}

/// The logarithm to base 2; NaN below 0.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    match special_logarithm(x) {
        Some(result) => result,
        None => {
            let (ln, exponent) = ln_mantissa(x);
            mul_add(ln, LOG2_E, exponent)
        }
    }
}

/// What `LOG2_E` lacks.
#[cfg(target_arch = "nvptx64")]
const LOG2_E_LOW: f32 = 1.925_963e-8;

/// ln 2 in two parts; the first has few enough digits that its product with an exponent is exact.
#[cfg(not(target_arch = "nvptx64"))]
const LN_2_HIGH: f32 = 0.693_359_4;
#[cfg(not(target_arch = "nvptx64"))]
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// `x` between two bounds; a NaN stays one.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// `e^r` for `|r|` up to half of ln 2, by its Taylor series.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn exp_fraction(r: f32) -> f32 {
    let p = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
    let p = 0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * p));
    1.0 + (r + r * r * p)
}

/// `x * 2^n`, with n in the low bits of a float that [`ROUND`] was added to; in two steps, so that results beyond the
/// normal range come out right.
#[inline(always)]
fn scale(x: f32, shifted: f32) -> f32 {
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    x * power(n >> 1) * power(n.wrapping_sub(n >> 1))
}

/// The logarithm of what is no positive finite number.
#[inline(always)]
fn special_logarithm(x: f32) -> Option<f32> {
    if x > 0.0 && x < f32::INFINITY {
        None
    } else if x == 0.0 {
        Some(f32::NEG_INFINITY)
    } else if x > 0.0 {
        Some(x)
    } else {
        Some(f32::NAN)
    }
}

/// `x = m * 2^e` with m between sqrt(1/2) and sqrt(2): the natural logarithm of m, and e.
#[inline(always)]
fn ln_mantissa(x: f32) -> (f32, f32) {
    const SQRT_HALF: u32 = core::f32::consts::FRAC_1_SQRT_2.to_bits();
    // Subnormal numbers become normal ones first.
    let (x, bias) = if x < f32::MIN_POSITIVE { (x * 8_388_608.0, 23) } else { (x, 0) };
    let exponent = (x.to_bits().wrapping_sub(SQRT_HALF) as i32) >> 23;
    let m = f32::from_bits(x.to_bits().wrapping_sub((exponent << 23) as u32));

    // ln(1 + f) = 2 atanh(s) with s = f / (2 + f), arranged so that f itself is the leading term.
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let half_square = 0.5 * f * f;
    let tail = z * (2.0 / 3.0 + z * (2.0 / 5.0 + z * (2.0 / 7.0 + z * (2.0 / 9.0))));
    (f - (half_square - s * (half_square + tail)), (exponent - bias) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance of a result from the true value, in units of the true value's last place.
    fn ulps(result: f32, exact: f64) -> f64 {
        if f64::from(result) == exact || (result.is_infinite() && exact.abs() > f64::from(f32::MAX)) {
            return 0.0;
        }
        let exponent = (exact.abs().log2().floor() as i32).max(-126);
        (f64::from(result) - exact).abs() / 2f64.powi(exponent - 23)
    }

    /// Floats of every size and sign that `filter` lets through.
    fn samples(filter: impl Fn(f32) -> bool) -> impl Iterator<Item = f32> {
        (0..=u32::MAX).step_by(4099).map(f32::from_bits).filter(move |&x| x.is_finite() && filter(x))
    }

    fn worst(name: &str, f: fn(f32) -> f32, exact: fn(f64) -> f64, filter: fn(f32) -> bool, limit: f64) {
        let (error, at) = samples(filter)
            .map(|x| (ulps(f(x), exact(f64::from(x))), x))
            .fold((0.0, 0.0), |worst, sample| if sample.0 > worst.0 { sample } else { worst });
        println!("{name}: at most {error:.2} ulp, at {at:e}");
        assert!(error <= limit, "{name}({at:e}) is {error} ulp off");
    }

    #[test]
    fn functions_match_f64() {
        worst("exp", exp, f64::exp, |_| true, 1.5);
        worst("exp2", exp2, f64::exp2, |_| true, 1.5);
        worst("ln", ln, f64::ln, |x| x > 0.0, 1.5);
        worst("log2", log2, f64::log2, |x| x > 0.0, 2.0);
        worst("sqrt", sqrt, f64::sqrt, |x| x >= 0.0, 0.5);
        worst("rsqrt", rsqrt, |x| 1.0 / x.sqrt(), |x| x > 0.0, 1.5);
        worst("floor", floor, f64::floor, |_| true, 0.0);
        worst("round_ties_even", round_ties_even, f64::round_ties_even, |_| true, 0.0);
    }

    #[test]
    fn integers_end_the_mantissa() {
        for x in [0.0f32, 0.5, 1.5, -0.5, -1.5, 126.5, -127.0, 63.49, -63.51, 2_097_151.0, -2_097_152.0] {
            let bits = low_bits_of_integer(x) << 10;
            assert_eq!(bits as i32 >> 10, x.round_ties_even() as i32, "{x}");
        }
    }

    #[test]
    fn keys_are_in_the_order_of_numbers() {
        let numbers =
            [f32::NEG_INFINITY, -1e30, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.5, f32::MAX, f32::INFINITY];
        for pair in numbers.windows(2) {
            assert!(order_key(pair[0]) < order_key(pair[1]), "{pair:?}");
        }
        for x in numbers.into_iter().chain([f32::NAN, -f32::NAN]) {
            assert_eq!(from_order_key(order_key(x)).to_bits(), x.to_bits());
        }
    }

    #[test]
    fn special_values() {
        for f in [exp, exp2, ln, log2, sqrt, rsqrt, floor, round_ties_even] {
            assert!(f(f32::NAN).is_nan());
        }
        assert_eq!([exp(f32::NEG_INFINITY), exp(f32::INFINITY), exp(0.0)], [0.0, f32::INFINITY, 1.0]);
        assert_eq!([exp2(f32::NEG_INFINITY), exp2(f32::INFINITY), exp2(-3.0)], [0.0, f32::INFINITY, 0.125]);
        assert_eq!([ln(0.0), ln(f32::INFINITY), ln(1.0)], [f32::NEG_INFINITY, f32::INFINITY, 0.0]);
        assert_eq!([log2(0.0), log2(f32::INFINITY), log2(0.25)], [f32::NEG_INFINITY, f32::INFINITY, -2.0]);
        assert!(ln(-1.0).is_nan() && log2(-1.0).is_nan() && sqrt(-1.0).is_nan());
        assert_eq!(round_ties_even(-0.25).to_bits(), (-0.0f32).to_bits());
        assert_eq!([round_ties_even(0.5), round_ties_even(1.5), round_ties_even(-2.5)], [0.0, 2.0, -2.0]);
        assert_eq!([floor(-0.5), floor(2.5), floor(1e30)], [-1.0, 2.0, 1e30]);
        assert_eq!(
            [min(1.0, f32::NAN), max(f32::NAN, 1.0), min(2.0, 1.0), max(2.0, 1.0)],
            [1.0, 1.0, 1.0, 2.0]
        );
        assert_eq!([abs(-1.5), abs(f32::NEG_INFINITY), mul_add(2.0, 3.0, 4.0)], [1.5, f32::INFINITY, 10.0]);
    }
}
