//! Copies from device into shared memory that run beside the threads which started them.

#[cfg(target_arch = "nvptx64")]
pub(crate) mod barrier;
mod block;
#[cfg(cuda_sm_90)]
pub(crate) mod bulk;
mod paced;
mod thread;

pub use block::{BlockCopies, Piece};
pub use paced::{PacedCopy, Window};
pub use thread::{commit_copies, copy_async, wait_for_copies};

#[cfg(all(target_arch = "nvptx64", not(cuda_sm_90)))]
use crate::shared::DynamicShared;

/// Starts copying `bytes` bytes, a multiple of 16, to word `to`, 16 for each of `n_threads` threads in turn, of which this one
/// is number `thread`.
///
/// # Safety
/// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until they have arrived.
#[cfg(all(target_arch = "nvptx64", not(cuda_sm_90)))]
#[inline(always)]
unsafe fn copy_in_turns(
    memory: DynamicShared<u32>,
    to: u32,
    from: *const u8,
    bytes: u32,
    thread: u32,
    n_threads: u32,
) {
    let mut at = thread * 16;
    while at < bytes {
        // SAFETY: the caller vouches for the source.
        unsafe { copy_async_u32x4(memory, (to + at / 4) as usize, from.add(at as usize).cast()) };
        at += n_threads * 16;
    }
}

/// Starts copying 16 bytes into elements `index` to `index + 3`, past the L1 cache; `index` is a multiple of 4.
///
/// # Safety
/// `from` is to 16 bytes of readable device memory, at a multiple of 16, which nothing writes until the copy has
/// arrived.
#[cfg(all(target_arch = "nvptx64", not(cuda_sm_90)))]
#[inline(always)]
unsafe fn copy_async_u32x4(to: DynamicShared<u32>, index: usize, from: *const [u32; 4]) {
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
