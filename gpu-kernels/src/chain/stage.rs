//! The list of a step's operations, as the kernel reads it from device memory.

use bytemuck::{Pod, Zeroable};
use cuda_std::shared::DynamicShared;
use half::f16;

/// What a stage does. Each product reads the vector `input` and, where `gamma` is there, normalises it first.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Queries, keys and values: bias, rotation, keys and values to the cache as well.
    Qkv = 0,
    /// Attention over a part of the context.
    Attention = 1,
    /// The parts of a context together, where it has several.
    Combine = 2,
    /// `output = residual + W input`.
    Add = 3,
    /// `output = silu(G input) * (U input)`.
    Swiglu = 4,
    /// `logits = W input`.
    Logits = 5,
}

/// A packed matrix of a product.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The tiles.
    pub tiles: *const u8,
    /// A [`Format`](crate::formats::Format).
    pub format: u32,
    /// Rows; the last band is filled up.
    pub n_rows: u32,
    /// Bands of sixteen rows.
    pub n_bands: u32,
    /// Bytes of a tile of eight units.
    pub tile_bytes: u32,
    /// Bytes of the last tile of a row, which may be shorter.
    pub last_tile_bytes: u32,
    /// Bytes of a band.
    pub band_bytes: u32,
}

impl Part {
    /// No matrix.
    pub const NONE: Self = Self {
        tiles: core::ptr::null(),
        format: 0,
        n_rows: 0,
        n_bands: 0,
        tile_bytes: 0,
        last_tile_bytes: 0,
        band_bytes: 0,
    };
}

/// Queries, keys, values and attention.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Keys: `[n_head_kv, n_ctx, head_dim]`, at a multiple of 16 bytes.
    pub k_cache: *mut f16,
    /// Values, likewise.
    pub v_cache: *mut f16,
    /// Biases of the queries, keys and values; null where there are none.
    pub bias: [*const f32; 3],
    /// Cosine and sine of the angle of each pair at the step's position: `[n_rot / 2]`.
    pub rotation: *const [f32; 2],
    /// Query heads.
    pub n_head: u32,
    /// Key-value heads.
    pub n_head_kv: u32,
    /// Values in a head, a multiple of 16, at most 256.
    pub head_dim: u32,
    /// `2^32 / head_dim`, rounded up ([`Heads::reciprocal`]).
    pub per_head_dim: u32,
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Values of a head that are rotated, even.
    pub n_rot: u32,
    /// How far apart the values of a pair are: 1, or half of what is rotated.
    pub pair_distance: u32,
    /// Blocks that the query heads of a key-value head are dealt out to, and how many each takes.
    pub blocks_per_kv: u32,
    /// See above; at most [`MAX_HEADS`](super::attention::MAX_HEADS).
    pub heads_per_block: u32,
    /// Lanes that share a position: the power of two from `head_dim / 8` on, at least 8.
    pub lanes: u32,
    /// Positions in a piece of the cache.
    pub chunk: u32,
    /// Unused, so that there is no padding.
    pub reserved: u32,
    /// Most blocks that share a context, at most [`MAX_SPLITS`](super::attention::MAX_SPLITS).
    pub n_splits: u32,
    /// The factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Where the results of parts of the context are, `[n_splits, n_head, head_dim]`, in words from the set's start.
    pub split_values: u32,
    /// Their largest scores (times log2 e) and sums of weights: `[n_splits, n_head, 4]`, of which two are used.
    pub split_sums: u32,
}

impl Heads {
    /// What a number is multiplied with to be divided by `head_dim`: exact below 2^32 / head_dim (Granlund and
    /// Montgomery, 1994).
    pub const fn reciprocal(head_dim: u32) -> u32 {
        ((1u64 << 32) / head_dim as u64 + 1) as u32
    }
}

/// How many of a block's tiles its warps have: neighbours, as many as any other's or one more.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Tiles of a warp.
    pub per_warp: u32,
    /// The first so many warps have a tile more.
    pub warps_with_more: u32,
}

impl Share {
    /// Of `tiles` tiles to `n_warps` warps.
    pub const fn new(tiles: u32, n_warps: u32) -> Self {
        Self { per_warp: tiles / n_warps, warps_with_more: tiles % n_warps }
    }

    /// A warp's first tile, and how many it has.
    #[inline(always)]
    pub(super) fn of(self, warp: u32) -> (u32, u32) {
        let first = warp * self.per_warp + warp.min(self.warps_with_more);
        (first, self.per_warp + u32::from(warp < self.warps_with_more))
    }

    /// The warp that has a tile.
    #[inline(always)]
    fn warp_of(self, tile: u32) -> u32 {
        let with_more = self.warps_with_more * (self.per_warp + 1);
        if tile < with_more {
            tile / (self.per_warp + 1)
        } else {
            self.warps_with_more + (tile - with_more) / self.per_warp
        }
    }

    /// The first and the last of the warps that share `n` tiles from `first` on.
    #[inline(always)]
    pub(super) fn warps_of(self, first: u32, n: u32) -> (u32, u32) {
        (self.warp_of(first), self.warp_of(first + n - 1))
    }
}

/// An operation. Vectors are given by the word at which they start in their set, a multiple of 4.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// A [`Kind`].
    pub kind: u32,
    /// Values of the input.
    pub n: u32,
    /// `1 / n`.
    pub per_n: f32,
    /// What RMSNorm adds to the mean square.
    pub eps: f32,
    /// The vector that is read. For attention queries, keys and values, one after the other.
    pub input: u32,
    /// The vector that a product is added to.
    pub residual: u32,
    /// The vector that is written.
    pub output: u32,
    /// 1 where the input has two values to a word ([`Narrow`](super::vector::Narrow)).
    pub input_is_narrow: u32,
    /// Likewise of the output.
    pub output_is_narrow: u32,
    /// Bands that each block of the grid has to finish.
    pub turns: u32,
    /// The first so many blocks have a band more.
    pub blocks_with_more: u32,
    /// Tiles of a band.
    pub n_tiles: u32,
    /// `2^31 / n_tiles`, rounded up ([`Stage::reciprocal`]).
    pub per_n_tiles: u32,
    /// Unused, so that what follows is aligned.
    pub reserved: u32,
    /// How a block of `turns` bands deals its tiles out to its warps, and one that has a band more.
    pub shares: [Share; 2],
    /// The factors of RMSNorm, `[n]`, at a multiple of 16 bytes; null where nothing is normalised.
    pub gamma: *const f32,
    /// The logits, which are no vector of the step.
    pub logits: *mut f32,
    /// The matrices of a product, one below the other.
    pub parts: [Part; 3],
    /// Of queries, keys and values and of attention.
    pub heads: Heads,
}

impl Stage {
    /// What a number is multiplied with to be divided by `n`: exact below 2^31 / n (Granlund and Montgomery, 1994).
    pub const fn reciprocal(n: u32) -> u32 {
        (1u32 << 31).div_ceil(n)
    }
}

// SAFETY: numbers and addresses, all of which may be 0.
unsafe impl Zeroable for Stage {}
// SAFETY: numbers and addresses without padding between them, as the assertion below says.
unsafe impl Pod for Stage {}
const _: () = assert!(core::mem::offset_of!(Stage, shares) == 14 * 4);
const _: () = assert!(size_of::<Stage>() == 18 * 4 + 2 * 8 + 3 * 32 + 6 * 8 + 16 * 4);

/// A band of a product: of which matrix, and its number there.
#[derive(Clone, Copy)]
pub(super) struct Band {
    pub(super) part: u32,
    /// Counted from the matrix's first.
    pub(super) number: u32,
}

/// Words of a stage.
pub const STAGE_WORDS: u32 = (size_of::<Stage>() / 4) as u32;

/// Reads of a structure in shared memory, each of a field.
macro_rules! shared_fields {
    ($Type:ident { $($field:ident: $kind:ident),* }) => {
        $(
            #[inline(always)]
            pub(super) fn $field(self) -> shared_fields!(@type $kind) {
                let offset = const { core::mem::offset_of!($Type, $field) as u32 / 4 };
                shared_fields!(@read $kind, self.memory, (self.at + offset) as usize)
            }
        )*
    };
    (@type u32) => { u32 };
    (@type f32) => { f32 };
    (@type address) => { usize };
    (@read u32, $memory:expr, $at:expr) => { $memory.get($at) };
    (@read f32, $memory:expr, $at:expr) => { f32::from_bits($memory.get($at)) };
    (@read address, $memory:expr, $at:expr) => { $memory.view::<u64>().get($at / 2) as usize };
}

/// A [`Part`] in shared memory.
#[derive(Clone, Copy)]
pub(super) struct PartRef {
    memory: DynamicShared<u32>,
    at: u32,
}

impl PartRef {
    shared_fields! { Part {
        tiles: address, format: u32, n_rows: u32, n_bands: u32, tile_bytes: u32, last_tile_bytes: u32, band_bytes: u32
    } }
}

/// [`Heads`] in shared memory.
#[derive(Clone, Copy)]
pub(super) struct HeadsRef {
    memory: DynamicShared<u32>,
    at: u32,
}

impl HeadsRef {
    shared_fields! { Heads {
        k_cache: address, v_cache: address, rotation: address, n_head: u32, n_head_kv: u32, head_dim: u32,
        per_head_dim: u32, n_ctx: u32, n_rot: u32, pair_distance: u32, blocks_per_kv: u32, heads_per_block: u32,
        lanes: u32, chunk: u32, n_splits: u32, scale: f32, split_values: u32, split_sums: u32
    } }

    /// The bias of the queries, keys or values.
    #[inline(always)]
    pub(super) fn bias(self, part: u32) -> *const f32 {
        let offset = const { core::mem::offset_of!(Heads, bias) as u32 / 4 };
        self.memory.view::<u64>().get(((self.at + offset) / 2 + part) as usize) as usize as *const f32
    }
}

/// A [`Stage`] in shared memory.
#[derive(Clone, Copy)]
pub(super) struct StageRef {
    memory: DynamicShared<u32>,
    at: u32,
}

impl StageRef {
    /// The stage at word `at`, a multiple of 2.
    #[inline(always)]
    pub(super) fn new(memory: DynamicShared<u32>, at: u32) -> Self {
        Self { memory, at }
    }

    shared_fields! { Stage {
        kind: u32, n: u32, per_n: f32, eps: f32, input: u32, residual: u32, output: u32, input_is_narrow: u32,
        output_is_narrow: u32, reserved: u32, turns: u32,
        blocks_with_more: u32, n_tiles: u32, per_n_tiles: u32, gamma: address, logits: address
    } }

    /// A matrix.
    #[inline(always)]
    pub(super) fn part(self, part: u32) -> PartRef {
        let offset = const { core::mem::offset_of!(Stage, parts) as u32 / 4 };
        PartRef { memory: self.memory, at: self.at + offset + part * const { size_of::<Part>() as u32 / 4 } }
    }

    /// Queries, keys, values and attention.
    #[inline(always)]
    pub(super) fn heads(self) -> HeadsRef {
        let offset = const { core::mem::offset_of!(Stage, heads) as u32 / 4 };
        HeadsRef { memory: self.memory, at: self.at + offset }
    }

    /// A block's first band, counted through all matrices, and how many it has.
    #[inline(always)]
    pub(super) fn deal(self, block: u32) -> (u32, u32) {
        let (turns, with_more) = (self.turns(), self.blocks_with_more());
        (block * turns + block.min(with_more), turns + u32::from(block < with_more))
    }

    /// How a block deals its tiles out.
    #[inline(always)]
    pub(super) fn share(self, block: u32) -> Share {
        let offset = const { core::mem::offset_of!(Stage, shares) as u32 / 4 };
        let at = (self.at + offset) / 2 + u32::from(block < self.blocks_with_more());
        let both = self.memory.view::<u64>().get(at as usize);
        Share { per_warp: both as u32, warps_with_more: (both >> 32) as u32 }
    }

    /// Which of a block's bands a tile is of, by its number among the block's.
    #[inline(always)]
    pub(super) fn turn_of(self, tile: u32) -> u32 {
        (u64::from(tile) * u64::from(self.per_n_tiles()) >> 31) as u32
    }

    /// A band by its number through all matrices.
    #[inline(always)]
    pub(super) fn band(self, number: u32) -> Band {
        let first = self.part(0).n_bands();
        if number < first {
            return Band { part: 0, number };
        }
        let (number, second) = (number - first, self.part(1).n_bands());
        if number < second { Band { part: 1, number } } else { Band { part: 2, number: number - second } }
    }
}
