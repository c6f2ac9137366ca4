//! Integer dot products, and bytes of words.

/// `c` plus the dot product of the four signed bytes of `a` with those of `b`.
///
/// On a GPU this is one instruction (dp4a). To sum up a run of words, [`dp4a_sum`] is as fast there and several
/// times faster on the CPU.
#[inline(always)]
pub fn dp4a(a: i32, b: i32, c: i32) -> i32 {
    cfg_select! {
        // SAFETY: arithmetic alone.
        target_arch = "nvptx64" => unsafe { device::dp4a(a, b, c) },
        target_arch = "x86_64" => c.wrapping_add(sse2::dp4a(a, b)),
        _ => c.wrapping_add(portable_dp4a(a, b)),
    }
}

/// `c` plus the dot product of all signed bytes of `a` with those of `b`: one [`dp4a`] per word.
#[inline(always)]
pub fn dp4a_sum<const N: usize>(a: [i32; N], b: [i32; N], c: i32) -> i32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let mut sum = c;
            let mut i = 0;
            while i < N {
                sum = dp4a(a[i], b[i], sum);
                i += 1;
            }
            sum
        }
        target_arch = "x86_64" => c.wrapping_add(sse2::dp4a_sum(a, b)),
        _ => (0..N).fold(c, |sum, i| sum.wrapping_add(portable_dp4a(a[i], b[i]))),
    }
}

/// The dot product of 32 nibbles with as many signed bytes: the low nibbles of word `i` meet word `i` of `b`, the high
/// ones word `i + 4`.
///
/// On a GPU the high nibbles stay where they are, sixteen times their value, and the sum of their products is shifted.
#[inline(always)]
pub fn dp4a_nibbles(a: [u32; 4], b: [i32; 8]) -> i32 {
    const LOW: u32 = 0x0f0f_0f0f;
    cfg_select! {
        target_arch = "nvptx64" => {
            let (mut low, mut high) = (0, 0);
            let mut i = 0;
            while i < 4 {
                low = dp4a((a[i] & LOW) as i32, b[i], low);
                // SAFETY: arithmetic alone.
                high = unsafe { device::dp4a_unsigned((a[i] & !LOW) as i32, b[i + 4], high) };
                i += 1;
            }
            low + (high >> 4)
        }
        _ => dp4a_sum(core::array::from_fn::<i32, 8, _>(|i| ((a[i % 4] >> (4 * (i / 4))) & LOW) as i32), b, 0),
    }
}

/// Byte `i` of a word, counted from the lowest, 0 to 3.
///
/// On a GPU this is one instruction (prmt), of a value that the compiler takes for any 32 bits: it then converts it to
/// floating point as such, which is several times faster than the conversion of a byte.
#[inline(always)]
pub fn byte(word: u32, i: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let byte: u32;
            // SAFETY: arithmetic alone.
            unsafe {
                core::arch::asm!(
                    "prmt.b32 {byte}, {word}, 0, {selector};",
                    byte = out(reg32) byte,
                    word = in(reg32) word,
                    selector = in(reg32) 0x4440 | i,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            byte
        }
        _ => (word >> (8 * i)) & 0xff,
    }
}

/// As [`byte`], of a signed byte.
#[inline(always)]
pub fn signed_byte(word: u32, i: u32) -> i32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let byte: i32;
            // SAFETY: arithmetic alone. A selector of 8 and more repeats the byte's sign.
            unsafe {
                core::arch::asm!(
                    "prmt.b32 {byte}, {word}, 0, {selector};",
                    byte = out(reg32) byte,
                    word = in(reg32) word,
                    selector = in(reg32) 0x8880 | i * 0x1111,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            byte
        }
        _ => i32::from((word >> (8 * i)) as i8),
    }
}

/// The lowest bytes of four words, the first one's lowest.
///
/// On a GPU these are three instructions (prmt).
#[inline(always)]
pub fn low_bytes([a, b, c, d]: [u32; 4]) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let pair = |low: u32, high: u32, selector: u32| -> u32 {
                let word: u32;
                // SAFETY: arithmetic alone.
                unsafe {
                    core::arch::asm!(
                        "prmt.b32 {word}, {low}, {high}, {selector};",
                        word = out(reg32) word,
                        low = in(reg32) low,
                        high = in(reg32) high,
                        selector = in(reg32) selector,
                        options(pure, nomem, nostack, preserves_flags),
                    );
                }
                word
            };
            pair(pair(a, b, 0x40), pair(c, d, 0x40), 0x5410)
        }
        _ => u32::from_le_bytes([a as u8, b as u8, c as u8, d as u8]),
    }
}

/// The lower halves of two words, the first one's below, and their upper halves.
///
/// On a GPU these are two instructions (prmt).
#[inline(always)]
pub fn transpose_halves(a: u32, b: u32) -> [u32; 2] {
    [a & 0xffff | b << 16, a >> 16 | b & 0xffff_0000]
}

macro_rules! bytes_in_floats {
    ($($name:ident, $selector:literal, $place:literal, $at:literal, $doc:literal;)*) => {$(
        #[doc = $doc]
        ///
        /// On a GPU this is one instruction (prmt).
        #[inline(always)]
        pub fn $name(word: u32, i: u32, exponent: u8) -> f32 {
            cfg_select! {
                target_arch = "nvptx64" => {
                    let value: f32;
                    // SAFETY: arithmetic alone.
                    unsafe {
                        core::arch::asm!(
                            "prmt.b32 {value}, {word}, {exponent}, {selector};",
                            value = out(reg32) value,
                            word = in(reg32) word,
                            exponent = in(reg32) u32::from(exponent),
                            selector = in(reg32) $selector | i << $place,
                            options(pure, nomem, nostack, preserves_flags),
                        );
                    }
                    value
                }
                _ => f32::from_bits(u32::from(exponent) << 24 | ((word >> (8 * i)) & 0xff) << $at),
            }
        }
    )*};
}

// A selector's digits choose the bytes of the result, the lowest first: 0 to 3 of the word, 4 the exponent, 5 a zero.
bytes_in_floats! {
    byte_below_exponent, 0x4055, 8, 16,
        "The f32 whose highest byte is `exponent` and whose next one is byte `i` of a word, zeros below: with the right \
         exponent an integer in that byte, without a conversion.";
    byte_as_mantissa, 0x4550, 0, 0,
        "The f32 whose highest byte is `exponent` and whose lowest one is byte `i` of a word, zeros between.";
}

#[cfg(any(test, not(any(target_arch = "nvptx64", target_arch = "x86_64"))))]
#[inline(always)]
fn portable_dp4a(a: i32, b: i32) -> i32 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let mut sum = 0;
    for i in 0..4 {
        sum += i32::from(a[i] as i8) * i32::from(b[i] as i8);
    }
    sum
}

#[cfg(target_arch = "x86_64")]
mod sse2 {
    use core::arch::x86_64::*;

    #[inline(always)]
    pub(super) fn dp4a(a: i32, b: i32) -> i32 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe {
            let (x, y) = (_mm_cvtsi32_si128(a), _mm_cvtsi32_si128(b));
            // Each byte goes to the upper half of a 16-bit lane, whose arithmetic shift then extends its sign.
            let sums = _mm_madd_epi16(
                _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8),
                _mm_srai_epi16(_mm_unpacklo_epi8(y, y), 8),
            );
            _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_shuffle_epi32(sums, 1)))
        }
    }

    #[inline(always)]
    pub(super) fn dp4a_sum<const N: usize>(a: [i32; N], b: [i32; N]) -> i32 {
        let mut i = 0;
        let mut sum = 0i32;
        // SAFETY: SSE2 is part of x86-64; both loads are inside the arrays.
        unsafe {
            let mut sums = _mm_setzero_si128();
            while i + 4 <= N {
                let x = _mm_loadu_si128(a.as_ptr().add(i).cast());
                let y = _mm_loadu_si128(b.as_ptr().add(i).cast());
                // As above, eight bytes at a time.
                let low = _mm_madd_epi16(
                    _mm_srai_epi16(_mm_unpacklo_epi8(x, x), 8),
                    _mm_srai_epi16(_mm_unpacklo_epi8(y, y), 8),
                );
                let high = _mm_madd_epi16(
                    _mm_srai_epi16(_mm_unpackhi_epi8(x, x), 8),
                    _mm_srai_epi16(_mm_unpackhi_epi8(y, y), 8),
                );
                sums = _mm_add_epi32(sums, _mm_add_epi32(low, high));
                i += 4;
            }
            if N >= 4 {
                sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0b01_00_11_10));
                sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0b10_11_00_01));
                sum = _mm_cvtsi128_si32(sums);
            }
        }
        while i < N {
            sum = sum.wrapping_add(dp4a(a[i], b[i]));
            i += 1;
        }
        sum
    }
}

#[cfg(target_arch = "nvptx64")]
mod device {
    unsafe extern "unadjusted" {
        #[link_name = "llvm.nvvm.idp4a.s.s"]
        pub(super) fn dp4a(a: i32, b: i32, c: i32) -> i32;

        /// The bytes of `a` are unsigned.
        #[link_name = "llvm.nvvm.idp4a.u.s"]
        pub(super) fn dp4a_unsigned(a: i32, b: i32, c: i32) -> i32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_multiplied_in_order() {
        let a = [0x8421_f0e1, 0x0123_4567, 0x89ab_cdef, 0xffff_0000u32];
        let b: [i32; 8] = core::array::from_fn(|i| {
            i32::from_le_bytes([1 - i as i8, -128i8, 127, i as i8].map(|b| b as u8))
        });
        let mut expected = 0;
        for i in 0..16 {
            let byte = a[i / 4].to_le_bytes()[i % 4];
            let at = |word: usize| i32::from(b[word].to_le_bytes()[i % 4] as i8);
            expected += i32::from(byte & 15) * at(i / 4) + i32::from(byte >> 4) * at(i / 4 + 4);
        }
        assert_eq!(dp4a_nibbles(a, b), expected);
    }

    #[test]
    fn dp4a_multiplies_signed_bytes() {
        let word = i32::from_le_bytes;
        assert_eq!(dp4a(word([1, 2, 3, 4]), word([5, 6, 7, 8]), 9), 79);
        assert_eq!(dp4a(word([0x80; 4]), word([0x80; 4]), 0), 65_536);
        assert_eq!(dp4a(word([0x80; 4]), word([0x7f; 4]), i32::MIN), i32::MIN.wrapping_sub(65_024));
        assert_eq!(dp4a(word([0xff; 4]), word([1, 0, 0, 0]), 1), 0);
    }

    #[test]
    fn bytes_are_counted_from_the_lowest() {
        assert_eq!(low_bytes([0x1122_33ff, 0xffff_ff01, 0x7f, 0x0000_0180]), 0x80_7f_01_ff);
        let word = 0x80_7f_01_ff;
        assert_eq!([0, 1, 2, 3].map(|i| byte(word, i)), [255, 1, 127, 128]);
        assert_eq!([0, 1, 2, 3].map(|i| signed_byte(word, i)), [-1, 1, 127, -128]);
        assert_eq!(transpose_halves(0x1111_2222, 0x3333_4444), [0x4444_2222, 0x3333_1111]);
    }

    #[test]
    fn dp4a_sum_matches_dp4a() {
        fn check<const N: usize>(seed: u32) {
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(0x9e37_79b1).wrapping_add(0x7f4a_7c15);
                state.rotate_left(13) as i32
            };
            let (a, b): ([i32; N], [i32; N]) =
                (std::array::from_fn(|_| next()), std::array::from_fn(|_| next()));
            let expected = (0..N).fold(0, |sum, i| dp4a(a[i], b[i], sum));
            assert_eq!(expected, (0..N).map(|i| portable_dp4a(a[i], b[i])).sum(), "N = {N}, seed = {seed}");
            assert_eq!(dp4a_sum(a, b, 0), expected, "N = {N}, seed = {seed}");
            assert_eq!(dp4a_sum(a, b, -7), expected.wrapping_sub(7), "N = {N}, seed = {seed}");
        }
        for seed in 0..100 {
            check::<0>(seed);
            check::<1>(seed);
            check::<3>(seed);
            check::<4>(seed);
            check::<7>(seed);
            check::<8>(seed);
        }
    }
}
