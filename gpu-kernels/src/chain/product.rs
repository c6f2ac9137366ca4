//! A stage that multiplies: its vector into shared memory, its tiles as they come, and one thread for each quad of
//! four rows that finishes them.

use super::feed::{Feed, Walk};
use super::stage::{HeadsRef, Kind, Quad, StageRef};
use super::vector::{await_again4, look4, put, put4};
use super::{Block, Formats, MAX_WARPS};
use crate::activations::{Activations, VALUES_PER_THREAD};
use crate::formats::tile::{SharedTile, TILE_ROWS, TILE_UNITS};
use crate::formats::{UNIT, UNIT_WORDS};
use crate::math::silu;
use crate::rope::rotate;
use cuda_std::float::{f32_to_f16, mul_add, rsqrt};
use cuda_std::memory::ld_global_u32x4;
use cuda_std::shared::DynamicShared;
use cuda_std::thread::{block_dim_x, sync_threads, thread_idx_x};
use cuda_std::warp::{FULL_MASK, WARP_SIZE, lane_id, warp_reduce_add, warp_reduce_add_4};
use half::f16;

/// Words that finishing a quad may need besides its sums: bias, two rotations, padding.
pub const PREPARED_WORDS: u32 = 8;

/// Runs the stage in this block.
///
/// # Safety
/// The stage, the block's memory and the feed are as they say.
#[inline(always)]
pub(super) unsafe fn run<X: Activations, F: Formats>(
    stage: StageRef,
    block: &Block,
    feed: &mut Feed,
    number: u32,
    known: u32,
) {
    let (first_quad, turns) = stage.deal(block.index);
    if turns == 0 {
        block.store_fetched();
        sync_threads();
        return;
    }
    let (memory, thread) = (block.memory, thread_idx_x());
    // The squares of the stage before may still be read.
    let squares = block.squares_at + number % 2 * MAX_WARPS;
    let n_tiles = stage.n_tiles();
    // SAFETY: the caller's promise.
    unsafe {
        // On its way beside the vector.
        let mut prepared = [[0.0; 4]; 2];
        if thread < turns {
            prepared = prepare(stage, block, stage.quad(first_quad + thread));
        }
        block.mark(1);
        let square_sum = load_input::<X>(stage, block.set.wrapping_add(stage.input() as usize), memory);
        if !stage.gamma() == 0 {
            store_squares(memory, squares, square_sum);
        }
        if thread < turns {
            let at = (block.prepared_at + thread * PREPARED_WORDS) as usize;
            memory.set4(at, prepared[0].map(f32::to_bits));
            memory.set4(at + 4, prepared[1].map(f32::to_bits));
        }
    }
    block.store_fetched();
    block.mark(2);
    sync_threads();
    block.mark(3);
    // SAFETY: as above.
    unsafe { multiply::<X, F>(stage, block, [first_quad, turns * n_tiles], feed, known) };
    block.mark(4);
    sync_threads();
    block.mark(5);

    let factor = if stage.gamma() == 0 {
        1.0
    } else {
        rsqrt(mul_add(load_squares(memory, squares), stage.per_n(), stage.eps()))
    };
    let mut turn = thread;
    while turn < turns {
        let mut sums = [0.0f32; TILE_ROWS];
        let mut tile = turn * n_tiles;
        while tile < (turn + 1) * n_tiles {
            let at = block.sums_at + tile * TILE_ROWS as u32;
            let [s0, s1, s2, s3] = memory.get4(at as usize).map(f32::from_bits);
            sums = [sums[0] + s0, sums[1] + s1, sums[2] + s2, sums[3] + s3];
            tile += 1;
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
    stage: StageRef,
    source: *const f32,
    memory: DynamicShared<u32>,
) -> f32 {
    let (thread, block_dim) = (thread_idx_x(), block_dim_x());
    let (n, gamma) = (stage.n(), stage.gamma() as *const f32);
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
    // Three are worked on while the next three are on their way.
    let fetch = |round: u32| {
        let word = round + thread;
        let words = [look(word), look(word + block_dim), look(word + 2 * block_dim)];
        (words, [factors(word), factors(word + block_dim), factors(word + 2 * block_dim)])
    };
    if warp_word + round < n_words {
        let mut fetched = fetch(round);
        while warp_word + round < n_words {
            let ([w0, w1, w2], [f0, f1, f2]) = fetched;
            fetched = fetch(round + 3 * block_dim);
            let word = round + thread;
            store(word, w0, f0);
            if warp_word + round + block_dim < n_words {
                store(word + block_dim, w1, f1);
            }
            if warp_word + round + 2 * block_dim < n_words {
                store(word + 2 * block_dim, w2, f2);
            }
            round += 3 * block_dim;
        }
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

/// The warp's part of the products: leaves its sums of each tile at the tile's place. `first_quad` and `n` are the
/// block's first quad and how many tiles it has.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn multiply<X: Activations, F: Formats>(
    stage: StageRef,
    block: &Block,
    [first_quad, n]: [u32; 2],
    feed: &mut Feed,
    known: u32,
) {
    let (lane, n_units) = (lane_id(), stage.n().div_ceil(UNIT as u32));
    let mut walk = Walk::new(stage, block.warp);
    let has_parts = stage.part(1).n_quads() > 0;
    let matrix = |turn: u32| {
        let part = stage.part(if has_parts { stage.quad(first_quad + turn).part } else { 0 });
        (part.format(), part.tile_bytes() / 4, part.last_tile_bytes() / 4)
    };
    let (mut format, mut tile_words, mut last_tile_words) = matrix(walk.turn);
    while walk.number < n {
        let tile_units = (n_units - walk.tile * TILE_UNITS as u32).min(TILE_UNITS as u32);
        let words = if walk.is_last() { last_tile_words } else { tile_words };
        let tile = SharedTile { memory: block.memory, start: feed.queue.front(words) as usize };
        let mut sums = [0.0f32; TILE_ROWS];
        if lane < tile_units {
            // The vector starts at the start of the memory.
            let x = X::load(block.memory, walk.tile as usize, lane as usize);
            sums = F::dots::<X>(format, tile, tile_units as usize, lane as usize, &x);
        }
        // All lanes meet here after their last read of the tile: its place is free.
        let sum = warp_reduce_add_4(sums);
        if lane.is_multiple_of(8) {
            let at = block.sums_at + walk.number * TILE_ROWS as u32 + lane / 8;
            block.memory.set(at as usize, sum.to_bits());
        }
        feed.queue.pop(words);
        // SAFETY: the stages are as they say.
        unsafe { feed.pump(known) };
        walk.advance(block.n_warps);
        if has_parts && walk.number < n {
            (format, tile_words, last_tile_words) = matrix(walk.turn);
        }
    }
}

/// Where the rows of a quad of queries, keys or values are: their head, the quad's place in it, and the rows.
struct Rows {
    head: u32,
    place: u32,
    rows: [u32; TILE_ROWS],
}

#[inline(always)]
fn rows(heads: HeadsRef, quad: Quad) -> Rows {
    let first = quad.number * TILE_ROWS as u32;
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

/// What finishing a quad needs besides its sums, fetched while the vector is on its way: bias and rotation of both of
/// its pairs, or what its rows are added to.
///
/// # Safety
/// The quad is one of the stage's; what the stage points to is as it says.
#[inline(always)]
unsafe fn prepare(stage: StageRef, block: &Block, quad: Quad) -> [[f32; 4]; 2] {
    // SAFETY: the caller's promise: rows and pairs are those of the quad.
    unsafe {
        if stage.kind() == Kind::Add as u32 {
            let from = block.set.add(stage.residual() as usize + quad.number as usize * TILE_ROWS);
            return [look4(from).map(f32::from_bits), [0.0; 4]];
        }
        if stage.kind() != Kind::Qkv as u32 {
            return [[0.0; 4]; 2];
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
            if is_rotated { *(heads.rotation() as *const [f32; 2]).add(in_head as usize / 2) } else { [1.0, 0.0] }
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
    stage: StageRef,
    block: &Block,
    quad: Quad,
    sums: [f32; TILE_ROWS],
    [first, second]: [[f32; 4]; 2],
) {
    let row = quad.number as usize * TILE_ROWS;
    let output = block.set.wrapping_add(stage.output() as usize);
    let n_left = (stage.part(0).n_rows() as usize).saturating_sub(row);
    // SAFETY: rows and places are the quad's.
    unsafe {
        if stage.kind() == Kind::Qkv as u32 {
            finish_qkv(stage, block, quad, sums, first, second);
        } else if stage.kind() == Kind::Swiglu as u32 {
            // Of such a matrix a quad holds two rows of each half.
            let [gate0, gate1, up0, up1] = sums;
            put(output.add(row / 2), silu(gate0) * up0);
            put(output.add(row / 2 + 1), silu(gate1) * up1);
        } else if stage.kind() == Kind::Add as u32 {
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
    sums: [f32; TILE_ROWS],
    bias: [f32; 4],
    [c0, s0, c1, s1]: [f32; 4],
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
