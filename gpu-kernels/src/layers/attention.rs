//! Attention of one query head by one block.

use super::WARPS;
use super::layout::{LayerRef, Layout, Shape};
use super::products::broadcast_4;
use super::walk::Walk;
use crate::activations::OCTET;
use crate::attention::LOWEST;
use crate::kv_cache::{HalfKv, KvCodec, KvRef};
use core::f32::consts::LOG2_E;
use core::mem::offset_of;
use cuda_std::float::{exp2, from_order_key, max, mul_add, order_key, rcp};
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, warp_max_u32, warp_reduce_add_n, warp_shuffle_xor_n};

/// Where in attention a lane stands.
#[derive(Clone, Copy)]
struct Seat {
    /// Which position of those that a warp takes at a time.
    group: u32,
    /// The first of the eight dimensions that are the lane's, if the block has a head and that has them.
    first_dim: u32,
    has_dims: bool,
    /// Where these are in the cache at position 0.
    in_cache: u32,
}

/// Eight dimensions of a key and of a value.
pub(super) type KeyAndValue = [<HalfKv as KvCodec>::Raw; 2];

impl Walk {
    /// Where in attention this lane stands, of `LANES` that share a position.
    #[inline(always)]
    fn seat<const LANES: u32>(self) -> Seat {
        let Shape { head_dim, n_ctx, heads_per_kv, .. } = self.a.shape;
        let first_dim = self.lane % LANES * OCTET as u32;
        let at_head = self.rank / heads_per_kv * n_ctx * head_dim;
        let has_dims = self.has_head() && first_dim < head_dim;
        Seat { group: self.lane / LANES, first_dim, has_dims, in_cache: at_head + first_dim }
    }

    /// Asks for this lane's part of the key and value of position `of`, if an earlier step has written them.
    ///
    /// # Safety
    /// The caches are written at positions below `position`.
    #[inline(always)]
    unsafe fn fetch_position(self, seat: Seat, layer: u32, of: u32, position: u32) -> KeyAndValue {
        if of >= position || !seat.has_dims || self.warp >= WARPS {
            return [HalfKv::ZEROS; 2];
        }
        let cache = |field| KvRef { values: self.address::<u8>(layer, field), scales: core::ptr::null() };
        let at = (seat.in_cache + of * self.a.shape.head_dim) as usize;
        // SAFETY: the position is written.
        unsafe {
            [
                HalfKv::fetch(cache(offset_of!(LayerRef, k_cache)), at),
                HalfKv::fetch(cache(offset_of!(LayerRef, v_cache)), at),
            ]
        }
    }

    /// Asks for this lane's part of the first position that its group takes.
    ///
    /// # Safety
    /// As [`fetch_position`](Self::fetch_position).
    #[inline(always)]
    pub(super) unsafe fn fetch_first<const LANES: u32>(self, layer: u32, position: u32) -> KeyAndValue {
        let this = self.afresh();
        let seat = this.seat::<LANES>();
        // SAFETY: the caller's promise.
        unsafe { this.fetch_position(seat, layer, this.warp * (WARP_SIZE / LANES) + seat.group, position) }
    }

    /// Attention of the block's query head over positions 0 to `position`, of which the last has come as mail; sends the result to all
    /// blocks. `fetched` is of the first position. All threads of the block make this call.
    ///
    /// Softmax is online (Milakov and Gimelshein, 2018), with a largest score for each warp.
    ///
    /// # Safety
    /// The arguments are as their fields say; the cache is written at the positions before.
    #[inline(always)]
    pub(super) unsafe fn attend<const LANES: u32>(self, layer: u32, position: u32, fetched: KeyAndValue) {
        let Shape { head_dim, scale, .. } = self.a.shape;
        let Layout { qkv, heads, warp_max, warp_sum, warp_values, .. } = self.a.layout;
        let floats = self.floats();
        let stride = Layout::values_stride(&self.a.shape);
        let seat = self.seat::<LANES>();
        let per_warp = WARP_SIZE / LANES;
        let eight = |at: u32| -> [f32; OCTET] {
            // Lanes beyond the head read the first dimensions, and meet a query of zeros.
            let at = (at + if seat.has_dims { seat.first_dim } else { 0 }) as usize;
            let ([a, b, c, d], [e, f, g, h]) = (floats.get4(at), floats.get4(at + 4));
            [a, b, c, d, e, f, g, h]
        };
        self.receive(self.qkv(), layer);
        if self.warp < WARPS {
            // Weights are powers of 2: the scores' factor turns e^x into 2^x.
            let factor = if seat.has_dims { scale * LOG2_E } else { 0.0 };
            let q = eight(qkv).map(|value| value * factor);
            let (mut largest, mut sum, mut value) = (LOWEST, 0.0f32, [0.0f32; OCTET]);
            let mut first = self.warp * per_warp;
            let [mut keys, mut values] = fetched;
            while first <= position {
                let own = first + seat.group;
                let (key, of_value) = if own == position {
                    (eight(qkv + head_dim), eight(qkv + 2 * head_dim))
                } else {
                    (HalfKv::widen(keys), HalfKv::widen(values))
                };
                first += WARPS * per_warp;
                if first <= position {
                    // SAFETY: the caller's promise.
                    [keys, values] =
                        unsafe { self.fetch_position(seat, layer, first + seat.group, position) };
                }
                let mut score = [0.0f32; 2];
                for d in 0..OCTET {
                    score[d % 2] = mul_add(q[d], key[d], score[d % 2]);
                }
                let [score] = warp_reduce_add_n(FULL_MASK, [score[0] + score[1]], LANES);
                let score = if own <= position { score } else { f32::NEG_INFINITY };
                let new = max(largest, largest_of_warp(score));
                let (correction, weight) = (exp2(largest - new), exp2(score - new));
                largest = new;
                sum = mul_add(sum, correction, weight);
                for d in 0..OCTET {
                    value[d] = mul_add(weight, of_value[d], value[d] * correction);
                }
            }
            // The groups of a warp: of two that are added, each goes on with half of the dimensions.
            let mut dims = value;
            let mut first_dim = seat.first_dim;
            let mut n = OCTET;
            let mut distance = WARP_SIZE / 2;
            while distance >= LANES {
                n /= 2;
                let is_upper = self.lane & distance != 0;
                let mut given = [0.0; OCTET / 2];
                let mut i = 0;
                while i < n {
                    (dims[i], given[i]) =
                        if is_upper { (dims[n + i], dims[i]) } else { (dims[i], dims[n + i]) };
                    i += 1;
                }
                let [a, b, c, d] = given;
                let ([a, b, c, d], other) = match n {
                    4 => {
                        let [a, b, c, d, other] = warp_shuffle_xor_n(FULL_MASK, [a, b, c, d, sum], distance);
                        ([a, b, c, d], other)
                    }
                    2 => {
                        let [a, b, other] = warp_shuffle_xor_n(FULL_MASK, [a, b, sum], distance);
                        ([a, b, 0.0, 0.0], other)
                    }
                    _ => {
                        let [a, other] = warp_shuffle_xor_n(FULL_MASK, [a, sum], distance);
                        ([a, 0.0, 0.0, 0.0], other)
                    }
                };
                let taken = [a, b, c, d];
                let mut i = 0;
                while i < n {
                    dims[i] += taken[i];
                    i += 1;
                }
                sum += other;
                if is_upper {
                    first_dim += n as u32;
                }
                distance /= 2;
            }
            if seat.has_dims {
                let at = (warp_values + self.warp * stride + first_dim) as usize;
                let [a, b, c, d, e, f, g, h] = dims;
                match n {
                    2 => {
                        floats.set(at, a);
                        floats.set(at + 1, b);
                    }
                    4 => floats.set4(at, [a, b, c, d]),
                    _ => {
                        floats.set4(at, [a, b, c, d]);
                        floats.set4(at + 4, [e, f, g, h]);
                    }
                }
            }
            if self.lane == 0 {
                floats.set((warp_max + self.warp) as usize, largest);
                floats.set((warp_sum + self.warp) as usize, sum);
            }
        }
        sync_threads();
        // The warps: a lane has what one of them has left.
        let mut quad = self.warp;
        if quad < head_dim / 4 {
            let of = self.lane.min(WARPS - 1);
            let largest = floats.get((warp_max + of) as usize);
            let sum = floats.get((warp_sum + of) as usize);
            let share = exp2(largest - largest_of_warp(largest));
            let share = if self.lane < WARPS { share } else { 0.0 };
            let sum = sum * share;
            while quad < head_dim / 4 {
                let values = floats.get4((warp_values + of * stride + 4 * quad) as usize);
                let (value, sum) = sum_of_4_and_1(values.map(|value| value * share), sum);
                let values = broadcast_4(value * rcp(sum));
                let to = heads + self.rank * head_dim + 4 * quad;
                // SAFETY: the cluster has the block.
                self.for_blocks::<WARP_SIZE>(|block| unsafe {
                    self.heads().arrivals.send_4(block, to, values);
                });
                quad += WARPS + 1;
            }
        }
    }
}

/// Four sums over the warp as `warp_reduce_add_4` leaves them, and one more that all lanes get; what one waits for hides
/// what the other does.
#[inline(always)]
fn sum_of_4_and_1(values: [f32; 4], one: f32) -> (f32, f32) {
    let lane = thread_idx_x() % WARP_SIZE;
    let [v0, v1, v2, v3] = values;
    // Each half of the warp gives away the two values that it will not sum up, then each quarter one.
    let is_upper = lane & 16 != 0;
    let [keep0, keep1, give0, give1] = if is_upper { [v2, v3, v0, v1] } else { [v0, v1, v2, v3] };
    let [a, b, c] = warp_shuffle_xor_n(FULL_MASK, [give0, give1, one], 16);
    let (a, b, mut one) = (keep0 + a, keep1 + b, one + c);
    let (keep, give) = if lane & 8 != 0 { (b, a) } else { (a, b) };
    let [c, d] = warp_shuffle_xor_n(FULL_MASK, [give, one], 8);
    let mut sum = keep + c;
    one += d;
    let mut distance = 4;
    while distance > 0 {
        let [c, d] = warp_shuffle_xor_n(FULL_MASK, [sum, one], distance);
        sum += c;
        one += d;
        distance /= 2;
    }
    (sum, one)
}

/// The largest value of a warp, in one exchange instead of five.
#[inline(always)]
fn largest_of_warp(value: f32) -> f32 {
    from_order_key(warp_max_u32(order_key(value)))
}
