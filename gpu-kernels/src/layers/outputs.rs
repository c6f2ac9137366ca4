//! What becomes of a quad of products: it goes to the blocks that need it.

use super::layout::{LayerRef, Layout, PLACE_WORDS, Shape};
use super::products::{Turn, broadcast_4};
use super::walk::{Mail, Walk};
use super::{BLOCK_DIM, BLOCKS, GATE_UP, QKV};
use crate::formats::tile::TILE_ROWS;
use crate::math::silu;
use crate::rope::rotate;
use core::f32::consts::LOG2_E;
use core::mem::offset_of;
use cuda_std::float::{f16_to_f32, f32_to_f16};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_shuffle_xor_n};

impl Walk {
    /// Sends four values that all lanes of a warp have to word `to`, a multiple of 4, of all blocks, a lane to one of them each.
    #[inline(always)]
    pub(super) fn send_to_all(self, mail: Mail, to: u32, values: [f32; 4]) {
        const { assert!(BLOCKS <= WARP_SIZE) };
        if self.lane < BLOCKS {
            // SAFETY: the cluster has the block, and expects the mail.
            unsafe { mail.arrivals.send_4(self.lane, to, values) };
        }
    }

    /// Leaves where the rows of the block's quads of queries, keys and values belong, and how they are rotated and scaled. A quad is one
    /// thread's.
    pub(super) fn place_rows(self, position: u32) {
        let Shape { heads_per_kv, head_dim, n_ctx, n_rot, pair_distance, scale, .. } = self.a.shape;
        let (product, n_q, n_kv) = (self.a.layout.products[QKV], self.a.shape.n_q(), self.a.shape.n_kv());
        let mut own = self.warp * WARP_SIZE + self.lane;
        while own < product.quads_of(self.rank) {
            let row = (product.first_quad(self.rank) + own) * TILE_ROWS as u32;
            let part = u32::from(row >= n_q) + u32::from(row >= n_q + n_kv);
            let row = match part {
                0 => row,
                1 => row - n_q,
                _ => row - n_q - n_kv,
            };
            let (head, place) = (row / head_dim, row % head_dim);
            // What is rotated is whole quads.
            let is_rotated = part < 2 && place < n_rot;
            let [[c0, s0], [c1, s1]] = if is_rotated {
                let pair = place as usize / 2;
                // SAFETY: the pairs are ones that are rotated.
                unsafe { [*self.a.rotation.add(pair), *self.a.rotation.add(pair + 1)] }
            } else {
                [[1.0, 0.0]; 2]
            };
            // Weights are powers of 2: the scores' factor, which queries bring, turns e^x into 2^x.
            let factor = if part == 0 { scale * LOG2_E } else { 1.0 };
            let [c0, s0, c1, s1] = [c0, s0, c1, s1].map(|value| value * factor);
            // In the head the quad's values lie side by side, or the second ones of its pairs so far from the first ones.
            let is_apart = is_rotated && pair_distance > 1;
            let (place, apart) = if is_apart { (place / 2, pair_distance) } else { (place, 0) };
            let (first, n) = if part == 0 { (head, 1) } else { (head * heads_per_kv, heads_per_kv) };
            let at = self.a.layout.places + own * PLACE_WORDS;
            let in_cache = (head * n_ctx + position) * head_dim + place;
            self.memory.set4(at as usize, [part, part * head_dim + place, apart, in_cache]);
            self.memory.set4(at as usize + 4, [first, n, 0, 0]);
            self.floats().set4(at as usize + 8, [c0, s0, c1, s1]);
            own += BLOCK_DIM;
        }
    }

    /// Where the rows of a quad of queries, keys and values belong.
    #[inline(always)]
    pub(super) fn place(self, turn: Turn) -> [[u32; 4]; 3] {
        let Layout { places, products, .. } = self.a.layout;
        let at = (places + (turn.quad - products[QKV].first_quad(self.rank)) * PLACE_WORDS) as usize;
        [self.memory.get4(at), self.memory.get4(at + 4), self.memory.get4(at + 8)]
    }

    /// Queries, keys and values of a quad, rotated, to the blocks whose heads they are, and into the cache. The lanes of a warp make
    /// this call together.
    ///
    /// # Safety
    /// The arguments are as their fields say, and the place is one of the block's quads.
    #[inline(always)]
    pub(super) unsafe fn finish_qkv(
        self,
        layer: u32,
        place: [[u32; 4]; 3],
        [s0, s1, s2, s3]: [f32; TILE_ROWS],
    ) {
        let qkv = self.a.layout.qkv;
        let [[part, place, apart, in_cache], [first, n, _, _], rotation] = place;
        let [cos0, sin0, cos1, sin1] = rotation.map(f32::from_bits);
        let ([v0, v1], [v2, v3]) = (rotate([s0, s1], [cos0, sin0]), rotate([s2, s3], [cos1, sin1]));
        let [v0, v1, v2, v3] = if apart == 0 { [v0, v1, v2, v3] } else { [v0, v2, v1, v3] };
        let bits = [v0, v1, v2, v3].map(f32_to_f16);
        let is_query = part == 0;
        if self.lane.wrapping_sub(first) < n {
            // Keys and values as attention will find them in the cache.
            let values = if is_query { [v0, v1, v2, v3] } else { bits.map(f16_to_f32) };
            let (to, mail) = (qkv + place, self.qkv().arrivals);
            // SAFETY: there is a block for each head.
            unsafe {
                if apart == 0 {
                    mail.send_4(self.lane, to, values);
                } else {
                    mail.send_2(self.lane, to, [values[0], values[1]]);
                    mail.send_2(self.lane, to + apart, [values[2], values[3]]);
                }
            }
        }
        // A lane that has no head.
        if !is_query && self.lane == WARP_SIZE - 1 {
            let cache: *mut u16 = if part == 1 {
                self.address(layer, offset_of!(LayerRef, k_cache))
            } else {
                self.address(layer, offset_of!(LayerRef, v_cache))
            };
            let [b0, b1, b2, b3] = bits.map(u32::from);
            let apart = if apart == 0 { 2 } else { apart };
            // SAFETY: the position is in the cache, and nobody else writes it.
            unsafe {
                let to = cache.add(in_cache as usize);
                *to.cast::<u32>() = b0 | b1 << 16;
                *to.add(apart as usize).cast::<u32>() = b2 | b3 << 16;
            }
        }
    }

    /// Leaves what gates and ups have made in the block's share. Of the eight lanes that share a quad two have each of its rows.
    #[inline(always)]
    pub(super) fn keep_hidden(self, turn: Turn, sum: f32) {
        let [other] = warp_shuffle_xor_n(FULL_MASK, [sum], 4);
        // The lanes that have the gates.
        if self.lane % 8 < 4 && self.lane.is_multiple_of(2) && turn.is_there {
            let quad = turn.quad - self.a.layout.products[GATE_UP].first_quad(self.rank);
            let at = self.a.layout.hidden + quad * 2 + turn.row;
            self.floats().set(at as usize, silu(sum) * other);
        }
    }

    /// The value of the lane's row, of the vector at word `x`.
    #[inline(always)]
    pub(super) fn row_of(self, x: u32, turn: Turn) -> f32 {
        self.floats().get((x + turn.quad * TILE_ROWS as u32 + turn.row) as usize)
    }

    /// Sends a quad of rows of the hidden state, of which eight lanes each have one, to where word `to` is in all blocks.
    #[inline(always)]
    pub(super) fn send_rows(self, mail: Mail, to: u32, turn: Turn, value: f32) {
        self.send_to_all(mail, to + turn.quad * TILE_ROWS as u32, broadcast_4(value));
    }
}
