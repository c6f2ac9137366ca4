//! Scalar functions that several kernels share.

use core::f64::consts::FRAC_PI_2;
use cuda_std::float::{div_approx, exp};

/// `x * sigmoid(x)`, the SiLU activation.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    div_approx(x, 1.0 + exp(-x))
}

/// Sine and cosine of an angle in radians, to about one unit in the last place of f32 for angles below 2^20.
///
/// The angle is reduced to the nearest multiple of a quarter turn in f64, where no position of any context loses
/// digits; the rest, at most an eighth of a turn, goes through both Taylor series.
#[inline]
pub fn sin_cos(angle: f64) -> (f32, f32) {
    // Adding and taking away 1.5 * 2^52 rounds to an integer, whose low bits then end the mantissa.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let rounded = angle * (1.0 / FRAC_PI_2) + ROUND;
    let quarter_turns = rounded.to_bits() & 3;
    let r = (angle - (rounded - ROUND) * FRAC_PI_2) as f32;
    let r2 = r * r;
    let sin = r + r * r2 * (-1.0 / 6.0 + r2 * (1.0 / 120.0 + r2 * (-1.0 / 5040.0 + r2 * (1.0 / 362_880.0))));
    let cos = 1.0
        + r2 * (-0.5
            + r2 * (1.0 / 24.0 + r2 * (-1.0 / 720.0 + r2 * (1.0 / 40_320.0 - r2 * (1.0 / 3_628_800.0)))));
    match quarter_turns {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sin_cos_matches_f64() {
        for i in 0..200_000 {
            let angle = (i as f64 - 1000.0) * 5.2345;
            let (sin, cos) = sin_cos(angle);
            assert!((sin as f64 - angle.sin()).abs() < 1.2e-7, "sin {angle}");
            assert!((cos as f64 - angle.cos()).abs() < 1.2e-7, "cos {angle}");
        }
    }

    #[test]
    fn silu_matches_f64() {
        for i in -2000..2000 {
            let x = i as f32 * 0.05;
            let reference = x as f64 / (1.0 + (-x as f64).exp());
            assert!((silu(x) as f64 - reference).abs() <= 1e-6 * reference.abs() + 1e-30, "{x}");
        }
    }
}
