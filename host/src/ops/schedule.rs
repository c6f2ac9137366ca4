//! How the work of a matrix-vector product is dealt out to blocks and warps ([`gpu_kernels::gemv`]).
//!
//! Blocks of several kernels share a multiprocessor: while one multiplies, the weights of others are on their way, those of
//! the next kernel among them. So what is best for a product depends on what comes before and after it as well; what
//! measured best on an H100 is written down here (docs/performance.md, versions 8 and 9).

use super::{Matrix, dim, launch_1d};
use crate::device::Device;
use anyhow::{Context as _, Result};
use cuda_std::launch::LaunchConfig;
use cuda_std::pipeline::Window;
use gpu_kernels::formats::UNIT;
use gpu_kernels::formats::tile::TILE_UNITS;
use gpu_kernels::gemv::epilogue::{Epilogue, Prepared as _};
use gpu_kernels::gemv::few::{self, FEW_WARPS};
use gpu_kernels::gemv::{ANY_WARPS, MAX_QUADS, Schedule, Shares, WARPS};

/// Which kernels a product is made by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// Those for one format, whose quads have to fit shared memory.
    Own,
    /// Those for any format.
    Any,
    /// Those for a few tokens at once, whose quads have to fit shared memory.
    Few { n_tokens: usize },
}

impl Family {
    /// Warps that a multiprocessor is dealt, of which a block has a part.
    fn warps(self) -> usize {
        match self {
            Self::Own | Self::Any => WARPS as usize,
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

/// Where in the chain of a layer's kernels a product stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chain {
    /// Blocks of it that a multiprocessor has, where the whole matrix is dealt out at once: with fewer than there are places
    /// the kernels after it find some.
    at_once: usize,
    /// Pieces of a block's weights that are on their way while the kernels before it run: more make what these wait for stand
    /// in line behind them, with fewer memory idles.
    ahead: u32,
    /// Most quads of a band that may be an odd number: of more, one would be left alone where two are multiplied at a time.
    most_odd: usize,
}

impl Chain {
    /// Attention follows, which reads little: there is the more time to fill places with the weights that come after it.
    pub(super) const QKV: Self = Self { at_once: 2, ahead: 1, most_odd: 2 };
    /// Added onto the hidden state; what it waits for, attention's reads above all, should not stand in line behind it.
    pub(super) const ADDED: Self = Self { at_once: 3, ahead: 1, most_odd: 4 };
    /// All others.
    pub(super) const OTHER: Self = Self { at_once: 3, ahead: 2, most_odd: 4 };
    /// It follows a launch that takes long and leaves memory idle: as much as there is room for may come meanwhile.
    pub(super) const AFTER_LAYERS: Self = Self { at_once: 3, ahead: u32::MAX, most_odd: 4 };

    /// The window of a block, which nobody waits for until the kernels before it have ended.
    fn window(self) -> Window {
        Window { ahead: self.ahead, late: LATE }
    }
}

/// Pieces of a block's weights on their way when the kernels before it have ended.
const LATE: u32 = 4;
/// What a block has in shared memory beside the weights of its band of one quad, at most, for each token.
pub(super) const MOST_BESIDE_BYTES: usize = 6 << 10;
/// What a GPU takes of its shared memory for itself, for each block (CUDA C++ Programming Guide, compute capabilities 8.x and
/// 9.0).
const RESERVED_BYTES: usize = 1 << 10;
/// Tiles from which on a quad is long: with a tile or two for each warp, the vector is quantized by more warps at once.
const LONG_TILES: usize = 8;
/// Pieces on their way in such a block: where a multiprocessor has two,
const LONG_WINDOW: Window = Window { ahead: 3, late: 3 };
/// and where it has as many as fit, in several rounds.
const LONG_ROUNDS_WINDOW: Window = Window { ahead: 1, late: 2 };
/// The least tiles that make a block worth its start.
const LEAST_TILES: usize = 2;

/// How many warps of a block multiply, how many quads it has, and how many pieces of them are on their way.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    warps: usize,
    quads: usize,
    window: Window,
}

impl Blocks {
    /// For a matrix of `n_quads` quads of `n_tiles` tiles, where a multiprocessor is dealt `most_warps` warps; `bytes` says
    /// how many bytes of shared memory a band of so many quads takes.
    fn choose(
        device: &Device,
        most_warps: usize,
        [n_quads, n_tiles]: [usize; 2],
        chain: Chain,
        bytes: impl Fn(usize) -> usize,
    ) -> Self {
        let multiprocessors = device.multiprocessors() as usize;
        let window = chain.window();
        if !device.is_cuda() {
            // On the CPU the threads of a block take turns: more of them only cost.
            return Self { warps: 1, quads: n_quads.div_ceil(4 * multiprocessors), window };
        }
        let room = device.shared_bytes() as usize + RESERVED_BYTES;
        // Whether so many blocks with bands of so many quads fit a third of a multiprocessor's shared memory, times `thirds`.
        let fit = |quads: usize, blocks: usize, thirds: usize| {
            3 * blocks * (bytes(quads) + RESERVED_BYTES) <= thirds * room
        };
        // Two blocks at once, in as many rounds as it takes, if the last one is not much shorter; pairs of quads are
        // multiplied faster than single ones.
        if n_tiles >= LONG_TILES {
            let places = 2 * multiprocessors;
            let mut bands = (1..).map(|rounds| (rounds, n_quads.div_ceil(places * rounds)));
            let is_good = |&(rounds, quads): &(usize, usize)| {
                let blocks = n_quads.div_ceil(quads);
                quads < 2 || fit(quads, 2, 3) && (rounds == 1 || 10 * blocks >= 9 * rounds * places)
            };
            if let Some((_, quads @ 2..)) = bands.find(is_good) {
                return Self { warps: most_warps / 2 - 1, quads, window: LONG_WINDOW };
            }
        }
        // In one round, give or take a twentieth of the blocks, which leaves a third of shared memory to the kernels after it.
        let quads = (19 * n_quads).div_ceil(20 * multiprocessors * chain.at_once);
        let quads = if quads > chain.most_odd { quads.next_multiple_of(2) } else { quads };
        let quads = quads.max(LEAST_TILES.div_ceil(n_tiles));
        if fit(quads, chain.at_once, 2) {
            return Self { warps: most_warps / 3 - 1, quads, window };
        }
        // In as many as it takes, of the largest bands of which there are four places: blocks that end sooner take more.
        let most = (1..=MAX_QUADS as usize).rev().find(|&quads| fit(quads, 4, 3)).unwrap_or(1);
        let quads = if most > chain.most_odd { most / 2 * 2 } else { most };
        let window = if n_tiles >= LONG_TILES {
            LONG_ROUNDS_WINDOW
        } else {
            Window { ahead: chain.ahead.max(Chain::OTHER.ahead), late: LATE }
        };
        Self { warps: most_warps / 4 - 1, quads, window }
    }
}

/// Deals out the product of `matrices`, one below the other, to blocks.
///
/// # Errors
/// When not one quad fits shared memory and the kernels do not take slabs.
pub(super) fn schedule<E: Epilogue>(
    device: &Device,
    matrices: &[&Matrix],
    family: Family,
    chain: Chain,
) -> Result<(Schedule, LaunchConfig)> {
    let n_tiles = matrices[0].n_cols().div_ceil(UNIT).div_ceil(TILE_UNITS);
    let n_quads: usize = matrices.iter().map(|matrix| matrix.n_quads()).sum();
    let quad_bytes = matrices.iter().map(|matrix| matrix.quad_bytes()).max().unwrap_or(0).max(1);
    let tile_bytes = matrices.iter().map(|matrix| matrix.largest_tile()).max().unwrap_or(0).max(1);
    let room = device.shared_bytes() as usize;
    // One more warp copies.
    let n_copiers = usize::from(device.is_cuda());
    let most_warps = family.most_warps() - n_copiers;

    let shared_bytes = |schedule: &Schedule| {
        4 * match family {
            Family::Own | Family::Any => schedule.shared_words(n_tiles as u32),
            Family::Few { n_tokens } => {
                few::shared_words(*schedule, n_tiles as u32, n_tokens as u32, E::Prepared::WORDS)
            }
        } as usize
    };
    let of_band = |quads: usize, slab_tiles: usize, bytes: usize| Schedule {
        shares: [Shares::default(); 3],
        quads: quads as u32,
        tile_warps: 1,
        slab_tiles: slab_tiles as u32,
        weight_words: bytes as u32 / 4,
        warps: 1,
        window: chain.window(),
    };
    let bytes = |quads: usize| shared_bytes(&of_band(quads, n_tiles, quads * quad_bytes));
    let Blocks { warps, quads, window } =
        Blocks::choose(device, family.warps(), [n_quads, n_tiles], chain, bytes);

    // Fewer quads, and of one as many tiles, as shared memory holds.
    let bands =
        (1..=quads.min(MAX_QUADS as usize)).rev().map(|quads| of_band(quads, n_tiles, quads * quad_bytes));
    let slabs = (1..n_tiles).rev().map(|tiles| of_band(1, tiles, tiles * tile_bytes));
    let slabs = slabs.filter(|_| family == Family::Any);
    let mut schedule = bands.chain(slabs).find(|schedule| shared_bytes(schedule) <= room).with_context(|| {
        format!(
            "gemv: {room} bytes of shared memory hold no quad of {quad_bytes} bytes of a matrix with {} columns",
            matrices[0].n_cols()
        )
    })?;
    // As few warps for the tiles of a quad as make no more rounds, and what is left for other quads.
    let warps = warps.min(most_warps);
    let tile_warps = n_tiles.div_ceil(n_tiles.div_ceil(warps)).min(schedule.slab_tiles as usize);
    schedule.tile_warps = tile_warps as u32;
    schedule.warps = (tile_warps * (warps / tile_warps).min(schedule.quads as usize)) as u32;
    schedule.window = window;
    for (shares, matrix) in schedule.shares.iter_mut().zip(matrices) {
        let blocks = matrix.n_quads().div_ceil(schedule.quads as usize);
        *shares = Shares {
            blocks: dim(blocks)?,
            quads: (matrix.n_quads() / blocks) as u32,
            blocks_with_more: (matrix.n_quads() % blocks) as u32,
        };
    }
    let n_blocks = schedule.shares.iter().map(|shares| shares.blocks as usize).sum();
    let mut config = launch_1d(n_blocks, 32 * (schedule.warps as usize + n_copiers))?;
    config.dynamic_shared_bytes = shared_bytes(&schedule) as u32;
    Ok((schedule, config))
}
