//! A stage that multiplies: its vector into shared memory, its tiles as they come, and one thread for each quad of
//! four rows that finishes them.

use super::feed::Feed;
use super::stage::{HeadsRef, Kind, StageRef};
use super::vector::{Narrow, await_again, await_mode, look4, put, put4, put_narrow};
use super::{Block, MAX_WARPS};
use crate::activations::{Activations, OCTET};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::UNIT;
use crate::gemv::Dots;
use crate::gemv::epilogue::{QUAD_ROWS, Quad};
use crate::math::silu;
use crate::rope::rotate;
use cuda_std::float::{f32_to_f16, mul_add, rsqrt};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, sync_warp, warp_reduce_add};
use half::f16;

/// Quads in a band.
const QUADS: u32 = (TILE_ROWS / QUAD_ROWS) as u32;

/// Words of shared memory for the sums of a block's bands, of each warp that shares one: from one place to the next it is
/// another band, another warp, or both.
pub const fn sums_words(turns: u32, n_warps: u32) -> u32 {
    (turns + n_warps) * TILE_ROWS as u32
}

/// Runs the stage in this block.
///
/// # Safety
/// The stage, the block's memory and the feed are as they say.
#[inline(always)]
pub(super) unsafe fn run<D: Dots>(stage: StageRef, block: &Block, feed: &mut Feed, number: u32, known: u32) {
    let (first_band, turns) = stage.deal(block.index);
    if turns == 0 {
        block.store_fetched();
        sync_threads();
        return;
    }
    let (memory, thread) = (block.memory, thread_idx_x());
    // The squares of the stage before may still be read.
    let squares = block.squares_at + number % 2 * MAX_WARPS;
    let normalises = stage.gamma() != 0;
    let n_quads = turns * QUADS;
    let quad_of = |place: u32| {
        let band = stage.band(first_band + place / QUADS);
        Quad { part: band.part, number: band.number * QUADS + place % QUADS }
    };
    let exists = |quad: Quad| quad.number * (QUAD_ROWS as u32) < stage.part(quad.part).n_rows();
    let warps_of = |place: u32| {
        let n_tiles = stage.n_tiles();
        stage.share(block.index).warps_of(place / QUADS * n_tiles, n_tiles)
    };
    // SAFETY: the caller's promise.
    unsafe {
        // What finishing takes besides the sums is found out while the vector is on its way.
        let mut prepared = Prepared::default();
        let mut warps = (0, 0);
        if thread < n_quads {
            let quad = quad_of(thread);
            warps = warps_of(thread);
            if exists(quad) {
                prepared = Prepared::fetch(stage, block, quad);
            }
        }
        block.mark(1);
        let source = block.set.wrapping_add(stage.input() as usize);
        let square_sum = load_input::<D::X>(stage, source, memory);
        if normalises {
            store_squares(memory, squares, square_sum);
        }
        block.store_fetched();
        block.mark(2);
        sync_threads();
        block.mark(3);
        multiply::<D>(stage, block, first_band, feed, known);
        block.mark(4);
        sync_threads();
        block.mark(5);

        let factor = if normalises {
            rsqrt(mul_add(load_squares(memory, squares), stage.per_n(), stage.eps()))
        } else {
            1.0
        };
        let mut place = thread;
        while place < n_quads {
            let quad = quad_of(place);
            if exists(quad) {
                let first = place / QUADS * TILE_ROWS as u32 + place % QUADS * QUAD_ROWS as u32;
                let mut sums = [0.0f32; QUAD_ROWS];
                let mut warp = warps.0;
                while warp <= warps.1 {
                    let at = block.sums_at + first + warp * TILE_ROWS as u32;
                    let [s0, s1, s2, s3] = memory.get4(at as usize).map(f32::from_bits);
                    sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
                    warp += 1;
                }
                finish(stage, block, quad, sums.map(|sum| sum * factor), prepared);
            }
            place += block_dim_x();
            if place < n_quads {
                warps = warps_of(place);
                if exists(quad_of(place)) {
                    prepared = Prepared::fetch(stage, block, quad_of(place));
                }
            }
        }
    }
}

/// Puts the vector into shared memory as it comes, zeros beyond its end; gives the sum of the squares of what this thread
/// has read.
///
/// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. Here `x * gamma` is stored; the products
/// get the common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the integers that Q8_1
/// of the normalised vector has.
///
/// # Safety
/// `source` is the stage's input.
#[inline(always)]
unsafe fn load_input<X: Activations>(stage: StageRef, source: *const f32, memory: DynamicShared<u32>) -> f32 {
    let (thread, block_dim) = (thread_idx_x(), block_dim_x());
    let (n, gamma) = (stage.n(), stage.gamma() as *const f32);
    let is_narrow = X::IS_ROUNDED && stage.input_is_narrow() != 0;
    let n_octets = stage.n_tiles() * (TILE_UNITS * UNIT / OCTET) as u32;
    // Warps stay whole: the lanes of a unit quantize it together.
    let warp_octet = thread / WARP_SIZE * WARP_SIZE;

    // Four words of the vector; beyond its end they are the last ones.
    let last = if is_narrow { n.div_ceil(8) } else { n.div_ceil(4) } - 1;
    // SAFETY: inside the vector, whose memory is a multiple of 16 bytes long.
    let look = |quad: u32| unsafe { look4(source.add(4 * quad.min(last) as usize)) };
    let factors = |quad: u32| {
        // SAFETY: inside gamma, likewise.
        unsafe { ld_global_u32x4(gamma.add(4 * quad.min(last) as usize).cast()).map(f32::from_bits) }
    };
    let fetch = |octet: u32| -> Fetched {
        let (first, second) = if is_narrow { (octet, octet) } else { (2 * octet, 2 * octet + 1) };
        let (low, high) = (look(first), if is_narrow { [0; 4] } else { look(second) });
        let (gamma_low, gamma_high) =
            if gamma.is_null() { ([0.0; 4], [0.0; 4]) } else { (factors(first), factors(second)) };
        Fetched { low, high, gamma_low, gamma_high }
    };
    let mut square_sum = 0.0;
    let mut store = |octet: u32, fetched: Fetched| {
        let n_left = n.saturating_sub(octet * OCTET as u32);
        let (low, high) = if is_narrow {
            let words = await_mode(fetched.low, n_left.div_ceil(2), || look(octet), stage.reserved());
            (Narrow::widen4([words[0], words[1]]), Narrow::widen4([words[2], words[3]]))
        } else {
            let low = await_mode(fetched.low, n_left, || look(2 * octet), stage.reserved());
            let high = await_mode(fetched.high, n_left.saturating_sub(4), || look(2 * octet + 1), stage.reserved());
            (low.map(f32::from_bits), high.map(f32::from_bits))
        };
        let ([mut a, mut b, mut c, mut d], [mut e, mut f, mut g, mut h]) = (low, high);
        if n_left < OCTET as u32 {
            let keep = |i: u32, value: f32| if i < n_left { value } else { 0.0 };
            (a, b, c, d) = (keep(0, a), keep(1, b), keep(2, c), keep(3, d));
            (e, f, g, h) = (keep(4, e), keep(5, f), keep(6, g), keep(7, h));
        }
        if !gamma.is_null() {
            let squares = |a: f32, b: f32, c: f32, d: f32| mul_add(a, a, b * b) + mul_add(c, c, d * d);
            square_sum += squares(a, b, c, d) + squares(e, f, g, h);
            let [ga, gb, gc, gd] = fetched.gamma_low;
            let [ge, gf, gg, gh] = fetched.gamma_high;
            (a, b, c, d) = (a * ga, b * gb, c * gc, d * gd);
            (e, f, g, h) = (e * ge, f * gf, g * gg, h * gh);
        }
        X::store(memory, n_octets as usize, octet as usize, [a, b, c, d, e, f, g, h]);
    };

    // Two are worked on while the next two are on their way.
    let mut round = 0;
    let (mut next0, mut next1) = (fetch(thread), fetch(thread + block_dim));
    while warp_octet + round < n_octets {
        let (first, second) = (next0, next1);
        let after = round + 2 * block_dim;
        if warp_octet + after < n_octets {
            (next0, next1) = (fetch(after + thread), fetch(after + block_dim + thread));
        }
        store(round + thread, first);
        if warp_octet + round + block_dim < n_octets {
            store(round + block_dim + thread, second);
        }
        round = after;
    }
    square_sum
}

/// Eight values as a thread has found them, and their factors.
#[derive(Clone, Copy)]
struct Fetched {
    low: [u32; 4],
    high: [u32; 4],
    gamma_low: [f32; 4],
    gamma_high: [f32; 4],
}

/// Leaves the sum of this warp's squares at its word of [`MAX_WARPS`] from `at` on; zeros for warps that do not exist.
#[inline(always)]
fn store_squares(memory: DynamicShared<u32>, at: u32, square_sum: f32) {
    let sum = warp_reduce_add(FULL_MASK, square_sum, WARP_SIZE);
    let (thread, n_warps) = (thread_idx_x(), block_dim_x() / WARP_SIZE);
    if thread.is_multiple_of(WARP_SIZE) {
        memory.set((at + thread / WARP_SIZE) as usize, sum.to_bits());
    }
    if thread + n_warps < MAX_WARPS {
        memory.set((at + n_warps + thread) as usize, 0);
    }
}

/// The sum of what [`store_squares`] has left.
#[inline(always)]
fn load_squares(memory: DynamicShared<u32>, at: u32) -> f32 {
    let mut sum = 0.0;
    for i in 0..MAX_WARPS / 4 {
        let [a, b, c, d] = memory.get4((at + 4 * i) as usize).map(f32::from_bits);
        sum += (a + b) + (c + d);
    }
    sum
}

/// The warp's part of the products: leaves its sums of each band at the band's and its own place.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<D: Dots>(stage: StageRef, block: &Block, first_band: u32, feed: &mut Feed, known: u32) {
    let (n_units, n_tiles) = (stage.n().div_ceil(UNIT as u32), stage.n_tiles());
    let (first, mut left) = stage.share(block.index).of(block.warp);
    let mut turn = stage.turn_of(first);
    let mut tile = first - turn * n_tiles;
    let has_parts = stage.part(1).n_bands() > 0;
    let format_of = |turn: u32| {
        stage.part(if has_parts { stage.band(first_band + turn).part } else { 0 }).format()
    };
    let mut format = format_of(turn);
    let mut sums = D::Sums::default();
    while left > 0 {
        // The warp's tiles of the band.
        let end = (tile + left).min(n_tiles);
        left -= end - tile;
        while tile < end {
            let tile_at = |start: u32| SharedTile { memory: block.memory, start: start as usize };
            let units_of = |tile: u32| (n_units - tile * TILE_UNITS as u32).min(TILE_UNITS as u32) as usize;
            // The vector starts at the start of the memory. All lanes meet after their last read of a tile: its place is
            // free then.
            if tile + 2 <= end {
                let (first, second) = feed.front_two();
                let sources = [tile_at(first), tile_at(second)];
                sums = D::add_two(format, sources, units_of(tile + 1), block.memory, tile as usize, sums);
                sync_warp(FULL_MASK);
                // SAFETY: the stages are as they say.
                unsafe { feed.pop_two(known) };
                tile += 2;
            } else {
                let source = tile_at(feed.front());
                sums = D::add(format, source, units_of(tile), block.memory, tile as usize, sums);
                sync_warp(FULL_MASK);
                // SAFETY: the stages are as they say.
                unsafe { feed.pop(known) };
                tile += 1;
            }
        }
        let at = block.sums_at + (turn + block.warp) * TILE_ROWS as u32;
        D::finish(sums, |row, sum| block.memory.set(at as usize + row, sum.to_bits()));
        sums = D::Sums::default();
        (turn, tile) = (turn + 1, 0);
        if has_parts && left > 0 {
            format = format_of(turn);
        }
    }
}

/// Where the rows of a quad of queries, keys or values are: their head, the quad's place in it, and the rows.
struct Rows {
    head: u32,
    place: u32,
    rows: [u32; QUAD_ROWS],
}

#[inline(always)]
fn rows(heads: HeadsRef, quad: Quad) -> Rows {
    let first = quad.number * QUAD_ROWS as u32;
    let head = ((u64::from(first) * u64::from(heads.per_head_dim())) >> 32) as u32;
    let place = first - head * heads.head_dim();
    // Pairs stand side by side: of the second pair of the quad either value is one further than of the first.
    let paired = heads.pair_distance() > 1 && quad.part < 2;
    let row = |i: u32| {
        if paired && place + (i & 2) < heads.n_rot() {
            first - place + place / 2 + i / 2 + i % 2 * heads.pair_distance()
        } else {
            first + i
        }
    };
    Rows { head, place, rows: [row(0), row(1), row(2), row(3)] }
}

/// What finishing a quad needs besides its sums.
#[derive(Clone, Copy, Default)]
struct Prepared {
    /// The bias of queries, keys or values, or what the rows are added to as it was when looked at.
    rows: [f32; QUAD_ROWS],
    /// The rotations of both pairs: cosine, sine, cosine, sine.
    rotations: [f32; 4],
}

impl Prepared {
    /// Fetches it.
    ///
    /// # Safety
    /// The quad is one of the stage's; what the stage points to is as it says.
    #[inline(always)]
    unsafe fn fetch(stage: StageRef, block: &Block, quad: Quad) -> Self {
        // SAFETY: the caller's promise: rows and pairs are those of the quad.
        unsafe {
            if stage.kind() == Kind::Add as u32 {
                let rows = look4(residual(stage, block, quad)).map(f32::from_bits);
                return Self { rows, rotations: [0.0; 4] };
            }
            if stage.kind() != Kind::Qkv as u32 {
                return Self::default();
            }
            let heads = stage.heads();
            let Rows { place, rows: [r0, r1, r2, r3], .. } = rows(heads, quad);
            let bias = heads.bias(quad.part);
            let bias = if bias.is_null() {
                [0.0; 4]
            } else {
                [*bias.add(r0 as usize), *bias.add(r1 as usize), *bias.add(r2 as usize), *bias.add(r3 as usize)]
            };
            let rotation = |pair: u32| {
                let in_head = place + 2 * pair;
                let is_rotated = quad.part < 2 && in_head < heads.n_rot();
                if is_rotated {
                    *(heads.rotation() as *const [f32; 2]).add(in_head as usize / 2)
                } else {
                    [1.0, 0.0]
                }
            };
            let ([c0, s0], [c1, s1]) = (rotation(0), rotation(1));
            Self { rows: bias, rotations: [c0, s0, c1, s1] }
        }
    }
}

/// What a quad is added to.
#[inline(always)]
fn residual(stage: StageRef, block: &Block, quad: Quad) -> *const f32 {
    block.set.wrapping_add(stage.residual() as usize + quad.number as usize * QUAD_ROWS)
}

/// Finishes a quad, given the products of its four rows.
///
/// # Safety
/// As [`Prepared::fetch`]; no other thread finishes the quad.
#[inline(always)]
unsafe fn finish(
    stage: StageRef,
    block: &Block,
    quad: Quad,
    sums: [f32; QUAD_ROWS],
    prepared: Prepared,
) {
    let row = quad.number as usize * QUAD_ROWS;
    let output = block.set.wrapping_add(stage.output() as usize);
    let n_left = (stage.part(0).n_rows() as usize).saturating_sub(row);
    // SAFETY: rows and places are the quad's.
    unsafe {
        if stage.kind() == Kind::Qkv as u32 {
            finish_qkv(stage, block, quad, sums, prepared);
        } else if stage.kind() == Kind::Swiglu as u32 {
            // Of such a matrix a quad holds two rows of each half.
            let [gate0, gate1, up0, up1] = sums;
            let [h0, h1] = [silu(gate0) * up0, silu(gate1) * up1];
            if stage.output_is_narrow() != 0 {
                put_narrow(output.add(quad.number as usize), Narrow::new(h0, h1));
            } else {
                put(output.add(row / 2), h0);
                put(output.add(row / 2 + 1), h1);
            }
        } else if stage.kind() == Kind::Add as u32 {
            let from = residual(stage, block, quad);
            let looked = prepared.rows.map(f32::to_bits);
            let [y0, y1, y2, y3] =
                await_again(looked, (n_left as u32).min(4), || look4(from)).map(f32::from_bits);
            let y = [y0 + sums[0], y1 + sums[1], y2 + sums[2], y3 + sums[3]];
            if n_left >= QUAD_ROWS {
                put4(output.add(row), y);
            } else {
                put(output.add(row), y[0]);
                if n_left > 1 {
                    put(output.add(row + 1), y[1]);
                }
                if n_left > 2 {
                    put(output.add(row + 2), y[2]);
                }
            }
        } else {
            let logits = (stage.logits() as *mut f32).add(row);
            *logits = sums[0];
            if n_left > 1 {
                *logits.add(1) = sums[1];
            }
            if n_left > 2 {
                *logits.add(2) = sums[2];
            }
            if n_left > 3 {
                *logits.add(3) = sums[3];
            }
        }
    }
}

/// Finishes a quad of queries, keys or values: they go to the step's vector, keys and values to the cache as well.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn finish_qkv(
    stage: StageRef,
    block: &Block,
    quad: Quad,
    sums: [f32; QUAD_ROWS],
    Prepared { rows: bias, rotations: [c0, s0, c1, s1] }: Prepared,
) {
    let heads = stage.heads();
    let Rows { head, rows: [r0, r1, r2, r3], .. } = rows(heads, quad);
    let [a0, b0] = rotate([sums[0] + bias[0], sums[1] + bias[1]], [c0, s0]);
    let [a1, b1] = rotate([sums[2] + bias[2], sums[3] + bias[3]], [c1, s1]);
    let (n_q, n_kv) = (heads.n_head() * heads.head_dim(), heads.n_head_kv() * heads.head_dim());
    let first = match quad.part {
        0 => 0,
        1 => n_q,
        _ => n_q + n_kv,
    };
    // SAFETY: the rows are the matrix's, the position is inside the cache, and the elements are this thread's own.
    unsafe {
        let output = block.set.add((stage.output() + first) as usize);
        put(output.add(r0 as usize), a0);
        put(output.add(r1 as usize), b0);
        put(output.add(r2 as usize), a1);
        put(output.add(r3 as usize), b1);
        if quad.part > 0 {
            let cache = if quad.part == 1 { heads.k_cache() } else { heads.v_cache() } as *mut f16;
            // In the cache a head's positions lie between it and the next head.
            let skipped = (u64::from(head) * u64::from(heads.n_ctx() - 1) + u64::from(block.position)) as usize;
            let cache = cache.add(skipped * heads.head_dim() as usize);
            *cache.add(r0 as usize) = f16::from_bits(f32_to_f16(a0));
            *cache.add(r1 as usize) = f16::from_bits(f32_to_f16(b0));
            *cache.add(r2 as usize) = f16::from_bits(f32_to_f16(a1));
            *cache.add(r3 as usize) = f16::from_bits(f32_to_f16(b1));
        }
    }
}
