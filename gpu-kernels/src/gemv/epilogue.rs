//! What becomes of a product: one thread finishes the four rows of a quad.

use super::MatrixRef;
use super::band::Quad;
use crate::formats::tile::TILE_ROWS;
use crate::math::silu;
use crate::operand::Operand;
use crate::rope::rotate;
use crate::sample::{Best, warp_largest};
use crate::step::Step;
use core::ptr;
use cuda_std::codegen::settled;
use cuda_std::float::f32_to_f16;
use cuda_std::memory::{ld_global_u32x4, st_global_u32x4};
use cuda_std::shared::DynamicShared;
use cuda_std::thread::block_idx_x;
use cuda_std::warp::lane_id;
use half::f16;

/// What finishing a quad needs besides the sums. Who has no registers for it meanwhile leaves it in shared memory.
pub trait Prepared: Copy {
    /// Words of shared memory, a multiple of 4.
    const WORDS: u32;

    /// Leaves it at word `at`.
    fn store(self, memory: DynamicShared<u32>, at: usize);

    /// Takes what is at word `at`.
    fn load(memory: DynamicShared<u32>, at: usize) -> Self;
}

impl Prepared for () {
    const WORDS: u32 = 0;

    #[inline(always)]
    fn store(self, _memory: DynamicShared<u32>, _at: usize) {}

    #[inline(always)]
    fn load(_memory: DynamicShared<u32>, _at: usize) {}
}

impl Prepared for [f32; TILE_ROWS] {
    const WORDS: u32 = 4;

    #[inline(always)]
    fn store(self, memory: DynamicShared<u32>, at: usize) {
        memory.set4(at, self.map(f32::to_bits));
    }

    #[inline(always)]
    fn load(memory: DynamicShared<u32>, at: usize) -> Self {
        memory.get4(at).map(f32::from_bits)
    }
}

/// What finishes a quad.
pub trait Epilogue: Copy {
    /// Whether the input may have to be normalised.
    const NORMALISES: bool;
    /// What it fetches beforehand.
    type Prepared: Prepared;
    /// All that it takes but the sums.
    type Ready: Ready;

    /// Fetches what a quad will need, before the sums are there.
    ///
    /// # Safety
    /// The quad must be one of `matrix`; the epilogue's pointers must be as
    /// its fields say.
    unsafe fn prepare(&self, quad: Quad, matrix: MatrixRef) -> Self::Prepared;

    /// Works out where the quad's results go.
    fn ready(&self, quad: Quad, matrix: MatrixRef, prepared: Self::Prepared) -> Self::Ready;

    /// What follows once all quads of a band are finished: each lane of the warp that did so has the products of the quad that was its
    /// own, or none.
    ///
    /// # Safety
    /// The epilogue's pointers must be as its fields say. All lanes make this call.
    #[inline(always)]
    unsafe fn conclude(&self, _quad: Quad, _matrix: MatrixRef, _sums: Option<[f32; TILE_ROWS]>) {}
}

/// A quad of which only the sums are missing.
pub trait Ready: Copy {
    /// Finishes it, given the products of its four rows.
    ///
    /// # Safety
    /// The epilogue's pointers must be as its fields say, and no other thread finishes the quad.
    unsafe fn finish(self, sums: [f32; TILE_ROWS]);
}

/// Stores the product: `y = W x`, rows in natural order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// `[n_rows]`, at a multiple of 16 bytes.
    pub y: *mut f32,
    /// The largest rank ([`crate::sample`]) of each block's rows, `[grid]`; null where nobody wants them.
    pub largest: *mut u64,
}

/// Rows of a vector in natural order: those of a quad that exist.
#[derive(Clone, Copy)]
struct Rows {
    /// The first one.
    y: *mut f32,
    /// How many there are, four or more where the quad is whole.
    n_left: u32,
}

impl Rows {
    #[inline(always)]
    fn new(y: *mut f32, quad: Quad, matrix: MatrixRef) -> Self {
        let first = quad.number * TILE_ROWS as u32;
        Self { y: settled(y.wrapping_add(first as usize)), n_left: settled(matrix.n_rows - first) }
    }

    /// Writes them.
    ///
    /// # Safety
    /// The vector must have the matrix's rows, at a multiple of 16 bytes.
    #[inline(always)]
    unsafe fn store(self, values: [f32; TILE_ROWS]) {
        // SAFETY: the rows are the matrix's.
        unsafe {
            if self.n_left >= TILE_ROWS as u32 {
                st_global_u32x4(self.y.cast(), values.map(f32::to_bits));
            } else {
                let [v0, v1, v2, _] = values;
                *self.y = v0;
                if self.n_left > 1 {
                    *self.y.add(1) = v1;
                }
                if self.n_left > 2 {
                    *self.y.add(2) = v2;
                }
            }
        }
    }
}

impl Epilogue for Store {
    const NORMALISES: bool = true;
    type Prepared = ();
    type Ready = StoreReady;

    #[inline(always)]
    unsafe fn prepare(&self, _quad: Quad, _matrix: MatrixRef) {}

    #[inline(always)]
    fn ready(&self, quad: Quad, matrix: MatrixRef, (): ()) -> StoreReady {
        StoreReady(Rows::new(self.y, quad, matrix))
    }

    #[inline(always)]
    unsafe fn conclude(&self, quad: Quad, matrix: MatrixRef, sums: Option<[f32; TILE_ROWS]>) {
        if self.largest.is_null() {
            return;
        }
        let first = quad.number * TILE_ROWS as u32;
        let [s0, s1, s2, s3] = sums.unwrap_or([f32::NEG_INFINITY; TILE_ROWS]);
        // Rows beyond the last one are nobody's.
        let keep = |i: u32, sum: f32| if first + i < matrix.n_rows { sum } else { f32::NEG_INFINITY };
        let best = Best::NONE.or_of_4(first, [s0, keep(1, s1), keep(2, s2), keep(3, s3)]);
        let largest = warp_largest(best.rank());
        if lane_id() == 0 {
            // SAFETY: the block's own place.
            unsafe { *self.largest.add(block_idx_x() as usize) = largest };
        }
    }
}

/// A quad that is to be stored.
#[derive(Clone, Copy)]
pub struct StoreReady(Rows);

impl Ready for StoreReady {
    #[inline(always)]
    unsafe fn finish(self, sums: [f32; TILE_ROWS]) {
        // SAFETY: the caller's promise.
        unsafe { self.0.store(sums) };
    }
}

/// Adds the product: `y += W x`, rows in natural order; and leaves `y` as the next product reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Add {
    /// `[n_rows]`, at a multiple of 16 bytes and readable up to one.
    pub y: *mut f32,
    /// Of `n_rows` columns, or nothing.
    pub operand: Operand,
}

/// What a quad needs besides the products: what they are added to, and the factors of the norm to come.
#[derive(Clone, Copy)]
pub struct AddPrepared {
    y: [f32; TILE_ROWS],
    gamma: [f32; TILE_ROWS],
}

impl Prepared for AddPrepared {
    const WORDS: u32 = 8;

    #[inline(always)]
    fn store(self, memory: DynamicShared<u32>, at: usize) {
        self.y.store(memory, at);
        self.gamma.store(memory, at + 4);
    }

    #[inline(always)]
    fn load(memory: DynamicShared<u32>, at: usize) -> Self {
        Self { y: <[f32; 4]>::load(memory, at), gamma: <[f32; 4]>::load(memory, at + 4) }
    }
}

impl Epilogue for Add {
    const NORMALISES: bool = false;
    type Prepared = AddPrepared;
    type Ready = AddReady;

    #[inline(always)]
    unsafe fn prepare(&self, quad: Quad, _matrix: MatrixRef) -> AddPrepared {
        let four = |from: *const f32| {
            // SAFETY: the quad starts inside the vectors.
            unsafe { ld_global_u32x4(from.add(quad.number as usize * TILE_ROWS).cast()).map(f32::from_bits) }
        };
        let gamma = if self.operand.gamma.is_null() { [1.0; TILE_ROWS] } else { four(self.operand.gamma) };
        AddPrepared { y: four(self.y), gamma }
    }

    #[inline(always)]
    fn ready(&self, quad: Quad, matrix: MatrixRef, prepared: AddPrepared) -> AddReady {
        let rows = Rows::new(self.y, quad, matrix);
        let AddPrepared { y, gamma: [g0, g1, g2, g3] } = prepared;
        // What lies beyond the factors' end may be anything.
        let keep = |i: u32, gamma: f32| if i < rows.n_left { gamma } else { 0.0 };
        let gamma = [g0, keep(1, g1), keep(2, g2), keep(3, g3)].map(settled);
        let operand = settled(self.operand.place_of_4(quad.number as usize * TILE_ROWS));
        let squares = self.operand.squares;
        let square = if squares.is_null() { squares } else { squares.wrapping_add(quad.number as usize) };
        AddReady { rows, operand, square: settled(square), y, gamma }
    }
}

/// A quad that is to be added.
#[derive(Clone, Copy)]
pub struct AddReady {
    rows: Rows,
    /// Where in the operand it goes; null where there is none.
    operand: *mut u64,
    /// Where the sum of its squares goes; null where nobody wants it.
    square: *mut f32,
    y: [f32; TILE_ROWS],
    gamma: [f32; TILE_ROWS],
}

impl Ready for AddReady {
    #[inline(always)]
    unsafe fn finish(self, [s0, s1, s2, s3]: [f32; TILE_ROWS]) {
        let Self { rows, operand, square, y: [y0, y1, y2, y3], gamma: [g0, g1, g2, g3] } = self;
        let [v0, v1, v2, v3] = [y0 + s0, y1 + s1, y2 + s2, y3 + s3];
        // Rows beyond the last one are none of the vector's.
        let keep = |i: u32, value: f32| if i < rows.n_left { value } else { 0.0 };
        let [v1, v2, v3] = [keep(1, v1), keep(2, v2), keep(3, v3)];
        // SAFETY: the caller's promise.
        unsafe {
            rows.store([v0, v1, v2, v3]);
            if !operand.is_null() {
                *operand = Operand::words_of_4([v0 * g0, v1 * g1, v2 * g2, v3 * g3]);
            }
            if !square.is_null() {
                *square = (v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3);
            }
        }
    }
}

/// Stores the product, with a bias or not, of rows in any order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StoreOrdered {
    /// `[n_rows]`.
    pub y: *mut f32,
    /// `[n_rows]`, or null.
    pub bias: *const f32,
}

impl Epilogue for StoreOrdered {
    const NORMALISES: bool = false;
    type Prepared = ();
    type Ready = OrderedReady;

    #[inline(always)]
    unsafe fn prepare(&self, _quad: Quad, _matrix: MatrixRef) {}

    #[inline(always)]
    fn ready(&self, quad: Quad, matrix: MatrixRef, (): ()) -> OrderedReady {
        OrderedReady { output: *self, quad, matrix }
    }
}

/// A quad of rows in any order that is to be stored.
#[derive(Clone, Copy)]
pub struct OrderedReady {
    output: StoreOrdered,
    quad: Quad,
    matrix: MatrixRef,
}

impl Ready for OrderedReady {
    #[inline(always)]
    unsafe fn finish(self, sums: [f32; TILE_ROWS]) {
        let Self { output: StoreOrdered { y, bias }, quad, matrix } = self;
        let store = |i: usize, sum: f32| {
            let place = quad.number as usize * TILE_ROWS + i;
            if place < matrix.n_rows as usize {
                let row = matrix.order.row_at(place);
                // SAFETY: the row is one of the matrix's.
                unsafe {
                    let bias = if bias.is_null() { 0.0 } else { *bias.add(row) };
                    *y.add(row) = sum + bias;
                }
            }
        };
        let [s0, s1, s2, s3] = sums;
        store(0, s0);
        store(1, s1);
        store(2, s2);
        store(3, s3);
    }
}

/// `silu(gate) * up`, of a matrix whose quads hold two rows of each; and the same as the next product reads it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Swiglu {
    /// `[n_rows / 2]`.
    pub y: *mut f32,
    /// Of `n_rows / 2` columns, or nothing.
    pub operand: Operand,
}

impl Epilogue for Swiglu {
    const NORMALISES: bool = true;
    type Prepared = ();
    type Ready = SwigluReady;

    #[inline(always)]
    unsafe fn prepare(&self, _quad: Quad, _matrix: MatrixRef) {}

    #[inline(always)]
    fn ready(&self, quad: Quad, _matrix: MatrixRef, (): ()) -> SwigluReady {
        let first = 2 * quad.number as usize;
        SwigluReady {
            y: settled(self.y.wrapping_add(first)),
            operand: settled(self.operand.place_of_2(first)),
        }
    }
}

/// A quad of two gates and two ups.
#[derive(Clone, Copy)]
pub struct SwigluReady {
    /// Where the first one goes.
    y: *mut f32,
    /// Where in the operand it goes; null where there is none.
    operand: *mut u32,
}

impl Ready for SwigluReady {
    #[inline(always)]
    unsafe fn finish(self, [gate0, gate1, up0, up1]: [f32; TILE_ROWS]) {
        let [a, b] = [silu(gate0) * up0, silu(gate1) * up1];
        // SAFETY: the quad's two gates are inside `y`, which is even.
        unsafe {
            *self.y = a;
            *self.y.add(1) = b;
            if !self.operand.is_null() {
                *self.operand = Operand::word_of_2(a, b);
            }
        }
    }
}

/// Queries, keys and values: bias, rotation, and the cache. The parts of the launch are q, k and v.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    /// Queries: `[n_head, head_dim]`.
    pub q: *mut f32,
    /// Keys: `[n_head_kv, n_ctx, head_dim]`.
    pub k_cache: *mut f16,
    /// Values: `[n_head_kv, n_ctx, head_dim]`.
    pub v_cache: *mut f16,
    /// Biases of the queries, keys and values; null where there are none.
    pub bias: [*const f32; 3],
    /// Cosine and sine of the angle of each pair at the step's position: `[n_rot / 2]`.
    pub rotation: *const [f32; 2],
    /// Holds the position.
    pub step: *const Step,
    /// Values in a head, a multiple of 4.
    pub head_dim: u32,
    /// `2^32 / head_dim`, rounded up ([`Qkv::reciprocal`]).
    pub per_head_dim: u32,
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Values of a head that are rotated, even.
    pub n_rot: u32,
    /// How far apart the values of a pair are: 1, or half of what is rotated.
    pub pair_distance: u32,
}

/// What a quad of queries, keys or values needs besides the products.
#[derive(Clone, Copy)]
pub struct QkvPrepared {
    bias: [f32; TILE_ROWS],
    /// Of both pairs of the quad.
    rotation: [[f32; 2]; 2],
    position: u32,
}

impl Prepared for QkvPrepared {
    const WORDS: u32 = 12;

    #[inline(always)]
    fn store(self, memory: DynamicShared<u32>, at: usize) {
        self.bias.store(memory, at);
        let [[c0, s0], [c1, s1]] = self.rotation;
        [c0, s0, c1, s1].store(memory, at + 4);
        memory.set(at + 8, self.position);
    }

    #[inline(always)]
    fn load(memory: DynamicShared<u32>, at: usize) -> Self {
        let [c0, s0, c1, s1] = <[f32; 4]>::load(memory, at + 4);
        Self {
            bias: <[f32; 4]>::load(memory, at),
            rotation: [[c0, s0], [c1, s1]],
            position: memory.get(at + 8),
        }
    }
}

/// A quad's head, where in it the quad stands, and its rows.
struct HeadRows {
    head: u32,
    place: u32,
    rows: [u32; TILE_ROWS],
}

impl Qkv {
    /// For launches that make none.
    pub const NOTHING: Self = Self {
        q: ptr::null_mut(),
        k_cache: ptr::null_mut(),
        v_cache: ptr::null_mut(),
        bias: [ptr::null(); 3],
        rotation: ptr::null(),
        step: ptr::null(),
        head_dim: 0,
        per_head_dim: 0,
        n_ctx: 0,
        n_rot: 0,
        pair_distance: 0,
    };

    /// What a number is multiplied with to be divided by `head_dim`: exact below 2^32 / head_dim (Granlund and
    /// Montgomery, 1994).
    pub const fn reciprocal(head_dim: u32) -> u32 {
        ((1u64 << 32) / head_dim as u64 + 1) as u32
    }

    /// The same of the token that is `token` after this one's, where the queries of a token are `n_q` after those before,
    /// and rotations and steps follow each other.
    #[inline(always)]
    pub fn at_token(self, token: u32, n_q: u32) -> Self {
        let token = token as usize;
        Self {
            q: self.q.wrapping_add(token * n_q as usize),
            rotation: self.rotation.wrapping_add(token * (self.n_rot / 2) as usize),
            step: self.step.wrapping_add(token),
            ..self
        }
    }

    /// The rows of a quad of part `part`, as the order of its matrix has them.
    #[inline(always)]
    fn rows(&self, quad: Quad) -> HeadRows {
        let first = quad.number * TILE_ROWS as u32;
        let head = ((u64::from(first) * u64::from(self.per_head_dim)) >> 32) as u32;
        let place = first - head * self.head_dim;
        // Pairs stand side by side: of the second pair of the quad either value is one further than of the first.
        let paired = self.pair_distance > 1 && quad.part < 2;
        let row = |i: u32| {
            if paired && place + (i & 2) < self.n_rot {
                first - place + place / 2 + i / 2 + i % 2 * self.pair_distance
            } else {
                first + i
            }
        };
        HeadRows { head, place, rows: [row(0), row(1), row(2), row(3)] }
    }
}

impl Epilogue for Qkv {
    const NORMALISES: bool = true;
    type Prepared = QkvPrepared;
    type Ready = QkvReady;

    #[inline(always)]
    unsafe fn prepare(&self, quad: Quad, _matrix: MatrixRef) -> QkvPrepared {
        let bias = match quad.part {
            0 => self.bias[0],
            1 => self.bias[1],
            _ => self.bias[2],
        };
        let HeadRows { place, rows, .. } = self.rows(quad);
        // SAFETY: the rows are the matrix's, since heads are whole quads; the pair is one that is rotated.
        unsafe {
            let bias = if bias.is_null() {
                [0.0; TILE_ROWS]
            } else {
                [
                    *bias.add(rows[0] as usize),
                    *bias.add(rows[1] as usize),
                    *bias.add(rows[2] as usize),
                    *bias.add(rows[3] as usize),
                ]
            };
            let rotation = |pair: u32| {
                let in_head = place + 2 * pair;
                let is_rotated = quad.part < 2 && in_head < self.n_rot;
                if is_rotated { *self.rotation.add(in_head as usize / 2) } else { [1.0, 0.0] }
            };
            QkvPrepared { bias, rotation: [rotation(0), rotation(1)], position: (*self.step).position }
        }
    }

    #[inline(always)]
    fn ready(&self, quad: Quad, _matrix: MatrixRef, prepared: QkvPrepared) -> QkvReady {
        let QkvPrepared { bias, rotation, position } = prepared;
        let HeadRows { head, rows, .. } = self.rows(quad);
        let is_query = quad.part == 0;
        let to = if is_query {
            Destination { queries: settled(self.q) }
        } else {
            let cache = if quad.part == 1 { self.k_cache } else { self.v_cache };
            // In the cache a head's positions lie between it and the next head.
            let skipped = (u64::from(head) * u64::from(self.n_ctx - 1) + u64::from(position)) as usize;
            Destination { cache: settled(cache.wrapping_add(skipped * self.head_dim as usize)) }
        };
        QkvReady { is_query, to, rows: rows.map(settled), bias, rotation }
    }
}

/// Where rows go: to the queries, or to a position of the cache.
#[derive(Clone, Copy)]
union Destination {
    queries: *mut f32,
    cache: *mut f16,
}

/// A quad of queries, keys or values.
#[derive(Clone, Copy)]
pub struct QkvReady {
    is_query: bool,
    to: Destination,
    rows: [u32; TILE_ROWS],
    bias: [f32; TILE_ROWS],
    rotation: [[f32; 2]; 2],
}

impl Ready for QkvReady {
    #[inline(always)]
    unsafe fn finish(self, sums: [f32; TILE_ROWS]) {
        let Self { is_query, to, rows: [r0, r1, r2, r3], bias, rotation: [pair0, pair1] } = self;
        let [a0, b0] = rotate([sums[0] + bias[0], sums[1] + bias[1]], pair0);
        let [a1, b1] = rotate([sums[2] + bias[2], sums[3] + bias[3]], pair1);
        // SAFETY: the rows are the matrix's, the position is inside the cache, and the elements are this thread's own.
        unsafe {
            if is_query {
                *to.queries.add(r0 as usize) = a0;
                *to.queries.add(r1 as usize) = b0;
                *to.queries.add(r2 as usize) = a1;
                *to.queries.add(r3 as usize) = b1;
            } else {
                *to.cache.add(r0 as usize) = f16::from_bits(f32_to_f16(a0));
                *to.cache.add(r1 as usize) = f16::from_bits(f32_to_f16(b0));
                *to.cache.add(r2 as usize) = f16::from_bits(f32_to_f16(a1));
                *to.cache.add(r3 as usize) = f16::from_bits(f32_to_f16(b1));
            }
        }
    }
}
