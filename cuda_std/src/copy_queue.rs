//! Copies from device into shared memory that run beside the warp which started them, first in, first out.

use crate::shared::DynamicShared;
#[cfg(target_arch = "nvptx64")]
use crate::warp::{FULL_MASK, sync_warp};

/// Copies that can be under way or waiting to be read at once.
pub const SLOTS: u32 = 8;
/// Words of shared memory for the slots' barriers, 8 bytes each.
const BARRIER_WORDS: u32 = 2 * SLOTS;

/// A warp's queue of pieces of device memory, of any sizes, in a ring of shared memory.
///
/// All lanes of the warp make every call, with the same arguments: [`push`](Self::push) while there is
/// [room](Self::has_room); [`front`](Self::front) waits for the oldest piece, and [`pop`](Self::pop) gives its place back.
/// Between their last read of a piece and that the lanes must meet.
///
/// From compute capability 9.0 on a copy is one instruction of one lane (cp.async.bulk), before that as many of every
/// lane as it has 512 bytes (cp.async). What is copied is not expected to be read again: in the L2 cache it gives way
/// to everything else. On the emulator a copy is complete when it has been started; between then and the lanes' reads
/// the warp must have met.
#[derive(Clone, Copy, Debug)]
pub struct CopyQueue {
    memory: DynamicShared<u32>,
    /// The word at which the ring starts, after the barriers; and its length.
    ring: u32,
    len: u32,
    /// The words after the piece that was taken off last, and after the newest: in between, around the end of the
    /// ring where that is before, lie the pieces.
    head: u32,
    tail: u32,
    /// Pieces in the queue.
    n: u32,
    /// The slot of the oldest piece, and the parity of its barrier's phase.
    slot: u32,
    parity: u32,
}

impl CopyQueue {
    /// Words of shared memory for a ring of `len` words, a multiple of 4.
    #[inline(always)]
    pub const fn words(len: u32) -> u32 {
        len + BARRIER_WORDS
    }

    /// An empty queue at word `start`, a multiple of 4, of this warp's alone, whose ring has `len` words.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32, len: u32) -> Self {
        let ring = start + BARRIER_WORDS;
        let queue = Self { memory, ring, len, head: 0, tail: 0, n: 0, slot: 0, parity: 0 };
        #[cfg(target_arch = "nvptx64")]
        {
            let lane = crate::warp::lane_id();
            if lane < SLOTS {
                let arrivals = if cfg!(cuda_sm_90) { 1 } else { crate::warp::WARP_SIZE };
                // SAFETY: the barriers are this warp's. Copies see them once the fence has been passed.
                unsafe {
                    core::arch::asm!(
                        "mbarrier.init.shared.b64 [{barrier}], {arrivals};",
                        barrier = in(reg32) queue.barrier(lane),
                        arrivals = in(reg32) arrivals,
                        options(nostack, preserves_flags),
                    );
                    #[cfg(cuda_sm_90)]
                    core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags));
                }
            }
            sync_warp(FULL_MASK);
        }
        queue
    }

    /// Where in the ring a piece of `words` words lies after one that ends at `end`: there, or at the start of the ring.
    #[inline(always)]
    fn place_after(&self, end: u32, words: u32) -> u32 {
        if end + words <= self.len { end } else { 0 }
    }

    /// Whether a piece of `words` words can be pushed.
    #[inline(always)]
    pub fn has_room(&self, words: u32) -> bool {
        if self.n == 0 {
            return true;
        }
        let place = self.place_after(self.tail, words);
        let end = place + words;
        let is_free = if self.head < self.tail {
            place >= self.tail || end <= self.head
        } else {
            place >= self.tail && end <= self.head
        };
        is_free && self.n < SLOTS
    }

    /// The address of a slot's barrier.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    fn barrier(&self, slot: u32) -> u32 {
        self.memory.address_of((self.ring - BARRIER_WORDS + 2 * slot) as usize)
    }

    /// Starts copying a piece of `bytes` bytes, a multiple of 16, and where `second` is not null as many from there behind
    /// them; there must be room for all.
    ///
    /// # Safety
    /// `from` and `second` are to as many bytes of readable device memory, at a multiple of 16, which nothing writes
    /// until the copy has arrived; they fit the ring.
    #[inline(always)]
    pub unsafe fn push(&mut self, from: *const u8, second: *const u8, bytes: u32) {
        let words = if second.is_null() { bytes / 4 } else { bytes / 2 };
        let place = self.place_after(self.tail, words);
        self.tail = place + words;
        let to = self.ring + place;
        #[cfg(target_arch = "nvptx64")]
        let slot = (self.slot + self.n) % SLOTS;
        self.n += 1;
        cfg_select! {
            all(target_arch = "nvptx64", cuda_sm_90) => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the place's barrier is this warp's; the caller vouches for sources and size.
                    unsafe {
                        core::arch::asm!(
                            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};",
                            barrier = in(reg32) self.barrier(slot),
                            bytes = in(reg32) 4 * words,
                            options(nostack, preserves_flags),
                        );
                        self.copy_bulk(slot, to, from, bytes);
                        if !second.is_null() {
                            self.copy_bulk(slot, to + bytes / 4, second, bytes);
                        }
                    }
                }
            }
            target_arch = "nvptx64" => {
                // SAFETY: the caller vouches for the sources; the barrier is this warp's, and counts this lane once its
                // copies have arrived.
                unsafe {
                    self.copy_async(to, from, bytes);
                    if !second.is_null() {
                        self.copy_async(to + bytes / 4, second, bytes);
                    }
                    core::arch::asm!(
                        "cp.async.mbarrier.arrive.noinc.shared.b64 [{barrier}];",
                        barrier = in(reg32) self.barrier(slot),
                        options(nostack, preserves_flags),
                    );
                }
            }
            _ => {
                if crate::warp::lane_id() == 0 {
                    // SAFETY: the caller vouches for the sources.
                    unsafe {
                        self.memory.copy_from(to as usize, from, bytes as usize);
                        if !second.is_null() {
                            self.memory.copy_from((to + bytes / 4) as usize, second, bytes as usize);
                        }
                    }
                }
            }
        }
    }

    /// Starts a copy to word `to` that a slot's barrier counts.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90))]
    #[inline(always)]
    unsafe fn copy_bulk(&self, slot: u32, to: u32, from: *const u8, bytes: u32) {
        // SAFETY: the caller's promise.
        unsafe {
            core::arch::asm!(
                "{{ .reg .b64 policy;",
                "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;",
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
                    [{to}], [{from}], {bytes}, [{barrier}], policy; }}",
                barrier = in(reg32) self.barrier(slot),
                to = in(reg32) self.memory.address_of(to as usize),
                from = in(reg64) from,
                bytes = in(reg32) bytes,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Starts this lane's part of a copy to word `to`.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    #[cfg(all(target_arch = "nvptx64", not(cuda_sm_90)))]
    #[inline(always)]
    unsafe fn copy_async(&self, to: u32, from: *const u8, bytes: u32) {
        let mut at = crate::warp::lane_id() * 16;
        while at < bytes {
            // SAFETY: the caller's promise.
            unsafe {
                core::arch::asm!(
                    "cp.async.cg.shared.global.L2::128B [{to}], [{from}], 16;",
                    to = in(reg32) self.memory.address_of((to + at / 4) as usize),
                    from = in(reg64) from.add(at as usize),
                    options(nostack, preserves_flags),
                );
            }
            at += crate::warp::WARP_SIZE * 16;
        }
    }

    /// Waits until the oldest piece, which has `words` words, has arrived, and gives the word at which it starts: all lanes
    /// can read it then.
    #[inline(always)]
    pub fn front(&self, words: u32) -> u32 {
        #[cfg(target_arch = "nvptx64")]
        loop {
            let has_arrived: u32;
            // SAFETY: looks at the barrier, or waits for some time. Not `nomem`: reads of the copy may not be moved
            // before it.
            unsafe {
                core::arch::asm!(
                    "{{",
                    ".reg .pred arrived;",
                    cfg_select! {
                        cuda_sm_90 => "mbarrier.try_wait.parity.shared.b64 arrived, [{barrier}], {parity};",
                        _ => "mbarrier.test_wait.parity.shared.b64 arrived, [{barrier}], {parity};",
                    },
                    "selp.u32 {has_arrived}, 1, 0, arrived;",
                    "}}",
                    has_arrived = out(reg32) has_arrived,
                    barrier = in(reg32) self.barrier(self.slot),
                    parity = in(reg32) self.parity,
                    options(nostack, preserves_flags),
                );
            }
            if has_arrived != 0 {
                break;
            }
        }
        self.ring + self.place_after(self.head, words)
    }

    /// Takes the oldest piece, which has `words` words, off the queue.
    #[inline(always)]
    pub fn pop(&mut self, words: u32) {
        self.head = self.place_after(self.head, words) + words;
        self.n -= 1;
        self.slot += 1;
        if self.slot == SLOTS {
            self.slot = 0;
            self.parity ^= 1;
        }
    }
}
