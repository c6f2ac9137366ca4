//! One copy at a time for a block.

#[cfg(target_arch = "nvptx64")]
use super::barrier;
use crate::shared::DynamicShared;
use crate::thread::{sync_threads, thread_idx_x};

/// Copies of neighbouring bytes from device into shared memory, one after the other, each of which all threads of a block
/// wait for.
///
/// From compute capability 9.0 on a copy is one instruction of one thread (cp.async.bulk), before that as many of every thread
/// as it takes (cp.async). What is copied is not expected to be read again: in the L2 cache it gives way to everything
/// else. On the emulator a copy is complete when it has been started and the block has met.
#[derive(Clone, Copy, Debug)]
pub struct BlockCopy {
    memory: DynamicShared<u32>,
    /// The word at which the barrier stands.
    #[cfg(target_arch = "nvptx64")]
    barrier: u32,
    /// Flips with every copy.
    #[cfg(target_arch = "nvptx64")]
    parity: u32,
}

impl BlockCopy {
    /// Words of shared memory for the barrier.
    pub const BARRIER_WORDS: u32 = 4;

    /// No copy yet, with a barrier at word `barrier`, a multiple of 4. All threads meet.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, barrier: u32) -> Self {
        cfg_select! {
            target_arch = "nvptx64" => {
                if thread_idx_x() == 0 {
                    let fillers = if cfg!(all(cuda_sm_90, not(no_bulk))) { 1 } else { crate::thread::block_dim_x() };
                    // SAFETY: the barrier is this thread's until the block meets.
                    unsafe { barrier::init(memory.address_of(barrier as usize), fillers) };
                }
                sync_threads();
                Self { memory, barrier, parity: 0 }
            }
            _ => {
                let _ = barrier;
                Self { memory }
            }
        }
    }

    /// Starts copying `bytes` bytes, a multiple of 16, to word `to`, a multiple of 4. All threads have read what was there,
    /// and met since.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until the copy has
    /// arrived.
    #[inline(always)]
    pub unsafe fn start(&self, to: u32, from: *const u8, bytes: u32) {
        cfg_select! {
            all(target_arch = "nvptx64", cuda_sm_90, not(no_bulk)) => {
                if thread_idx_x() == 0 {
                    // SAFETY: the barrier is the block's; the caller vouches for the source.
                    unsafe {
                        core::arch::asm!(
                            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
                            "{{ .reg .b64 policy;",
                            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
                            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
                                [{to}], [{from}], {bytes}, [{barrier}], policy; }}",
                            barrier = in(reg32) self.memory.address_of(self.barrier as usize),
                            to = in(reg32) self.memory.address_of(to as usize),
                            from = in(reg64) from,
                            bytes = in(reg32) bytes,
                            options(nostack, preserves_flags),
                        );
                    }
                }
            }
            target_arch = "nvptx64" => {
                let mut at = thread_idx_x() * 16;
                while at < bytes {
                    // SAFETY: the caller vouches for the source.
                    unsafe {
                        let from = from.add(at as usize).cast();
                        super::copy_async_u32x4(self.memory, (to + at / 4) as usize, from);
                    }
                    at += crate::thread::block_dim_x() * 16;
                }
                // SAFETY: the barrier is the block's; it counts this thread once its copies have arrived.
                unsafe {
                    core::arch::asm!(
                        "cp.async.mbarrier.arrive.noinc.shared.b64 [{barrier}];",
                        barrier = in(reg32) self.memory.address_of(self.barrier as usize),
                        options(nostack, preserves_flags),
                    );
                }
            }
            _ => {
                if thread_idx_x() == 0 {
                    // SAFETY: the caller vouches for the source.
                    unsafe { self.memory.copy_from(to as usize, from, bytes as usize) };
                }
            }
        }
    }

    /// Waits until the copy has arrived: all threads can read it then.
    #[inline(always)]
    pub fn wait(&mut self) {
        cfg_select! {
            target_arch = "nvptx64" => {
                // SAFETY: the barrier is the block's.
                unsafe { barrier::wait(self.memory.address_of(self.barrier as usize), self.parity) };
                self.parity ^= 1;
            }
            _ => sync_threads(),
        }
    }
}
