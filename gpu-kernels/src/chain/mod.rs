//! All operations of a step in one kernel.
//!
//! A block stays on each multiprocessor and goes through the list of [stages](stage). Two things make that fast. Weights
//! [stream](feed) into shared memory without regard to where a stage ends: while blocks wait for each other, or for a
//! vector to be quantized, memory goes on delivering what later stages need. And [vectors](vector) pass from block to
//! block by themselves, with no barrier of the grid.
//!
//! On the emulator, and to stop after any operation, a launch runs some of the stages, or one: the same code.

pub mod attention;
mod feed;
mod product;
pub mod stage;
pub mod vector;

use crate::activations::{Activations, F32Vector, Q8_1};
use crate::step::Step;
use cuda_std::copy_queue::CopyQueue;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::prefetch_l1;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_idx_x, global_timer, grid_dim_x, thread_idx_x};
use cuda_std::warp::WARP_SIZE;
use cuda_std::{dynamic_shared, kernel};
use feed::Feed;
use stage::{Kind, Stage};

/// Most warps in a block.
pub const MAX_WARPS: u32 = 16;
/// How many stages ahead the list is fetched into the L1 cache.
const LIST_AHEAD: u32 = 6;

/// Which stages a launch runs, and how shared memory is dealt out.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    /// The list.
    pub stages: *const Stage,
    /// The first stage that runs, and the one after the last.
    pub first: u32,
    /// See above.
    pub end: u32,
    /// The token and its position.
    pub step: *const Step,
    /// Both sets of vectors.
    pub vectors: *mut f32,
    /// Words of a set.
    pub set_words: u32,
    /// Where each block leaves the time at which each of its stages started, and the one at which the last one ended, in
    /// nanoseconds: `[end - first + 1, n_blocks]`; null where nobody wants to know.
    pub times: *mut u64,
    /// How shared memory is dealt out.
    pub layout: Layout,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Arguments {}

/// How shared memory is dealt out, in words, chosen by the launcher.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// The base-2 logarithm of the warps in a block.
    pub log_warps: u32,
    /// For a stage's vector, or what attention needs; a multiple of 4.
    pub stage_words: u32,
    /// Most quads that a block has to finish in a stage.
    pub turns: u32,
    /// For each warp's ring of tiles; a multiple of 4.
    pub ring_words: u32,
}

impl Layout {
    /// Where each part starts: sums of squares, sums, the warps of each quad, what is prepared for it, rings, the end.
    #[inline(always)]
    pub fn places(self) -> [u32; 6] {
        let n_warps = 1 << self.log_warps;
        let squares = self.stage_words;
        let sums = squares + 2 * MAX_WARPS;
        // From one place to the next it is another quad, another warp, or both.
        let warps = sums + (self.turns + n_warps) * 4;
        let prepared = warps + self.turns.next_multiple_of(4);
        let rings = prepared + self.turns.min(n_warps * WARP_SIZE) * product::PREPARED_WORDS;
        [squares, sums, warps, prepared, rings, rings + n_warps * CopyQueue::words(self.ring_words)]
    }
}

/// What a thread knows about its block for the whole launch.
pub struct Block {
    index: u32,
    n_blocks: u32,
    warp: u32,
    log_warps: u32,
    memory: DynamicShared<u32>,
    squares_at: u32,
    sums_at: u32,
    warps_at: u32,
    prepared_at: u32,
    /// The step's set of vectors.
    set: *mut f32,
    /// The step's position.
    position: u32,
}

/// Runs the stages in this block.
///
/// # Safety
/// As [`q8_1::chain`].
#[inline(always)]
unsafe fn run<X: Activations>(a: Arguments) {
    let memory = dynamic_shared!(CHAIN_MEMORY: [u32]);
    let (thread, log_warps) = (thread_idx_x(), a.layout.log_warps);
    let warp = thread / WARP_SIZE;
    let [squares_at, sums_at, warps_at, prepared_at, rings, _] = a.layout.places();
    let ring = rings + warp * CopyQueue::words(a.layout.ring_words);
    let queue = CopyQueue::new(memory, ring, a.layout.ring_words);
    let mut feed = Feed::new(queue, a.stages, [a.first, a.end], warp, log_warps);
    // SAFETY: the stages are as they say.
    unsafe { feed.pump() };

    let_next_start();
    wait_for_previous();
    // SAFETY: the step was written before the kernels of the step started.
    let step = unsafe { *a.step };
    let block = Block {
        index: block_idx_x(),
        n_blocks: grid_dim_x(),
        warp,
        log_warps,
        memory,
        squares_at,
        sums_at,
        warps_at,
        prepared_at,
        set: a.vectors.wrapping_add(step.set as usize * a.set_words as usize),
        position: step.position,
    };
    let leave_time = |number: u32| {
        if !a.times.is_null() && thread == 0 {
            let at = ((number - a.first) * block.n_blocks + block.index) as usize;
            // SAFETY: the place is this block's.
            unsafe { *a.times.add(at) = global_timer() };
        }
    };
    let mut number = a.first;
    while number < a.end {
        // SAFETY: the stage is one of the list, as the caller vouches.
        let stage = unsafe { &*a.stages.add(number as usize) };
        leave_time(number);
        let line = thread * 128;
        if line < size_of::<Stage>() as u32 && number + LIST_AHEAD < a.end {
            let later = a.stages.wrapping_add((number + LIST_AHEAD) as usize);
            prefetch_l1(later.cast::<u8>().wrapping_add(line as usize));
        }
        // SAFETY: as above.
        unsafe {
            if stage.kind == Kind::Attention as u32 {
                attention::run(stage, &block);
            } else if stage.kind == Kind::Combine as u32 {
                attention::combine(stage, &block);
            } else {
                if stage.kind == Kind::Qkv as u32 {
                    attention::prefetch(&stage.heads, &block);
                }
                product::run::<X>(stage, &block, &mut feed, number);
            }
        }
        number += 1;
    }
    leave_time(number);
}

macro_rules! define_kernels {
    ($(($suffix:ident, $X:ident))*) => {$(
        #[doc = concat!("On ", stringify!($X), " activations.")]
        pub mod $suffix {
            use super::*;

            /// Stages `first` to `end` of a step.
            ///
            /// # Safety
            /// The stages and everything they point to are in device memory and as their fields say; the vectors that
            /// they write are [`UNWRITTEN`](vector::UNWRITTEN) where a launch runs several stages; the step's position
            /// is below the caches' `n_ctx`, and all before it are written. The launch has the shared memory that
            /// [`Layout::places`] ends with. All blocks of a launch of several stages fit on the GPU at once.
            ///
            /// # Parameters
            /// - `arguments`: the stages, the step, the vectors
            ///
            /// # Thread mapping
            /// One block on each multiprocessor, of `2^layout.log_warps` warps; how a stage is dealt out to them is its own
            /// matter. Bytes moved: those of the matrices and of the cache, and every vector once for each block, from the
            /// L2 cache.
            #[kernel(suffix = $suffix, overlapping, launch_bounds(512, 1))]
            pub unsafe fn chain(arguments: Arguments) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$X>(arguments) }
            }
        }
    )*};
}
define_kernels! {
    (q8_1, Q8_1)
    (f32, F32Vector)
}
