//! Copies from device into shared memory that run beside the warp which started them.

#[cfg(target_arch = "nvptx64")]
mod barrier;
mod block;
mod paced;
mod thread;

pub use block::{BlockCopies, Piece};
pub use paced::PacedCopy;
pub use thread::{commit_copies, copy_async, wait_for_copies};

use crate::shared::DynamicShared;
#[cfg(target_arch = "nvptx64")]
use crate::warp::{FULL_MASK, sync_warp};

/// A warp's ring of places in shared memory, each filled by an asynchronous copy.
///
/// All lanes of the warp make every call, with the same arguments: first [`start`](Self::start) for each place, then in
/// turn [`wait`](Self::wait) for the current place, `start(0, ..)` to fill it again, and [`advance`](Self::advance).
/// Between their last read of a place and the call that fills it again the lanes must meet.
///
/// From compute capability 9.0 on a copy is one instruction of one lane (cp.async.bulk), before that as many of every
/// lane as it has 512 bytes (cp.async). What is copied is not expected to be read again: in the L2 cache it gives way to
/// everything else. On the emulator it is complete when it has been started; between then and the
/// lanes' reads the warp must have met.
#[derive(Clone, Copy, Debug)]
pub struct WarpCopies {
    memory: DynamicShared<u32>,
    /// Where the places start, in words, after the barriers; and how long one is.
    places: u32,
    stage_words: u32,
    stages: u32,
    /// The current place.
    stage: u32,
    /// Flips with every round of the ring.
    parity: u32,
}

impl WarpCopies {
    /// Words of shared memory for a ring of `stages` places of `stage_words` words, which is a multiple of 4.
    #[inline(always)]
    pub const fn words(stages: u32, stage_words: u32) -> u32 {
        stages * stage_words + Self::barrier_words(stages)
    }

    /// A barrier of 8 bytes for each place, filled up to 16.
    #[inline(always)]
    const fn barrier_words(stages: u32) -> u32 {
        (2 * stages).next_multiple_of(4)
    }

    /// A ring at word `start`, a multiple of 4, of this warp's alone.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32, stages: u32, stage_words: u32) -> Self {
        let places = start + Self::barrier_words(stages);
        let copies = Self { memory, places, stage_words, stages, stage: 0, parity: 0 };
        #[cfg(target_arch = "nvptx64")]
        {
            let lane = crate::warp::lane_id();
            if lane < stages {
                let arrivals = if cfg!(cuda_sm_90) { 1 } else { crate::warp::WARP_SIZE };
                // SAFETY: the barriers are this warp's.
                unsafe { barrier::init(copies.barrier(lane), arrivals) };
            }
            sync_warp(FULL_MASK);
        }
        copies
    }

    /// Places in the ring.
    #[inline(always)]
    pub fn stages(&self) -> u32 {
        self.stages
    }

    /// The word at which the current place starts.
    #[inline(always)]
    pub fn place(&self) -> u32 {
        self.place_of(self.stage)
    }

    #[inline(always)]
    fn place_of(&self, stage: u32) -> u32 {
        self.places + stage * self.stage_words
    }

    /// Goes on to the next place.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.stage += 1;
        if self.stage == self.stages {
            self.stage = 0;
            self.parity ^= 1;
        }
    }

    /// The address of a place's barrier.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    fn barrier(&self, stage: u32) -> u32 {
        let first = self.places - Self::barrier_words(self.stages);
        self.memory.address_of((first + 2 * stage) as usize)
    }

    /// Starts copying `bytes` bytes, a multiple of 16, to the place that is `ahead` places after the current one.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until the copy
    /// has arrived; they fit the place.
    #[inline(always)]
    pub unsafe fn start(&self, ahead: u32, from: *const u8, bytes: u32) {
        let stage = self.stage + ahead;
        let stage = if stage < self.stages { stage } else { stage - self.stages };
        cfg_select! {
            all(target_arch = "nvptx64", cuda_sm_90) => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the caller vouches for source and size; the place and its barrier are this warp's.
                    unsafe {
                        core::arch::asm!(
                            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
                            "{{ .reg .b64 policy;",
                            "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
                            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
                                [{to}], [{from}], {bytes}, [{barrier}], policy; }}",
                            barrier = in(reg32) self.barrier(stage),
                            to = in(reg32) self.memory.address_of(self.place_of(stage) as usize),
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
                        copy_async_u32x4(self.memory, (self.place_of(stage) + at / 4) as usize, piece);
                    }
                    at += crate::warp::WARP_SIZE * 16;
                }
                // SAFETY: the barrier is this warp's; it counts this lane once its copies have arrived.
                unsafe {
                    core::arch::asm!(
                        "cp.async.mbarrier.arrive.noinc.shared.b64 [{barrier}];",
                        barrier = in(reg32) self.barrier(stage),
                        options(nostack, preserves_flags),
                    );
                }
            }
            _ => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the caller vouches for the source.
                    unsafe { self.memory.copy_from(self.place_of(stage) as usize, from, bytes as usize) };
                }
            }
        }
    }

    /// Waits until the copy to the current place has arrived: all lanes can read it then.
    #[inline(always)]
    pub fn wait(&self) {
        // SAFETY: the barrier is this warp's.
        #[cfg(target_arch = "nvptx64")]
        unsafe {
            barrier::wait(self.barrier(self.stage), self.parity);
        }
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
