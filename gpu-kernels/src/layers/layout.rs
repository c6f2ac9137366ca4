//! What the launch is about, and how a block's shared memory is used.

use super::{BLOCKS, WARPS};
use crate::activations::OCTET;
use crate::formats::tile::{Geometry, TILE_ROWS, TILE_UNITS, aligned_bytes};
use crate::formats::{UNIT, UNIT_WORDS, WeightFormat};
use bytemuck::{Pod, Zeroable};
use cuda_std::cluster::Arrivals;
use cuda_std::codegen::no_sooner;
use cuda_std::warp::WARP_SIZE;

/// What is a layer's own: addresses in device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct LayerRef {
    /// `[n_embd]`.
    pub attn_norm: u64,
    /// `[n_embd]`.
    pub ffn_norm: u64,
    /// Tiles of `[n_head * head_dim, n_embd]`, in an order that has the two values of a rotated pair side by side.
    pub q: u64,
    /// Tiles of `[n_head_kv * head_dim, n_embd]`, likewise.
    pub k: u64,
    /// Tiles of `[n_head_kv * head_dim, n_embd]`.
    pub v: u64,
    /// Tiles of `[n_embd, n_head * head_dim]`.
    pub attn_output: u64,
    /// Tiles of `[2 * n_ff, n_embd]`, in [`Order::Halves`](crate::rows::Order::Halves).
    pub gate_up: u64,
    /// Tiles of `[n_embd, n_ff]`.
    pub down: u64,
    /// Keys, f16: `[n_head_kv, n_ctx, head_dim]`.
    pub k_cache: u64,
    /// Values, likewise.
    pub v_cache: u64,
}

/// Words of a [`LayerRef`].
pub(super) const LAYER_WORDS: u32 = size_of::<LayerRef>() as u32 / 4;
/// Words that say where the rows of a quad belong.
pub(super) const PLACE_WORDS: u32 = 12;

/// Quads of gate and up that make a unit of hidden values: a block makes whole ones.
pub(super) const HIDDEN_QUADS: u32 = UNIT as u32 / 2;

/// Most units of a row that the lanes which share it have in registers together, before the vector is there.
pub(super) const MAX_LOADED: u32 = 48;
/// Words beyond a vector's integers that lanes may read.
const ROOM: u32 = MAX_LOADED * UNIT_WORDS as u32 / 2;

/// What all layers have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Layers, at least one.
    pub n_layer: u32,
    /// Values of the hidden state, a multiple of 32.
    pub n_embd: u32,
    /// Query heads, at most [`MAX_HEADS`](super::MAX_HEADS).
    pub n_head: u32,
    /// Query heads that share a key-value head.
    pub heads_per_kv: u32,
    /// Values in a head, a multiple of 16, at most 256; of all heads a multiple of 32.
    pub head_dim: u32,
    /// Values between the halves of the feed-forward network, a multiple of 32.
    pub n_ff: u32,
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Values of a head that are rotated, a multiple of 4.
    pub n_rot: u32,
    /// How far apart the values of a pair are: 1, or half of what is rotated.
    pub pair_distance: u32,
    /// `1 / n_embd`.
    pub per_n_embd: f32,
    /// What RMSNorm adds to the mean square.
    pub eps: f32,
    /// The factor of attention's scores.
    pub scale: f32,
}

/// A method that gives the same numbers, worked out no sooner than a token: what is made of them would be kept from layer to layer else,
/// and there are no registers for that.
macro_rules! define_no_sooner {
    ($($field:ident),*) => {
        #[inline(always)]
        pub(super) fn no_sooner(self, token: u32) -> Self {
            Self { $($field: no_sooner(self.$field, token),)* ..self }
        }
    };
}

impl Shape {
    define_no_sooner!(n_layer, n_embd, n_head, heads_per_kv, head_dim, n_ff, n_ctx, n_rot, pair_distance);

    /// Values of all query heads.
    #[inline(always)]
    pub fn n_q(&self) -> u32 {
        self.n_head * self.head_dim
    }

    /// Neighbouring lanes that share a position in attention, with eight values of a head each.
    #[inline(always)]
    pub fn lanes_per_position(&self) -> u32 {
        self.head_dim.div_ceil(OCTET as u32).next_power_of_two().max(8)
    }

    /// Values of all key-value heads.
    #[inline(always)]
    pub fn n_kv(&self) -> u32 {
        self.n_head / self.heads_per_kv * self.head_dim
    }
}

/// A product's part of shared memory, and its matrix's shape.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Product {
    // Two and two, as they are used: the compiler would put them into local memory else.
    /// Columns in units of 32.
    pub(super) n_units: u32,
    /// Words of a tile of 32 units,
    pub(super) tile_words: u32,
    /// and of a quad.
    pub(super) quad_words: u32,
    /// Quads of all blocks, in groups of which each is one block's.
    pub(super) n_groups: u32,
    /// The word at which the factors of the norm before it lie, and how many there are: none where there is none.
    pub(super) gamma: u32,
    pub(super) n_gamma: u32,
    /// The word at which the block's quads lie.
    pub(super) quads: u32,
    /// What counts their arrival.
    pub(super) arrivals: u32,
    /// Where its vector lies in Q8_1: integers, and of each unit a factor, and that times the sum of the integers.
    pub(super) quants: u32,
    pub(super) scales: u32,
    /// Quads of a group.
    pub(super) group: u32,
    padding: u32,
}

impl Product {
    define_no_sooner!(
        n_units, tile_words, quad_words, n_groups, gamma, n_gamma, quads, arrivals, quants, scales, group
    );

    /// With its part from word `at` on, and its vector's integers and factors where they are said to be; gives the end of its part as well.
    #[inline(always)]
    fn new<F: WeightFormat>(
        at: u32,
        [n_rows, n_cols]: [u32; 2],
        [group, n_gamma]: [u32; 2],
        [quants, scales]: [u32; 2],
    ) -> (Self, u32) {
        // A block takes its quads one by one.
        const { assert!(!F::IN_STRIPS_OF_TWO) }
        let n_units = n_cols / UNIT as u32;
        let geometry = Geometry {
            n_units: n_units as usize,
            strip_quads: 1,
            tile_bytes: aligned_bytes::<F>(TILE_UNITS),
            last_tile_bytes: aligned_bytes::<F>(n_units as usize % TILE_UNITS),
        };
        let (n_groups, quad_words) = (n_rows / TILE_ROWS as u32 / group, geometry.strip_bytes() as u32 / 4);
        let gamma = at + Arrivals::WORDS;
        let quads = gamma + n_gamma;
        let product = Self {
            n_units,
            n_groups,
            quad_words,
            tile_words: geometry.tile_bytes as u32 / 4,
            gamma,
            n_gamma,
            quads,
            arrivals: at,
            quants,
            scales,
            group,
            padding: 0,
        };
        // Lanes beyond the end of the last row read what follows: nothing that arrives meanwhile.
        let beyond = n_units.next_multiple_of(TILE_UNITS as u32) - n_units;
        let room = beyond * TILE_ROWS as u32 * UNIT_WORDS as u32 / 2;
        (product, quads + n_groups.div_ceil(BLOCKS) * group * quad_words + room)
    }

    /// The word at which the integers of half of a unit lie: the first halves of all units, then the second ones, so that lanes that
    /// read neighbouring units use all banks.
    #[inline(always)]
    pub(super) fn quants_of(&self, half: u32, unit: u32) -> u32 {
        self.quants + UNIT_WORDS as u32 / 2 * (half * self.n_units + unit)
    }

    /// Quads of all blocks.
    #[inline(always)]
    pub(super) fn n_quads(&self) -> u32 {
        self.n_groups * self.group
    }

    /// The first quad of block `rank`.
    #[inline(always)]
    pub(super) fn first_quad(&self, rank: u32) -> u32 {
        self.n_groups * rank / BLOCKS * self.group
    }

    /// How many quads block `rank` has.
    #[inline(always)]
    pub(super) fn quads_of(&self, rank: u32) -> u32 {
        self.first_quad(rank + 1) - self.first_quad(rank)
    }
}

/// How a block's shared memory is used, in words.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    // What lies together comes first, at a multiple of eight bytes: the compiler would put it into local memory else.
    /// Queries, keys and values; attention's output; gate and up; down.
    pub(super) products: [Product; 4],
    /// The hidden state before attention, and after it.
    pub(super) x: [u32; 2],
    /// What counts the arrival of each kind of mail (`walk.rs`).
    pub(super) qkv_mail: u32,
    pub(super) heads_mail: u32,
    pub(super) attended_mail: u32,
    pub(super) hidden_mail: u32,
    pub(super) layer_mail: u32,
    /// The factor of a norm.
    pub(super) factor: u32,
    /// The block's share of `silu(gate) * up`.
    pub(super) hidden: u32,
    /// The block's query, key and value.
    pub(super) qkv: u32,
    /// All heads.
    pub(super) heads: u32,
    /// Of each group of lanes that takes a position at a time, the largest score with the sum of weights, and the sum of values.
    pub(super) group_weights: u32,
    pub(super) group_values: u32,
    /// Where the rows of the block's quads of queries, keys and values belong, and how they are rotated.
    pub(super) places: u32,
    /// The layers.
    pub(super) layers: u32,
    /// All of it.
    pub(super) words: u32,
}

impl Layout {
    define_no_sooner!(
        qkv_mail,
        heads_mail,
        attended_mail,
        hidden_mail,
        layer_mail,
        factor,
        hidden,
        qkv,
        heads,
        group_weights,
        group_values,
        places,
        layers
    );

    /// For weights in format `F`.
    #[inline(always)]
    pub fn new<F: WeightFormat>(shape: &Shape) -> Self {
        let Shape { n_embd, n_ff, head_dim, .. } = *shape;
        let (n_q, n_kv) = (shape.n_q(), shape.n_kv());
        let mut end = 0;
        let mut take = |words: u32| {
            let at = end;
            end = (at + words).next_multiple_of(4);
            at
        };
        let [qkv_mail, heads_mail, attended_mail, hidden_mail, layer_mail] =
            [(); 5].map(|()| take(Arrivals::WORDS));
        let x = [take(n_embd), take(n_embd)];
        let hidden_units = (n_ff / UNIT as u32).div_ceil(BLOCKS);
        let (qkv, heads, hidden) = (take(3 * head_dim), take(n_q), take(hidden_units * UNIT as u32));
        // The first two products of normalised vectors have one: whoever makes the next one ready has met all that read it.
        let [normalised, attended, activated] =
            [n_embd, n_q, n_ff].map(|n| [take(n / 4 + ROOM), take(2 * Self::scales_of(n / UNIT as u32))]);
        let factor = take(1);
        let n_groups = WARPS * (WARP_SIZE / shape.lanes_per_position());
        let (group_weights, group_values) = (take(2 * n_groups), take(n_groups * Self::values_stride(shape)));
        let qkv_rows = n_q + 2 * n_kv;
        let places = take((qkv_rows / TILE_ROWS as u32).div_ceil(BLOCKS) * PLACE_WORDS);
        let layers = take(shape.n_layer * LAYER_WORDS);
        let (qkv_product, at) = Product::new::<F>(end, [qkv_rows, n_embd], [1, n_embd], normalised);
        let (output, at) = Product::new::<F>(at, [n_embd, n_q], [1, 0], attended);
        let (gate_up, at) = Product::new::<F>(at, [2 * n_ff, n_embd], [HIDDEN_QUADS, n_embd], normalised);
        let (down, words) = Product::new::<F>(at, [n_embd, n_ff], [1, 0], activated);
        Self {
            qkv_mail,
            heads_mail,
            attended_mail,
            hidden_mail,
            layer_mail,
            x,
            qkv,
            heads,
            hidden,
            factor,
            group_weights,
            group_values,
            places,
            layers,
            products: [qkv_product, output, gate_up, down],
            words,
        }
    }

    /// Factors of a vector of so many units, with room for what lanes beyond its end read: zeros.
    #[inline(always)]
    pub(super) fn scales_of(n_units: u32) -> u32 {
        n_units + MAX_LOADED
    }

    /// Bytes of shared memory.
    pub fn bytes(&self) -> u32 {
        4 * self.words
    }

    /// Words from one group's values to the next one's: lanes that read the same four of each should not meet in a bank.
    #[inline(always)]
    pub(super) fn values_stride(shape: &Shape) -> u32 {
        shape.head_dim + 4
    }
}
