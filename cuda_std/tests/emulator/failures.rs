//! Launches that fail: each error names the kernel, the block and a thread, and the next launch works.

use crate::{launch, try_launch};
use cuda_std::emulator::{self, LaunchError};
use cuda_std::launch::LaunchConfig;
use cuda_std::thread::*;
use cuda_std::warp::*;
use cuda_std::{kernel, shared_array};
use std::sync::atomic::{AtomicU32, Ordering};

/// Does nothing.
#[kernel]
pub unsafe fn nothing() {}

#[test]
fn grids_and_blocks_that_a_gpu_refuses_are_refused() {
    for (grid, block) in [
        ([0, 1, 1], [1, 1, 1]),
        ([1, 1, 1], [1, 0, 1]),
        ([1, 1, 1], [1025, 1, 1]),
        ([1, 1, 1], [32, 33, 1]),
        ([1, 1, 1], [1, 1, 65]),
        ([1, 65_536, 1], [1, 1, 1]),
        ([1, 1, 65_536], [1, 1, 1]),
        ([1 << 31, 1, 1], [1, 1, 1]),
        ([1, 1, 1], [u32::MAX, u32::MAX, u32::MAX]),
    ] {
        let error = try_launch(&NOTHING, grid, block, 0, ()).unwrap_err();
        assert!(matches!(error, LaunchError::Refused { kernel: "nothing", .. }), "{error}");
    }
    try_launch(&NOTHING, [1, 65_535, 1], [1; 3], 0, ()).unwrap();
}

#[test]
fn a_wrong_number_of_arguments_is_refused() {
    let config = LaunchConfig { grid: [1; 3], block: [1; 3], dynamic_shared_bytes: 0, cluster: 1 };
    // SAFETY: refused before anything is read.
    let error = unsafe { emulator::launch(BREAKS.info(), config, &[]) }.unwrap_err();
    assert!(
        error.to_string().contains("0 arguments") && error.to_string().contains("place, thread"),
        "{error}"
    );
}

/// Panics in one thread of one block, before or after a barrier.
#[kernel]
pub unsafe fn breaks(place: u32, thread: u32, after: u32) {
    let values = shared_array!(BREAKS: [f32; 64]);
    if after == 1 {
        sync_threads();
    }
    if block_idx_x() == place && thread_idx_x() == thread {
        values.set(64 + thread as usize, 0.0);
    }
    sync_threads();
}

#[test]
fn a_panic_names_kernel_block_and_thread() {
    for (blocks, place) in [(1, 0), (100, 17), (3000, 2999)] {
        for (block, thread, after) in [(1, 0, 0), (64, 40, 0), (64, 40, 1), (33, 32, 1)] {
            let error = try_launch(&BREAKS, [blocks, 1, 1], [block, 1, 1], 0, (place, thread, after));
            let error = error.unwrap_err();
            let text = error.to_string();
            let LaunchError::Panic { kernel, block: b, thread: t, message } = error else { panic!("{text}") };
            assert_eq!((kernel, b, t), ("breaks", [place, 0, 0], [thread, 0, 0]));
            let expected = format!("has 64 elements, the access is to 1 at {}", 64 + thread);
            assert!(message.contains(&expected) && message.contains("failures.rs:"), "{message}");
            assert!(!text.contains('\n'));
        }
    }
    launch(&BREAKS, 100, 64, (1000, 0, 1));
}

static DROPPED: AtomicU32 = AtomicU32::new(0);

struct CountsDrop;

impl Drop for CountsDrop {
    fn drop(&mut self) {
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Holds a value while it waits for a thread that panics.
#[kernel]
pub unsafe fn holds() {
    let _held = CountsDrop;
    warp_reduce_add(FULL_MASK, 1.0, 32);
    assert!(thread_idx_x() != 63, "the last one");
    sync_threads();
}

#[test]
fn threads_that_wait_are_unwound_when_another_panics() {
    let error = try_launch(&HOLDS, [1; 3], [64, 1, 1], 0, ()).unwrap_err();
    assert!(matches!(error, LaunchError::Panic { thread: [63, 0, 0], .. }), "{error}");
    assert_eq!(DROPPED.load(Ordering::Relaxed), 64);
}

/// What the threads of a block do instead of meeting.
#[kernel]
pub unsafe fn parts_ways(how: u32) {
    let first = thread_idx_x() == 0;
    match how {
        0 if first => sync_warp(FULL_MASK),
        0 => sync_threads(),
        1 if first => drop(warp_reduce_add(FULL_MASK, 1.0f32, 32)),
        1 => drop(warp_reduce_max(FULL_MASK, 1.0f32, 32)),
        2 => drop(warp_reduce_add(FULL_MASK, 1, if first { 16 } else { 32 })),
        3 if first => sync_warp(0b11),
        3 => sync_warp(0b101),
        4 => sync_warp(FULL_MASK & !1),
        _ => drop(warp_shuffle_xor(FULL_MASK, 1, 1, 3)),
    }
}

#[test]
fn threads_that_part_ways_are_an_error_and_not_a_hang() {
    for (how, thread, parts) in [
        (
            0,
            0,
            &[
                "thread [0, 0, 0] waits in sync_warp with mask 0xffffffff for thread [1, 0, 0]",
                "63 threads from [1, 0, 0] on wait at sync_threads",
            ][..],
        ),
        (1, 1, &["warp_reduce_max", "warp_reduce_add", "mask 0xffffffff"]),
        (2, 1, &["over 32 lanes", "over 16 lanes"]),
        (3, 1, &["mask 0x00000005", "its own lane, 1,"]),
        (4, 0, &["its own lane, 0,"]),
    ] {
        // Two warps in the first case, so that the message has to count across them.
        let block = if how == 0 { 64 } else { 32 };
        let error = try_launch(&PARTS_WAYS, [2, 1, 1], [block, 1, 1], 0, (how,)).unwrap_err();
        let text = error.to_string();
        let LaunchError::Divergence { kernel: "parts_ways", thread: t, message, .. } = error else {
            panic!("{how}: {text}")
        };
        assert_eq!(t, [thread, 0, 0], "{how}: {message}");
        for part in parts {
            assert!(message.contains(part), "{how}: {message}");
        }
    }
    let error = try_launch(&PARTS_WAYS, [1; 3], [32, 1, 1], 0, (9,)).unwrap_err();
    assert!(error.to_string().contains("a width of 3 lanes"), "{error}");
}

/// Takes what is one for a warp, or is not, for one.
#[kernel]
pub unsafe fn takes_for_uniform(divisor: u32, out: *mut u32) {
    let i = thread_idx_x();
    // SAFETY: one element per thread.
    unsafe { *out.add(i as usize) = warp_uniform(i / divisor) };
}

#[test]
fn what_lanes_do_not_agree_on_is_not_uniform() {
    let mut out = vec![9; 64];
    launch(&TAKES_FOR_UNIFORM, 1, 64, (32, out.as_mut_ptr()));
    assert!(out.iter().enumerate().all(|(i, &warp)| warp as usize == i / 32), "{out:?}");
    let error = try_launch(&TAKES_FOR_UNIFORM, [1; 3], [64, 1, 1], 0, (16, out.as_mut_ptr())).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("takes_for_uniform") && text.contains("has another value than lane 0"), "{text}");
}

/// All blocks but the first wait for memory that only a block which panics would write.
#[kernel]
pub unsafe fn waits_in_vain(flag: *mut u32) {
    if block_idx_x() == 0 {
        for _ in 0..1000 {
            spin_hint();
        }
        panic!("no flag today");
    }
    // SAFETY: a word that exists.
    while unsafe { cuda_std::atomic::load_acquire_u32(flag) } == 0 {}
}

#[test]
fn blocks_that_wait_for_a_block_that_failed_end_too() {
    let mut flag = 0;
    let error = try_launch(&WAITS_IN_VAIN, [8, 1, 1], [64, 1, 1], 0, (&raw mut flag,)).unwrap_err();
    assert!(error.to_string().contains("no flag today"), "{error}");
}

#[test]
fn outside_of_a_launch_an_index_is_a_clear_panic() {
    let error = std::panic::catch_unwind(thread_idx_x).unwrap_err();
    assert!(error.downcast_ref::<&str>().is_some_and(|text| text.contains("belongs in a kernel")));
}
