//! Attention of one query head by one block.

use super::WARPS;
use super::layout::{LayerRef, Layout, Shape};
use super::products::broadcast_4;
use super::walk::Walk;
use crate::activations::OCTET;
use crate::attention::LOWEST;
use crate::kv_cache::{HalfKv, KvCodec, KvRef};
use core::mem::offset_of;
use cuda_std::codegen::settled;
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
type KeyAndValue = [<HalfKv as KvCodec>::Raw; 2];

/// What a lane has of the first position that it takes, and where its part of position 0 is in the cache.
#[derive(Clone, Copy)]
pub(super) struct First {
    fetched: KeyAndValue,
    in_cache: u32,
}

impl Walk {
    /// Where in attention this lane stands, of `LANES` that share a position.
    #[inline(always)]
    fn seat<const LANES: u32>(self, in_cache: u32) -> Seat {
        let first_dim = self.lane % LANES * OCTET as u32;
        let has_dims = self.has_head() && first_dim < self.a.shape.head_dim;
        Seat { group: self.lane / LANES, first_dim, has_dims, in_cache }
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
    pub(super) unsafe fn fetch_first<const LANES: u32>(self, layer: u32, position: u32) -> First {
        let Shape { head_dim, n_ctx, heads_per_kv, .. } = self.a.shape;
        let at_head = self.rank / heads_per_kv * n_ctx * head_dim;
        let in_cache = settled(at_head + self.lane % LANES * OCTET as u32);
        let seat = self.seat::<LANES>(in_cache);
        let of = self.warp * (WARP_SIZE / LANES) + seat.group;
        // SAFETY: the caller's promise.
        First { fetched: unsafe { self.fetch_position(seat, layer, of, position) }, in_cache }
    }

    /// Attention of the block's query head over positions 0 to `position`, of which the last has come as mail; sends the result to all
    /// blocks. `at_hand` is of the first position. All threads of the block make this call.
    ///
    /// Softmax is online (Milakov and Gimelshein, 2018), with a largest score for each group of lanes that takes a position at a time.
    ///
    /// # Safety
    /// The arguments are as their fields say; the cache is written at the positions before.
    #[inline(always)]
    pub(super) unsafe fn attend<const LANES: u32>(self, layer: u32, position: u32, at_hand: First) {
        let head_dim = self.a.shape.head_dim;
        let Layout { qkv, heads, group_weights, group_values, .. } = self.a.layout;
        let floats = self.floats();
        let stride = Layout::values_stride(&self.a.shape);
        let seat = self.seat::<LANES>(at_hand.in_cache);
        let n_quads = settled(head_dim / 4);
        let per_warp = WARP_SIZE / LANES;
        let eight = |at: u32| -> [f32; OCTET] {
            // Lanes beyond the head read the first dimensions, and count for nothing.
            let at = (at + if seat.has_dims { seat.first_dim } else { 0 }) as usize;
            let ([a, b, c, d], [e, f, g, h]) = (floats.get4(at), floats.get4(at + 4));
            [a, b, c, d, e, f, g, h]
        };
        self.receive(self.qkv(), layer);
        if self.warp < WARPS {
            let q = eight(qkv);
            let (mut largest, mut sum, mut value) = (LOWEST, 0.0f32, [0.0f32; OCTET]);
            let mut first = self.warp * per_warp;
            let [mut keys, mut values] = at_hand.fetched;
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
                let score = if seat.has_dims { score[0] + score[1] } else { 0.0 };
                let [score] = warp_reduce_add_n(FULL_MASK, [score], LANES);
                let score = if own <= position { score } else { f32::NEG_INFINITY };
                let new = max(largest, score);
                let (correction, weight) = (exp2(largest - new), exp2(score - new));
                largest = new;
                sum = mul_add(sum, correction, weight);
                for d in 0..OCTET {
                    value[d] = mul_add(weight, of_value[d], value[d] * correction);
                }
            }
            let group = self.warp * per_warp + seat.group;
            if seat.has_dims {
                let at = (group_values + group * stride + seat.first_dim) as usize;
                let [a, b, c, d, e, f, g, h] = value;
                floats.set4(at, [a, b, c, d]);
                floats.set4(at + 4, [e, f, g, h]);
            }
            if self.lane.is_multiple_of(LANES) {
                let both = u64::from(largest.to_bits()) | u64::from(sum.to_bits()) << 32;
                self.memory.view::<u64>().set((group_weights / 2 + group) as usize, both);
            }
        }
        sync_threads();
        // The groups: a lane has what some of them have left.
        let mut quad = self.warp;
        if quad < n_quads {
            const { assert!(WARPS * (WARP_SIZE / LANES) <= 3 * WARP_SIZE) };
            let groups: [u32; 3] = core::array::from_fn(|i| self.lane + i as u32 * WARP_SIZE);
            let n_groups = WARPS * per_warp;
            let (mut largest, mut sums) = ([LOWEST; 3], [0.0; 3]);
            let mut i = 0;
            while i < n_groups.div_ceil(WARP_SIZE) as usize {
                let both =
                    self.memory.view::<u64>().get((group_weights / 2 + groups[i].min(n_groups - 1)) as usize);
                largest[i] = f32::from_bits(both as u32);
                sums[i] = if groups[i] < n_groups { f32::from_bits((both >> 32) as u32) } else { 0.0 };
                i += 1;
            }
            let [a, b, c] = largest;
            let of_all = largest_of_warp(max(max(a, b), c));
            let shares = largest.map(|largest| exp2(largest - of_all));
            let [a, b, c]: [f32; 3] = core::array::from_fn(|i| sums[i] * shares[i]);
            let sum = a + b + c;
            while quad < n_quads {
                let mut value = [0.0; 4];
                let mut i = 0;
                while i < n_groups.div_ceil(WARP_SIZE) as usize {
                    if groups[i] < n_groups {
                        let of_group = floats.get4((group_values + groups[i] * stride + 4 * quad) as usize);
                        value = core::array::from_fn(|d| mul_add(of_group[d], shares[i], value[d]));
                    }
                    i += 1;
                }
                let (value, sum) = sum_of_4_and_1(value, sum);
                let values = broadcast_4(value * rcp(sum));
                let to = heads + self.rank * head_dim + 4 * quad;
                self.send_to_all(self.heads(), to, values);
                quad += WARPS + 1;
            }
        }
    }
}

/// Four sums over the warp, of which lanes 0 to 7 get the first, lanes 8 to 15 the second, and so on; and one more that all lanes
/// get. What one waits for hides what the other does.
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
