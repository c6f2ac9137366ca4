//! A ring of copies for all warps of a block.

#[cfg(target_arch = "nvptx64")]
use super::barrier;
#[cfg(cuda_sm_90)]
use super::bulk;
use crate::shared::DynamicShared;
use crate::thread::{block_dim_x, sync_threads, thread_idx_x};
use crate::warp::{FULL_MASK, WARP_SIZE, lane_id, sync_warp};

/// A part of what is copied to a place.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Device memory, at a multiple of 16 bytes.
    pub from: *const u8,
    /// Where it goes, in words from the start of the place, a multiple of 4.
    pub to: u32,
    /// Its length in bytes, a multiple of 16.
    pub bytes: u32,
}

/// A block's ring of places in shared memory, filled by asynchronous copies and read by all of its warps.
///
/// All threads make every call, with the same arguments; warps may be at different places of the ring. First
/// [`start`](Self::start) fills each place; then, in turn, [`wait`](Self::wait) for the current place, read it,
/// [`release`](Self::release) it, which goes on to the next one, and [`restart`](Self::restart) a place that was released
/// before, which waits until all warps have released it.
///
/// From compute capability 9.0 on a piece is one instruction of one thread (cp.async.bulk), before that as many of every
/// thread as it takes (cp.async). On the emulator a copy is complete when it has been started.
#[derive(Clone, Copy, Debug)]
pub struct BlockCopies {
    memory: DynamicShared<u32>,
    /// Where the places and their barriers start, in words.
    places: u32,
    barriers: u32,
    stage_words: u32,
    stages: u32,
    /// The current place, and how often the ring was gone round.
    stage: u32,
    round: u32,
}

/// Words of both barriers of a place: that it is full, and that it is free again.
const BARRIER_WORDS: u32 = 4;

impl BlockCopies {
    /// Words of shared memory for the barriers of a ring of `stages` places.
    #[inline(always)]
    pub const fn barrier_words(stages: u32) -> u32 {
        stages * BARRIER_WORDS
    }

    /// A ring of `stages` places of `stage_words` words each from word `places` on, whose barriers stand at word
    /// `barriers`, both multiples of 4. All threads meet.
    #[inline(always)]
    pub fn new(
        memory: DynamicShared<u32>,
        barriers: u32,
        places: u32,
        stages: u32,
        stage_words: u32,
    ) -> Self {
        let copies = Self { memory, places, barriers, stage_words, stages, stage: 0, round: 0 };
        let thread = thread_idx_x();
        if thread < stages {
            copies.set_barriers(thread);
        }
        sync_threads();
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
        self.places + self.stage * self.stage_words
    }

    #[inline(always)]
    fn full(&self, stage: u32) -> u32 {
        self.barriers + stage * BARRIER_WORDS
    }

    #[inline(always)]
    fn free(&self, stage: u32) -> u32 {
        self.full(stage) + 2
    }

    /// Starts filling place `stage` of a ring that is as new; the pieces do not overlap.
    ///
    /// # Safety
    /// The pieces are readable, and nothing writes them until they have arrived; they fit the place.
    #[inline(always)]
    pub unsafe fn start<const N: usize>(&self, stage: u32, pieces: [Piece; N]) {
        // SAFETY: the caller's promise.
        unsafe { self.fill(stage, pieces) };
    }

    /// Waits until all warps have released the place that is `behind` places before the current one, and starts filling
    /// it.
    ///
    /// # Safety
    /// As [`start`](Self::start).
    #[inline(always)]
    pub unsafe fn restart<const N: usize>(&self, behind: u32, pieces: [Piece; N]) {
        let (stage, round) = if self.stage >= behind {
            (self.stage - behind, self.round)
        } else {
            (self.stage + self.stages - behind, self.round.wrapping_sub(1))
        };
        // Only who copies has to know.
        if cfg!(cuda_sm_90) && thread_idx_x() != 0 {
            return;
        }
        self.wait_for(self.free(stage), round, block_dim_x() / WARP_SIZE);
        // SAFETY: the caller's promise.
        unsafe { self.fill(stage, pieces) };
    }

    /// Waits until the current place is full.
    #[inline(always)]
    pub fn wait(&self) {
        self.wait_for(self.full(self.stage), self.round, 1);
    }

    /// Says that this warp has read the current place, and goes on to the next one.
    #[inline(always)]
    pub fn release(&mut self) {
        sync_warp(FULL_MASK);
        if lane_id() == 0 {
            self.arrive(self.free(self.stage));
        }
        self.stage += 1;
        if self.stage == self.stages {
            self.stage = 0;
            self.round = self.round.wrapping_add(1);
        }
    }
}

#[cfg(target_arch = "nvptx64")]
impl BlockCopies {
    #[inline(always)]
    fn set_barriers(&self, stage: u32) {
        let (warps, fillers) = (block_dim_x() / WARP_SIZE, if cfg!(cuda_sm_90) { 1 } else { block_dim_x() });
        for (barrier, arrivals) in [(self.full(stage), fillers), (self.free(stage), warps)] {
            // SAFETY: the barriers are this thread's until the block meets.
            unsafe { barrier::init(self.memory.address_of(barrier as usize), arrivals) };
        }
    }

    #[inline(always)]
    fn arrive(&self, barrier: u32) {
        // SAFETY: the barrier is the ring's. Not `nomem`: the reads of the place come before it.
        unsafe {
            core::arch::asm!(
                "{{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [{barrier}]; }}",
                barrier = in(reg32) self.memory.address_of(barrier as usize),
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn wait_for(&self, barrier: u32, round: u32, _arrivals: u32) {
        // SAFETY: the barrier is the ring's.
        unsafe { barrier::wait(self.memory.address_of(barrier as usize), round & 1) };
    }

    #[inline(always)]
    unsafe fn fill<const N: usize>(&self, stage: u32, pieces: [Piece; N]) {
        let barrier = self.memory.address_of(self.full(stage) as usize);
        let place = self.places + stage * self.stage_words;
        cfg_select! {
            cuda_sm_90 => {
                if thread_idx_x() != 0 {
                    return;
                }
                // SAFETY: the barrier is the ring's; the caller vouches for the pieces.
                unsafe {
                    bulk::expect(barrier, pieces.iter().fold(0, |bytes, piece| bytes + piece.bytes));
                    for piece in pieces {
                        let to = self.memory.address_of((place + piece.to) as usize);
                        bulk::copy(to, piece.from, piece.bytes, barrier);
                    }
                }
            }
            _ => {
                // SAFETY: the caller vouches for the pieces; the barrier is the ring's.
                unsafe {
                    for piece in pieces {
                        let (thread, n_threads) = (thread_idx_x(), block_dim_x());
                        let to = place + piece.to;
                        super::copy_in_turns(self.memory, to, piece.from, piece.bytes, thread, n_threads);
                    }
                    barrier::arrive_with_copies(barrier);
                }
            }
        }
    }
}

/// Here a barrier is a count of arrivals: one for each time a place is filled, one for each warp that releases it.
#[cfg(not(target_arch = "nvptx64"))]
impl BlockCopies {
    fn set_barriers(&self, stage: u32) {
        self.memory.set(self.full(stage) as usize, 0);
        self.memory.set(self.free(stage) as usize, 0);
    }

    fn arrive(&self, barrier: u32) {
        self.memory.set(barrier as usize, self.memory.get(barrier as usize).wrapping_add(1));
    }

    fn wait_for(&self, barrier: u32, round: u32, arrivals: u32) {
        let wanted = round.wrapping_add(1).wrapping_mul(arrivals);
        while (self.memory.get(barrier as usize).wrapping_sub(wanted) as i32) < 0 {
            crate::emulator::with_thread(|thread| thread.spin());
        }
    }

    unsafe fn fill<const N: usize>(&self, stage: u32, pieces: [Piece; N]) {
        if thread_idx_x() != 0 {
            return;
        }
        let place = self.places + stage * self.stage_words;
        for piece in pieces {
            // SAFETY: the caller vouches for the piece.
            unsafe { self.memory.copy_from((place + piece.to) as usize, piece.from, piece.bytes as usize) };
        }
        self.arrive(self.full(stage));
    }
}
