//! Shuffles, votes, reductions.

use crate::launch;
use cuda_std::kernel;
use cuda_std::thread::{index_1d, thread_idx_x};
use cuda_std::warp::*;

/// Deterministic values of very different sizes, so that another order of additions shows.
fn values(n: usize) -> Vec<f32> {
    (0..n as u32)
        .map(|i| {
            let bits = i.wrapping_mul(0x9e37_79b1).wrapping_add(12345);
            (bits >> 8) as f32 * 2f32.powi((bits % 40) as i32 - 40) * if bits & 64 == 0 { 1.0 } else { -1.0 }
        })
        .collect()
}

/// All four shuffles of one warp, with a width.
#[kernel]
pub unsafe fn shuffles(x: *const u32, out: *mut [u32; 4], by: u32, width: u32) {
    let i = thread_idx_x() as usize;
    // SAFETY: one element per thread.
    unsafe {
        let value = *x.add(i);
        *out.add(i) = [
            warp_shuffle_xor(FULL_MASK, value, by, width),
            warp_shuffle_idx(FULL_MASK, value as i32, by, width) as u32,
            warp_shuffle_up(FULL_MASK, f32::from_bits(value), by, width).to_bits(),
            warp_shuffle_down(FULL_MASK, value, by, width),
        ];
    }
}

#[test]
fn shuffles_read_the_lanes_that_ptx_says() {
    let x: Vec<u32> = (100..164).collect();
    for width in [1, 2, 4, 8, 16, 32u32] {
        for by in [0, 1, 2, 3, 5, 8, 16, 31u32] {
            let mut out = vec![[0; 4]; 64];
            launch(&SHUFFLES, 1, 64, (x.as_ptr(), out.as_mut_ptr(), by, width));
            for (i, found) in out.into_iter().enumerate() {
                let (warp, lane) = (i as u32 / 32 * 32, i as u32 % 32);
                let (first, last) = (lane / width * width, lane / width * width + width - 1);
                let xor = if lane ^ by <= last { lane ^ by } else { lane };
                let up = if lane >= first + by { lane - by } else { lane };
                let down = if lane + by <= last { lane + by } else { lane };
                let expected = [xor, first + by % width, up, down].map(|lane| 100 + warp + lane);
                assert_eq!(found, expected, "lane {lane} by {by}, width {width}");
            }
        }
    }
}

/// Three values of each lane at once.
#[kernel]
pub unsafe fn shuffle_several(x: *const [u32; 3], out: *mut [u32; 3], by: u32) {
    let i = thread_idx_x() as usize;
    // SAFETY: one element per thread.
    unsafe { *out.add(i) = warp_shuffle_xor_n(FULL_MASK, *x.add(i), by) };
}

#[test]
fn several_values_are_shuffled_as_one_is() {
    let x: Vec<[u32; 3]> = (0..64).map(|i| [i, 1000 + i, 2000 + i]).collect();
    for by in [0, 1, 6, 16, 31] {
        let mut out = vec![[0; 3]; 64];
        launch(&SHUFFLE_SEVERAL, 1, 64, (x.as_ptr(), out.as_mut_ptr(), by));
        for (i, found) in out.into_iter().enumerate() {
            assert_eq!(found, x[i ^ by as usize], "thread {i} by {by}");
        }
    }
}

/// Votes whether a bit of `bits` is set, in the lanes of a mask.
#[kernel]
pub unsafe fn votes(bits: *const u32, out: *mut [u32; 3], mask: u32) {
    let lane = lane_id();
    if mask >> lane & 1 == 1 {
        // SAFETY: one element per thread.
        unsafe {
            let bit = *bits >> lane & 1 == 1;
            *out.add(lane as usize) = [
                u32::from(warp_vote_any(mask, bit)),
                u32::from(warp_vote_all(mask, bit)),
                warp_vote_ballot(mask, bit),
            ];
        }
    }
}

#[test]
fn votes_count_the_lanes_of_the_mask() {
    for mask in [FULL_MASK, 0x0000_ffff, 0x8000_0001, 0x0000_0010] {
        for bits in [0, FULL_MASK, 0x0001_0000, 0x7fff_ffff, 0x10] {
            let mut out = vec![[7; 3]; 32];
            launch(&VOTES, 1, 32, (&bits, out.as_mut_ptr(), mask));
            for (lane, found) in out.into_iter().enumerate() {
                let in_mask = [u32::from(bits & mask != 0), u32::from(bits & mask == mask), bits & mask];
                assert_eq!(found, if mask >> lane & 1 == 1 { in_mask } else { [7; 3] }, "{mask:x} {bits:x}");
            }
        }
    }
}

/// The reductions at once: sum, maximum, two sums, integer sum and maximum.
#[kernel]
pub unsafe fn reductions(x: *const f32, out: *mut [f32; 4], integers: *mut [i32; 4], width: u32) {
    let i = index_1d() as usize;
    // SAFETY: one element per thread.
    unsafe {
        let value = *x.add(i);
        let [a, b] = warp_reduce_add_n(FULL_MASK, [value, 3.0 * value], width);
        *out.add(i) =
            [warp_reduce_add(FULL_MASK, value, width), warp_reduce_max(FULL_MASK, value, width), a, b];
        *integers.add(i) = [
            warp_reduce_add(FULL_MASK, value.to_bits() as i32, width),
            warp_reduce_max(FULL_MASK, value.to_bits() as i32, width),
            warp_reduce_max(FULL_MASK, value.to_bits(), width) as i32,
            warp_max_u32(value.to_bits()) as i32,
        ];
    }
}

/// What a GPU computes: exchanges at distances `width / 2` to 1.
fn butterfly<T: Copy>(mut values: Vec<T>, width: usize, combine: impl Fn(T, T) -> T) -> Vec<T> {
    let mut distance = width / 2;
    while distance > 0 {
        values = (0..values.len()).map(|i| combine(values[i], values[i ^ distance])).collect();
        distance /= 2;
    }
    values
}

#[test]
fn reductions_equal_a_butterfly_to_the_bit() {
    let x = values(96 * 3);
    for width in [1, 2, 4, 8, 16, 32] {
        let (mut out, mut integers) = (vec![[0.0; 4]; x.len()], vec![[0; 4]; x.len()]);
        launch(&REDUCTIONS, 3, 96, (x.as_ptr(), out.as_mut_ptr(), integers.as_mut_ptr(), width));
        let width = width as usize;
        let sum = butterfly(x.clone(), width, |a, b| a + b);
        let sum3 = butterfly(x.iter().map(|x| 3.0 * x).collect(), width, |a, b| a + b);
        let max = butterfly(x.clone(), width, f32::max);
        let bits: Vec<i32> = x.iter().map(|x| x.to_bits() as i32).collect();
        let integer_sum = butterfly(bits.clone(), width, i32::wrapping_add);
        let integer_max = butterfly(bits.clone(), width, i32::max);
        let unsigned_max = butterfly(bits, width, |a, b| (a as u32).max(b as u32) as i32);
        let warp_max = butterfly(unsigned_max.clone(), 32, |a, b| (a as u32).max(b as u32) as i32);
        for i in 0..x.len() {
            let expected = [sum[i], max[i], sum[i], sum3[i]].map(f32::to_bits);
            assert_eq!(out[i].map(f32::to_bits), expected, "thread {i}, width {width}");
            assert_eq!(integers[i], [integer_sum[i], integer_max[i], unsigned_max[i], warp_max[i]]);
        }
    }
}

#[kernel]
pub unsafe fn four_sums(x: *const [f32; 4], of_halves: u32, out: *mut f32) {
    let i = index_1d() as usize;
    // SAFETY: one element per thread.
    unsafe { *out.add(i) = warp_reduce_add_4(*x.add(i), of_halves != 0) };
}

#[test]
fn four_lanes_get_one_of_four_sums() {
    let x: Vec<[f32; 4]> =
        values(4 * 64).chunks(4).map(|four| [four[0], four[1], four[2], four[3]]).collect();
    for (width, of_halves) in [(32, false), (16, true)] {
        let mut out = vec![0.0; x.len()];
        launch(&FOUR_SUMS, 2, 32, (x.as_ptr(), u32::from(of_halves), out.as_mut_ptr()));
        for (i, &sum) in out.iter().enumerate() {
            let (group, value) = (i / width, i % 16 / 4);
            let values = || x[width * group..][..width].iter().map(|four| f64::from(four[value]));
            let (expected, magnitude) = (values().sum::<f64>(), values().map(f64::abs).sum::<f64>());
            assert!(
                (f64::from(sum) - expected).abs() <= 1e-6 * magnitude,
                "thread {i} of {width}: {sum}, not {expected}"
            );
        }
    }
}

/// Lanes in two halves, each with a mask of its own and a different number of rounds.
#[kernel]
pub unsafe fn halves(out: *mut u32) {
    let lane = lane_id();
    let (mask, rounds) = if lane < 16 { (0x0000_ffff, 3) } else { (0xffff_0000, 5) };
    let mut sum = lane;
    for _ in 0..rounds {
        sum = warp_reduce_add(mask, sum, 16) % 1000;
    }
    sync_warp(FULL_MASK);
    // SAFETY: one element per thread.
    unsafe { *out.add(lane as usize) = sum };
}

#[test]
fn lanes_with_disjoint_masks_work_apart_and_meet_again() {
    let mut out = vec![0u32; 32];
    launch(&HALVES, 1, 32, (out.as_mut_ptr(),));
    let expected = |mut lanes: Vec<u32>, rounds| {
        for _ in 0..rounds {
            lanes = vec![lanes.iter().sum::<u32>() % 1000; 16];
        }
        lanes
    };
    assert_eq!(out[..16], expected((0..16).collect(), 3));
    assert_eq!(out[16..], expected((16..32).collect(), 5));
}

/// The last lanes return before the others meet.
#[kernel]
pub unsafe fn some_return(out: *mut [u32; 2], stay: u32) {
    let lane = lane_id();
    if lane >= stay {
        return;
    }
    let ballot = warp_vote_ballot(FULL_MASK, true);
    let next = warp_shuffle_idx(FULL_MASK, lane, lane + 1, 32);
    // SAFETY: one element per thread.
    unsafe { *out.add(lane as usize) = [ballot, next] };
}

#[test]
fn a_collective_does_not_wait_for_lanes_that_returned_or_never_were() {
    for (block, stay) in [(32, 20), (33, 1), (7, 7), (1, 1), (20, 13)] {
        let mut out = vec![[0; 2]; 32];
        launch(&SOME_RETURN, 1, block, (out.as_mut_ptr(), stay));
        let lanes = stay.min(block);
        for lane in 0..lanes {
            let next = if lane + 1 < lanes { lane + 1 } else { u32::MAX };
            let next = if lane == 31 { 0 } else { next };
            assert_eq!(out[lane as usize], [((1u64 << lanes) - 1) as u32, next], "{block} {stay} {lane}");
        }
    }
}

/// The first lane waits; the second returns only after that.
#[kernel]
pub unsafe fn late_return(out: *mut u32) {
    if lane_id() == 0 {
        let ballot = warp_vote_ballot(0b111, true);
        // SAFETY: one thread writes.
        unsafe { *out = ballot };
    } else if lane_id() == 2 {
        warp_vote_ballot(0b111, true);
    }
}

#[test]
fn a_lane_that_returns_completes_what_waits_for_it() {
    let mut out = 0;
    launch(&LATE_RETURN, 1, 32, (&raw mut out,));
    assert_eq!(out, 0b101);
}
