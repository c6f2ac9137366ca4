//! A stage that multiplies: its vector into shared memory, its tiles as they come, and one thread for each quad of
//! four rows that finishes them.

use super::feed::{Feed, Share};
use super::stage::{Heads, Kind, Quad, Stage};
use super::vector::{await_again4, look4, put, put4};
use super::{Block, MAX_WARPS};
use crate::activations::{Activations, VALUES_PER_THREAD};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, UNIT, UNIT_WORDS, WeightFormat};
use crate::math::silu;
use crate::rope::rotate;
use cuda_std::float::{f32_to_f16, mul_add, rsqrt};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, sync_warp, warp_reduce_add, warp_reduce_add_4};
use half::f16;

/// Words that finishing a quad may need besides its sums: bias, two rotations, padding.
pub const PREPARED_WORDS: u32 = 8;

/// Runs the stage in this block.
///
/// # Safety
/// The stage, the block's memory and the feed are as they say.
#[inline(always)]
pub unsafe fn run<X: Activations>(stage: &Stage, block: &Block, feed: &mut Feed, number: u32) {
    let (first_quad, turns) = stage.deal(block.index);
    if turns == 0 {
        return;
    }
    let share = Share::new(block.log_warps, turns, stage.n_tiles);
    let (memory, thread) = (block.memory, thread_idx_x());
    // The squares of the stage before may still be read.
    let squares = block.squares_at + number % 2 * MAX_WARPS;

    // Whose sums make up a quad takes divisions to know: found out now, by the thread that will need it.
    let mut turn = thread;
    while turn < turns {
        memory.set((block.warps_at + turn) as usize, share.warps_of(turn));
        turn += block_dim_x();
    }
    // SAFETY: the caller's promise.
    unsafe {
        let square_sum = load_input::<X>(stage, block.set.wrapping_add(stage.input as usize), memory);
        if !stage.gamma.is_null() {
            store_squares(memory, squares, square_sum);
        }
        if thread < turns {
            let prepared = prepare(stage, block, stage.quad(first_quad + thread));
            let at = (block.prepared_at + thread * PREPARED_WORDS) as usize;
            memory.set4(at, prepared[0].map(f32::to_bits));
            memory.set4(at + 4, prepared[1].map(f32::to_bits));
        }
    }
    sync_threads();
    // SAFETY: as above.
    unsafe { multiply::<X>(stage, block, share, first_quad, feed) };
    sync_threads();

    let factor = if stage.gamma.is_null() {
        1.0
    } else {
        rsqrt(mul_add(load_squares(memory, squares), stage.per_n, stage.eps))
    };
    let mut turn = thread;
    while turn < turns {
        let warps = memory.get((block.warps_at + turn) as usize);
        let mut sums = [0.0f32; TILE_ROWS];
        for warp in (warps & 0xffff)..=(warps >> 16) {
            let at = block.sums_at + (turn + warp) * TILE_ROWS as u32;
            let [s0, s1, s2, s3] = memory.get4(at as usize).map(f32::from_bits);
            sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
        }
        let quad = stage.quad(first_quad + turn);
        // SAFETY: the quad is one of the stage's, finished by this thread alone.
        unsafe {
            let prepared = if turn == thread {
                let at = (block.prepared_at + thread * PREPARED_WORDS) as usize;
                [memory.get4(at).map(f32::from_bits), memory.get4(at + 4).map(f32::from_bits)]
            } else {
                prepare(stage, block, quad)
            };
            finish(stage, block, quad, sums.map(|sum| sum * factor), prepared);
        }
        turn += block_dim_x();
    }
}

/// Puts the vector into shared memory as it comes; gives the sum of the squares of what this thread has read.
///
/// RMSNorm (Zhang and Sennrich, 2019) is `x * gamma / sqrt(mean(x^2) + eps)`. Here `x * gamma` is stored; the products
/// get the common factor at the end, so that nothing waits for the sum. Q8_1 of `x * gamma` has the integers that Q8_1
/// of the normalised vector has.
///
/// # Safety
/// `source` is the stage's input.
#[inline(always)]
unsafe fn load_input<X: Activations>(
    stage: &Stage,
    source: *const f32,
    memory: DynamicShared<u32>,
) -> f32 {
    let (thread, block_dim) = (thread_idx_x(), block_dim_x());
    let (n, gamma) = (stage.n, stage.gamma);
    let n_words = n.div_ceil(UNIT as u32) * UNIT_WORDS as u32;
    let n_full = n.div_ceil(VALUES_PER_THREAD as u32);
    // Warps stay whole: the lanes of a unit quantize it together.
    let warp_word = thread / WARP_SIZE * WARP_SIZE;
    let mut square_sum = 0.0;

    let place = |word: u32| word.min(n_full - 1) as usize * VALUES_PER_THREAD;
    // SAFETY: inside gamma, whose memory is a multiple of 16 bytes long.
    let factors = |word: u32| unsafe {
        if gamma.is_null() {
            [1.0; VALUES_PER_THREAD]
        } else {
            ld_global_u32x4(gamma.add(place(word)).cast()).map(f32::from_bits)
        }
    };
    // SAFETY: inside the vector, likewise.
    let look = |word: u32| unsafe { look4(source.add(place(word))) };
    let mut store = |word: u32, words: [u32; 4], gamma: [f32; VALUES_PER_THREAD]| {
        let first = word * VALUES_PER_THREAD as u32;
        let n_left = n.saturating_sub(first);
        // SAFETY: as above; words beyond the end are those of the last one, and not waited for.
        let x = unsafe { await_again4(source.add(place(word)), words, n_left.max(1)) };
        let keep = |i: u32, value: f32| if i < n_left { value } else { 0.0 };
        let x = [keep(0, x[0]), keep(1, x[1]), keep(2, x[2]), keep(3, x[3])];
        square_sum += mul_add(x[0], x[0], x[1] * x[1]) + mul_add(x[2], x[2], x[3] * x[3]);
        // What lies beyond the end of gamma may be anything, but not what stands in for it here.
        let scaled = |i: usize| if x[i] == 0.0 { 0.0 } else { x[i] * gamma[i] };
        X::store(memory, n_words as usize, word as usize, [scaled(0), scaled(1), scaled(2), scaled(3)]);
    };

    // The first word of each thread tells when the vector comes; then the others are asked for, several at once.
    if warp_word < n_words {
        let factors = factors(thread);
        store(thread, look(thread), factors);
    }
    let mut round = block_dim;
    while warp_word + round < n_words {
        let word = round + thread;
        let (f0, f1, f2) = (factors(word), factors(word + block_dim), factors(word + 2 * block_dim));
        let (w0, w1, w2) = (look(word), look(word + block_dim), look(word + 2 * block_dim));
        store(word, w0, f0);
        if warp_word + round + block_dim < n_words {
            store(word + block_dim, w1, f1);
        }
        if warp_word + round + 2 * block_dim < n_words {
            store(word + 2 * block_dim, w2, f2);
        }
        round += 3 * block_dim;
    }
    square_sum
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

/// The warp's part of the products: leaves its sums of each quad at the quad's and warp's place.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<X: Activations>(
    stage: &Stage,
    block: &Block,
    share: Share,
    first_quad: u32,
    feed: &mut Feed,
) {
    let (lane, n_units) = (lane_id(), stage.n.div_ceil(UNIT as u32));
    let mut walk = share.walk(block.warp);
    let mut sums = [0.0f32; TILE_ROWS];
    let mut part = &stage.parts[stage.quad(first_quad + walk.turn).part as usize];
    while walk.left > 0 {
        let tile_units = (n_units - walk.tile * TILE_UNITS as u32).min(TILE_UNITS as u32);
        let words = if walk.is_last() { part.last_tile_bytes } else { part.tile_bytes } / 4;
        let tile = SharedTile { memory: block.memory, start: feed.queue.front(words) as usize };
        if lane < tile_units {
            // The vector starts at the start of the memory.
            let x = X::load(block.memory, walk.tile as usize, lane as usize);
            sums = dots::<X>(part.format, tile, tile_units as usize, lane as usize, &x, sums);
        }
        let turn = walk.turn;
        let is_next = walk.advance();
        // All lanes meet here after their last read of the tile: its place is free.
        if !is_next && walk.left > 0 {
            sync_warp(FULL_MASK);
        } else {
            let sum = warp_reduce_add_4(sums);
            if lane.is_multiple_of(8) {
                let at = block.sums_at + (turn + block.warp) * TILE_ROWS as u32 + lane / 8;
                block.memory.set(at as usize, sum.to_bits());
            }
            sums = [0.0; TILE_ROWS];
        }
        feed.queue.pop(words);
        // SAFETY: the stages are as they say.
        unsafe { feed.pump() };
        if is_next && walk.left > 0 {
            part = &stage.parts[stage.quad(first_quad + walk.turn).part as usize];
        }
    }
}

/// `sums` plus the products of a tile's four rows with the vector's unit of this lane. The format is the same for all
/// lanes of the warp.
#[inline(always)]
fn dots<X: Activations>(
    format: u32,
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    x: &X::Unit,
    sums: [f32; TILE_ROWS],
) -> [f32; TILE_ROWS] {
    use crate::formats::{F16, F32, Q4_1, Q4_K, Q6_K, Q8_0};
    const Q8_0_FORMAT: u32 = Format::Q8_0 as u32;
    const Q4_1_FORMAT: u32 = Format::Q4_1 as u32;
    const Q4_K_FORMAT: u32 = Format::Q4_K as u32;
    const Q6_K_FORMAT: u32 = Format::Q6_K as u32;
    const F16_FORMAT: u32 = Format::F16 as u32;
    match format {
        Q4_K_FORMAT => four_dots::<Q4_K, X>(tile, n_units, unit, x, sums),
        Q6_K_FORMAT => four_dots::<Q6_K, X>(tile, n_units, unit, x, sums),
        Q8_0_FORMAT => four_dots::<Q8_0, X>(tile, n_units, unit, x, sums),
        Q4_1_FORMAT => four_dots::<Q4_1, X>(tile, n_units, unit, x, sums),
        F16_FORMAT => row_by_row::<F16, X>(tile, n_units, unit, x, sums),
        _ => row_by_row::<F32, X>(tile, n_units, unit, x, sums),
    }
}

/// The four rows at once, written out: an array of closures' results would be filled in a loop, with `x` in local
/// memory.
#[inline(always)]
fn four_dots<F: WeightFormat, X: Activations>(
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    x: &X::Unit,
    [s0, s1, s2, s3]: [f32; TILE_ROWS],
) -> [f32; TILE_ROWS] {
    [
        X::dot(&F::unpack(tile, Place { n_units, row: 0, unit }), x, s0),
        X::dot(&F::unpack(tile, Place { n_units, row: 1, unit }), x, s1),
        X::dot(&F::unpack(tile, Place { n_units, row: 2, unit }), x, s2),
        X::dot(&F::unpack(tile, Place { n_units, row: 3, unit }), x, s3),
    ]
}

/// Row by row, in a loop that the compiler cannot unroll since it does not know where it ends: formats that are rare
/// and have many registers of weights.
#[inline(always)]
fn row_by_row<F: WeightFormat, X: Activations>(
    tile: SharedTile,
    n_units: usize,
    unit: usize,
    x: &X::Unit,
    sums: [f32; TILE_ROWS],
) -> [f32; TILE_ROWS] {
    let n_rows = if n_units <= TILE_UNITS { TILE_ROWS } else { 0 };
    let mut sums = sums;
    let mut row = 0;
    while row < n_rows {
        // The rows' sums go round.
        let [first, s1, s2, s3] = sums;
        sums = [s1, s2, s3, X::dot(&F::unpack(tile, Place { n_units, row, unit }), x, first)];
        row += 1;
    }
    sums
}

/// Where the rows of a quad of queries, keys or values are: their head, the quad's place in it, and the rows.
struct Rows {
    head: u32,
    place: u32,
    rows: [u32; TILE_ROWS],
}

#[inline(always)]
fn rows(heads: &Heads, quad: Quad) -> Rows {
    let first = quad.number * TILE_ROWS as u32;
    let head = ((u64::from(first) * u64::from(heads.per_head_dim)) >> 32) as u32;
    let place = first - head * heads.head_dim;
    // Pairs stand side by side: of the second pair of the quad either value is one further than of the first.
    let paired = heads.pair_distance > 1 && quad.part < 2;
    let row = |i: u32| {
        if paired && place + (i & 2) < heads.n_rot {
            first - place + place / 2 + i / 2 + i % 2 * heads.pair_distance
        } else {
            first + i
        }
    };
    Rows { head, place, rows: [row(0), row(1), row(2), row(3)] }
}

/// What finishing a quad needs besides its sums, fetched while the vector is on its way: bias and rotation of both of
/// its pairs, or what its rows are added to.
///
/// # Safety
/// The quad is one of the stage's; what the stage points to is as it says.
#[inline(always)]
unsafe fn prepare(stage: &Stage, block: &Block, quad: Quad) -> [[f32; 4]; 2] {
    // SAFETY: the caller's promise: rows and pairs are those of the quad.
    unsafe {
        if stage.kind == Kind::Add as u32 {
            let from = block.set.add(stage.residual as usize + quad.number as usize * TILE_ROWS);
            return [look4(from).map(f32::from_bits), [0.0; 4]];
        }
        if stage.kind != Kind::Qkv as u32 {
            return [[0.0; 4]; 2];
        }
        let heads = &stage.heads;
        let Rows { place, rows: [r0, r1, r2, r3], .. } = rows(heads, quad);
        let bias = heads.bias[quad.part as usize];
        let bias = if bias.is_null() {
            [0.0; 4]
        } else {
            [*bias.add(r0 as usize), *bias.add(r1 as usize), *bias.add(r2 as usize), *bias.add(r3 as usize)]
        };
        let rotation = |pair: u32| {
            let in_head = place + 2 * pair;
            let is_rotated = quad.part < 2 && in_head < heads.n_rot;
            if is_rotated { *heads.rotation.add(in_head as usize / 2) } else { [1.0, 0.0] }
        };
        let ([c0, s0], [c1, s1]) = (rotation(0), rotation(1));
        [bias, [c0, s0, c1, s1]]
    }
}

/// Finishes a quad, given the products of its four rows.
///
/// # Safety
/// As [`prepare`]; no other thread finishes the quad.
#[inline(always)]
unsafe fn finish(
    stage: &Stage,
    block: &Block,
    quad: Quad,
    sums: [f32; TILE_ROWS],
    [first, second]: [[f32; 4]; 2],
) {
    let row = quad.number as usize * TILE_ROWS;
    let output = block.set.wrapping_add(stage.output as usize);
    let n_left = (stage.parts[0].n_rows as usize).saturating_sub(row);
    // SAFETY: rows and places are the quad's.
    unsafe {
        if stage.kind == Kind::Qkv as u32 {
            finish_qkv(stage, block, quad, sums, first, second);
        } else if stage.kind == Kind::Swiglu as u32 {
            // Of such a matrix a quad holds two rows of each half.
            let [gate0, gate1, up0, up1] = sums;
            put(output.add(row / 2), silu(gate0) * up0);
            put(output.add(row / 2 + 1), silu(gate1) * up1);
        } else if stage.kind == Kind::Add as u32 {
            let y = [first[0] + sums[0], first[1] + sums[1], first[2] + sums[2], first[3] + sums[3]];
            if n_left >= TILE_ROWS {
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
            let logits = stage.logits.add(row);
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
    stage: &Stage,
    block: &Block,
    quad: Quad,
    sums: [f32; TILE_ROWS],
    bias: [f32; 4],
    [c0, s0, c1, s1]: [f32; 4],
) {
    let heads = &stage.heads;
    let Rows { head, rows: [r0, r1, r2, r3], .. } = rows(heads, quad);
    let [a0, b0] = rotate([sums[0] + bias[0], sums[1] + bias[1]], [c0, s0]);
    let [a1, b1] = rotate([sums[2] + bias[2], sums[3] + bias[3]], [c1, s1]);
    let (n_q, n_kv) = (heads.n_head * heads.head_dim, heads.n_head_kv * heads.head_dim);
    let first = match quad.part {
        0 => 0,
        1 => n_q,
        _ => n_q + n_kv,
    };
    // SAFETY: the rows are the matrix's, the position is inside the cache, and the elements are this thread's own.
    unsafe {
        let output = block.set.add((stage.output + first) as usize);
        put(output.add(r0 as usize), a0);
        put(output.add(r1 as usize), b0);
        put(output.add(r2 as usize), a1);
        put(output.add(r3 as usize), b1);
        if quad.part > 0 {
            let cache = if quad.part == 1 { heads.k_cache } else { heads.v_cache };
            // In the cache a head's positions lie between it and the next head.
            let skipped = (u64::from(head) * u64::from(heads.n_ctx - 1) + u64::from(block.position)) as usize;
            let cache = cache.add(skipped * heads.head_dim as usize);
            *cache.add(r0 as usize) = f16::from_bits(f32_to_f16(a0));
            *cache.add(r1 as usize) = f16::from_bits(f32_to_f16(b0));
            *cache.add(r2 as usize) = f16::from_bits(f32_to_f16(a1));
            *cache.add(r3 as usize) = f16::from_bits(f32_to_f16(b1));
        }
    }
}
