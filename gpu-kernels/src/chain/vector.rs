//! Vectors that blocks of one launch hand to each other.
//!
//! Every vector of a step has a place of its own, whose words are [`UNWRITTEN`] before. Each is written once, and who
//! reads one looks at it until it is a number: so a value is on its way to its readers as soon as it is stored, with no
//! barrier and no counter in between. There are two sets of places; while a step uses one, the other is made ready for the
//! next ([`embed`](crate::embed)).

use cuda_std::atomic::{load_relaxed_u32x4, store_relaxed_u32, store_relaxed_u32x4};

/// What a word holds that is yet to be written: a NaN that no operation gives.
pub const UNWRITTEN: u32 = u32::MAX;

/// The bits of a value; of [`UNWRITTEN`]'s those of the usual NaN.
#[inline(always)]
fn written(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits == UNWRITTEN { 0x7fff_ffff } else { bits }
}

/// Writes a value.
///
/// # Safety
/// `to` is a word of a vector.
#[inline(always)]
pub unsafe fn put(to: *mut f32, value: f32) {
    // SAFETY: the caller vouches for the word.
    unsafe { store_relaxed_u32(to.cast(), written(value)) }
}

/// Writes four neighbouring values.
///
/// # Safety
/// `to` is to four words of a vector, at a multiple of 16 bytes.
#[inline(always)]
pub unsafe fn put4(to: *mut f32, [a, b, c, d]: [f32; 4]) {
    // SAFETY: the caller vouches for the words.
    unsafe { store_relaxed_u32x4(to.cast(), [written(a), written(b), written(c), written(d)]) }
}

/// Four neighbouring words as they are now.
///
/// # Safety
/// As [`put4`].
#[inline(always)]
pub unsafe fn look4(from: *const f32) -> [u32; 4] {
    // SAFETY: the caller vouches for the words.
    unsafe { load_relaxed_u32x4(from.cast()) }
}

/// Four neighbouring values, of which the first `n` are waited for; `words` is what they were when last looked at.
///
/// # Safety
/// As [`put4`]; the first `n` will be written by a block that runs beside this one or has ended.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), allow(unused_mut, clippy::never_loop, reason = "the emulator does not wait"))]
pub unsafe fn await_again4(from: *const f32, mut words: [u32; 4], n: u32) -> [f32; 4] {
    let is_missing = |words: [u32; 4]| {
        words[0] == UNWRITTEN
            || (words[1] == UNWRITTEN && n > 1)
            || (words[2] == UNWRITTEN && n > 2)
            || (words[3] == UNWRITTEN && n > 3)
    };
    while is_missing(words) {
        // A launch of the emulator has one stage: nobody would write them.
        #[cfg(not(target_arch = "nvptx64"))]
        panic!("a vector is read at {from:p} that no earlier stage has written");
        // SAFETY: the caller vouches for the words.
        #[cfg(target_arch = "nvptx64")]
        {
            words = unsafe { look4(from) };
        }
    }
    words.map(f32::from_bits)
}

/// Four neighbouring values, waited for.
///
/// # Safety
/// As [`await_again4`].
#[inline(always)]
pub unsafe fn await4(from: *const f32) -> [f32; 4] {
    // SAFETY: the caller vouches for the words.
    unsafe { await_again4(from, look4(from), 4) }
}
