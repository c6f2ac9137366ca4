//! The products: their vectors in Q8_1, norms, and the quads.

use super::layout::{HIDDEN_QUADS, Layout, MAX_LOADED, Product};
use super::walk::Walk;
use super::{BLOCK_DIM, BLOCKS, DOWN, GATE_UP, WARPS};
use crate::activations::Q8_1Unit;
use crate::formats::tile::{TILE_ROWS, TILE_UNITS};
use crate::formats::{InPlanes, LaneInTile, UNIT, UNIT_WORDS, WeightUnit, half_sums};
use cuda_std::codegen::settled;
use cuda_std::float::{abs, low_bits_of_integer, max, mul_add, rcp, rsqrt};
use cuda_std::thread::sync_threads;
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, warp_max_u32, warp_reduce_add, warp_shuffle_idx, warp_shuffle_xor_n, warp_sum_u32,
};

/// Half of a unit, in bytes of its integers.
const HALF: u32 = UNIT as u32 / 2;

/// Whose turn it is to be multiplied.
#[derive(Clone, Copy, Default)]
pub(super) struct Turn {
    /// The quad's number in the matrix.
    pub(super) quad: u32,
    /// Which of its rows is the lane's.
    pub(super) row: u32,
    /// Whether it is the lanes' own: where a warp has more places than there are quads left, others have the last one besides.
    pub(super) is_there: bool,
}

/// What a lane multiplies next: units of a row of a quad, in registers before the vector is there, what finishing the row needs, and
/// where the vector will be.
#[derive(Clone, Copy)]
pub(super) struct Loaded<U, const N: usize, R> {
    units: [U; N],
    ready: R,
    turn: Turn,
    /// Rows of the block.
    n_rows: u32,
    /// The words at which the halves of the lane's first unit of the vector lie, and its factor, in pairs of words.
    halves: [u32; 2],
    scale: u32,
}

/// A unit that a warp makes ready for a product next, and the lane's factor of the norm.
#[derive(Clone, Copy)]
pub(super) struct NextUnit {
    /// The word of the lane's value.
    from: u32,
    /// Where the lane's byte goes, and where the unit's factor, in pairs of words.
    byte: u32,
    scale: u32,
    gamma: f32,
}

impl Walk {
    /// What the warp makes ready first, of the vector at word `from`: before it is there. The norm's factors have come, if there is one.
    #[inline(always)]
    pub(super) fn next_unit(self, product: Product, from: u32) -> NextUnit {
        self.unit_to_be(product, from, self.warp)
    }

    /// What the warp makes ready once it has come to unit `unit`.
    #[inline(always)]
    fn unit_to_be(self, product: Product, from: u32, unit: u32) -> NextUnit {
        // Where there is no unit nothing will be made ready.
        let unit = unit.min(product.n_units - 1);
        let column = unit * UNIT as u32 + self.lane;
        let gamma =
            if product.n_gamma == 0 { 1.0 } else { self.floats().get((product.gamma + column) as usize) };
        let at = 4 * product.quants_of(self.lane / HALF, unit) + self.lane % HALF;
        NextUnit {
            from: settled(from + column),
            byte: settled(at),
            scale: settled(product.scales / 2 + unit),
            gamma: settled(gamma),
        }
    }

    /// Makes a vector ready for a product, times the factors of the norm before it, beginning with `next`. All threads of the block
    /// make this call.
    #[inline(always)]
    pub(super) fn prepare(self, product: Product, from: u32, next: NextUnit) {
        let mut next = next;
        let mut unit = self.warp;
        while unit < product.n_units && self.warp < WARPS {
            let value = self.floats().get(next.from as usize) * next.gamma;
            let Quantized { byte, d, d_sum } = quantize(value);
            self.memory.view::<u8>().set(next.byte as usize, byte);
            if self.lane == 0 {
                let both = u64::from(d.to_bits()) | u64::from(d_sum.to_bits()) << 32;
                self.memory.view::<u64>().set(next.scale as usize, both);
            }
            unit += WARPS;
            if unit < product.n_units {
                next = self.afresh().unit_to_be(product, from, unit);
            }
        }
        sync_threads();
    }

    /// As [`prepare`](Self::prepare), of the hidden state; the warp that makes no unit ready leaves the factor of the norm, which
    /// products with the vector lack, in the meantime.
    #[inline(always)]
    pub(super) fn prepare_normalised(self, product: Product, from: u32, next: NextUnit) {
        if self.warp == WARPS {
            self.work_out_norm(from);
        }
        self.prepare(product, from, next);
    }

    /// Leaves the factor of the norm of the hidden state at word `from`. The lanes of a warp make this call together.
    #[inline(always)]
    fn work_out_norm(self, from: u32) {
        let mut sums = [0.0f32; 2];
        let mut column = 4 * self.lane;
        while column < self.a.shape.n_embd {
            let [a, b, c, d] = self.floats().get4((from + column) as usize);
            sums = [mul_add(a, a, mul_add(c, c, sums[0])), mul_add(b, b, mul_add(d, d, sums[1]))];
            column += 4 * WARP_SIZE;
        }
        let sum = warp_reduce_add(FULL_MASK, sums[0] + sums[1], WARP_SIZE);
        if self.lane == 0 {
            let factor = rsqrt(mul_add(sum, self.a.shape.per_n_embd, self.a.shape.eps));
            self.floats().set(self.a.layout.factor as usize, factor);
        }
    }

    /// The factor of the norm of the vector that was made ready last.
    #[inline(always)]
    pub(super) fn norm_factor(self) -> f32 {
        self.floats().get(self.a.layout.factor as usize)
    }

    /// Sends the block's share of what is between the halves of the feed-forward network, which all of its threads have left before
    /// they met, to all blocks in Q8_1.
    #[inline(always)]
    pub(super) fn send_hidden(self) {
        let this = self.afresh();
        let Layout { hidden, products, .. } = this.a.layout;
        let first = products[GATE_UP].first_quad(this.rank) / HIDDEN_QUADS;
        let n_own = products[GATE_UP].quads_of(this.rank) / HIDDEN_QUADS;
        let mut own = this.warp;
        while own < n_own {
            let value = this.floats().get((hidden + own * UNIT as u32 + this.lane) as usize);
            let Quantized { byte, d, d_sum } = quantize(value);
            // The bytes of four lanes make a word, and each half of the warp sends the words of half of the unit.
            let word = u32::from(byte) << (8 * (this.lane % 4));
            let [other] = warp_shuffle_xor_n(FULL_MASK, [word], 1);
            let word = word | other;
            let [other] = warp_shuffle_xor_n(FULL_MASK, [word], 2);
            let word = word | other;
            let half = this.lane / HALF;
            let words =
                [0, 4, 8, 12].map(|lane| warp_shuffle_idx(FULL_MASK, word, half * HALF + lane, WARP_SIZE));
            let (unit, mail) = (first + own, this.hidden().arrivals);
            let block = this.lane % BLOCKS;
            // SAFETY: the cluster has the block.
            unsafe {
                mail.send_4(block, products[DOWN].quants_of(half, unit), words.map(f32::from_bits));
                if half == 0 {
                    mail.send_2(block, products[DOWN].scales + 2 * unit, [d, d_sum]);
                }
            }
            own += WARPS + 1;
        }
    }

    /// A unit of a product's vector, which was made ready: its halves at two words, its factor at a pair of words.
    #[inline(always)]
    fn unit(self, halves: [u32; 2], scale: u32) -> Q8_1Unit {
        let [[a, b, c, d], [e, f, g, h]] = halves.map(|half| self.memory.get4(half as usize));
        let both = self.memory.view::<u64>().get(scale as usize);
        let quants = [a, b, c, d, e, f, g, h].map(|word| word as i32);
        Q8_1Unit {
            quants,
            d: f32::from_bits(both as u32),
            d_sum: f32::from_bits((both >> 32) as u32),
            sums: half_sums(quants),
        }
    }

    /// Leaves zeros as the factors beyond the end of a product's vector. All threads of the block make this call.
    pub(super) fn clear_scales(self, product: Product) {
        let mut unit = product.n_units + self.warp * WARP_SIZE + self.lane;
        while unit < Layout::scales_of(product.n_units) {
            self.memory.view::<u64>().set((product.scales / 2 + unit) as usize, 0);
            unit += BLOCK_DIM;
        }
    }

    /// The unit of weights of lane `member`, of those from unit `first` of a row on: as many as there are lanes that share the row, of
    /// which `first` is a multiple.
    #[inline(always)]
    fn weights_of<F: InPlanes>(
        self,
        product: Product,
        start: u32,
        row: u32,
        member: u32,
        first: u32,
    ) -> F::Fetched {
        const TILE: u32 = TILE_UNITS as u32;
        let tile = first / TILE;
        let start = start + tile.min((product.n_units - 1) / TILE) * product.tile_words;
        let n_units = product.n_units.max(tile * TILE) - tile * TILE;
        F::fetch(LaneInTile::new(self.memory, start, n_units.min(TILE), row, member), first % TILE)
    }

    /// Takes `N` units of each lane's row into registers, from unit `first` on, of the block's row `of` and those after it that the warp
    /// multiplies at a time: `LANES` lanes share a row. The weights are there; `ready` fetches what finishing the rows needs besides.
    #[inline(always)]
    fn load<F: InPlanes, const LANES: u32, const N: usize, R>(
        self,
        product: Product,
        [of, first]: [u32; 2],
        ready: impl Fn(Turn) -> R,
    ) -> Loaded<F::Fetched, N, R> {
        const { assert!(LANES.is_power_of_two() && LANES <= WARP_SIZE / 2 && N as u32 * LANES <= MAX_LOADED) };
        let (of, member) = (of + self.lane / LANES, self.lane % LANES);
        let (own, row) = (of / TILE_ROWS as u32, of % TILE_ROWS as u32);
        let n_quads = product.quads_of(self.rank);
        // Where there is no quad the last one is as good as any.
        let (own, is_there) = (own.min(n_quads - 1), own < n_quads);
        let turn = Turn { quad: product.first_quad(self.rank) + own, row, is_there };
        let start = product.quads + own * product.quad_words;
        let units = core::array::from_fn(|i| {
            self.weights_of::<F>(product, start, row, member, first + i as u32 * LANES)
        });
        let halves = [0, 1].map(|half| settled(product.quants_of(half, first + member)));
        let scale = settled(product.scales / 2 + first + member);
        Loaded { units, ready: ready(turn), turn, n_rows: settled(TILE_ROWS as u32 * n_quads), halves, scale }
    }

    /// [`load`](Self::load)s what the warp multiplies first, if there is anything.
    #[inline(always)]
    pub(super) fn load_first<F: InPlanes, const LANES: u32, const N: usize, R: Default>(
        self,
        product: Product,
        ready: impl Fn(Turn) -> R,
    ) -> Loaded<F::Fetched, N, R> {
        let of = self.warp * (WARP_SIZE / LANES);
        if self.warp < WARPS && of < TILE_ROWS as u32 * product.quads_of(self.rank) {
            return self.load::<F, LANES, N, R>(product, [of, 0], ready);
        }
        Loaded {
            units: [(); N].map(|()| F::Fetched::default()),
            ready: R::default(),
            turn: Turn::default(),
            n_rows: 0,
            halves: [0; 2],
            scale: 0,
        }
    }

    /// Multiplies the block's quads of a matrix with the vector that was made ready, of which the first ones are loaded; all lanes
    /// call `finish` with the product of their row and with what `ready` has fetched for it.
    #[inline(always)]
    pub(super) fn multiply<F: InPlanes, const LANES: u32, const N: usize, R: Copy>(
        self,
        product: Product,
        loaded: Loaded<F::Fetched, N, R>,
        ready: impl Fn(Turn) -> R,
        finish: impl Fn(Turn, R, f32),
    ) {
        let (mut of, mut first) = (self.warp * (WARP_SIZE / LANES), 0);
        if of >= loaded.n_rows {
            return;
        }
        let mut loaded = loaded;
        let mut sum = 0.0;
        loop {
            let Loaded { units, ready: at_hand, turn, n_rows, halves, scale } = loaded;
            let mut i = 0;
            while i < N {
                // What is beyond the vector's end is multiplied with nothing.
                let skipped = i as u32 * LANES;
                let x = self.unit(halves.map(|half| half + UNIT_WORDS as u32 / 2 * skipped), scale + skipped);
                sum = F::unit(units[i]).dot_q8_1(&x, sum);
                i += 1;
            }
            first += N as u32 * LANES;
            if first >= product.n_units {
                finish(turn, at_hand, warp_reduce_add(FULL_MASK, sum, LANES));
                (of, first, sum) = (of + WARPS * (WARP_SIZE / LANES), 0, 0.0);
                if of >= n_rows {
                    return;
                }
            }
            loaded = self.afresh().load::<F, LANES, N, R>(product, [of, first], &ready);
        }
    }
}

/// A value of a unit in Q8_1, of which each lane of a warp has one.
#[derive(Clone, Copy)]
struct Quantized {
    byte: u8,
    /// The factor, and that times the sum of the integers.
    d: f32,
    d_sum: f32,
}

/// Q8_1 of a unit of which each lane of a warp has a value.
#[inline(always)]
fn quantize(value: f32) -> Quantized {
    let amax = f32::from_bits(warp_max_u32(abs(value).to_bits()));
    // Where all are 0, so are the integers.
    let byte = low_bits_of_integer(value * (127.0 * rcp(max(amax, 1e-36)))) as u8;
    let sum = warp_sum_u32(i32::from(byte as i8) as u32) as i32;
    let d = amax * (1.0 / 127.0);
    Quantized { byte, d, d_sum: d * sum as f32 }
}

/// What every eight lanes have one of.
#[inline(always)]
pub(super) fn broadcast_4(value: f32) -> [f32; 4] {
    [0, 8, 16, 24].map(|lane| warp_shuffle_idx(FULL_MASK, value, lane, WARP_SIZE))
}
