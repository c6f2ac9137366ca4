//! Tensor cores, and the copies that feed them.

use crate::try_launch;
use cuda_std::float::{bf16x2_to_f32, f16_to_f32, f32_to_bf16x2, f32_to_f16x2};
use cuda_std::pipeline::{BlockCopies, Piece, commit_copies, copy_async, wait_for_copies};
use cuda_std::tensor::*;
use cuda_std::thread::*;
use cuda_std::warp::{FULL_MASK, lane_id, sync_warp};
use cuda_std::{dynamic_shared, kernel};

/// Words of a panel of 256 rows.
const PANEL_WORDS: usize = 256 * PANEL_ROW_WORDS;

/// A warp's part of the first matrix, `[16, 64]` in words of two values.
unsafe fn operand(a: *const u32) -> [[u32; 4]; PANEL_STEPS] {
    let (group, member) = (lane_id() as usize / 4, lane_id() as usize % 4);
    std::array::from_fn(|step| {
        std::array::from_fn(|i| {
            let (row, word) = (group + i % 2 * 8, 8 * step + member + i / 2 * 4);
            // SAFETY: the caller's matrix has the element.
            unsafe { *a.add(row * 32 + word) }
        })
    })
}

/// `y += a * b` of a warp, `b` by its columns.
unsafe fn product<T: Half, const SUMS: usize>(a: *const u32, b: *const u32, y: *mut f32, wanted: u32) {
    let memory = dynamic_shared!(PRODUCT_MEMORY: [u32]);
    let lane = lane_id() as usize;
    for i in (lane..2 * SUMS * PANEL_ROW_WORDS).step_by(32) {
        let (row, word) = (i / PANEL_ROW_WORDS, i % PANEL_ROW_WORDS);
        // SAFETY: the word is the caller's.
        memory.set(row * PANEL_ROW_WORDS + 4 * swizzled(row, word / 4) + word % 4, unsafe { *b.add(i) });
    }
    sync_warp(FULL_MASK);
    let mut sums = [1.0f32; SUMS];
    // SAFETY: the caller's promise.
    multiply_add::<T, SUMS>(
        &mut sums,
        unsafe { operand(a) },
        Panel::new(memory, aligned_start(memory)),
        wanted,
    );
    let (group, member) = (lane / 4, lane % 4);
    for (i, sum) in sums.into_iter().enumerate() {
        let (row, column) = (group + i / 2 % 2 * 8, i / 4 * 8 + 2 * member + i % 2);
        // SAFETY: one element per thread.
        unsafe { *y.add(row * 2 * SUMS + column) = sum };
    }
}

macro_rules! define_products {
    ($(($name:ident, $T:ident, $sums:literal))*) => {$(
        /// [`product`] of one kind.
        #[kernel]
        pub unsafe fn $name(a: *const u32, b: *const u32, y: *mut f32, wanted: u32) {
            // SAFETY: the test's buffers are long enough.
            unsafe { product::<$T, $sums>(a, b, y, wanted) }
        }
    )*};
}
define_products! {
    (product_f16_64, F16, 32)
    (product_bf16_16, Bf16, 8)
    (product_bf16_64, Bf16, 32)
    (product_bf16_128, Bf16, 64)
    (product_bf16_256, Bf16, 128)
}

/// `y += a * b` of a warp, `b` of 64 columns by its rows.
#[kernel]
pub unsafe fn transposed(a: *const u32, b: *const u32, y: *mut f32) {
    let memory = dynamic_shared!(TRANSPOSED_MEMORY: [u32]);
    let lane = lane_id() as usize;
    for i in (lane..PANEL_DEPTH * 8).step_by(32) {
        let (row, piece) = (i / 8, i % 8);
        let place = row * PANEL_ROW_WORDS + 4 * swizzled(row, piece);
        // SAFETY: the pieces are the test's; every third row is not wanted.
        unsafe { copy_async(memory, place, b.add(4 * i).cast(), row % 3 != 0) };
    }
    commit_copies();
    wait_for_copies::<0>();
    publish();
    sync_warp(FULL_MASK);
    let mut sums = [0.0f32; PANEL_DEPTH / 2];
    // SAFETY: the test's matrix.
    multiply_add_transposed::<F16>(&mut sums, unsafe { operand(a) }, TransposedPanel::new(memory, 0));
    for (i, sum) in sums.into_iter().enumerate() {
        let (row, column) = (lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + 2 * (lane % 4) + i % 2);
        // SAFETY: one element per thread.
        unsafe { *y.add(row * PANEL_DEPTH + column) = sum };
    }
}

/// `y += a * b` of a warp's first 16 columns of `a` and eight columns of `b`, both in registers.
#[kernel]
pub unsafe fn in_registers(a: *const u32, b: *const u32, y: *mut f32) {
    let (group, member) = (lane_id() as usize / 4, lane_id() as usize % 4);
    // SAFETY: the test's matrices.
    unsafe {
        let b = [member, member + 4].map(|word| *b.add(group * 32 + word));
        let sums = multiply_add_in_registers::<F16>(operand(a)[0], b, [1.0, 2.0, 3.0, 4.0]);
        for (i, sum) in sums.into_iter().enumerate() {
            *y.add((group + i / 2 * 8) * 8 + 2 * member + i % 2) = sum;
        }
    }
}

#[test]
fn products_in_registers_match_plain_ones() {
    let (a, b) = (numbers(16 * 64), numbers(8 * 64));
    let (a_words, b_words) = (words(&a, f32_to_f16x2), words(&b, f32_to_f16x2));
    let mut y = vec![0.0f32; 16 * 8];
    let args = (a_words.as_ptr(), b_words.as_ptr(), y.as_mut_ptr());
    try_launch(&IN_REGISTERS, [1; 3], [32, 1, 1], 0, args).unwrap();
    for (i, &y) in y.iter().enumerate() {
        let (row, column) = (i / 8, i % 8);
        let dot: f32 = (0..16).map(|k| a[row * 64 + k] * b[column * 64 + k]).sum();
        assert_eq!(y, (1 + row / 8 * 2 + column % 2) as f32 + dot, "row {row}, column {column}");
    }
}

/// Small whole numbers: their products and sums are exact.
fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + i / 5) % 17) as f32 - 8.0).collect()
}

fn words(values: &[f32], round: fn(f32, f32) -> u32) -> Vec<u32> {
    values.chunks(2).map(|pair| round(pair[0], pair[1])).collect()
}

#[test]
fn products_match_plain_ones() {
    let kernels = [
        (&PRODUCT_F16_64, 64, f32_to_f16x2 as fn(f32, f32) -> u32),
        (&PRODUCT_BF16_16, 16, f32_to_bf16x2),
        (&PRODUCT_BF16_64, 64, f32_to_bf16x2),
        (&PRODUCT_BF16_128, 128, f32_to_bf16x2),
        (&PRODUCT_BF16_256, 256, f32_to_bf16x2),
    ];
    let (a, b) = (numbers(16 * 64), numbers(256 * 64));
    for (kernel, columns, round) in kernels {
        let (a_words, b_words) = (words(&a, round), words(&b, round));
        for wanted in [columns, 10] {
            let mut y = vec![0.0f32; 16 * columns];
            let args = (a_words.as_ptr(), b_words.as_ptr(), y.as_mut_ptr(), wanted as u32);
            try_launch(kernel, [1; 3], [32, 1, 1], 4 * PANEL_WORDS as u32, args).unwrap();
            for (row, y) in y.chunks(columns).enumerate() {
                for (column, &y) in y.iter().enumerate().take(wanted) {
                    let dot: f32 = (0..64).map(|k| a[row * 64 + k] * b[column * 64 + k]).sum();
                    assert_eq!(y, 1.0 + dot, "{columns} columns, row {row}, column {column}");
                }
            }
        }
    }
}

#[test]
fn transposed_products_match_plain_ones_and_unwanted_copies_are_zeros() {
    let (a, b) = (numbers(16 * 64), numbers(64 * 64));
    let (a_words, b_words) = (words(&a, f32_to_f16x2), words(&b, f32_to_f16x2));
    // Copies are of 16 bytes at a multiple of 16.
    let mut aligned = vec![[0u32; 4]; b_words.len() / 4 + 1];
    let start = aligned.as_ptr().addr().next_multiple_of(16) - aligned.as_ptr().addr();
    let flat: &mut [u32] = aligned.as_flattened_mut();
    flat[start / 4..][..b_words.len()].copy_from_slice(&b_words);
    let mut y = vec![0.0f32; 16 * 64];
    let args = (a_words.as_ptr(), flat[start / 4..].as_ptr(), y.as_mut_ptr());
    try_launch(&TRANSPOSED, [1; 3], [32, 1, 1], 4 * PANEL_WORDS as u32, args).unwrap();
    for (i, &y) in y.iter().enumerate() {
        let (row, column) = (i / 64, i % 64);
        let kept = (0..64).filter(|k| k % 3 != 0);
        let dot: f32 = kept.map(|k| a[row * 64 + k] * b[k * 64 + column]).sum();
        assert_eq!(y, dot, "row {row}, column {column}");
    }
}

#[test]
fn pairs_of_halves_come_back() {
    let word = f32_to_f16x2(1.5, -65_504.0);
    assert_eq!([f16_to_f32(word as u16), f16_to_f32((word >> 16) as u16)], [1.5, -65_504.0]);
    assert_eq!(bf16x2_to_f32(f32_to_bf16x2(1.5, -3e38)), [1.5, f32::from_bits(0xff62_0000)]);
}

/// All warps of a block add up what comes by in a ring, each in its own time; every other warp dawdles.
#[kernel]
pub unsafe fn ring(x: *const u32, y: *mut u64, n: u32, stages: u32) {
    let memory = dynamic_shared!(RING_MEMORY: [u32]);
    let places = BlockCopies::barrier_words(stages).next_multiple_of(4);
    let mut copies = BlockCopies::new(memory, 0, places, stages, 64);
    let pieces = |i: u32| {
        // SAFETY: the piece is one of the test's.
        let from = |half: u32| unsafe { x.add((64 * i + 32 * half) as usize) }.cast();
        [Piece { from: from(0), to: 32, bytes: 128 }, Piece { from: from(1), to: 0, bytes: 128 }]
    };
    for i in 0..stages.min(n) {
        // SAFETY: the pieces are the test's, and fit.
        unsafe { copies.start(i, pieces(i)) };
    }
    let (warp, lane) = (thread_idx_x() / 32, lane_id());
    let mut sum = 0u64;
    for i in 0..n {
        copies.wait();
        if i > 0 && i + stages - 1 < n {
            // SAFETY: as above.
            unsafe { copies.restart(1, pieces(i + stages - 1)) };
        }
        for _ in 0..warp % 2 * 3 {
            sync_warp(FULL_MASK);
        }
        let place = copies.place() as usize;
        for word in [lane, lane + 32] {
            // The halves are exchanged.
            let number = 64 * i + (word + 32) % 64;
            sum += u64::from(memory.get(place + word as usize) == 3 * number + 1) << warp;
        }
        copies.release();
    }
    // SAFETY: one element per thread.
    unsafe { *y.add(thread_idx_x() as usize) = sum };
}

#[test]
fn every_warp_sees_every_place_of_a_ring() {
    for (n, stages, warps) in [(1, 2, 1), (3, 4, 2), (40, 2, 5), (100, 5, 8)] {
        let x: Vec<u32> = (0..64 * n).map(|i| 3 * i + 1).collect();
        let mut y = vec![0u64; 32 * warps as usize];
        let bytes = 4 * (BlockCopies::barrier_words(stages).next_multiple_of(4) + stages * 64);
        try_launch(&RING, [1; 3], [32 * warps, 1, 1], bytes, (x.as_ptr(), y.as_mut_ptr(), n, stages))
            .unwrap();
        for (thread, &sum) in y.iter().enumerate() {
            assert_eq!(
                sum,
                u64::from(2 * n) << (thread / 32),
                "thread {thread}, {n} places, {stages} stages"
            );
        }
    }
}
