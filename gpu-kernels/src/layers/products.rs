//! The products: their vectors in Q8_1, norms, and the quads.

use super::WARPS;
use super::layout::Product;
use super::walk::Walk;
use crate::activations::{Q8_1, Q8_1Unit};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{UNIT, UNIT_WORDS, WeightFormat, half_sums};
use crate::gemv::{Dots, One};
use cuda_std::cluster::Arrivals;
use cuda_std::float::{abs, low_bits_of_integer, max, mul_add, rcp, rsqrt};
use cuda_std::thread::sync_threads;
use cuda_std::warp::{
    FULL_MASK, WARP_SIZE, warp_max_u32, warp_reduce_add, warp_reduce_add_4, warp_reduce_add_n,
    warp_shuffle_idx, warp_sum_u32,
};

/// Whose turn it is to be multiplied.
#[derive(Clone, Copy)]
pub(super) struct Turn {
    /// The quad's number in the matrix.
    pub(super) quad: u32,
    /// Whether it is the lanes' own: where a warp has more places than there are quads left, others have the last one besides.
    pub(super) is_there: bool,
}

impl Walk {
    /// Makes the hidden state at word `x` ready for a product, times the factors of the norm before it, which have come. All threads of
    /// the block make this call.
    #[inline(always)]
    pub(super) fn prepare_normalised(self, product: Product, x: u32) {
        let this = self.afresh();
        if this.warp < WARPS {
            let squares = this.a.layout.squares;
            let mut unit = this.warp;
            while unit < product.n_units {
                let column = unit * UNIT as u32 + this.lane;
                let value = this.floats().get((x + column) as usize);
                let gamma = this.floats().get((product.gamma + column) as usize);
                this.quantize(product, [unit], [value * gamma]);
                let square = warp_reduce_add(FULL_MASK, value * value, WARP_SIZE);
                if this.lane == 0 {
                    this.floats().set((squares + unit) as usize, square);
                }
                unit += WARPS;
            }
        }
        sync_threads();
    }

    /// What counts that a norm's factor is there.
    #[inline(always)]
    pub(super) fn norm(self) -> Arrivals {
        Arrivals::at(self.memory, self.a.layout.norm)
    }

    /// Leaves the factor of the norm that products with what [`prepare_normalised`](Self::prepare_normalised) has made ready lack. The
    /// lanes of the warp that multiplies nothing make this call together, beside the products.
    #[inline(always)]
    pub(super) fn work_out_norm(self, product: Product) {
        let mut sum = 0.0;
        let mut unit = self.lane;
        while unit - self.lane < product.n_units {
            let square = self.floats().get((self.a.layout.squares + unit.min(product.n_units - 1)) as usize);
            sum += if unit < product.n_units { square } else { 0.0 };
            unit += WARP_SIZE;
        }
        let sum = warp_reduce_add(FULL_MASK, sum, WARP_SIZE);
        if self.lane == 0 {
            let factor = rsqrt(mul_add(sum, self.a.shape.per_n_embd, self.a.shape.eps));
            self.floats().set(self.a.layout.factor as usize, factor);
            self.norm().expect(0);
        }
    }

    /// The factor of norm `number` of the launch, once it is there.
    #[inline(always)]
    pub(super) fn norm_factor(self, number: u32) -> f32 {
        self.norm().wait(number);
        self.floats().get(self.a.layout.factor as usize)
    }

    /// Makes a vector ready for a product, `AT_ONCE` units by a warp at a time; `value` gives the vector's columns. All threads of the
    /// block make this call.
    #[inline(always)]
    pub(super) fn prepare<const AT_ONCE: usize>(self, product: Product, value: impl Fn(u32) -> f32) {
        let this = self.afresh();
        if this.warp < WARPS {
            let mut first = this.warp;
            while first < product.n_units {
                // Units beyond the last one are the last one once more.
                let units: [u32; AT_ONCE] =
                    core::array::from_fn(|i| (first + i as u32 * WARPS).min(product.n_units - 1));
                this.quantize(product, units, units.map(|unit| value(unit * UNIT as u32 + this.lane)));
                first += AT_ONCE as u32 * WARPS;
            }
        }
        sync_threads();
    }

    /// Leaves units of a product's vector in Q8_1, of which each lane of a warp has a value.
    #[inline(always)]
    fn quantize<const N: usize>(self, product: Product, units: [u32; N], values: [f32; N]) {
        let Product { quants, scales, .. } = product;
        let amax = values.map(|value| f32::from_bits(warp_max_u32(abs(value).to_bits())));
        let mut bytes = [0; N];
        let mut i = 0;
        while i < N {
            // Where all are 0, so are the integers.
            let inverse = 127.0 * rcp(max(amax[i], 1e-36));
            bytes[i] = low_bits_of_integer(values[i] * inverse) as u8;
            let column = units[i] * UNIT as u32 + self.lane;
            self.memory.view::<u8>().set((4 * quants + column) as usize, bytes[i]);
            i += 1;
        }
        let sums = bytes.map(|byte| warp_sum_u32(i32::from(byte as i8) as u32) as i32);
        if self.lane == 0 {
            let mut i = 0;
            while i < N {
                let d = amax[i] * (1.0 / 127.0);
                let both = u64::from(d.to_bits()) | u64::from((d * sums[i] as f32).to_bits()) << 32;
                self.memory.view::<u64>().set((scales / 2 + units[i]) as usize, both);
                i += 1;
            }
        }
    }

    /// A unit of a product's vector, which was made ready.
    #[inline(always)]
    fn unit(self, product: Product, unit: u32) -> Q8_1Unit {
        let Product { quants, scales, .. } = product;
        let at = (quants + unit * UNIT_WORDS as u32) as usize;
        let ([a, b, c, d], [e, f, g, h]) = (self.memory.get4(at), self.memory.get4(at + 4));
        let both = self.memory.view::<u64>().get((scales / 2 + unit) as usize);
        let quants = [a, b, c, d, e, f, g, h].map(|word| word as i32);
        Q8_1Unit {
            quants,
            d: f32::from_bits(both as u32),
            d_sum: f32::from_bits((both >> 32) as u32),
            sums: half_sums(quants),
        }
    }

    /// Multiplies the block's quads of a matrix with the vector that was made ready, `GROUP` lanes to a quad, each with `AT_ONCE` units
    /// at a time; all lanes call `finish` with the products of a quad's rows and with what `ready` has fetched beforehand.
    #[inline(always)]
    pub(super) fn multiply<F: WeightFormat, const GROUP: u32, const AT_ONCE: usize, R>(
        self,
        product: Product,
        ready: impl Fn(Turn) -> R,
        finish: impl Fn(Turn, R, [f32; TILE_ROWS]),
    ) {
        let this = self.afresh();
        if this.warp >= WARPS {
            return;
        }
        const { assert!(GROUP.is_power_of_two() && GROUP <= WARP_SIZE) };
        // As many units as there are registers for.
        let at_once = if F::IN_PAIRS { AT_ONCE } else { 1 };
        let per_warp = WARP_SIZE / GROUP;
        let (of_warp, member) = (this.lane / GROUP, this.lane % GROUP);
        let (first_quad, n_quads) = (product.first_quad(this.rank), product.quads_of(this.rank));
        let mut quad = this.warp * per_warp;
        while quad < n_quads {
            let own = (quad + of_warp).min(n_quads - 1);
            let start = product.quads + own * product.quad_words;
            let turn = Turn { quad: first_quad + own, is_there: quad + of_warp < n_quads };
            let ready = ready(turn);
            let mut sums = [0.0; TILE_ROWS];
            let mut first = 0;
            while first < product.n_units {
                let mut i = 0;
                while i < at_once {
                    let unit = first + member + i as u32 * GROUP;
                    // Lanes without a unit take the last one, times nothing.
                    let (is_there, unit) = (unit < product.n_units, unit.min(product.n_units - 1));
                    let tile = unit / TILE_UNITS as u32;
                    let n_units = (product.n_units - tile * TILE_UNITS as u32).min(TILE_UNITS as u32);
                    let start = (start + tile * product.tile_words) as usize;
                    let source = SharedTile { memory: this.memory, start };
                    let (in_tile, mut x) = ((unit % TILE_UNITS as u32) as usize, this.unit(product, unit));
                    if !is_there {
                        (x.d, x.d_sum) = (0.0, 0.0);
                    }
                    let format = F::FORMAT as u32;
                    sums = One::<F>::dots::<Q8_1>(format, source, n_units as usize, in_tile, &x, sums);
                    i += 1;
                }
                first += at_once as u32 * GROUP;
            }
            let sums = if GROUP == WARP_SIZE {
                broadcast_4(warp_reduce_add_4(sums))
            } else {
                warp_reduce_add_n(FULL_MASK, sums, GROUP)
            };
            finish(turn, ready, sums);
            quad += WARPS * per_warp;
        }
    }
}

/// What every eight lanes have one of, as [`warp_reduce_add_4`] leaves it.
#[inline(always)]
pub(super) fn broadcast_4(value: f32) -> [f32; 4] {
    [0, 8, 16, 24].map(|lane| warp_shuffle_idx(FULL_MASK, value, lane, WARP_SIZE))
}
