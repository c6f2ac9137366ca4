//! Shared arrays and dynamic shared memory.

use crate::{launch, try_launch};
use cuda_std::emulator::LaunchError;
use cuda_std::pipeline::{PacedCopy, Window};
use cuda_std::thread::*;
use cuda_std::{dynamic_shared, kernel, shared_array};

const TILE: usize = 64;

/// Reverses each block's values, through arrays of every width of element.
#[kernel]
pub unsafe fn reverse(x: *mut u64) {
    let bytes = shared_array!(REVERSE_BYTES: [u8; TILE]);
    let halves = shared_array!(REVERSE_HALVES: [u16; TILE]);
    let words = shared_array!(REVERSE_WORDS: [u32; 2 * TILE / 2]);
    let longs = shared_array!(REVERSE_LONGS: [u64; TILE]);
    let i = thread_idx_x() as usize;
    let at = block_idx_x() as usize * TILE + i;
    // SAFETY: one element per thread.
    let value = unsafe { *x.add(at) };
    bytes.set(i, value as u8);
    halves.set(i, value as u16);
    words.set(i, value as u32);
    longs.set(i, value);
    sync_threads();
    let j = TILE - 1 - i;
    let agree = bytes.get(j) == longs.get(j) as u8
        && halves.get(j) == longs.get(j) as u16
        && words.get4(j / 4 * 4)[j % 4] == longs.get(j) as u32;
    // SAFETY: one element per thread.
    unsafe { *x.add(at) = if agree { longs.get(j) } else { 0 } };
}

#[test]
fn threads_exchange_values_through_shared_arrays() {
    let values: Vec<u64> =
        (0..100 * TILE as u64).map(|i| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    let mut x = values.clone();
    launch(&REVERSE, 100, TILE as u32, (x.as_mut_ptr(),));
    for (found, block) in x.chunks(TILE).zip(values.chunks(TILE)) {
        assert!(found.iter().eq(block.iter().rev()));
    }
}

/// Reads an array before and after writing it.
#[kernel]
pub unsafe fn unwritten(before: *mut f32, after: *mut f32) {
    let array = shared_array!(UNWRITTEN: [f32; 32]);
    let dynamic = dynamic_shared!(DYNAMIC_WORDS: [u32]);
    let (i, t) = (index_1d() as usize, thread_idx_x() as usize);
    // SAFETY: one element per thread.
    unsafe {
        *before.add(i) = if dynamic.get(t) == u32::MAX { array.get(t) } else { 0.0 };
        array.set(t, i as f32);
        dynamic.set(t, 0);
        *after.add(i) = array.get(t);
    }
}

#[test]
fn every_block_starts_with_poisoned_memory() {
    let (mut before, mut after) = (vec![0f32; 320], vec![0f32; 320]);
    for _ in 0..2 {
        try_launch(&UNWRITTEN, [10, 1, 1], [32, 1, 1], 128, (before.as_mut_ptr(), after.as_mut_ptr()))
            .unwrap();
        assert!(before.iter().all(|x| x.to_bits() == u32::MAX));
        assert!(after.iter().enumerate().all(|(i, &x)| x == i as f32));
    }
}

/// The last warp copies `x` piece by piece into shared memory, twice, and the others sum up its words as they come: each thread
/// every so many. In the second round it is in a hurry.
#[kernel]
pub unsafe fn paced(x: *const u32, out: *mut u32, n_words: u32, window: u32) {
    let (warp, n_threads) = (thread_idx_x() / 32, block_dim_x() - 32);
    let memory = dynamic_shared!(PACED_MEMORY: [u32]);
    let copy = PacedCopy::new(memory, n_words.next_multiple_of(4), 4 * n_words);
    let mut sum = 0u32;
    for round in 0..2 {
        if warp == n_threads / 32 {
            // SAFETY: there are as many words, and each round reads the same.
            unsafe { copy.run(round, 0, x.cast(), 4 * n_words, Window { ahead: window, late: 2 * window }) };
        } else {
            let mut i = thread_idx_x();
            while i < n_words {
                copy.wait(round, 4 * i, 4 * i + 4);
                sum = sum.wrapping_mul(31).wrapping_add(memory.get(i as usize));
                i += n_threads;
            }
        }
        sync_threads();
        if round == 0 && thread_idx_x() == 0 {
            copy.hurry();
        }
    }
    if warp < n_threads / 32 {
        // SAFETY: one element per thread.
        unsafe { *out.add(thread_idx_x() as usize) = sum };
    }
}

#[test]
fn a_paced_copy_brings_every_piece() {
    for (n_words, window) in [(4, 1), (1024, 1), (1028, 2), (5000, 3), (8192, 100)] {
        let x: Vec<u32> = (0..n_words).map(|i: u32| i.wrapping_mul(0x9e37_79b1)).collect();
        let mut out = vec![0u32; 64];
        let bytes = 4 * (n_words.next_multiple_of(4) + PacedCopy::state_words(4 * n_words));
        let args = (x.as_ptr(), out.as_mut_ptr(), n_words, window);
        try_launch(&PACED, [1, 1, 1], [96, 1, 1], bytes, args).unwrap();
        for (thread, &sum) in out.iter().enumerate() {
            let words = x.iter().skip(thread).step_by(64);
            let expected =
                words.clone().chain(words).fold(0u32, |sum, &x| sum.wrapping_mul(31).wrapping_add(x));
            assert_eq!(sum, expected, "thread {thread} of {n_words} words, {window} pieces at a time");
        }
    }
}

/// Sums up a block's values in dynamic shared memory.
#[kernel]
pub unsafe fn dynamic_sum(x: *const f32, out: *mut f32, length: *mut usize) {
    let shared = dynamic_shared!(DYNAMIC_FLOATS: [f32]);
    let t = thread_idx_x() as usize;
    // SAFETY: four elements per thread, and one thread writes the results.
    unsafe {
        shared.set4(4 * t, x.add(4 * t).cast::<[f32; 4]>().read());
        sync_threads();
        if t == 0 {
            *out = (0..4 * block_dim_x() as usize).map(|i| shared.get(i)).sum();
            *length = if shared.is_empty() { 0 } else { shared.len() };
        }
    }
}

#[test]
fn dynamic_shared_memory_has_the_size_of_the_launch() {
    let x: Vec<f32> = (0..4096).map(|i| i as f32).collect();
    let (mut sum, mut length) = (0.0, 0);
    let args = (x.as_ptr(), &raw mut sum, &raw mut length);
    try_launch(&DYNAMIC_SUM, [1; 3], [1024, 1, 1], 16_388, args).unwrap();
    assert_eq!((sum, length), ((0..4096).sum::<i32>() as f32, 4097));
}

/// Each thread adds its number plus one to one of eight counters.
#[kernel]
pub unsafe fn count(sums: *mut u32, before: *mut u32) {
    let counters = shared_array!(COUNTERS: [u32; 8]);
    let i = thread_idx_x() as usize;
    if i < 8 {
        counters.set(i, u32::MAX);
    }
    sync_threads();
    let old = counters.atomic_add(i % 8, i as u32 + 1);
    sync_threads();
    // SAFETY: one element per thread, and one per counter.
    unsafe {
        *before.add(i) = old;
        if i < 8 {
            *sums.add(i) = counters.get(i);
        }
    }
}

#[test]
fn atomic_add_adds_up_and_wraps_around() {
    let (mut sums, mut before) = ([0u32; 8], [0u32; 100]);
    launch(&COUNT, 1, 100, (sums.as_mut_ptr(), before.as_mut_ptr()));
    for (counter, sum) in sums.into_iter().enumerate() {
        let mut additions: Vec<(u32, u32)> =
            (counter..100).step_by(8).map(|i| (before[i].wrapping_add(1), i as u32 + 1)).collect();
        additions.sort_unstable();
        // In some order each found what the ones before had left.
        let total = additions.iter().fold(0, |total, &(before, amount)| {
            assert_eq!(before, total);
            total + amount
        });
        assert_eq!(sum, total - 1);
    }
}

fn ignore<T>(_: T) {}

/// More than the 48 KB that a kernel may have.
#[kernel]
pub unsafe fn too_large() {
    ignore(shared_array!(TOO_LARGE_FIRST: [u8; 40 * 1024]));
    ignore(shared_array!(TOO_LARGE_SECOND: [u32; 2049]));
}

/// Exactly 48 KB.
#[kernel]
pub unsafe fn just_fits() {
    ignore(shared_array!(JUST_FITS_FIRST: [u8; 40 * 1024]));
    ignore(shared_array!(JUST_FITS_SECOND: [u32; 2048]));
}

#[test]
fn shared_memory_is_limited_as_on_a_gpu() {
    let launch = |kernel, dynamic| try_launch(kernel, [1; 3], [1; 3], dynamic, ());
    launch(&JUST_FITS, 0).unwrap();
    launch(&JUST_FITS, 179 * 1024).unwrap();
    for (kernel, dynamic, part) in [
        (&TOO_LARGE, 0, "TOO_LARGE_SECOND"),
        (&JUST_FITS, 179 * 1024 + 16, "together"),
        (&JUST_FITS, 227 * 1024 + 1, "dynamic"),
    ] {
        let error = launch(kernel, dynamic).unwrap_err();
        assert!(matches!(&error, LaunchError::Refused { reason, .. } if reason.contains(part)), "{error}");
    }
}
