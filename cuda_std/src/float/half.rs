//! Half precision: conversions from and to the bits of an f16.

/// The f16 with these bits. Exact.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let value;
            // SAFETY: arithmetic alone.
            unsafe {
                core::arch::asm!(
                    "cvt.f32.f16 {value}, {bits};",
                    value = out(reg32) value,
                    bits = in(reg16) bits,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            value
        }
        _ => {
            // Exponent and mantissa go to where f32 has them; what is left is the difference of the biases, which
            // infinities and NaNs need twice. Selects, no branches: the values decode side by side.
            let shifted = u32::from(bits & 0x7fff) << 13;
            let normal = shifted + ((127 - 15) << 23);
            let magnitude = if shifted >= 0x7c00 << 13 { normal + ((128 - 16) << 23) } else { normal };
            // A subnormal number counts in steps of 2^-24, as 2^-14 with the same mantissa does above 2^-14.
            let subnormal = f32::from_bits(normal + (1 << 23)) - f32::from_bits(113 << 23);
            let magnitude = if shifted < 0x0400 << 13 { subnormal.to_bits() } else { magnitude };
            f32::from_bits(magnitude | u32::from(bits & 0x8000) << 16)
        }
    }
}

/// The bits of the f16 nearest to `value`, the even one of two that are equally near; infinity beyond 65,504.
#[inline(always)]
pub fn f32_to_f16(value: f32) -> u16 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let bits;
            // SAFETY: arithmetic alone.
            unsafe {
                core::arch::asm!(
                    "cvt.rn.f16.f32 {bits}, {value};",
                    value = in(reg32) value,
                    bits = out(reg16) bits,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            bits
        }
        _ => {
            let bits = value.to_bits();
            let magnitude = bits & 0x7fff_ffff;
            // Rebias, then round away 13 digits: half of the last kept one, less if that one is even.
            let odd = (magnitude >> 13) & 1;
            let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
            // Adding 1/2 leaves steps of 2^-24 in the mantissa: the addition itself rounds.
            let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
            let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
            let result = if magnitude < 113 << 23 { subnormal } else { normal };
            // 65,520 is the first number that rounds up to infinity.
            let result = if magnitude >= 65_520f32.to_bits() { special } else { result };
            result as u16 | (bits >> 16) as u16 & 0x8000
        }
    }
}

/// Two numbers as [`f32_to_f16`] rounds them, `low` in the lower half of the word.
#[inline(always)]
pub fn f32_to_f16x2(low: f32, high: f32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("cvt.rn.f16x2.f32", high, low),
        _ => u32::from(f32_to_f16(low)) | u32::from(f32_to_f16(high)) << 16,
    }
}

/// Likewise, but the largest f16 there is, 65,504, for all beyond it.
#[inline(always)]
pub fn f32_to_f16x2_saturating(low: f32, high: f32) -> u32 {
    cfg_select! {
        // From PTX 8.1 on.
        cuda_sm_90a => ptx!("cvt.rn.satfinite.f16x2.f32", high, low),
        _ => {
            const MOST: f32 = 65_504.0;
            let saturate = |value: f32| super::max(super::min(value, MOST), -MOST);
            f32_to_f16x2(saturate(low), saturate(high))
        }
    }
}

/// The two numbers in a word, the lower half first. Exact.
#[inline(always)]
pub fn f16x2_to_f32(word: u32) -> [f32; 2] {
    [f16_to_f32(word as u16), f16_to_f32((word >> 16) as u16)]
}

/// The larger magnitude of both lower and of both upper numbers.
#[inline(always)]
pub fn f16x2_max_magnitudes(a: u32, b: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let (a, b): (u32, u32) = (ptx!("abs.f16x2", a), ptx!("abs.f16x2", b));
            ptx!("max.f16x2", a, b)
        }
        _ => {
            // Magnitudes are in the order of their bits.
            let (a, b) = (a & 0x7fff_7fff, b & 0x7fff_7fff);
            (a & 0xffff).max(b & 0xffff) | (a & 0xffff_0000).max(b & 0xffff_0000)
        }
    }
}

/// Two products of numbers that each have the bits of an f16 in half of a word, rounded to f16.
#[inline(always)]
pub fn f16x2_mul(a: u32, b: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("mul.rn.f16x2", a, b),
        _ => {
            let ([a0, a1], [b0, b1]) = (f16x2_to_f32(a), f16x2_to_f32(b));
            f32_to_f16x2(a0 * b0, a1 * b1)
        }
    }
}

/// The integers nearest to four numbers, two in each word, times `factor`, the even one of two that are equally near: a byte each, the
/// lower half of `a` first.
///
/// `factor` has the bits of an f16 in both halves, and the integer goes from -128 to 127. On a GPU both numbers of a word are
/// worked out at a time: what is added to their products leaves the integer in the mantissa.
#[inline(always)]
pub fn f16x2_to_bytes([a, b]: [u32; 2], factor: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            // 1,536 in both halves.
            const INTEGERS: u32 = 0x6600_6600;
            let integers = |word: u32| -> u32 { ptx!("fma.rn.f16x2", word, factor, INTEGERS) };
            let (a, b) = (integers(a), integers(b));
            ptx!("prmt.b32", a, b, 0x6420u32)
        }
        _ => {
            // Two f16 have a product that an f32 has as well.
            let factor = f16_to_f32(factor as u16);
            let ([a, b], [c, d]) = (f16x2_to_f32(a), f16x2_to_f32(b));
            crate::intrinsics::low_bytes([a, b, c, d].map(|x| super::low_bits_of_integer(x * factor)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_an_f16_become_the_largest() {
        let both = |word: u32| f16x2_to_f32(word);
        assert_eq!(both(f32_to_f16x2_saturating(1e6, -1e30)), [65_504.0, -65_504.0]);
        assert_eq!(both(f32_to_f16x2_saturating(65_519.0, -0.25)), [65_504.0, -0.25]);
        assert_eq!(both(f32_to_f16x2_saturating(f32::INFINITY, f32::NEG_INFINITY)), [65_504.0, -65_504.0]);
    }

    #[test]
    fn the_larger_magnitude_of_each_half() {
        for (a, b, expected) in [
            ([1.0, -2.0], [-0.5, 1.0], [1.0, 2.0]),
            ([-0.0, 3e-7], [0.0, -2e-7], [0.0, 3e-7]),
            ([65_504.0, 0.0], [-65_504.0, f32::NEG_INFINITY], [65_504.0, f32::INFINITY]),
        ] {
            let word = |[low, high]: [f32; 2]| f32_to_f16x2(low, high);
            assert_eq!(f16x2_max_magnitudes(word(a), word(b)), word(expected), "{a:?}, {b:?}");
        }
    }

    #[test]
    fn products_become_the_nearest_integers() {
        let twice = |value: f32| f32_to_f16x2(value, value);
        for factor in [12.7, 478.0, 64_000.0, 0.002] {
            let factor = f16_to_f32(f32_to_f16(factor));
            for i in -127..=127i16 {
                // The nearest f16, and those between two integers.
                let x = |integer: f32| f16_to_f32(f32_to_f16(integer / factor));
                let values = [x(i.into()), x(f32::from(i) + 0.5), x(f32::from(-i)), x(f32::from(-i) - 0.5)];
                let words = [f32_to_f16x2(values[0], values[1]), f32_to_f16x2(values[2], values[3])];
                let bytes = f16x2_to_bytes(words, twice(factor)).to_le_bytes();
                for (byte, value) in bytes.into_iter().zip(values) {
                    let expected = (f64::from(value) * f64::from(factor)).round_ties_even();
                    assert_eq!(byte, expected as i64 as u8, "{value} times {factor}");
                }
            }
        }
    }

    #[test]
    fn products_of_both_halves() {
        for (a, b, expected) in [
            ([1.5, -2.0], [2.0, 0.25], [3.0, -0.5]),
            ([6e-8, 1.0], [32_768.0, 32_768.0], [f16_to_f32(1) * 32_768.0, 32_768.0]),
            ([0.0, 65_504.0], [-1.0, 2.0], [-0.0, f32::INFINITY]),
        ] {
            let word = |[low, high]: [f32; 2]| f32_to_f16x2(low, high);
            assert_eq!(f16x2_mul(word(a), word(b)), word(expected), "{a:?} times {b:?}");
        }
    }

    /// The definition: sign, exponent, mantissa.
    fn reference(bits: u16) -> f64 {
        let (exponent, mantissa) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-24),
            31 if mantissa == 0.0 => f64::INFINITY,
            31 => f64::NAN,
            _ => (1024.0 + mantissa) * 2f64.powi(exponent - 25),
        };
        if bits >> 15 == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_f16_reads_as_defined_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (value, expected) = (f16_to_f32(bits), reference(bits));
            if expected.is_nan() {
                assert!(value.is_nan(), "{bits:#06x}");
                assert!(reference(f32_to_f16(value)).is_nan(), "{bits:#06x}");
            } else {
                assert_eq!(f64::from(value).to_bits(), expected.to_bits(), "{bits:#06x}");
                assert_eq!(f32_to_f16(value), bits);
            }
        }
    }

    #[test]
    fn f32_rounds_to_the_nearest_f16() {
        for bits in (0..=u32::MAX).step_by(1021) {
            let value = f32::from_bits(bits);
            let half = f32_to_f16(value);
            if value.is_nan() {
                assert!(reference(half).is_nan());
                continue;
            }
            let magnitude = f64::from(value.abs());
            let at = |half: u16| if half == 0x7c00 { 65_536.0 } else { reference(half) };
            let found = half & 0x7fff;
            let error = (at(found) - magnitude).abs();
            for neighbour in [found.wrapping_sub(1), found + 1] {
                if neighbour <= 0x7c00 && magnitude < 65_536.0 {
                    let other = (at(neighbour) - magnitude).abs();
                    assert!(
                        error < other || (error == other && found.is_multiple_of(2)),
                        "{value:e}: {half:#06x}"
                    );
                }
            }
            assert_eq!(half >> 15 == 1, value.is_sign_negative());
            assert!(magnitude < 65_520.0 || found == 0x7c00);
        }
    }
}
