//! Attention of many tokens over the KV cache, which their own keys and values are in already, on tensor cores.
//!
//! A block takes one query head and a run of tokens, 16 to a warp, and goes through the keys and values 64 at a time
//! (FlashAttention: Dao, 2023): scores of its tokens with these keys, softmax kept online (Milakov and Gimelshein, 2018), and
//! the weighted sum of the values. Scores never leave registers: rounded they are the operand of the next product. A token
//! sees no position after its own; what lies beyond the last one is not read.
//!
//! Queries and weights are rounded to f16, as keys and values are; all sums are in f32.

use crate::attention::LOWEST;
#[cfg(not(target_arch = "nvptx64"))]
use crate::kv_cache::KvFormat;
use crate::kv_cache::{HalfKv, KvCodec, KvRef, Q8Kv};
use core::f32::consts::LOG2_E;
use cuda_std::float::{exp2, f32_to_f16x2, max, min, mul_add};
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::ld_global_u32x2;
use cuda_std::pipeline::{commit_copies, copy_async, wait_for_copies};
use cuda_std::shared::DynamicShared;
use cuda_std::tensor::{
    F16, PANEL_ALIGNMENT, PANEL_DEPTH, PANEL_ROW_WORDS, PANEL_STEPS, Panel, TransposedPanel, aligned_start,
    multiply_add, multiply_add_transposed, publish, swizzled,
};
use cuda_std::thread::{block_dim_x, block_idx_x, block_idx_y, grid_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, lane_id, sync_warp, warp_id, warp_reduce_add, warp_reduce_max, warp_uniform,
    warp_vote_any,
};
use cuda_std::{dynamic_shared, kernel};

/// Tokens that a warp takes.
pub const WARP_TOKENS: usize = 16;
/// Most warps in a block; others are a multiple of four.
pub const MAX_WARPS: usize = 8;
/// Keys that are looked at together.
pub const TILE_KEYS: usize = 64;
/// Panels that hold the longest head.
pub const MAX_PANELS: usize = 4;
/// Words of a panel of keys or values.
const PANEL_WORDS: usize = TILE_KEYS * PANEL_ROW_WORDS;
/// Words of the queries of a warp that meet a panel.
const QUERY_WORDS: usize = PANEL_STEPS * WARP_SIZE as usize * 4;
/// Sums that a lane has of a panel's columns.
const SUMS: usize = PANEL_DEPTH / 2;
/// The largest number in f16.
const F16_MAX: f32 = 65_504.0;

/// What a launch works on.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Arguments {
    /// Queries, `[n_tokens, n_head, head_dim]`.
    pub q: *const f32,
    /// Keys.
    pub k_cache: KvRef,
    /// Values.
    pub v_cache: KvRef,
    /// The result, `[n_tokens, n_head, head_dim]`.
    pub out: *mut f32,
    /// The first token's position.
    pub position: u32,
    /// Tokens.
    pub n_tokens: u32,
    /// Query heads.
    pub n_head: u32,
    /// Query heads that share a key-value head.
    pub heads_per_kv: u32,
    /// Values in a head, a multiple of 16.
    pub head_dim: u32,
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Groups of a block's warps, 1 or 2, that share its tokens: of the tiles of keys each takes every other one.
    pub splits: u32,
    /// How many tiles of keys and values each of these has room for: 1 or 2.
    pub stages: u32,
    /// The factor of the scores, above 0, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers and numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Arguments {}

/// Words of shared memory for a block of `warps` warps in `splits` groups, heads of `panels` panels and `stages` tiles.
pub const fn shared_words(warps: usize, panels: usize, splits: usize, stages: usize) -> usize {
    PANEL_ALIGNMENT as usize + panels * (2 * splits * stages * PANEL_WORDS + warps / splits * QUERY_WORDS)
}

/// How a thread takes part in copying tiles: a piece of 16 bytes of every so many rows.
#[derive(Clone, Copy)]
struct Share<const PANELS: usize> {
    row: u32,
    row_step: u32,
    piece: u32,
    head_dim: u32,
}

impl<const PANELS: usize> Share<PANELS> {
    const PANEL_PIECES: u32 = PANEL_DEPTH as u32 / 8;

    #[inline(always)]
    fn new(head_dim: u32) -> Self {
        // Neighbouring threads copy neighbouring pieces of a row. Some have none where a row is three panels.
        let row_threads = Self::PANEL_PIECES * PANELS.next_power_of_two() as u32;
        let thread = thread_idx_x();
        Self {
            row: thread / row_threads,
            row_step: block_dim_x() / row_threads,
            piece: thread % row_threads,
            head_dim,
        }
    }

    /// Starts copying 64 rows of a cache from `first` on into panels at word `at`; zeros beyond row `end` and beyond the
    /// head. `head_at` is the head's first value.
    ///
    /// # Safety
    /// The head's rows up to `end` are readable.
    #[inline(always)]
    unsafe fn copy<C: Tiles>(
        self,
        memory: DynamicShared<u32>,
        at: u32,
        cache: KvRef,
        head_at: usize,
        first: u32,
        end: u32,
    ) {
        if PANELS == 3 && self.piece >= Self::PANEL_PIECES * 3 {
            return;
        }
        let pieces = Pieces {
            memory,
            cache,
            panel_at: at as usize + (self.piece / Self::PANEL_PIECES) as usize * PANEL_WORDS,
            piece: (self.piece % Self::PANEL_PIECES) as usize,
            from: head_at + (first * self.head_dim + 8 * self.piece) as usize,
            head_dim: self.head_dim,
            // A head's last pieces are zeros.
            n_wanted: if 8 * self.piece < self.head_dim { end.saturating_sub(first) } else { 0 },
        };
        let mut row = self.row;
        while row < TILE_KEYS as u32 {
            if C::WAITS && PANELS <= 2 {
                // Four on their way at once, written out: an array of them would be put into local memory.
                let (r1, r2, r3) = (row + self.row_step, row + 2 * self.row_step, row + 3 * self.row_step);
                // SAFETY: the caller's promise.
                let (a, b, c, d) = unsafe {
                    (
                        pieces.start::<C>(row),
                        pieces.start::<C>(r1),
                        pieces.start::<C>(r2),
                        pieces.start::<C>(r3),
                    )
                };
                pieces.finish::<C>(row, a);
                pieces.finish::<C>(r1, b);
                pieces.finish::<C>(r2, c);
                pieces.finish::<C>(r3, d);
                row += 4 * self.row_step;
            } else {
                // SAFETY: the caller's promise.
                let pending = unsafe { pieces.start::<C>(row) };
                pieces.finish::<C>(row, pending);
                row += self.row_step;
            }
        }
    }
}

/// A thread's pieces of a tile, one in each of its rows.
#[derive(Clone, Copy)]
struct Pieces {
    memory: DynamicShared<u32>,
    cache: KvRef,
    /// Where the panel starts, and the piece's number in its rows.
    panel_at: usize,
    piece: usize,
    /// The first value of row 0's piece.
    from: usize,
    head_dim: u32,
    /// Rows that are there.
    n_wanted: u32,
}

impl Pieces {
    #[inline(always)]
    fn place(&self, row: u32) -> usize {
        self.panel_at + row as usize * PANEL_ROW_WORDS + 4 * swizzled(row as usize, self.piece)
    }

    /// Asks for the piece of row `row`; of none beyond the tile.
    ///
    /// # Safety
    /// It is readable where it is wanted.
    #[inline(always)]
    unsafe fn start<C: Tiles>(&self, row: u32) -> C::Pending {
        let (row, is_wanted) = (row.min(TILE_KEYS as u32 - 1), row < self.n_wanted.min(TILE_KEYS as u32));
        let from = self.from + (row * self.head_dim) as usize;
        // SAFETY: the caller's promise.
        unsafe { C::start(self.memory, self.place(row), self.cache, from, is_wanted) }
    }

    /// Stores it.
    #[inline(always)]
    fn finish<C: Tiles>(&self, row: u32, pending: C::Pending) {
        if row < TILE_KEYS as u32 {
            C::finish(self.memory, self.place(row), pending);
        }
    }
}

/// A cache's way into panels, eight values at a time.
trait Tiles: KvCodec {
    /// Whether the thread waits for what it has asked for.
    const WAITS: bool;
    /// What is between asking for values and storing them.
    type Pending: Copy;

    /// Asks for values `from` to `from + 7`, to go to four words at `place` as f16; zeros where they are not wanted.
    ///
    /// # Safety
    /// They are written where they are wanted.
    unsafe fn start(
        memory: DynamicShared<u32>,
        place: usize,
        cache: KvRef,
        from: usize,
        is_wanted: bool,
    ) -> Self::Pending;

    /// Stores them. They are there once the thread has waited for its copies.
    fn finish(memory: DynamicShared<u32>, place: usize, pending: Self::Pending);
}

impl Tiles for HalfKv {
    const WAITS: bool = false;
    type Pending = ();

    #[inline(always)]
    unsafe fn start(memory: DynamicShared<u32>, place: usize, cache: KvRef, from: usize, is_wanted: bool) {
        // SAFETY: the caller's promise.
        unsafe { copy_async(memory, place, cache.values.wrapping_add(2 * from), is_wanted) };
    }

    #[inline(always)]
    fn finish(_memory: DynamicShared<u32>, _place: usize, (): ()) {}
}

impl Tiles for Q8Kv {
    const WAITS: bool = true;
    type Pending = <Self as KvCodec>::Raw;

    #[inline(always)]
    unsafe fn start(
        _memory: DynamicShared<u32>,
        _place: usize,
        cache: KvRef,
        from: usize,
        is_wanted: bool,
    ) -> Self::Pending {
        // SAFETY: the caller's promise.
        if is_wanted { unsafe { Self::fetch(cache, from) } } else { Self::ZEROS }
    }

    #[inline(always)]
    fn finish(memory: DynamicShared<u32>, place: usize, raw: Self::Pending) {
        memory.set4(place, Self::halves(raw));
    }
}

/// Where a block's tiles come from and go to.
#[derive(Clone, Copy)]
struct Tiling<const PANELS: usize> {
    a: Arguments,
    /// The head's first value in the cache.
    kv_head: usize,
    n_keys: u32,
    n_rounds: u32,
    memory: DynamicShared<u32>,
    tiles_at: u32,
    share: Share<PANELS>,
}

impl<const PANELS: usize> Tiling<PANELS> {
    /// Words of a tile: keys, then values.
    const WORDS: u32 = (2 * PANELS * PANEL_WORDS) as u32;

    /// The word at which a tile starts.
    #[inline(always)]
    fn at(&self, round: u32, split: u32) -> u32 {
        let stage = if self.a.stages > 1 { round % 2 } else { 0 };
        self.tiles_at + (stage * self.a.splits + split) * Self::WORDS
    }

    /// Starts copying a round's tiles, where there is such a round.
    ///
    /// # Safety
    /// The cache is written up to the last key.
    #[inline(always)]
    unsafe fn copy<C: Tiles>(&self, round: u32) {
        if round < self.n_rounds {
            for split in 0..self.a.splits {
                let (at, first) = (self.at(round, split), (round * self.a.splits + split) * TILE_KEYS as u32);
                let (memory, head, n_keys) = (self.memory, self.kv_head, self.n_keys);
                // SAFETY: the caller's promise.
                unsafe {
                    self.share.copy::<C>(memory, at, self.a.k_cache, head, first, n_keys);
                    self.share.copy::<C>(memory, at + Self::WORDS / 2, self.a.v_cache, head, first, n_keys);
                }
            }
        }
        commit_copies();
    }
}

/// Attention of a block's tokens, heads of up to `PANELS` panels.
///
/// # Safety
/// The arguments are as their fields say; the cache is written up to the last token; the launch has the shared memory that
/// [`shared_words`] gives.
#[inline(always)]
unsafe fn attend<C: Tiles, const PANELS: usize>(a: Arguments) {
    let_next_start();
    wait_for_previous();
    let memory = dynamic_shared!(PREFILL_ATTENTION_MEMORY: [u32]);
    let (warp, lane) = (warp_uniform(warp_id()), lane_id());
    let (group, member) = (lane / 4, lane % 4);
    let split_warps = block_dim_x() / WARP_SIZE / a.splits;
    let (split, warp) = (warp / split_warps, warp % split_warps);
    let block_tokens = split_warps * WARP_TOKENS as u32;
    // The last tokens have most to look at: they come first.
    let first_token = (grid_dim_x() - 1 - block_idx_x()) * block_tokens;
    let head = block_idx_y();
    let n_keys = a.position + (first_token + block_tokens).min(a.n_tokens);
    let n_rounds = n_keys.div_ceil(TILE_KEYS as u32 * a.splits);
    let kv_head = (head / a.heads_per_kv) as usize * a.n_ctx as usize * a.head_dim as usize;

    let tiles_at = aligned_start(memory);
    let tile_words = Tiling::<PANELS>::WORDS;
    let queries_at = tiles_at + a.splits * a.stages * tile_words + warp * (PANELS * QUERY_WORDS) as u32;
    let tiles =
        Tiling { a, kv_head, n_keys, n_rounds, memory, tiles_at, share: Share::<PANELS>::new(a.head_dim) };
    // SAFETY: the cache is written up to the last token.
    unsafe { tiles.copy::<C>(0) };

    // The queries of this lane's two tokens, as the products take them; zeros for tokens that there are not.
    let tokens = [0, 8].map(|row| first_token + warp * WARP_TOKENS as u32 + group + row);
    let query = |i: usize, dim: u32| -> u32 {
        if tokens[i] >= a.n_tokens || dim >= a.head_dim {
            return 0;
        }
        // SAFETY: the token and the dimensions exist; both are even.
        let pair = unsafe {
            let row = (tokens[i] * a.n_head + head) as usize * a.head_dim as usize;
            ld_global_u32x2(a.q.add(row + dim as usize).cast())
        };
        let [low, high] = pair.map(|bits| min(max(f32::from_bits(bits), -F16_MAX), F16_MAX));
        f32_to_f16x2(low, high)
    };
    let query_at = |panel: usize, step: usize| {
        (queries_at as usize + panel * QUERY_WORDS) + (step * WARP_SIZE as usize + lane as usize) * 4
    };
    for panel in 0..PANELS {
        for step in 0..PANEL_STEPS {
            let dim = (panel * PANEL_DEPTH + step * 16) as u32 + 2 * member;
            let words = [query(0, dim), query(1, dim), query(0, dim + 8), query(1, dim + 8)];
            memory.set4(query_at(panel, step), words);
        }
    }

    // Weights are powers of 2: the scores' factor turns e^x into 2^x.
    let factor = a.scale * LOG2_E;
    let (mut largest, mut sum) = ([LOWEST; 2], [0.0f32; 2]);
    let mut out = [[0.0f32; SUMS]; PANELS];
    let mut round = 0;
    while round < n_rounds {
        wait_for_copies::<0>();
        publish();
        // Everybody's copies are there, and everybody is through with the round before: its place may be filled again.
        sync_threads();
        if a.stages > 1 {
            // SAFETY: as above.
            unsafe { tiles.copy::<C>(round + 1) };
        }

        let at = tiles.at(round, split);
        let mut scores = [0.0f32; SUMS];
        for panel in 0..PANELS {
            let q = [0, 1, 2, 3].map(|step| memory.get4(query_at(panel, step)));
            let k = Panel::new(memory, at + (panel * PANEL_WORDS) as u32);
            multiply_add::<F16, SUMS>(&mut scores, q, k, TILE_KEYS as u32);
        }

        // Keys after a token's own position count for nothing; only the last tiles have any.
        let first_key = (round * a.splits + split) * TILE_KEYS as u32;
        let last_seen = [a.position + tokens[0], a.position + tokens[1]];
        let is_masked = first_key + TILE_KEYS as u32 > a.position + first_token + warp * WARP_TOKENS as u32;
        if is_masked {
            // The lanes need not meet; but so it stays a branch, which most tiles jump over.
            sync_warp(FULL_MASK);
            for (i, score) in scores.iter_mut().enumerate() {
                let key = first_key + (i / 4 * 8 + i % 2) as u32 + 2 * member;
                *score = if key > last_seen[i / 2 % 2] { f32::NEG_INFINITY } else { *score };
            }
        }
        let mut new = largest;
        for (i, &score) in scores.iter().enumerate() {
            new[i / 2 % 2] = max(new[i / 2 % 2], score);
        }
        // Four lanes share a token.
        let new = new.map(|largest| warp_reduce_max(FULL_MASK, largest, 4));
        // The longer a context is, the more seldom is there a larger score than all before.
        if warp_vote_any(FULL_MASK, new[0] > largest[0] || new[1] > largest[1]) {
            let correction = [exp2((largest[0] - new[0]) * factor), exp2((largest[1] - new[1]) * factor)];
            largest = new;
            sum = [sum[0] * correction[0], sum[1] * correction[1]];
            for out in &mut out {
                for (i, value) in out.iter_mut().enumerate() {
                    *value *= correction[i / 2 % 2];
                }
            }
        }
        let offset = [largest[0] * -factor, largest[1] * -factor];
        for (i, score) in scores.iter_mut().enumerate() {
            *score = exp2(mul_add(*score, factor, offset[i / 2 % 2]));
            sum[i / 2 % 2] += *score;
        }

        let mut weights = [[0u32; 4]; PANEL_STEPS];
        for (step, words) in weights.iter_mut().enumerate() {
            for (i, word) in words.iter_mut().enumerate() {
                let at = 8 * step + 2 * i;
                *word = f32_to_f16x2(scores[at], scores[at + 1]);
            }
        }
        for (panel, out) in out.iter_mut().enumerate() {
            let v = TransposedPanel::new(memory, at + tile_words / 2 + (panel * PANEL_WORDS) as u32);
            multiply_add_transposed::<F16>(out, weights, v);
        }
        round += 1;
        if a.stages == 1 {
            sync_threads();
            // SAFETY: as above.
            unsafe { tiles.copy::<C>(round) };
        }
    }

    // Each group leaves what it has, lane by lane, for the first one to add the second one's to its own. Were it the second
    // one alone, the compiler would give each group a barrier of its own, which the hardware takes and its tools do not.
    if a.splits > 1 {
        let words = WARP_SIZE * (PANELS * SUMS + 4) as u32;
        // The tiles are not needed any more.
        sync_threads();
        let place = |split: u32, i: usize| {
            (tiles_at + (split * split_warps + warp) * words + lane) as usize + i * WARP_SIZE as usize
        };
        for (panel, out) in out.iter().enumerate() {
            for (i, value) in out.iter().enumerate() {
                memory.set(place(split, panel * SUMS + i), value.to_bits());
            }
        }
        for i in 0..2 {
            memory.set(place(split, PANELS * SUMS + i), largest[i].to_bits());
            memory.set(place(split, PANELS * SUMS + 2 + i), sum[i].to_bits());
        }
        sync_threads();
        if split > 0 {
            return;
        }
        let other = |i: usize| f32::from_bits(memory.get(place(1, i)));
        let (mut own_factors, mut other_factors) = ([0.0; 2], [0.0; 2]);
        for i in 0..2 {
            let other_largest = other(PANELS * SUMS + i);
            let new = max(largest[i], other_largest);
            own_factors[i] = exp2((largest[i] - new) * factor);
            other_factors[i] = exp2((other_largest - new) * factor);
            sum[i] = mul_add(sum[i], own_factors[i], other(PANELS * SUMS + 2 + i) * other_factors[i]);
        }
        for (panel, out) in out.iter_mut().enumerate() {
            for (i, value) in out.iter_mut().enumerate() {
                let row = i / 2 % 2;
                let added = other(panel * SUMS + i) * other_factors[row];
                *value = mul_add(*value, own_factors[row], added);
            }
        }
    }

    let total = sum.map(|sum| warp_reduce_add(FULL_MASK, sum, 4));
    let factors = total.map(|total| 1.0 / total);
    for (panel, out) in out.iter().enumerate() {
        for block in 0..SUMS / 4 {
            let dim = (panel * PANEL_DEPTH + 8 * block) as u32 + 2 * member;
            for i in 0..2 {
                if tokens[i] < a.n_tokens && dim < a.head_dim {
                    let values = [0, 1].map(|column| out[4 * block + 2 * i + column] * factors[i]);
                    // SAFETY: the token and the dimensions exist, and are this lane's own; both are even.
                    unsafe {
                        let row = (tokens[i] * a.n_head + head) as usize * a.head_dim as usize;
                        *a.out.add(row + dim as usize).cast::<[f32; 2]>() = values;
                    }
                }
            }
        }
    }
}

macro_rules! define_kernels {
    ($(($module:ident, $panels:literal, $Codec:ident, $format:ident))*) => {
        $(
            #[doc = concat!("Heads of ", stringify!($panels), " panels of 64 values, a cache in ", stringify!($format), ".")]
            pub mod $module {
                use super::*;

                /// Attention of many tokens over the cache.
                ///
                /// # Safety
                /// The arguments are as their fields say, in device memory; the cache is written up to the last token,
                /// whose position is below `n_ctx`; the launch has the shared memory that [`shared_words`] gives.
                ///
                /// # Parameters
                /// - `arguments`: queries, cache, result, and their shapes
                ///
                /// # Thread mapping
                /// Grid: tiles of tokens, the last one first, by query heads. Blocks of 4 or 8 warps, of which each takes 16
                /// tokens, or two of them the same. Bytes moved: keys and values once for every tile and head, mostly from the L2 cache.
                #[kernel(suffix = $module, overlapping, launch_bounds(256, 1))]
                pub unsafe fn prefill_attention(arguments: Arguments) {
                    // SAFETY: the caller keeps the contract above, which is the one asked for.
                    unsafe { attend::<$Codec, $panels>(arguments) }
                }
            }
        )*

        /// The kernel for heads of so many panels, 1 to [`MAX_PANELS`], and a format of the cache.
        #[cfg(not(target_arch = "nvptx64"))]
        pub fn kernel_for(panels: usize, format: KvFormat) -> &'static cuda_std::launch::Kernel<(Arguments,)> {
            match (panels, format) {
                $(($panels, KvFormat::$format) => &$module::PREFILL_ATTENTION,)*
                _ => panic!("heads of {panels} panels"),
            }
        }
    };
}
define_kernels! {
    (d64, 1, HalfKv, F16)
    (d128, 2, HalfKv, F16)
    (d192, 3, HalfKv, F16)
    (d256, 4, HalfKv, F16)
    (q8_0_d64, 1, Q8Kv, Q8_0)
    (q8_0_d128, 2, Q8Kv, Q8_0)
    (q8_0_d192, 3, Q8Kv, Q8_0)
    (q8_0_d256, 4, Q8Kv, Q8_0)
}
