//! A copy for a block, a piece at a time.

#[cfg(target_arch = "nvptx64")]
use super::barrier;
#[cfg(cuda_sm_90)]
use super::bulk;
use crate::shared::DynamicShared;
use crate::thread::{sync_threads, thread_idx_x};
use crate::warp::lane_id;

/// A copy of neighbouring bytes from device into shared memory, of which no more than a few pieces are on their way at a time.
///
/// One warp of the block copies ([`run`](Self::run)), and others wait for what they read ([`wait`](Self::wait)). A block that
/// asked for all of its bytes at once would have them no sooner, but whatever the multiprocessor's other blocks ask of memory
/// meanwhile would have to stand in line behind them.
///
/// From compute capability 9.0 on a piece is one instruction of one lane (cp.async.bulk), before that as many of every lane
/// as it takes (cp.async). What is copied is not expected to be read again: in the L2 cache it gives way to everything
/// else. On the emulator a piece has arrived when it has been started.
#[derive(Clone, Copy, Debug)]
pub struct PacedCopy {
    memory: DynamicShared<u32>,
    /// The word at which barriers start: one that is over when [`hurry`](Self::hurry) was called, and one for each piece.
    state: u32,
}

/// How many pieces of a copy are on their way at a time, at most.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Window {
    /// While others are waited for, whose own reads and writes should not have to stand in line behind them.
    pub ahead: u32,
    /// Once [`PacedCopy::hurry`] was called.
    pub late: u32,
}

/// Arrivals that complete a piece.
const PIECE_FILLERS: u32 =
    if cfg!(any(cuda_sm_90, not(target_arch = "nvptx64"))) { 1 } else { crate::warp::WARP_SIZE };

/// Words of a barrier.
const BARRIER_WORDS: u32 = 2;
/// Bytes of a piece, a multiple of 16. With fewer there is more to wait for one by one, with more it takes longer until the
/// first can be used (docs/performance.md, version 8).
const PIECE_BYTES: u32 = 6 << 10;

impl PacedCopy {
    /// Words of shared memory that copies of up to `bytes` bytes need beside what they bring.
    #[inline(always)]
    pub const fn state_words(bytes: u32) -> u32 {
        ((1 + bytes.div_ceil(PIECE_BYTES)) * BARRIER_WORDS).next_multiple_of(4)
    }

    /// No copy yet, of up to `bytes` bytes, with [`state_words`](Self::state_words) from word `state` on, a multiple of 4.
    /// All threads meet.
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, state: u32, bytes: u32) -> Self {
        let copy = Self { memory, state };
        let mut piece = thread_idx_x();
        if piece == 0 {
            copy.set_barrier(copy.state, 1);
        }
        while piece < bytes.div_ceil(PIECE_BYTES) {
            copy.set_barrier(copy.barrier(piece), PIECE_FILLERS);
            piece += crate::thread::block_dim_x();
        }
        sync_threads();
        copy
    }

    /// Copies `bytes` bytes, a multiple of 16, to word `to`, a multiple of 4, with as many pieces on their way at a time as the
    /// window says. The lanes of one warp make this call together; it is the block's copy number `round`, and all threads have
    /// read what the one before it has brought.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until they have
    /// arrived.
    #[inline(always)]
    pub unsafe fn run(&self, round: u32, to: u32, from: *const u8, bytes: u32, window: Window) {
        let (mut piece, mut start) = (0, 0);
        while start < bytes {
            let window = if self.is_over(self.state, 0) { window.late } else { window.ahead };
            if piece >= window {
                self.wait_for(piece - window, round);
            }
            // SAFETY: the piece is inside what the caller vouches for.
            unsafe {
                let from = from.add(start as usize);
                self.start(piece, to + start / 4, from, PIECE_BYTES.min(bytes - start));
            }
            piece += 1;
            start += PIECE_BYTES;
        }
    }

    /// From now on the block waits for nothing else: more pieces may be on their way. One thread says so, once.
    #[inline(always)]
    pub fn hurry(&self) {
        self.arrive(self.state);
    }

    /// Waits until bytes `start` to `end`, at least one, of copy number `round` have arrived.
    #[inline(always)]
    pub fn wait(&self, round: u32, start: u32, end: u32) {
        // Most have arrived when they are wanted: what says so is asked for all at once.
        if !self.have_arrived(round, start, end) {
            self.wait_in_turn(round, start, end);
        }
    }

    /// Whether bytes `start` to `end`, at least one, of copy number `round` are known to have arrived, by now; a range over
    /// more than two pieces never is.
    #[inline(always)]
    pub fn have_arrived(&self, round: u32, start: u32, end: u32) -> bool {
        let (first, last) = (start / PIECE_BYTES, (end - 1) / PIECE_BYTES);
        (last - first < 2)
            & self.is_over(self.barrier(first), round)
            & self.is_over(self.barrier(last), round)
    }

    /// As [`wait`](Self::wait), of bytes that are not known to have arrived.
    #[inline(always)]
    pub fn wait_in_turn(&self, round: u32, start: u32, end: u32) {
        let last = (end - 1) / PIECE_BYTES;
        let mut piece = start / PIECE_BYTES;
        while piece <= last {
            self.wait_for(piece, round);
            piece += 1;
        }
    }

    #[inline(always)]
    fn barrier(&self, piece: u32) -> u32 {
        self.state + (1 + piece) * BARRIER_WORDS
    }
}

#[cfg(target_arch = "nvptx64")]
impl PacedCopy {
    #[inline(always)]
    fn set_barrier(&self, barrier: u32, arrivals: u32) {
        // SAFETY: the barrier is this thread's until the block meets.
        unsafe { barrier::init(self.memory.address_of(barrier as usize), arrivals) };
    }

    #[inline(always)]
    fn arrive(&self, barrier: u32) {
        // SAFETY: the barrier is the block's.
        unsafe { barrier::arrive(self.memory.address_of(barrier as usize)) };
    }

    #[inline(always)]
    fn is_over(&self, barrier: u32, round: u32) -> bool {
        // SAFETY: the barrier is the block's.
        unsafe { barrier::is_over_now(self.memory.address_of(barrier as usize), round & 1) }
    }

    #[inline(always)]
    fn wait_for(&self, piece: u32, round: u32) {
        // SAFETY: the barrier is the block's.
        unsafe { barrier::wait(self.memory.address_of(self.barrier(piece) as usize), round & 1) };
    }

    #[inline(always)]
    unsafe fn start(&self, piece: u32, to: u32, from: *const u8, bytes: u32) {
        let barrier = self.memory.address_of(self.barrier(piece) as usize);
        cfg_select! {
            cuda_sm_90 => {
                if lane_id() == 0 {
                    // SAFETY: the barrier is the block's; the caller vouches for the source.
                    unsafe {
                        bulk::expect(barrier, bytes);
                        bulk::copy_once(self.memory.address_of(to as usize), from, bytes, barrier);
                    }
                }
            }
            _ => {
                // SAFETY: the caller vouches for the source; the barrier is the block's.
                unsafe {
                    super::copy_in_turns(self.memory, to, from, bytes, lane_id(), crate::warp::WARP_SIZE);
                    barrier::arrive_with_copies(barrier);
                }
            }
        }
    }
}

/// Here a barrier is a count of arrivals, one for each round.
#[cfg(not(target_arch = "nvptx64"))]
impl PacedCopy {
    fn set_barrier(&self, barrier: u32, _arrivals: u32) {
        self.memory.set(barrier as usize, 0);
    }

    fn arrive(&self, barrier: u32) {
        self.memory.set(barrier as usize, self.memory.get(barrier as usize) + 1);
    }

    #[inline(always)]
    fn is_over(&self, barrier: u32, round: u32) -> bool {
        self.memory.get(barrier as usize) > round
    }

    fn wait_for(&self, piece: u32, round: u32) {
        while !self.is_over(self.barrier(piece), round) {
            crate::emulator::with_thread(|thread| thread.spin());
        }
    }

    unsafe fn start(&self, piece: u32, to: u32, from: *const u8, bytes: u32) {
        if lane_id() == 0 {
            // SAFETY: the caller vouches for the source.
            unsafe { self.memory.copy_from(to as usize, from, bytes as usize) };
            self.arrive(self.barrier(piece));
        }
    }
}
