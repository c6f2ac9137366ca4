//! bfloat16: the upper half of an f32, so with its range and eight bits of precision.

/// Two numbers rounded to bfloat16, `low` in the lower half of the word: the nearest ones, even of two that are equally
/// near.
#[inline(always)]
pub fn f32_to_bf16x2(low: f32, high: f32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => ptx!("cvt.rn.bf16x2.f32", high, low),
        _ => round(low) | round(high) << 16,
    }
}

/// The two numbers in a word, the lower half first. Exact.
#[inline(always)]
pub fn bf16x2_to_f32(word: u32) -> [f32; 2] {
    [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
}

#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    // Half of the last kept digit, less if that is even; a carry goes on into the exponent, as it should.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { 0x7fff } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number that lies between two bfloat16 goes to the nearer one, in the middle to the even one.
    #[test]
    fn rounds_to_the_nearest() {
        for upper in (0..0x7f80u32).step_by(7).chain(0x8000..0x8100) {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(upper << 16 | lower);
                let up = lower > 0x8000 || (lower == 0x8000 && upper % 2 == 1);
                let word = f32_to_bf16x2(value, -1.5);
                assert_eq!(word & 0xffff, upper + u32::from(up), "{value:e}");
                assert_eq!(bf16x2_to_f32(word)[1], -1.5);
            }
        }
        assert_eq!(
            bf16x2_to_f32(f32_to_bf16x2(f32::MAX, f32::NEG_INFINITY)),
            [f32::INFINITY, f32::NEG_INFINITY]
        );
        assert!(bf16x2_to_f32(f32_to_bf16x2(f32::NAN, 0.0))[0].is_nan());
    }
}
