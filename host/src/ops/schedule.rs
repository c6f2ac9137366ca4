//! How the work of a matrix-vector product is dealt out to blocks and warps ([`gpu_kernels::gemv`]).
//!
//! Blocks of several kernels share a multiprocessor: while one multiplies, the weights of others are on their way, those of
//! the next kernel among them. So what is best for a product depends on what comes before and after it as well; what
//! measured best on an H100 is written down here (docs/performance.md, versions 8, 9 and 14).

use super::{Matrix, dim, launch_1d};
use crate::device::Device;
use anyhow::{Context as _, Result};
use cuda_std::launch::LaunchConfig;
use cuda_std::pipeline::Window;
use gpu_kernels::gemv::epilogue::{Epilogue, Prepared as _};
use gpu_kernels::gemv::few::{self, FEW_WARPS};
use gpu_kernels::gemv::strip::StripShape;
use gpu_kernels::gemv::{ANY_WARPS, MAX_QUADS, QKV_WARPS, Schedule, Shares, WARPS};

/// Which kernels a product is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Those for one format, whose strips have to fit shared memory.
    Own,
    /// Those for any format.
    Any,
    /// Those for a few tokens at once, whose strips have to fit shared memory.
    Few { n_tokens: usize },
}

impl Family {
    /// Warps that a multiprocessor is dealt, of which a block has a part.
    fn warps(self) -> usize {
        match self {
            Self::Own => WARPS as usize,
            Self::Any => ANY_DEALT,
            Self::Few { .. } => FEW_WARPS as usize,
        }
    }

    /// Most warps in a block.
    fn most_warps(self) -> usize {
        match self {
            Self::Own | Self::Few { .. } => self.warps(),
            Self::Any => ANY_WARPS as usize,
        }
    }
}

/// Warps of kernels for any format that a multiprocessor is dealt: more than it has registers for, which makes bands small.
const ANY_DEALT: usize = 20;

/// Where in the chain of a layer's kernels a product stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    /// Blocks of it that a multiprocessor has, at least, where the whole matrix is dealt out at once: with fewer than there are
    /// places the kernels after it find some.
    at_once: usize,
    /// Pieces of a block's weights that are on their way while the kernels before it run: more make what these wait for stand
    /// in line behind them, with fewer memory idles.
    ahead: u32,
}

impl Chain {
    /// Attention follows, which reads little: there is the more time to fill places with the weights that come after it.
    pub(super) const QKV: Self = Self { at_once: 1, ahead: 1 };
    /// Most others: what they wait for, attention's reads above all, should not stand in line behind their weights.
    pub(super) const OTHER: Self = Self { at_once: MOST_AT_ONCE, ahead: 1 };
    /// It follows a launch that takes long and leaves memory idle: as much as there is room for may come meanwhile.
    pub(super) const AFTER_LAYERS: Self = Self { at_once: MOST_AT_ONCE, ahead: u32::MAX };

    /// The window of a block, which nobody waits for until the kernels before it have ended.
    fn window(self) -> Window {
        Window { ahead: self.ahead, late: LATE }
    }
}

/// Pieces of a block's weights on their way when the kernels before it have ended.
const LATE: u32 = 4;
/// What a block has in shared memory beside the weights of its band of one strip, at most, for each token.
pub(super) const MOST_BESIDE_BYTES: usize = 6 << 10;
/// What a GPU takes of its shared memory for itself, for each block (CUDA C++ Programming Guide, compute capabilities 8.x and
/// 9.0).
const RESERVED_BYTES: usize = 1 << 10;
/// Tiles from which on a strip is long: with a tile or two for each warp, the vector is quantized by more warps at once.
const LONG_TILES: usize = 8;
/// Pieces on their way in such a block: where nearly all multiprocessors have two,
const PAIR_WINDOW: Window = Window { ahead: 2, late: LATE };
/// and where many have but one.
const SINGLE_WINDOW: Window = Window { ahead: 4, late: 6 };
/// Likewise in a block whose strips are not long, where a multiprocessor has as many as fit, in several rounds.
const ROUNDS_AHEAD: u32 = 2;
/// Most strips of a band that may be an odd number: of more, one would be left alone where two are multiplied at a time.
const MOST_ODD: usize = 4;
/// The least tiles that make a block worth its start.
const LEAST_TILES: usize = 2;
/// Most blocks that a multiprocessor has at once where the whole matrix is dealt out, before it is taken in rounds.
const MOST_AT_ONCE: usize = 3;
// No block has more than half of what a multiprocessor is dealt: so those of three matrices start as well.
const _: () = assert!(WARPS / 2 <= QKV_WARPS);
/// Most tiles that a warp multiplies one after the other where a multiprocessor has fewer blocks than that.
const MOST_TILES: usize = 4;

/// How many warps of a block multiply, how many strips it has, and how many pieces of them are on their way.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    warps: usize,
    strips: usize,
    window: Window,
}

impl Blocks {
    /// For a matrix of `n_strips` strips of `n_tiles` tiles, where a multiprocessor is dealt `most_warps` warps; `bytes` says
    /// how many bytes of shared memory a band of so many strips takes.
    fn choose(
        device: &Device,
        most_warps: usize,
        [n_strips, n_tiles]: [usize; 2],
        chain: Chain,
        bytes: impl Fn(usize) -> usize,
    ) -> Self {
        let multiprocessors = device.multiprocessors() as usize;
        let window = chain.window();
        if !device.is_cuda() {
            // On the CPU the threads of a block take turns: more of them only cost.
            return Self { warps: 1, strips: n_strips.div_ceil(4 * multiprocessors), window };
        }
        let room = device.shared_bytes() as usize + RESERVED_BYTES;
        // Whether so many blocks with bands of so many strips fit a third of a multiprocessor's shared memory, times `thirds`.
        let fit = |strips: usize, blocks: usize, thirds: usize| {
            3 * blocks * (bytes(strips) + RESERVED_BYTES) <= thirds * room
        };
        // Two blocks at once, in as many rounds as it takes, if the last one is not much shorter; pairs of strips are
        // multiplied faster than single ones.
        if n_tiles >= LONG_TILES {
            let places = 2 * multiprocessors;
            let mut bands = (1..).map(|rounds| (rounds, n_strips.div_ceil(places * rounds)));
            let is_full =
                |rounds: usize, strips: usize| 10 * n_strips.div_ceil(strips) >= 9 * rounds * places;
            let is_good = |&(rounds, strips): &(usize, usize)| {
                strips < 2 || fit(strips, 2, 3) && (rounds == 1 || is_full(rounds, strips))
            };
            if let Some((rounds, strips @ 2..)) = bands.find(is_good) {
                let window = if is_full(rounds, strips) { PAIR_WINDOW } else { SINGLE_WINDOW };
                return Self { warps: most_warps / 2 - 1, strips, window };
            }
        }
        // In one round, which leaves a third of shared memory to the kernels after it.
        let warps = most_warps / MOST_AT_ONCE - 1;
        let strips = |at_once: usize| {
            let strips = n_strips.div_ceil(multiprocessors * at_once);
            let strips = if strips > MOST_ODD { strips.next_multiple_of(2) } else { strips };
            strips.max(LEAST_TILES.div_ceil(n_tiles))
        };
        let tiles_of_warp = |strips: usize| {
            let [tile_warps, abreast] = share_out(warps, strips, n_tiles);
            strips.div_ceil(abreast) * n_tiles.div_ceil(tile_warps)
        };
        let at_once = (chain.at_once..MOST_AT_ONCE).find(|&n| tiles_of_warp(strips(n)) <= MOST_TILES);
        let at_once = at_once.unwrap_or(MOST_AT_ONCE);
        if fit(strips(at_once), at_once, 2) {
            return Self { warps, strips: strips(at_once), window };
        }
        // In as many as it takes, of the largest bands of which there are three or four places, whichever lets a warp have fewer
        // tiles of a strip: blocks that end sooner take more.
        let warps = |places: usize| most_warps / places - 1;
        let places = if n_tiles.div_ceil(warps(3)) < n_tiles.div_ceil(warps(4)) { 3 } else { 4 };
        let most = (1..=MAX_QUADS as usize).rev().find(|&strips| fit(strips, places, 3)).unwrap_or(1);
        let strips = if most > MOST_ODD { most / 2 * 2 } else { most };
        let ahead = if n_tiles >= LONG_TILES { 1 } else { ROUNDS_AHEAD };
        let window = Window { ahead: chain.ahead.max(ahead), late: LATE };
        Self { warps: warps(places), strips, window }
    }
}

/// How many of a block's warps share the tiles of a strip, as few as make no more rounds, and how many strips are multiplied at a time,
/// likewise.
fn share_out(warps: usize, strips: usize, n_tiles: usize) -> [usize; 2] {
    let tile_warps = n_tiles.div_ceil(n_tiles.div_ceil(warps));
    let abreast = warps / tile_warps;
    [tile_warps, strips.div_ceil(strips.div_ceil(abreast))]
}

/// Deals out the product of `matrices`, one below the other, to blocks.
///
/// # Errors
/// When not one strip fits shared memory and the kernels do not take slabs.
pub(super) fn schedule<E: Epilogue>(
    device: &Device,
    matrices: &[&Matrix],
    family: Family,
    chain: Chain,
) -> Result<(Schedule, LaunchConfig)> {
    // Of formats side by side some may have two quads in a strip, and some one.
    let shapes = || matrices.iter().map(|matrix| matrix.strip_shape());
    let n_tiles = shapes().map(StripShape::n_tiles).max().unwrap_or(1) as usize;
    let strip_quads = shapes().map(|strip| strip.quads).max().unwrap_or(1) as usize;
    let n_strips: usize = matrices.iter().map(|matrix| matrix.n_strips()).sum();
    let strip_bytes = matrices.iter().map(|matrix| matrix.strip_bytes()).max().unwrap_or(0).max(1);
    let tile_bytes = matrices.iter().map(|matrix| matrix.largest_tile()).max().unwrap_or(0).max(1);
    let room = device.shared_bytes() as usize;
    // One more warp copies.
    let n_copiers = usize::from(device.is_cuda());
    let most_warps = family.most_warps() - n_copiers;

    let shared_bytes = |schedule: &Schedule| {
        let words = shapes().map(|strip| match family {
            Family::Own | Family::Any => schedule.shared_words(strip),
            Family::Few { n_tokens } => {
                few::shared_words(*schedule, strip, n_tokens as u32, E::Prepared::WORDS)
            }
        });
        4 * words.max().unwrap_or(0) as usize
    };
    let of_band = |strips: usize, slab_tiles: usize, bytes: usize| Schedule {
        shares: [Shares::default(); 3],
        strips: strips as u32,
        tile_warps: 1,
        slab_tiles: slab_tiles as u32,
        weight_words: bytes as u32 / 4,
        warps: 1,
        window: chain.window(),
    };
    let whole = |strips: usize| of_band(strips, n_tiles, strips * strip_bytes);
    let bytes = |strips: usize| shared_bytes(&whole(strips));
    let Blocks { warps, strips, window } =
        Blocks::choose(device, family.warps(), [n_strips, n_tiles], chain, bytes);

    // Fewer strips, and of one as many tiles, as shared memory holds.
    let bands = (1..=strips.min(MAX_QUADS as usize / strip_quads)).rev().map(whole);
    let slabs = (1..n_tiles).rev().map(|tiles| of_band(1, tiles, tiles * tile_bytes));
    let slabs = slabs.filter(|_| family == Family::Any);
    let mut schedule = bands.chain(slabs).find(|schedule| shared_bytes(schedule) <= room).with_context(|| {
        format!(
            "gemv: {room} bytes of shared memory hold no strip of {strip_bytes} bytes of a matrix with {} columns",
            matrices[0].n_cols()
        )
    })?;
    let tiles_at_once = n_tiles.min(schedule.slab_tiles as usize);
    let [tile_warps, abreast] = share_out(warps.min(most_warps), schedule.strips as usize, tiles_at_once);
    schedule.tile_warps = tile_warps as u32;
    schedule.warps = (tile_warps * abreast) as u32;
    schedule.window = window;
    for (shares, matrix) in schedule.shares.iter_mut().zip(matrices) {
        let blocks = matrix.n_strips().div_ceil(schedule.strips as usize);
        *shares = Shares {
            blocks: dim(blocks)?,
            strips: (matrix.n_strips() / blocks) as u32,
            blocks_with_more: (matrix.n_strips() % blocks) as u32,
        };
    }
    let n_blocks = schedule.shares.iter().map(|shares| shares.blocks as usize).sum();
    let mut config = launch_1d(n_blocks, 32 * (schedule.warps as usize + n_copiers))?;
    config.dynamic_shared_bytes = shared_bytes(&schedule) as u32;
    Ok((schedule, config))
}
