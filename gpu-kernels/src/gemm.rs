//! Matrix products with quantized weights for many tokens at once, on tensor cores.
//!
//! A block takes 128 rows of the matrix, 16 to a warp, and a tile of tokens. Each lane reads units of weights as they lie
//! in device memory, dequantizes them in its registers to what the tensor cores take, and multiplies them with the
//! activations, which come into shared memory by asynchronous copies ([`crate::panels`] says how both fit together). So
//! weights never pass through shared memory, and are dequantized once for a whole tile of tokens. While one group of
//! four warps waits for its products, the other one dequantizes.
//!
//! Where there are fewer tiles than multiprocessors, several blocks share a tile, each with a part of the columns. All
//! leave their sums in device memory, and the last one to come adds them up, in a fixed order: none waits.
//!
//! At the end the sums of a warp go through shared memory to be finished quad by quad, token by token, by what finishes a
//! matrix-vector product ([`crate::gemv::epilogue`]).
//!
//! Bytes moved: the matrix once for each tile of tokens (from the L2 cache but for the first one), the activations once
//! for every 128 rows, from the L2 cache.

use crate::formats::tile::{DeviceTile, Fetched, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, UNIT, WeightFormat, WeightUnit};
use crate::gemv::MatrixRef;
use crate::gemv::band::Quad;
use crate::gemv::epilogue::{Epilogue, Ready as _};
use crate::many_output::{ForTokens, Output};
use crate::panels::{GROUP_PANELS, GROUP_STEPS, GROUP_UNITS, PanelPiece, Panels, ROW_BYTES, rest};
use core::ops::Range;
use cuda_std::atomic::{atomic_add_u32, thread_fence};
use cuda_std::float::f32_to_bf16x2;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::memory::ld_global_u32;
use cuda_std::pipeline::{BlockCopies, Piece};
use cuda_std::shared::DynamicShared;
use cuda_std::tensor::{
    Bf16, PANEL_ALIGNMENT, PANEL_ROW_WORDS, PANEL_STEPS, Panel, aligned_start, multiply_add,
};
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, sync_warp, warp_id, warp_uniform};
use cuda_std::{dynamic_shared, kernel};

/// Warps in a block: two groups of four.
pub const WARPS: usize = 8;
/// Threads in a block.
pub const BLOCK_DIM: usize = WARPS * WARP_SIZE as usize;
/// Quads that a warp takes.
const WARP_QUADS: usize = 4;
/// Quads that a block takes.
pub const BLOCK_QUADS: usize = WARPS * WARP_QUADS;
/// Most places for activations in shared memory.
pub const MAX_STAGES: usize = 8;

/// A launch's shape.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Matrices, one below the other, up to three.
    pub n_parts: u32,
    /// Tokens.
    pub n_tokens: u32,
    /// Tiles of tokens.
    pub token_tiles: u32,
    /// Blocks that share a tile.
    pub splits: u32,
    /// Places for activations in shared memory.
    pub stages: u32,
}

/// What blocks that share a tile leave each other; not read where none do.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Splits {
    /// `[tiles, splits, sums, BLOCK_DIM]`, as many sums as a lane has.
    pub sums: *mut f32,
    /// How many blocks of a tile have come: one per tile, 0 between launches.
    pub n_ended: *mut u32,
}

#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: pointers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Splits {}
#[cfg(not(target_arch = "nvptx64"))]
// SAFETY: numbers in C's layout, alike on both sides.
unsafe impl cuda_std::launch::KernelArg for Shape {}

/// Tokens in a tile, of which a lane has so many sums.
pub const fn tile_tokens(sums: usize) -> usize {
    2 * sums
}

/// Words of a place in shared memory: a panel of a tile's tokens, two on the exact path.
pub const fn stage_words(sums: usize, is_exact: bool) -> usize {
    tile_tokens(sums) * PANEL_ROW_WORDS * if is_exact { 2 } else { 1 }
}

/// Words from one token to the next where a warp's sums wait to be finished: 16 rows, and as many more as it takes for lanes
/// to write to different banks.
const TOKEN_WORDS: usize = WARP_QUADS * TILE_ROWS + 4;

/// Words for `stages` places, and for the sums that take their room at the end.
const fn place_words(sums: usize, is_exact: bool, stages: usize) -> usize {
    let ring = stages * stage_words(sums, is_exact);
    let sums = WARPS * tile_tokens(sums) * TOKEN_WORDS;
    if ring > sums { ring } else { sums }
}

/// Words of shared memory that a block needs for `stages` places.
pub const fn shared_words(sums: usize, is_exact: bool, stages: usize) -> usize {
    BlockCopies::barrier_words(stages as u32) as usize
        + PANEL_ALIGNMENT as usize
        + place_words(sums, is_exact, stages)
}

/// A unit of weights, in pairs of neighbours rounded to bfloat16; on the exact path also what is left of them.
#[inline(always)]
fn fragments<W: WeightUnit, const EXACT: bool>(unit: &W) -> [[u32; UNIT / 2]; 2] {
    let w = unit.dequantize();
    let (mut high, mut low) = ([0; UNIT / 2], [0; UNIT / 2]);
    for i in 0..UNIT / 2 {
        let pair = [w[2 * i], w[2 * i + 1]];
        high[i] = f32_to_bf16x2(pair[0], pair[1]);
        if EXACT {
            low[i] = rest(pair, high[i]);
        }
    }
    [high, low]
}

/// The operands of a panel's steps, of the units of a lane's two rows.
#[inline(always)]
fn operands(first: &[u32; UNIT / 2], second: &[u32; UNIT / 2], panel: usize) -> [[u32; 4]; PANEL_STEPS] {
    let step = |step: usize| {
        let at = 2 * (PANEL_STEPS * panel + step);
        [first[at], second[at], first[at + 1], second[at + 1]]
    };
    const { assert!(PANEL_STEPS == 4 && GROUP_STEPS == 8) };
    [step(0), step(1), step(2), step(3)]
}

/// The sums of a lane over some groups of columns.
///
/// # Safety
/// The matrix, of format `F`, has the quad; the panels are as their fields say, and have the groups.
#[inline(always)]
unsafe fn products<F: WeightFormat, const SUMS: usize, const EXACT: bool>(
    matrix: MatrixRef,
    quad: u32,
    panels: Panels,
    groups: Range<u32>,
    first_token: u32,
    memory: DynamicShared<u32>,
    copies: &mut BlockCopies,
) -> [f32; SUMS] {
    let (group, member) = (lane_id() / 4, lane_id() % 4);
    let (n_units, n_groups) = (panels.n_units as usize, groups.end - groups.start);
    let n_panels = n_groups * GROUP_PANELS as u32;
    let first_panel = groups.start * GROUP_PANELS as u32;
    let wanted = (panels.n_rows - first_token).min(tile_tokens(SUMS) as u32);
    let bytes = wanted * ROW_BYTES as u32;
    let low_at = stage_words(SUMS, false) as u32;
    let pieces = |panel: u32| {
        let offset = ((first_panel + panel) as usize * panels.n_rows as usize + first_token as usize)
            * (ROW_BYTES / 16);
        let from = |panels: *const PanelPiece| panels.wrapping_add(offset).cast();
        [
            Piece { from: from(panels.high), to: 0, bytes },
            Piece { from: from(panels.low), to: low_at, bytes: if EXACT { bytes } else { 0 } },
        ]
    };
    // SAFETY: the panel is one of them.
    let start = |copies: &BlockCopies, stage: u32| unsafe {
        let [high, low] = pieces(stage);
        if EXACT { copies.start(stage, [high, low]) } else { copies.start(stage, [high]) }
    };
    // SAFETY: likewise.
    let restart = |copies: &BlockCopies, panel: u32| unsafe {
        let [high, low] = pieces(panel);
        if EXACT { copies.restart(1, [high, low]) } else { copies.restart(1, [high]) }
    };
    // The quad's strip, and where in it the quad's rows begin and all end.
    let (strip, in_strip) = (quad / matrix.strip_quads, quad % matrix.strip_quads);
    let first_unit = in_strip as usize * n_units;
    let strip_units = matrix.strip_quads as usize * n_units;
    // SAFETY: the quad is one of the matrix's.
    let tiles = unsafe { matrix.tiles.add(strip as usize * matrix.strip_bytes as usize) };
    // The place of the unit that this lane takes of a group, and its tile. Beyond the last one it is that again, times
    // zeros.
    let place = |number: usize, row: usize| {
        let unit = first_unit + (number * GROUP_UNITS + member as usize).min(n_units - 1);
        let tile = unit / TILE_UNITS;
        let n_units = TILE_UNITS.min(strip_units - tile * TILE_UNITS);
        // SAFETY: the tile is one of the strip's.
        let source = unsafe { DeviceTile::at(tiles.add(tile * matrix.tile_bytes as usize)) };
        (source, Place { n_units, row, unit: unit % TILE_UNITS })
    };
    // Rows 0 and 2 of the quad, or 1 and 3.
    let rows = [group as usize % 2, group as usize % 2 + 2];
    // Those of the next group are on their way while this one is worked on, unless they would take too many registers.
    let is_small = const { size_of::<F::Unit>() <= 48 };
    let fetch = |number: usize| {
        rows.map(|row| {
            let (tile, place) = place(number, row);
            Fetched::fetch::<F>(tile, place)
        })
    };
    let mut sums = [0.0f32; SUMS];
    let mut fetched = if is_small { Some(fetch(groups.start as usize)) } else { None };
    // The weights depend on nothing, the activations on the kernel before.
    wait_for_previous();
    let stages = copies.stages();
    for stage in 0..stages.min(n_panels) {
        start(copies, stage);
    }
    let mut panel = 0;
    for number in groups.start as usize..groups.end as usize {
        let unit = |i: usize| {
            let (tile, place) = place(number, rows[i]);
            match &fetched {
                Some(fetched) => fetched[i].unpack::<F>(place),
                None => F::unpack(tile, place),
            }
        };
        let [first, first_low] = fragments::<_, EXACT>(&unit(0));
        let [second, second_low] = fragments::<_, EXACT>(&unit(1));
        if is_small {
            fetched = Some(fetch((number + 1).min(groups.end as usize - 1)));
        }
        for half in 0..GROUP_PANELS {
            copies.wait();
            // The place of the panel before this one.
            if panel > 0 && panel + stages - 1 < n_panels {
                restart(copies, panel + stages - 1);
            }
            let high = Panel::new(memory, copies.place());
            let a = operands(&first, &second, half);
            multiply_add::<Bf16, SUMS>(&mut sums, a, high, wanted);
            if EXACT {
                let low = Panel::new(memory, copies.place() + low_at);
                multiply_add::<Bf16, SUMS>(&mut sums, a, low, wanted);
                multiply_add::<Bf16, SUMS>(&mut sums, operands(&first_low, &second_low, half), high, wanted);
            }
            copies.release();
            panel += 1;
        }
    }
    sums
}

/// Finishes a warp's quads for every token of the tile. The words from `at` on are the warp's.
struct Finish {
    memory: DynamicShared<u32>,
    /// The word at which the sums start.
    at: u32,
    first: Quad,
    matrix: MatrixRef,
    tokens: Range<u32>,
}

impl ForTokens for Finish {
    #[inline(always)]
    unsafe fn with<E: Epilogue>(self, epilogue: impl Fn(u32) -> E) {
        let Self { memory, at, first, matrix, tokens } = self;
        let lane = lane_id();
        let quad = Quad { number: first.number + lane % WARP_QUADS as u32, ..first };
        let first_token = tokens.start;
        let mut token = first_token + lane / WARP_QUADS as u32;
        while token < tokens.end && quad.number < matrix.n_quads {
            let place =
                at + (token - first_token) * TOKEN_WORDS as u32 + lane % WARP_QUADS as u32 * TILE_ROWS as u32;
            let sums = memory.get4(place as usize).map(f32::from_bits);
            let epilogue = epilogue(token);
            // SAFETY: the quad is the matrix's, and only this thread finishes it for this token.
            unsafe {
                let prepared = epilogue.prepare(quad, matrix);
                epilogue.ready(quad, matrix, prepared).finish(sums);
            }
            token += WARP_SIZE / WARP_QUADS as u32;
        }
    }
}

/// Multiplies the matrices, one below the other, with the tokens' vectors.
///
/// # Safety
/// As the kernels below.
#[inline(always)]
unsafe fn run<const SUMS: usize, const EXACT: bool>(
    matrices: [MatrixRef; 3],
    panels: Panels,
    shape: Shape,
    splits: Splits,
    output: Output,
) {
    let_next_start();
    let memory = dynamic_shared!(GEMM_MEMORY: [u32]);
    let warp = warp_uniform(warp_id());
    // Blocks of the same rows are neighbours: the weights are in the L2 cache for all but the first.
    let token_tile = block_idx_x() % shape.token_tiles;
    let (row_tile, split) =
        (block_idx_x() / shape.token_tiles / shape.splits, block_idx_x() / shape.token_tiles % shape.splits);
    let tile = row_tile * shape.token_tiles + token_tile;
    let n_groups = panels.n_groups();
    let groups = split * n_groups / shape.splits..(split + 1) * n_groups / shape.splits;
    let tiles_of = |matrix: MatrixRef| matrix.n_quads.div_ceil(BLOCK_QUADS as u32);
    let (mut part, mut matrix, mut row_tile) = (0, matrices[0], row_tile);
    while part + 1 < shape.n_parts && row_tile >= tiles_of(matrix) {
        row_tile -= tiles_of(matrix);
        part += 1;
        matrix = if part == 1 { matrices[1] } else { matrices[2] };
    }
    let warp_quad = row_tile * BLOCK_QUADS as u32 + warp * WARP_QUADS as u32;
    let first_token = token_tile * tile_tokens(SUMS) as u32;

    let places = aligned_start(memory);
    // The barriers behind the places, whose start is aligned.
    let mut copies = BlockCopies::new(
        memory,
        places + place_words(SUMS, EXACT, shape.stages as usize) as u32,
        places,
        shape.stages,
        stage_words(SUMS, EXACT) as u32,
    );
    // A lane's quad; warps beyond the last one work on that again, for the others to go on with.
    let quad = (warp_quad + lane_id() / 8).min(matrix.n_quads - 1);
    macro_rules! dispatch {
        ($(($Type:ident, $name:ident))*) => {
            match matrix.format {
                // SAFETY: the matrix is of this format and has the quad.
                $(f if f == Format::$Type as u32 => unsafe {
                    products::<crate::formats::$Type, SUMS, EXACT>(
                        matrix, quad, panels, groups, first_token, memory, &mut copies,
                    )
                },)*
                _ => [0.0; SUMS],
            }
        };
    }
    let mut sums = crate::for_each_format!(dispatch);

    // Nobody reads activations any more.
    sync_threads();
    if shape.splits > 1 {
        let lane_sums = |split: u32| {
            let first = (tile * shape.splits + split) as usize * SUMS * BLOCK_DIM;
            splits.sums.wrapping_add(first + thread_idx_x() as usize)
        };
        for (i, &sum) in sums.iter().enumerate() {
            // SAFETY: the tile's and split's sums are this block's to write.
            unsafe { *lane_sums(split).add(i * BLOCK_DIM) = sum };
        }
        thread_fence();
        sync_threads();
        if thread_idx_x() == 0 {
            // SAFETY: the tile's counter.
            let before = unsafe { atomic_add_u32(splits.n_ended.add(tile as usize), 1) };
            memory.set(places as usize, u32::from(before + 1 == shape.splits));
        }
        sync_threads();
        if memory.get(places as usize) == 0 {
            return;
        }
        thread_fence();
        sums = [0.0; SUMS];
        for split in 0..shape.splits {
            // All of a split's on their way at once.
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: all blocks of the tile have written theirs.
                *sum += unsafe { f32::from_bits(ld_global_u32(lane_sums(split).add(i * BLOCK_DIM).cast())) };
            }
        }
        if thread_idx_x() == 0 {
            // SAFETY: the tile's counter, which no other block uses any more.
            unsafe { *splits.n_ended.add(tile as usize) = 0 };
        }
        // The word that says who is last is overwritten from here on.
        sync_threads();
    }
    let at = places + warp * (tile_tokens(SUMS) * TOKEN_WORDS) as u32;
    let (group, member) = (lane_id() / 4, lane_id() % 4);
    let lane_at = at + group / 2 * TILE_ROWS as u32 + group % 2;
    for column in 0..SUMS / 2 {
        let token = (column / 2 * 8 + column % 2) as u32 + 2 * member;
        let place = (lane_at + token * TOKEN_WORDS as u32) as usize;
        memory.set(place, sums[column / 2 * 4 + column % 2].to_bits());
        memory.set(place + 2, sums[column / 2 * 4 + column % 2 + 2].to_bits());
    }
    sync_warp(FULL_MASK);

    let first = Quad { part, number: warp_quad };
    let tokens = first_token..(first_token + tile_tokens(SUMS) as u32).min(shape.n_tokens);
    // SAFETY: the output is as its fields say.
    unsafe { output.dispatch(Finish { memory, at, first, matrix, tokens }) };
}

macro_rules! define_kernels {
    ($(($module:ident, $sums:literal, $exact:literal, $blocks:literal, $doc:literal))*) => {$(
        #[doc = $doc]
        pub mod $module {
            use super::*;

            /// Sums that a lane has: half as many as a tile has tokens.
            pub const SUMS: usize = $sums;
            /// Whether it is the exact path.
            pub const EXACT: bool = $exact;

            /// The product of up to three matrices, one below the other, and `n_tokens` vectors.
            ///
            /// # Safety
            /// The matrices, the panels and the output are as their fields say, in device memory, all of as many columns;
            /// the launch has the shared memory that [`shared_words`] gives; rows are in the order that the output asks
            /// for.
            ///
            /// # Parameters
            /// - `first`, `second`, `third`: `[n_rows, n_cols]` each
            /// - `panels`: the vectors
            /// - `shape`: how many matrices and tokens, and how they are dealt out
            /// - `splits`: room for blocks that share a tile
            /// - `output`: where the products go
            ///
            /// # Thread mapping
            /// A block of [`BLOCK_DIM`] threads takes 128 rows, a tile of tokens, and one split of the columns; in the grid tiles of
            /// tokens come first, then splits.
            #[kernel(suffix = $module, overlapping, launch_bounds(256, $blocks))]
            pub unsafe fn gemm(
                first: MatrixRef,
                second: MatrixRef,
                third: MatrixRef,
                panels: Panels,
                shape: Shape,
                splits: Splits,
                output: Output,
            ) {
                // SAFETY: the caller keeps the contract above, which is the one asked for.
                unsafe { run::<SUMS, EXACT>([first, second, third], panels, shape, splits, output) }
            }
        }
    )*};
}
define_kernels! {
    (tokens_256, 128, false, 1, "Tiles of 256 tokens.")
    (tokens_128, 64, false, 1, "Tiles of 128 tokens.")
    (tokens_64, 32, false, 1, "Tiles of 64 tokens.")
    (exact, 32, true, 1, "Tiles of 64 tokens, exact.")
}
// Two blocks on a multiprocessor, since it is weights that they wait for; but on GPUs newer than Hopper that would
// take more registers than there are.
#[cfg(all(cuda_sm_90, not(cuda_sm_90a)))]
define_kernels! { (tokens_16, 8, false, 1, "Tiles of 16 tokens.") }
#[cfg(any(not(cuda_sm_90), cuda_sm_90a))]
define_kernels! { (tokens_16, 8, false, 2, "Tiles of 16 tokens.") }
