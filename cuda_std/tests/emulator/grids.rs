//! Grids, blocks, indices, barriers.

use crate::{launch, try_launch};
use cuda_std::thread::*;
use cuda_std::warp::{lane_id, warp_id};
use cuda_std::{kernel, shared_array};

/// Writes every index of a thread at the thread's place in the grid.
#[kernel]
pub unsafe fn indices(out: *mut [u32; 8]) {
    let block = block_idx_x() + grid_dim_x() * (block_idx_y() + grid_dim_y() * block_idx_z());
    let thread = thread_idx_x() + block_dim_x() * (thread_idx_y() + block_dim_y() * thread_idx_z());
    let threads = block_dim_x() * block_dim_y() * block_dim_z();
    let place = (block * threads + thread) as usize;
    // SAFETY: one element per thread.
    unsafe {
        *out.add(place) = [
            thread_idx_x(),
            thread_idx_y(),
            thread_idx_z(),
            block_idx_x(),
            block_idx_y(),
            block_idx_z(),
            lane_id(),
            1,
        ];
    }
}

#[test]
fn every_thread_runs_once_with_its_own_indices() {
    let sizes = [[1, 1, 1], [33, 1, 1], [3, 5, 2], [7, 1, 4], [1024, 1, 1], [1, 32, 32], [4, 4, 64]];
    for grid in [[1, 1, 1], [5, 1, 1], [3, 4, 2], [1, 1, 6]] {
        for block in sizes {
            let count = |size: [u32; 3]| size.iter().product::<u32>() as usize;
            let mut out = vec![[0; 8]; count(grid) * count(block)];
            try_launch(&INDICES, grid, block, 0, (out.as_mut_ptr(),)).unwrap();
            let mut at = out.iter();
            for [bz, by, bx] in coordinates(grid) {
                for (i, [tz, ty, tx]) in coordinates(block).enumerate() {
                    let expected = [tx, ty, tz, bx, by, bz, i as u32 % 32, 1];
                    assert_eq!(at.next(), Some(&expected), "grid {grid:?}, block {block:?}");
                }
            }
        }
    }
}

/// All `[z, y, x]` in order.
fn coordinates([x, y, z]: [u32; 3]) -> impl Iterator<Item = [u32; 3]> {
    (0..z).flat_map(move |z| (0..y).flat_map(move |y| (0..x).map(move |x| [z, y, x])))
}

/// Counts up its element.
#[kernel]
pub unsafe fn count(out: *mut u32) {
    // SAFETY: one element per thread.
    unsafe { *out.add(index_1d() as usize) += warp_id() + 1 };
}

#[test]
fn large_grids_run_every_block_once() {
    let mut out = vec![0; 64 * 10_000];
    launch(&COUNT, 10_000, 64, (out.as_mut_ptr(),));
    assert!(out.chunks(64).all(|block| block[..32] == [1; 32] && block[32..] == [2; 32]));
}

/// Rotates the block's values by one place, `rounds` times, with two barriers each.
#[kernel]
pub unsafe fn rotate(values: *mut u32, rounds: u32) {
    let (i, n) = (thread_idx_x() as usize, block_dim_x() as usize);
    for _ in 0..rounds {
        // SAFETY: inside the block's values; the barriers keep reads and writes apart.
        let value = unsafe { *values.add(block_idx_x() as usize * n + (i + 1) % n) };
        sync_threads();
        // SAFETY: as above.
        unsafe { *values.add(block_idx_x() as usize * n + i) = value };
        sync_threads();
    }
}

#[test]
fn barriers_in_loops_keep_the_threads_of_a_block_together() {
    for block in [1, 2, 31, 32, 33, 64, 100, 257, 1024] {
        let mut values: Vec<u32> = (0..4 * block).collect();
        launch(&ROTATE, 4, block, (values.as_mut_ptr(), 5));
        for (i, value) in values.into_iter().enumerate() {
            let (b, t) = (i as u32 / block, i as u32 % block);
            assert_eq!(value, b * block + (t + 5) % block, "block of {block}");
        }
    }
}

/// Threads from `stay` on return at once; the others meet at barriers.
#[kernel]
pub unsafe fn leave(out: *mut u32, stay: u32) {
    let i = thread_idx_x();
    if i >= stay {
        return;
    }
    for round in 0..3 {
        // SAFETY: one element per thread.
        unsafe { *out.add(i as usize) = round };
        sync_threads();
        // SAFETY: written by the neighbour before the barrier.
        assert_eq!(unsafe { *out.add(((i + 1) % stay) as usize) }, round);
        sync_threads();
    }
}

#[test]
fn a_barrier_does_not_wait_for_threads_that_returned() {
    for (block, stay) in [(64, 1), (64, 33), (100, 31), (1024, 1023)] {
        let mut out = vec![u32::MAX; block as usize];
        launch(&LEAVE, 1, block, (out.as_mut_ptr(), stay));
        assert!(out.iter().enumerate().all(|(i, &v)| v == if i < stay as usize { 2 } else { u32::MAX }));
    }
}

/// All warps but the last leave a number each and return; the last one adds them up.
#[kernel]
pub unsafe fn last_meeting(out: *mut u32) {
    let numbers = shared_array!(NUMBERS: [u32; 32]);
    let last = block_dim_x() / 32 - 1;
    if warp_id() < last {
        if lane_id() == 0 {
            numbers.set(warp_id() as usize, warp_id() + 1);
        }
        arrive_at_last_meeting();
        return;
    }
    meet_for_the_last_time();
    if lane_id() == 0 {
        let sum = (0..last as usize).map(|warp| numbers.get(warp)).sum();
        // SAFETY: the block's own element.
        unsafe { *out.add(block_idx_x() as usize) = sum };
    }
}

#[test]
fn the_last_warp_sees_what_those_left_that_have_returned() {
    for warps in [1, 2, 5, 32] {
        let mut out = [u32::MAX; 3];
        launch(&LAST_MEETING, 3, 32 * warps, (out.as_mut_ptr(),));
        assert_eq!(out, [warps * (warps - 1) / 2; 3]);
    }
}

#[test]
fn launches_from_many_threads_do_not_disturb_each_other() {
    std::thread::scope(|scope| {
        for seed in 0..8 {
            scope.spawn(move || {
                for round in 0..20 {
                    let block = 32 + 7 * seed + round;
                    let mut values: Vec<u32> = (0..30 * block).collect();
                    launch(&ROTATE, 30, block, (values.as_mut_ptr(), 3));
                    for (i, value) in values.into_iter().enumerate() {
                        let (b, t) = (i as u32 / block, i as u32 % block);
                        assert_eq!(value, b * block + (t + 3) % block);
                    }
                }
            });
        }
    });
}
