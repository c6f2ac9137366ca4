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

#[cfg(test)]
mod tests {
    use super::*;

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
