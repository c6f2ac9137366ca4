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

/// `words`, looked at until the first `n` of them are written; a block that runs beside this one or has ended must write
/// them.
#[inline(always)]
pub fn await_again(words: [u32; 4], n: u32, look: impl Fn() -> [u32; 4]) -> [u32; 4] {
    await_mode(words, n, look, 0)
}
#[inline(always)]
/// x
pub fn await_mode(words: [u32; 4], n: u32, look: impl Fn() -> [u32; 4], mode: u32) -> [u32; 4] {
    let is_missing = |words: [u32; 4]| {
        (words[0] == UNWRITTEN && n > 0)
            || (words[1] == UNWRITTEN && n > 1)
            || (words[2] == UNWRITTEN && n > 2)
            || (words[3] == UNWRITTEN && n > 3)
    };
    let mut words = words;
    #[cfg(target_arch = "nvptx64")]
    if mode == 3 {
        use cuda_std::warp::*;
        loop {
            let missing = warp_vote_ballot(FULL_MASK, is_missing(words));
            if missing == 0 { return words; }
            let leader = missing.trailing_zeros();
            if lane_id() == leader {
                while is_missing(words) { words = look(); }
            }
            sync_warp(FULL_MASK);
            if is_missing(words) { words = look(); }
        }
    }
    while is_missing(words) {
        if mode == 1 { cuda_std::thread::nanosleep(100); }
        if mode == 2 { cuda_std::thread::nanosleep(500); }
        // A launch of the emulator has one stage: nobody would write them.
        if cfg!(not(target_arch = "nvptx64")) {
            panic!("a vector is read that no earlier stage has written");
        }
        words = look();
    }
    words
}

/// Four neighbouring values, waited for.
///
/// # Safety
/// As [`put4`]; a block that runs beside this one or has ended must write them.
#[inline(always)]
pub unsafe fn await4(from: *const f32) -> [f32; 4] {
    // SAFETY: the caller vouches for the words.
    let look = || unsafe { look4(from) };
    await_again(look(), 4, look).map(f32::from_bits)
}

/// Two values in a word, as bfloat16: half the way from block to block for a vector that is rounded to eight bits then.
#[derive(Clone, Copy)]
pub struct Narrow(u32);

impl Narrow {
    /// Two values, rounded to the nearest, the first one below.
    #[inline(always)]
    pub fn new(first: f32, second: f32) -> Self {
        // Half a unit in the last place that stays, and a little less for the even ones; NaN stays one.
        let round = |value: f32| {
            let bits = value.to_bits();
            if value.is_nan() { 0x7fc0 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 }
        };
        Self(round(first) | round(second) << 16)
    }

    /// The values of two words.
    #[inline(always)]
    pub fn widen4([a, b]: [u32; 2]) -> [f32; 4] {
        [a << 16, a & 0xffff_0000, b << 16, b & 0xffff_0000].map(f32::from_bits)
    }
}

/// Writes two values; they are never [`UNWRITTEN`].
///
/// # Safety
/// As [`put`].
#[inline(always)]
pub unsafe fn put_narrow(to: *mut f32, Narrow(word): Narrow) {
    // SAFETY: the caller vouches for the word.
    unsafe { store_relaxed_u32(to.cast(), word) }
}
