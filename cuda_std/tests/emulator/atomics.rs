//! Atomics, and threads that wait for memory.

use crate::launch;
use cuda_std::atomic::*;
use cuda_std::kernel;
use cuda_std::thread::*;

/// Every read-modify-write operation on one word each.
#[kernel]
pub unsafe fn contend(words: *mut u32, longs: *mut u64, sum: *mut f32) {
    let i = index_1d();
    // SAFETY: atomics on words that exist.
    unsafe {
        atomic_add_u32(words, i);
        atomic_max_u32(words.add(1), i);
        atomic_min_u32(words.add(2), i);
        atomic_max_u64(longs, u64::from(i) << 32);
        atomic_min_u64(longs.add(1), u64::from(i) << 32);
        atomic_add_u64(longs.add(2), u64::from(i) << 32);
        atomic_add_f32(sum, 0.5);
    }
}

#[test]
fn atomics_lose_no_update() {
    let n = 200 * 96u32;
    let (mut words, mut longs, mut sum) = ([0, 0, u32::MAX], [0, u64::MAX, 0], 0f32);
    launch(&CONTEND, 200, 96, (words.as_mut_ptr(), longs.as_mut_ptr(), &raw mut sum));
    let total = n * (n - 1) / 2;
    assert_eq!(words, [total, n - 1, 0]);
    assert_eq!(longs, [u64::from(n - 1) << 32, 0, u64::from(total) << 32]);
    assert_eq!(sum, n as f32 / 2.0);
}

/// A critical section behind a lock that threads spin for, two ways.
#[kernel]
pub unsafe fn locked(lock: *mut u32, count: *mut u32) {
    // SAFETY: the count is touched only by the thread that holds the lock.
    unsafe {
        if thread_idx_x().is_multiple_of(2) {
            while atomic_cas_u32(lock, 0, 1) != 0 {}
        } else {
            while atomic_exchange_u32(lock, 1) != 0 {
                nanosleep(50);
            }
        }
        thread_fence();
        let value = count.read_volatile();
        spin_hint();
        count.write_volatile(value + 1);
        store_release_u32(lock, 0);
    }
}

#[test]
fn threads_spin_for_a_lock_that_another_thread_holds() {
    let (mut lock, mut count) = (0, 0);
    launch(&LOCKED, 20, 70, (&raw mut lock, &raw mut count));
    assert_eq!(count, 20 * 70);
}

/// Each thread waits for the one after it; the last one starts.
#[kernel]
pub unsafe fn chain(flags: *mut u32) {
    let i = thread_idx_x() as usize;
    // SAFETY: one flag per thread, and one more.
    unsafe {
        while load_acquire_u32(flags.add(i + 1)) == 0 {}
        store_release_u32(flags.add(i), 1);
    }
}

#[test]
fn a_thread_may_wait_for_any_thread_of_its_block() {
    for block in [1, 32, 100, 1024] {
        let mut flags = vec![0; block + 1];
        flags[block] = 1;
        launch(&CHAIN, 1, block as u32, (flags.as_mut_ptr(),));
        assert!(flags.iter().all(|&flag| flag == 1));
    }
}

/// Each block waits for the one before it.
#[kernel]
pub unsafe fn look_back(totals: *mut u32) {
    let block = block_idx_x() as usize;
    // SAFETY: one element per block.
    unsafe {
        let mut before = 1;
        if block > 0 {
            while {
                before = load_acquire_u32(totals.add(block - 1));
                before == 0
            } {}
        }
        store_release_u32(totals.add(block), before + 1);
    }
}

#[test]
fn a_block_may_wait_for_blocks_before_it() {
    let mut totals = vec![0; 5000];
    launch(&LOOK_BACK, 5000, 1, (totals.as_mut_ptr(),));
    assert!(totals.iter().enumerate().all(|(i, &total)| total == i as u32 + 2));
}
