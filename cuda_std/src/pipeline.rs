//! Copies from device into shared memory that run beside the thread which started them (cp.async).
//!
//! A thread starts copies, closes them into a group with [`commit_copies`], goes on, and calls [`wait_copies`] when
//! it needs a group. Then its own copies have arrived; for other threads to see them, the threads must meet
//! afterwards ([`sync_warp`](crate::warp::sync_warp), [`sync_threads`](crate::thread::sync_threads)), and all must
//! have met again before the memory is copied over.
//!
//! On the emulator a copy is complete when it has been started, so that a thread that reads too early may get away
//! with it; one that has not met the thread that copies reads what was there before.

use crate::shared::DynamicShared;

/// Starts copying 16 bytes into elements `index` to `index + 3`, past the L1 cache; `index` is a multiple of 4.
///
/// # Safety
/// `from` is to 16 bytes of readable device memory, at a multiple of 16, which nothing writes until the copy has
/// arrived.
#[inline(always)]
#[track_caller]
pub unsafe fn copy_async_u32x4(to: DynamicShared<u32>, index: usize, from: *const [u32; 4]) {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: the caller vouches for `from`; the handle for the shared memory.
            unsafe {
                core::arch::asm!(
                    "cp.async.cg.shared.global.L2::128B [{to}], [{from}], 16;",
                    to = in(reg32) to.address_of(index),
                    from = in(reg64) from,
                    options(nostack, preserves_flags),
                );
            }
        }
        // SAFETY: the caller vouches for `from`.
        _ => to.set4(index, unsafe { from.read() }),
    }
}

/// Closes the copies that this thread has started since the last call into a group, which may be empty.
#[inline(always)]
pub fn commit_copies() {
    // SAFETY: counts, and does nothing else.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        core::arch::asm!("cp.async.commit_group;", options(nostack, preserves_flags))
    }
}

/// Waits until at most the `PENDING` latest of this thread's groups are still on their way.
#[inline(always)]
pub fn wait_copies<const PENDING: usize>() {
    // SAFETY: waits, and does nothing else. Not `nomem`: reads of the copies may not be moved before it.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        core::arch::asm!("cp.async.wait_group {n};", n = const PENDING, options(nostack, preserves_flags))
    }
}
