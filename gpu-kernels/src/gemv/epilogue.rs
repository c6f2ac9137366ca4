//! What becomes of a product: one thread finishes the four rows of a quad.

use super::MatrixRef;
use super::stream::Quad;
use crate::formats::tile::TILE_ROWS;
use crate::math::silu;
use crate::rope::rotate;
use crate::step::Step;
use cuda_std::float::f32_to_f16;
use half::f16;

/// What finishes a quad.
pub trait Epilogue: Copy {
    /// What it fetches beforehand.
    type Prepared: Copy + Default;

    /// Fetches what [`finish`](Self::finish) will need, before the sums are there.
    ///
    /// # Safety
    /// The quad must be one of `matrix`; the epilogue's pointers must be as
    /// its fields say.
    unsafe fn prepare(&self, quad: Quad, matrix: MatrixRef) -> Self::Prepared;

    /// Finishes the quad, given the products of its four rows.
    ///
    /// # Safety
    /// As [`prepare`](Self::prepare); no other thread finishes the quad.
    unsafe fn finish(&self, quad: Quad, matrix: MatrixRef, sums: [f32; TILE_ROWS], prepared: Self::Prepared);
}

/// What `y` gets besides the product.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addend {
    /// Nothing: `y = W x`.
    None = 0,
    /// A bias: `y = W x + b`.
    Bias = 1,
    /// The residual: `y += W x`.
    Residual = 2,
}

/// Stores the product, added to something or not.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Store {
    /// `[n_rows]`.
    pub y: *mut f32,
    /// `[n_rows]`, for [`Addend::Bias`].
    pub bias: *const f32,
    /// An [`Addend`].
    pub addend: u32,
}

impl Epilogue for Store {
    type Prepared = [f32; TILE_ROWS];

    #[inline(always)]
    unsafe fn prepare(&self, quad: Quad, matrix: MatrixRef) -> [f32; TILE_ROWS] {
        let from = match self.addend {
            0 => return [0.0; TILE_ROWS],
            1 => self.bias,
            _ => self.y.cast_const(),
        };
        [0, 1, 2, 3].map(|i| {
            let place = quad.number as usize * TILE_ROWS + i;
            // SAFETY: the row is one of the matrix's.
            if place < matrix.n_rows as usize {
                unsafe { *from.add(matrix.order.row_at(place)) }
            } else {
                0.0
            }
        })
    }

    #[inline(always)]
    unsafe fn finish(&self, quad: Quad, matrix: MatrixRef, sums: [f32; TILE_ROWS], addend: [f32; TILE_ROWS]) {
        for i in 0..TILE_ROWS {
            let place = quad.number as usize * TILE_ROWS + i;
            if place < matrix.n_rows as usize {
                // SAFETY: the row is one of the matrix's.
                unsafe { *self.y.add(matrix.order.row_at(place)) = addend[i] + sums[i] };
            }
        }
    }
}

/// `silu(gate) * up`, of a matrix whose quads hold two rows of each.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Swiglu {
    /// `[n_rows / 2]`.
    pub y: *mut f32,
}

impl Epilogue for Swiglu {
    type Prepared = ();

    #[inline(always)]
    unsafe fn prepare(&self, _quad: Quad, _matrix: MatrixRef) {}

    #[inline(always)]
    unsafe fn finish(
        &self,
        quad: Quad,
        _matrix: MatrixRef,
        [gate0, gate1, up0, up1]: [f32; TILE_ROWS],
        (): (),
    ) {
        // SAFETY: the quad's two gates are inside `y`, which is even.
        unsafe {
            *self.y.add(2 * quad.number as usize) = silu(gate0) * up0;
            *self.y.add(2 * quad.number as usize + 1) = silu(gate1) * up1;
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
    /// Positions in the cache.
    pub n_ctx: u32,
    /// Values of a head that are rotated, even.
    pub n_rot: u32,
}

/// What a quad of queries, keys or values needs besides the products.
#[derive(Clone, Copy, Default)]
pub struct QkvPrepared {
    bias: [f32; TILE_ROWS],
    /// Of both pairs of the quad.
    rotation: [[f32; 2]; 2],
    position: u32,
}

impl Epilogue for Qkv {
    type Prepared = QkvPrepared;

    #[inline(always)]
    unsafe fn prepare(&self, quad: Quad, matrix: MatrixRef) -> QkvPrepared {
        let first = quad.number as usize * TILE_ROWS;
        let bias = match quad.part {
            0 => self.bias[0],
            1 => self.bias[1],
            _ => self.bias[2],
        };
        // SAFETY: the rows are the matrix's, since heads are whole quads; the pair is one that is rotated.
        unsafe {
            let bias = if bias.is_null() {
                [0.0; TILE_ROWS]
            } else {
                [0, 1, 2, 3].map(|i| *bias.add(matrix.order.row_at(first + i)))
            };
            let rotation = [0, 1].map(|pair| {
                let in_head = first % self.head_dim as usize + 2 * pair;
                if quad.part < 2 && in_head < self.n_rot as usize {
                    *self.rotation.add(in_head / 2)
                } else {
                    [1.0, 0.0]
                }
            });
            QkvPrepared { bias, rotation, position: (*self.step).position }
        }
    }

    #[inline(always)]
    unsafe fn finish(&self, quad: Quad, matrix: MatrixRef, sums: [f32; TILE_ROWS], prepared: QkvPrepared) {
        let (first, head_dim) = (quad.number as usize * TILE_ROWS, self.head_dim as usize);
        let QkvPrepared { bias, rotation: [pair0, pair1], position } = prepared;
        let [a0, b0, a1, b1] = [0, 1, 2, 3].map(|i| sums[i] + bias[i]);
        let ([a0, b0], [a1, b1]) = (rotate([a0, b0], pair0), rotate([a1, b1], pair1));
        let values = [a0, b0, a1, b1];
        // The head's start in the cache, for this position.
        let head = (first / head_dim * self.n_ctx as usize + position as usize) * head_dim;
        for i in 0..TILE_ROWS {
            let row = matrix.order.row_at(first + i);
            // SAFETY: the row is one of the matrix's, the position is inside the cache, and the element is this
            // thread's own.
            unsafe {
                match quad.part {
                    0 => *self.q.add(row) = values[i],
                    1 => *self.k_cache.add(head + row % head_dim) = f16::from_bits(f32_to_f16(values[i])),
                    _ => *self.v_cache.add(head + row % head_dim) = f16::from_bits(f32_to_f16(values[i])),
                }
            }
        }
    }
}
