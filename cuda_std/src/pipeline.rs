//! Copies from device into shared memory that run beside the thread which started them.
//!
//! [`WarpCopies`] is a ring of places that a warp keeps filled, by bulk copies where the GPU has them. Below it is
//! cp.async: a thread starts copies, closes them into a group with [`commit_copies`], goes on, and calls [`wait_copies`] when
//! it needs a group. Then its own copies have arrived; for other threads to see them, the threads must meet
//! afterwards ([`sync_warp`](crate::warp::sync_warp), [`sync_threads`](crate::thread::sync_threads)), and all must
//! have met again before the memory is copied over.
//!
//! On the emulator a copy is complete when it has been started, so that a thread that reads too early may get away
//! with it; one that has not met the thread that copies reads what was there before.

use crate::shared::DynamicShared;
#[cfg(target_arch = "nvptx64")]
use crate::warp::{FULL_MASK, sync_warp};

/// A warp's ring of `STAGES` places in shared memory, each filled by an asynchronous copy: copy `n` goes to place
/// `n % STAGES`.
///
/// All lanes of the warp make every call, with the same arguments, and in this order: [`start`](Self::start) or
/// [`skip`](Self::skip) for the first `STAGES` copies, then for `n` from 0 on `wait(n)` and `start` or `skip` of copy
/// `n + STAGES`. Between their last read of a place and the call that fills it again the lanes must meet.
///
/// From compute capability 9.0 on a copy is one instruction of one lane (cp.async.bulk), before that as many of every
/// lane as it has 512 bytes (cp.async). On the emulator it is complete when it has been started; between then and the
/// lanes' reads the warp must have met.
#[derive(Clone, Copy, Debug)]
pub struct WarpCopies<const STAGES: u32> {
    memory: DynamicShared<u32>,
    /// Where the places start, and how far apart they are, in words.
    first: u32,
    stage_words: u32,
}

impl<const STAGES: u32> WarpCopies<STAGES> {
    /// Words of shared memory for a ring of places of `stage_words` words, which is a multiple of 4.
    #[inline(always)]
    pub const fn words(stage_words: u32) -> u32 {
        STAGES * stage_words + Self::BARRIER_WORDS
    }

    /// A barrier for each place, filled up to 16 bytes.
    const BARRIER_WORDS: u32 = (2 * STAGES).next_multiple_of(4);

    /// A ring at word `start`, a multiple of 4, of this warp's alone.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32, stage_words: u32) -> Self {
        let copies = Self { memory, first: start + Self::BARRIER_WORDS, stage_words };
        #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
        {
            if crate::warp::lane_id() == 0 {
                for stage in 0..STAGES {
                    // SAFETY: the barriers are this warp's; copies see them once the fence has been passed.
                    unsafe {
                        core::arch::asm!(
                            "mbarrier.init.shared::cta.b64 [{barrier}], 1;",
                            barrier = in(reg32) copies.barrier(stage),
                            options(nostack, preserves_flags),
                        );
                    }
                }
                // SAFETY: orders memory accesses, and does nothing else.
                unsafe {
                    core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags))
                };
            }
            sync_warp(FULL_MASK);
        }
        copies
    }

    /// The word at which copy `n` starts.
    #[inline(always)]
    pub fn place(&self, n: u32) -> u32 {
        self.first + n % STAGES * self.stage_words
    }

    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    #[inline(always)]
    fn barrier(&self, n: u32) -> u32 {
        self.memory.address_of((self.first - Self::BARRIER_WORDS + 2 * (n % STAGES)) as usize)
    }

    /// Starts copy `n`, of `bytes` bytes, a multiple of 16.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until the copy
    /// has arrived; they fit the place.
    #[inline(always)]
    pub unsafe fn start(&self, n: u32, from: *const u8, bytes: u32) {
        cfg_select! {
            all(target_arch = "nvptx64", cuda_sm_90) => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the caller vouches for source and size; the place and its barrier are this warp's.
                    unsafe {
                        core::arch::asm!(
                            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
                            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {bytes}, [{barrier}];",
                            barrier = in(reg32) self.barrier(n),
                            to = in(reg32) self.memory.address_of(self.place(n) as usize),
                            from = in(reg64) from,
                            bytes = in(reg32) bytes,
                            options(nostack, preserves_flags),
                        );
                    }
                }
            }
            target_arch = "nvptx64" => {
                let mut at = crate::warp::lane_id() * 16;
                while at < bytes {
                    // SAFETY: the caller vouches for the source.
                    unsafe {
                        let piece = from.add(at as usize).cast();
                        copy_async_u32x4(self.memory, (self.place(n) + at / 4) as usize, piece);
                    }
                    at += crate::warp::WARP_SIZE * 16;
                }
                commit_copies();
            }
            _ => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the caller vouches for the source.
                    unsafe { self.memory.copy_from(self.place(n) as usize, from, bytes as usize) };
                }
            }
        }
    }

    /// To be called instead of [`start`](Self::start) where there is nothing to copy any more.
    #[inline(always)]
    pub fn skip(&self) {
        #[cfg(not(cuda_sm_90))]
        commit_copies();
    }

    /// Waits until copy `n` has arrived: all lanes can read it then, from word [`place(n)`](Self::place) on.
    #[inline(always)]
    pub fn wait(&self, n: u32) {
        cfg_select! {
            all(target_arch = "nvptx64", cuda_sm_90) => {
                let (barrier, parity) = (self.barrier(n), n / STAGES % 2);
                loop {
                    let has_arrived: u32;
                    // SAFETY: waits for some time, and does nothing else. Not `nomem`: reads of the copy may not be
                    // moved before it.
                    unsafe {
                        core::arch::asm!(
                            "{{",
                            ".reg .pred arrived;",
                            "mbarrier.try_wait.parity.shared::cta.b64 arrived, [{barrier}], {parity};",
                            "selp.u32 {has_arrived}, 1, 0, arrived;",
                            "}}",
                            has_arrived = out(reg32) has_arrived,
                            barrier = in(reg32) barrier,
                            parity = in(reg32) parity,
                            options(nostack, preserves_flags),
                        );
                    }
                    if has_arrived != 0 {
                        break;
                    }
                }
            }
            target_arch = "nvptx64" => {
                let _ = n;
                // How many groups may be pending is part of the instruction.
                match STAGES {
                    2 => wait_copies::<1>(),
                    4 => wait_copies::<3>(),
                    _ => wait_copies::<0>(),
                }
                // Each lane has waited for its own pieces.
                sync_warp(FULL_MASK);
            }
            _ => {
                let _ = n;
            }
        }
    }
}

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
