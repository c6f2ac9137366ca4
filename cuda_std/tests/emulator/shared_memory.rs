//! Shared arrays and dynamic shared memory.

use crate::{launch, try_launch};
use cuda_std::emulator::LaunchError;
use cuda_std::pipeline::WarpCopies;
use cuda_std::thread::*;
use cuda_std::warp::{FULL_MASK, lane_id, sync_warp};
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

/// Each warp sums up the words of its part of `x`, 64 at a time, of which some are always on their way; the last ones
/// are `last`.
#[kernel]
pub unsafe fn stream(x: *const u32, out: *mut u32, n_pieces: u32, last: u32, stages: u32) {
    let (warp, lane) = (thread_idx_x() / 32, lane_id());
    let memory = dynamic_shared!(STREAM_MEMORY: [u32]);
    let mut copies = WarpCopies::new(memory, warp * WarpCopies::words(stages, 64), stages, 64);
    let words = |piece: u32| if piece + 1 == n_pieces { last } else { 64 };
    // SAFETY: each warp has `n_pieces` pieces of 64 words, the last of which may be cut short.
    let start = |copies: &WarpCopies, ahead: u32, piece: u32| unsafe {
        if piece < n_pieces {
            copies.start(ahead, x.add(((warp * n_pieces + piece) * 64) as usize).cast(), 4 * words(piece));
        }
    };
    for ahead in 0..stages {
        start(&copies, ahead, ahead);
    }
    sync_warp(FULL_MASK);
    let mut sum = 0u32;
    for piece in 0..n_pieces {
        copies.wait();
        let mut i = lane;
        while i < words(piece) {
            sum = sum.wrapping_mul(31).wrapping_add(memory.get((copies.place() + i) as usize));
            i += 32;
        }
        sync_warp(FULL_MASK);
        start(&copies, 0, piece + stages);
        copies.advance();
        sync_warp(FULL_MASK);
    }
    // SAFETY: one element per thread.
    unsafe { *out.add(thread_idx_x() as usize) = sum };
}

#[test]
fn a_ring_of_copies_brings_every_piece_in_order() {
    for (n_pieces, last, stages) in [(1, 64, 2), (2, 4, 3), (7, 32, 3), (8, 64, 8), (9, 20, 2), (3, 64, 5)] {
        let (mut x, mut out) = (vec![0u32; 2 * n_pieces as usize * 64], vec![0u32; 64]);
        x.iter_mut().enumerate().for_each(|(i, word)| *word = (i as u32).wrapping_mul(0x9e37_79b1));
        let bytes = 2 * 4 * WarpCopies::words(stages, 64);
        let args = (x.as_ptr(), out.as_mut_ptr(), n_pieces, last, stages);
        try_launch(&STREAM, [1, 1, 1], [64, 1, 1], bytes, args).unwrap();
        for (thread, &sum) in out.iter().enumerate() {
            let (warp, lane) = (thread / 32, thread % 32);
            let mut expected = 0u32;
            for piece in 0..n_pieces as usize {
                let words = if piece + 1 == n_pieces as usize { last as usize } else { 64 };
                for i in (lane..words).step_by(32) {
                    let word = x[(warp * n_pieces as usize + piece) * 64 + i];
                    expected = expected.wrapping_mul(31).wrapping_add(word);
                }
            }
            assert_eq!(sum, expected, "thread {thread} of {n_pieces} pieces, {stages} stages");
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
