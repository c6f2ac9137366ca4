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

use crate::activations::{F32Vector, Q8_1};
use crate::formats::{Q4_1, Q4_K, Q6_K, Q8_0};
use crate::gemv::{Any, Dots, TensorOf};
use crate::step::Step;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::prefetch_l2;
use cuda_std::pipeline::WarpCopies;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, block_idx_x, global_timer, grid_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::WARP_SIZE;
use cuda_std::{dynamic_shared, kernel};
use feed::Feed;
use stage::{Kind, STAGE_WORDS, Stage, StageRef};

const MARKS: bool = false;
/// Most warps in a block.
pub const MAX_WARPS: u32 = 12;
/// Stages that are in shared memory at a time: the present one, those after it whose tiles may be on their way already,
/// the one that is being fetched, and the one before, which slower warps may still look at.
const LIST_SLOTS: u32 = 8;

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
    /// Warps in a block.
    pub n_warps: u32,
    /// For a stage's vector, or what attention needs; a multiple of 4.
    pub stage_words: u32,
    /// Most bands that a block has in a stage.
    pub turns: u32,
    /// Places in each warp's ring, at most 32, and the words of one, a multiple of 4.
    pub places: u32,
    /// See above.
    pub place_words: u32,
}

impl Layout {
    /// Where each part starts: the list, sums of squares, sums of bands, rings, the end.
    #[inline(always)]
    pub fn starts(self) -> [u32; 5] {
        let n_warps = self.n_warps;
        let list = self.stage_words;
        let squares = list + LIST_SLOTS * STAGE_WORDS;
        let sums = squares + 2 * MAX_WARPS;
        let rings = sums + product::sums_words(self.turns, n_warps);
        [list, squares, sums, rings, rings + n_warps * WarpCopies::words(self.places, self.place_words)]
    }
}

/// The stages that are in shared memory: a ring.
#[derive(Clone, Copy)]
struct List {
    memory: DynamicShared<u32>,
    at: u32,
    stages: *const Stage,
    end: u32,
}

impl List {
    /// Stage `number`, which must be there.
    #[inline(always)]
    fn stage(self, number: u32) -> StageRef {
        StageRef::new(self.memory, self.place(number))
    }

    #[inline(always)]
    fn place(self, number: u32) -> u32 {
        self.at + number % LIST_SLOTS * STAGE_WORDS
    }

    /// Word `word` of stage `number`; 0 where there is none.
    ///
    /// # Safety
    /// The list is as it says.
    #[inline(always)]
    unsafe fn fetch(self, number: u32, word: u32) -> u32 {
        if number < self.end {
            // SAFETY: inside the list.
            unsafe { *self.stages.cast::<u32>().add((number * STAGE_WORDS + word) as usize) }
        } else {
            0
        }
    }

    /// Puts a word where [`stage`](Self::stage) finds it after the next barrier.
    #[inline(always)]
    fn store(self, number: u32, word: u32, value: u32) {
        self.memory.set((self.place(number) + word) as usize, value);
    }
}

/// What a thread knows about its block for the whole launch.
pub struct Block {
    index: u32,
    n_blocks: u32,
    warp: u32,
    memory: DynamicShared<u32>,
    squares_at: u32,
    sums_at: u32,
    /// The step's set of vectors.
    set: *mut f32,
    /// The step's position.
    position: u32,
    list: List,
    /// This thread's word of the stage that is being fetched, and its number.
    fetched: u32,
    fetched_number: u32,
    times: *mut u64,
}

impl Block {
    /// Puts the stage that was fetched where [`List::stage`] finds it after the next barrier: once in each stage.
    #[inline(always)]
    fn store_fetched(&self) {
        let thread = thread_idx_x();
        if thread < STAGE_WORDS {
            self.list.store(self.fetched_number, thread, self.fetched);
        }
    }

    #[inline(always)]
    fn mark(&self, k: u32) {
        if MARKS && !self.times.is_null() && thread_idx_x() == 0 {
            unsafe { *self.times.add(k as usize) = global_timer() };
        }
    }
}

/// How many stages ahead the vectors among the weights are asked for.
const VECTORS_AHEAD: u32 = 3;

/// Asks the L2 cache for a stage's factors and biases: they would be the last to come while memory is busy with tiles.
#[inline(always)]
fn prefetch_vectors(stage: StageRef) {
    let thread = thread_idx_x();
    let (from, n) = if thread == 0 {
        (stage.gamma(), stage.n())
    } else if thread < 4 && stage.kind() == Kind::Qkv as u32 {
        (stage.heads().bias(thread - 1) as usize, stage.part(thread - 1).n_rows())
    } else {
        (0, 0)
    };
    if from != 0 {
        prefetch_l2(from as *const u8, n * 4 / 16 * 16);
    }
}

/// Runs the stages in this block.
///
/// # Safety
/// As [`q8_1::chain`].
#[inline(always)]
unsafe fn run<D: Dots, const HEADS: usize>(a: Arguments) {
    let memory = dynamic_shared!(CHAIN_MEMORY: [u32]);
    let (thread, n_warps) = (thread_idx_x(), a.layout.n_warps);
    let warp = thread / WARP_SIZE;
    let [list_at, squares_at, sums_at, rings, _] = a.layout.starts();
    let ring = rings + warp * WarpCopies::words(a.layout.places, a.layout.place_words);
    let copies = WarpCopies::new(memory, ring, a.layout.places, a.layout.place_words);
    let list = List { memory, at: list_at, stages: a.stages, end: a.end };
    let mut at = thread;
    while at < (LIST_SLOTS - 2) * STAGE_WORDS {
        let (number, word) = (a.first + at / STAGE_WORDS, at % STAGE_WORDS);
        // SAFETY: the list is as it says.
        list.store(number, word, unsafe { list.fetch(number, word) });
        at += block_dim_x();
    }
    sync_threads();
    // SAFETY: the step was written before the kernels of the step started.
    let step = unsafe { *a.step };
    let mut feed = Feed::new(copies, list, a.first, warp, n_warps, step.position);
    let_next_start();
    let mut block = Block {
        index: block_idx_x(),
        n_blocks: grid_dim_x(),
        warp,
        memory,
        squares_at,
        sums_at,
        set: a.vectors.wrapping_add(step.set as usize * a.set_words as usize),
        position: step.position,
        list,
        fetched: 0,
        fetched_number: 0,
        times: core::ptr::null_mut(),
    };
    let mut number = a.first;
    while number < a.end {
        let stage = list.stage(number);
        if !a.times.is_null() {
            block.times = a.times.wrapping_add((((number - a.first) * block.n_blocks + block.index) * 8) as usize);
        }
        block.mark(0);
        // The stage after those that are known: on its way until this one has its vector.
        let known = a.end.min(number + LIST_SLOTS - 2);
        if thread < STAGE_WORDS {
            // SAFETY: the list is as it says.
            block.fetched = unsafe { list.fetch(number + LIST_SLOTS - 2, thread) };
        }
        block.fetched_number = number + LIST_SLOTS - 2;
        // Also where nothing has been worked on: what the next stage needs must be on its way.
        // SAFETY: as above.
        unsafe { feed.pump(known) };
        if number == a.first {
            wait_for_previous();
        }
        if number + VECTORS_AHEAD < known && block.index == number % block.n_blocks {
            prefetch_vectors(list.stage(number + VECTORS_AHEAD));
        }
        // SAFETY: as above.
        unsafe {
            if stage.kind() == Kind::Attention as u32 {
                attention::run::<HEADS>(stage, &block, &mut feed, known);
            } else if stage.kind() == Kind::Combine as u32 {
                attention::combine(stage, &block);
            } else {
                product::run::<D>(stage, &block, &mut feed, number, known);
            }
        }
        block.mark(7);
        number += 1;
    }
}

/// A kernel for how products are made, and query heads that a block takes at a time: the code of one alone stays in the
/// instruction caches from stage to stage.
macro_rules! define_kernels {
    ($(($suffix:ident, $D:ty, $threads:literal, $heads:literal))*) => {$(
        #[doc = concat!("Products ", stringify!($D), ", blocks of ", stringify!($heads), " query heads.")]
        pub mod $suffix {
            use super::*;

            /// Stages `first` to `end` of a step.
            ///
            /// # Safety
            /// The stages and everything they point to are in device memory and as their fields say; the vectors that
            /// they write are [`UNWRITTEN`](vector::UNWRITTEN) where a launch runs several stages; the step's position
            /// is below the caches' `n_ctx`, and all before it are written. Matrices have the module's formats, and
            /// blocks its query heads. The launch has the shared memory that [`Layout::starts`] ends with. All blocks
            /// of a launch of several stages fit on the GPU at once.
            ///
            /// # Parameters
            /// - `arguments`: the stages, the step, the vectors
            ///
            /// # Thread mapping
            /// One block on each multiprocessor, of `layout.n_warps` warps; how a stage is dealt out to them is its own
            /// matter. Bytes moved: those of the matrices and of the cache, and every vector once for each block, from the
            /// L2 cache.
            #[kernel(suffix = $suffix, overlapping, launch_bounds($threads, 1))]
            pub unsafe fn chain(arguments: Arguments) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<$D, $heads>(arguments) }
            }
        }
    )*};
}
define_kernels! {
    (k_quants_h1, TensorOf<Q4_K, Q6_K>, 384, 1)
    (k_quants_h2, TensorOf<Q4_K, Q6_K>, 384, 2)
    (k_quants_h3, TensorOf<Q4_K, Q6_K>, 384, 3)
    (k_quants_h4, TensorOf<Q4_K, Q6_K>, 384, 4)
    (legacy_h1, TensorOf<Q4_1, Q8_0>, 384, 1)
    (legacy_h2, TensorOf<Q4_1, Q8_0>, 384, 2)
    (legacy_h3, TensorOf<Q4_1, Q8_0>, 384, 3)
    (legacy_h4, TensorOf<Q4_1, Q8_0>, 384, 4)
    (any_h1, Any<Q8_1>, 256, 1)
    (any_h2, Any<Q8_1>, 256, 2)
    (any_h3, Any<Q8_1>, 256, 3)
    (any_h4, Any<Q8_1>, 256, 4)
    (exact_h1, Any<F32Vector>, 256, 1)
    (exact_h2, Any<F32Vector>, 256, 2)
    (exact_h3, Any<F32Vector>, 256, 3)
    (exact_h4, Any<F32Vector>, 256, 4)
}

/// The kernel for f32 or Q8_1 activations, the formats of all matrices, and blocks of `heads` query heads; and the most
/// warps that its blocks have.
///
/// # Panics
/// When there is none: `heads` is not from 1 to [`MAX_HEADS`](attention::MAX_HEADS).
#[cfg(not(target_arch = "nvptx64"))]
pub fn kernel_for(
    is_exact: bool,
    formats: &[crate::formats::Format],
    heads: usize,
) -> (&'static cuda_std::launch::Kernel<(Arguments,)>, u32) {
    use crate::formats::Format;
    let all_are = |known: [Format; 2]| formats.iter().all(|format| known.contains(format));
    let (by_heads, n_warps) = if is_exact {
        ([&exact_h1::CHAIN, &exact_h2::CHAIN, &exact_h3::CHAIN, &exact_h4::CHAIN], 8)
    } else if all_are([Format::Q4_K, Format::Q6_K]) {
        ([&k_quants_h1::CHAIN, &k_quants_h2::CHAIN, &k_quants_h3::CHAIN, &k_quants_h4::CHAIN], 12)
    } else if all_are([Format::Q4_1, Format::Q8_0]) {
        ([&legacy_h1::CHAIN, &legacy_h2::CHAIN, &legacy_h3::CHAIN, &legacy_h4::CHAIN], 12)
    } else {
        ([&any_h1::CHAIN, &any_h2::CHAIN, &any_h3::CHAIN, &any_h4::CHAIN], 8)
    };
    (by_heads[heads - 1], n_warps)
}
