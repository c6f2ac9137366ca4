//! Launchers of the matrix products for many tokens.

use super::few::{FewVectors, has_few_products};
use super::gemv::{QkvWeights, check_qkv, qkv_output};
use super::{KvLayer, Matrix, Norm, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use cuda_std::launch::{Kernel, LaunchConfig};
use gpu_kernels::formats::UNIT;
use gpu_kernels::gemm::{self as kernels, BLOCK_DIM, BLOCK_QUADS, MAX_STAGES, Shape};
use gpu_kernels::gemv::MatrixRef;
use gpu_kernels::gemv::epilogue::Qkv;
use gpu_kernels::gemv::few::FEW_TOKENS;
use gpu_kernels::many_output::{self, OutputKind};
use gpu_kernels::panels::{self, GROUP, GROUP_PANELS, PanelPiece, ROW_BYTES, TOKEN_STEP};
use gpu_kernels::rows::{Order, RowOrder};
use gpu_kernels::step::Step;
use std::ptr;

/// Vectors of many tokens as the tensor cores take them ([`gpu_kernels::panels`]), or of a few tokens in Q8_1: scratch that
/// [`pack_panels`] fills, and products read and work with.
#[derive(Debug)]
pub struct Panels {
    high: Buffer<PanelPiece>,
    /// On the exact path what the values in `high` leave.
    low: Option<Buffer<PanelPiece>>,
    /// What blocks that share a tile leave each other, and how many have come: room for a tile for each multiprocessor.
    sums: Buffer<f32>,
    n_ended: Buffer<u32>,
    few: FewVectors,
    /// What was packed last, and whether it is in `few`.
    n_tokens: usize,
    n_cols: usize,
    is_few: bool,
}

impl Panels {
    /// Room for `n_tokens` vectors of `n_cols` values; exact ones take twice as much.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, n_tokens: usize, n_cols: usize, is_exact: bool) -> Result<Self> {
        let len = pieces(n_tokens, n_cols);
        let most_tiles = device.multiprocessors() as usize;
        let most_sums = TILINGS.iter().map(|tiling| tiling.sums).max().unwrap_or(0);
        Ok(Self {
            sums: device.alloc(most_tiles * most_sums * BLOCK_DIM)?,
            n_ended: device.alloc_zeroed(most_tiles)?,
            high: device.alloc(len)?,
            low: if is_exact { Some(device.alloc(len)?) } else { None },
            few: FewVectors::alloc(device, if is_exact { 0 } else { n_tokens }, n_cols)?,
            n_tokens: 0,
            n_cols: 0,
            is_few: false,
        })
    }

    fn as_ref(&self) -> Result<panels::Panels> {
        Ok(panels::Panels {
            high: self.high.as_ptr(),
            low: self.low.as_ref().map_or(ptr::null(), |low| low.as_ptr()),
            n_rows: dim(self.n_tokens.next_multiple_of(TOKEN_STEP))?,
            n_units: dim(self.n_cols.div_ceil(UNIT))?,
        })
    }
}

/// Pieces of 16 bytes that the vectors of so many tokens take.
fn pieces(n_tokens: usize, n_cols: usize) -> usize {
    let n_panels = n_cols.div_ceil(GROUP) * GROUP_PANELS;
    n_panels * n_tokens.next_multiple_of(TOKEN_STEP) * ROW_BYTES / 16
}

/// Puts `n_tokens` vectors of `n_cols` values into panels, normalised first where there is a norm. In `x` they follow each
/// other, each filled up to a multiple of 4 values. A few tokens' are left in Q8_1 instead, on the fast path, where `readers`,
/// all matrices that will be multiplied with them, [have products for that](has_few_products).
///
/// # Errors
/// When a buffer is too short, a matrix has not `n_cols` columns, or the launch fails.
pub fn pack_panels(
    device: &Device,
    x: &Buffer<f32>,
    n_tokens: usize,
    n_cols: usize,
    norm: Option<Norm>,
    readers: &[&Matrix],
    to: &mut Panels,
) -> Result<()> {
    ensure!(!readers.is_empty(), "pack_panels: no matrix reads the vectors");
    ensure!(n_tokens > 0 && n_cols > 0, "pack_panels: {n_tokens} vectors of {n_cols} values");
    aligned("pack_panels", "x", x, n_tokens * n_cols.next_multiple_of(4))?;
    at_least("pack_panels", "panels", &to.high, pieces(n_tokens, n_cols))?;
    for matrix in readers {
        ensure!(
            matrix.n_cols() == n_cols,
            "pack_panels: a matrix of {} x {} is to read vectors of {n_cols} values",
            matrix.n_rows(),
            matrix.n_cols()
        );
    }
    let (mut gamma, mut eps) = (ptr::null(), 0.0);
    if let Some(norm) = norm {
        ensure!(
            norm.gamma.len() == n_cols,
            "pack_panels: gamma has {} values, the vectors {n_cols}",
            norm.gamma.len()
        );
        aligned("pack_panels", "gamma", norm.gamma, n_cols)?;
        (gamma, eps) = (norm.gamma.as_ptr(), norm.eps);
    }
    let is_few = to.low.is_none() && n_tokens <= FEW_TOKENS && has_few_products(device, readers);
    ensure!(
        !is_few || to.few.has_room(n_tokens, n_cols),
        "pack_panels: no room for {n_tokens} vectors of {n_cols} values in Q8_1"
    );
    (to.n_tokens, to.n_cols, to.is_few) = (n_tokens, n_cols, is_few);
    if is_few {
        // SAFETY: the lengths are checked.
        return unsafe { to.few.pack(device, (x.as_ptr(), n_tokens, n_cols), (gamma, eps)) };
    }
    let config = launch_1d(n_tokens, panels::BLOCK_DIM)?;
    let arguments = (x.as_ptr(), gamma, dim(n_cols)?, eps, to.as_ref()?);
    // SAFETY: the lengths are checked, and the panels are as many as the vectors need.
    unsafe { device.launch(&panels::PACK_PANELS, config, arguments) }
}

/// Where the products of many tokens go; rows of `y` are one token's values, the matrix's rows, filled up to a multiple of 4.
#[derive(Debug)]
pub enum ManyOutput<'a> {
    /// `y = W x`: `[n_tokens, n_rows]`.
    Set(&'a mut Buffer<f32>),
    /// `y += W x`.
    Add(&'a mut Buffer<f32>),
    /// `y = silu(G x) * (U x)` of a matrix that has `G` above `U`, in [`Order::Halves`]: `[n_tokens, n_rows / 2]`.
    Swiglu(&'a mut Buffer<f32>),
}

/// The product of a matrix with each of the vectors in `x`.
///
/// # Errors
/// When the vectors have not `weights.n_cols()` values, the rows are not in the order that the output takes, `y` is too
/// short, or the launch fails.
pub fn gemm(device: &Device, weights: &Matrix, x: &mut Panels, output: ManyOutput) -> Result<()> {
    let (order, n_rows) = (weights.order(), weights.n_rows());
    let (kind, n_out, y) = match output {
        ManyOutput::Set(y) => (OutputKind::Store, n_rows, y),
        ManyOutput::Add(y) => (OutputKind::Add, n_rows, y),
        ManyOutput::Swiglu(y) => (OutputKind::Swiglu, n_rows / 2, y),
    };
    match kind {
        OutputKind::Swiglu => ensure!(
            order.order == Order::Halves as u32,
            "gemm: gate and up must be one matrix in halves, found {order:?}"
        ),
        _ => ensure!(order == RowOrder::NATURAL, "gemm: rows must be in natural order, found {order:?}"),
    }
    let stride = n_out.next_multiple_of(4);
    aligned("gemm", "y", y, x.n_tokens * stride)?;
    let (stride, y) = (dim(stride)?, y.as_mut_ptr());
    let output = many_output::Output { kind: kind as u32, stride, y, qkv: Qkv::NOTHING };
    // SAFETY: the order of the rows and the length of `y` are checked.
    unsafe { launch(device, &[weights], x, kind, output) }
}

/// Queries of many tokens, rotated, into `q`, `[n_tokens, n_head * head_dim]`; their keys, rotated, and values into the
/// cache at the steps' positions.
///
/// `steps` and `rotation` are what [`embed`](super::embed) has taken and left for the tokens. The positions are in device
/// memory: whoever writes them keeps them below the cache's `n_ctx`.
///
/// # Errors
/// When a shape does not fit the others or the launch fails.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn gemm_qkv(
    device: &Device,
    weights: QkvWeights,
    x: &mut Panels,
    rope: &Rope,
    rotation: &Buffer<[f32; 2]>,
    steps: &Buffer<Step>,
    q: &mut Buffer<f32>,
    cache: &mut KvLayer,
) -> Result<()> {
    check_qkv("gemm_qkv", weights, rope, cache)?;
    let n_q = weights.matrices[0].n_rows();
    at_least("gemm_qkv", "q", q, x.n_tokens * n_q)?;
    at_least("gemm_qkv", "rotation", rotation, x.n_tokens * rope.frequencies.len())?;
    at_least("gemm_qkv", "steps", steps, x.n_tokens)?;
    let output = many_output::Output {
        kind: OutputKind::Qkv as u32,
        stride: dim(n_q)?,
        y: ptr::null_mut(),
        qkv: qkv_output(weights, rope, rotation, steps, q, cache)?,
    };
    // SAFETY: the shapes are checked.
    unsafe { launch(device, &weights.matrices, x, OutputKind::Qkv, output) }
}

type GemmKernel =
    Kernel<(MatrixRef, MatrixRef, MatrixRef, panels::Panels, Shape, kernels::Splits, many_output::Output)>;

/// A kernel, with the sums that its lanes have.
struct Tiling {
    kernel: &'static GemmKernel,
    sums: usize,
    is_exact: bool,
    /// Nanoseconds that a block takes for a group of columns, on an H100: dequantizing 128 rows of them, or the products
    /// where those take longer. For others it is a guess, which costs nothing but time.
    group_ns: usize,
    /// Blocks that a multiprocessor has at once.
    at_once: usize,
}

/// What there is to choose from.
const TILINGS: [Tiling; 5] = [
    Tiling {
        kernel: &kernels::tokens_256::GEMM,
        sums: kernels::tokens_256::SUMS,
        is_exact: false,
        group_ns: 1750,
        at_once: 1,
    },
    Tiling {
        kernel: &kernels::tokens_128::GEMM,
        sums: kernels::tokens_128::SUMS,
        is_exact: false,
        group_ns: 1250,
        at_once: 1,
    },
    Tiling {
        kernel: &kernels::tokens_64::GEMM,
        sums: kernels::tokens_64::SUMS,
        is_exact: false,
        group_ns: 1000,
        at_once: 1,
    },
    Tiling {
        kernel: &kernels::tokens_16::GEMM,
        sums: kernels::tokens_16::SUMS,
        is_exact: false,
        group_ns: 1200,
        at_once: 2,
    },
    Tiling {
        kernel: &kernels::exact::GEMM,
        sums: kernels::exact::SUMS,
        is_exact: true,
        group_ns: 2500,
        at_once: 1,
    },
];
/// What a block takes beside its groups, and what adding up splits takes for each token of a tile.
const BLOCK_NS: usize = 3500;
const SPLIT_NS: usize = 1500;
const SPLIT_TOKEN_NS: usize = 12;

/// How a product is dealt out.
#[derive(Clone, Copy)]
struct Plan {
    tiling: &'static Tiling,
    stages: usize,
    token_tiles: usize,
    splits: usize,
}

impl Tiling {
    /// Places for activations, as many as fit beside each other; `None` where two do not.
    fn stages(&self, device: &Device) -> Option<usize> {
        let fits = |&stages: &usize| {
            4 * kernels::shared_words(self.sums, self.is_exact, stages) <= device.shared_bytes() as usize
        };
        (2..=MAX_STAGES).rev().find(fits)
    }
}

/// The plan that takes the least time, as far as that can be told.
fn plan(device: &Device, row_tiles: usize, n_groups: usize, x: &Panels) -> Result<Plan> {
    let multiprocessors = device.multiprocessors() as usize;
    let possible = TILINGS.iter().filter(|tiling| tiling.is_exact == x.low.is_some());
    let plans =
        possible.filter_map(|tiling| Some((tiling, tiling.stages(device)?))).flat_map(|(tiling, stages)| {
            let token_tiles = x.n_tokens.div_ceil(kernels::tile_tokens(tiling.sums));
            // Blocks share tiles only where all of them run at once.
            let most = multiprocessors * tiling.at_once / (row_tiles * token_tiles);
            (1..=most.clamp(1, n_groups)).map(move |splits| Plan { tiling, stages, token_tiles, splits })
        });
    let time = |plan: &Plan| {
        let waves =
            (row_tiles * plan.token_tiles * plan.splits).div_ceil(multiprocessors * plan.tiling.at_once);
        let block = BLOCK_NS + n_groups.div_ceil(plan.splits) * plan.tiling.group_ns;
        let tokens = kernels::tile_tokens(plan.tiling.sums);
        let adding = if plan.splits > 1 { SPLIT_NS + plan.splits * tokens * SPLIT_TOKEN_NS } else { 0 };
        waves * block + adding
    };
    plans
        .min_by_key(time)
        .with_context(|| format!("gemm: {} bytes of shared memory do not hold a tile", device.shared_bytes()))
}

/// The products of up to three matrices, one below the other, with what was packed.
///
/// # Safety
/// `output` is as its fields say, for as many tokens, and of kind `kind`, whose order the rows are in.
unsafe fn launch(
    device: &Device,
    matrices: &[&Matrix],
    x: &mut Panels,
    kind: OutputKind,
    output: many_output::Output,
) -> Result<()> {
    ensure!(x.n_tokens > 0, "gemm: nothing was packed into the panels");
    for matrix in matrices {
        ensure!(
            matrix.n_cols() == x.n_cols,
            "gemm: the matrix is {} x {}, the vectors have {} values",
            matrix.n_rows(),
            matrix.n_cols(),
            x.n_cols
        );
    }
    if x.is_few {
        // SAFETY: the vectors are packed, of as many columns; the caller vouches for the output.
        return unsafe { x.few.multiply(device, matrices, x.n_tokens, kind, output) };
    }
    let row_tiles = matrices.iter().map(|matrix| matrix.n_quads().div_ceil(BLOCK_QUADS)).sum();
    let Plan { tiling, stages, token_tiles, splits } = plan(device, row_tiles, x.n_cols.div_ceil(GROUP), x)?;
    let shape = Shape {
        n_parts: matrices.len() as u32,
        n_tokens: dim(x.n_tokens)?,
        token_tiles: dim(token_tiles)?,
        splits: dim(splits)?,
        stages: stages as u32,
    };
    let mut config: LaunchConfig = launch_1d(row_tiles * token_tiles * splits, BLOCK_DIM)?;
    config.dynamic_shared_bytes = 4 * kernels::shared_words(tiling.sums, tiling.is_exact, stages) as u32;
    let shared = kernels::Splits { sums: x.sums.as_mut_ptr(), n_ended: x.n_ended.as_mut_ptr() };
    let matrix = |i: usize| matrices[i.min(matrices.len() - 1)].as_ref();
    let arguments = (matrix(0)?, matrix(1)?, matrix(2)?, x.as_ref()?, shape, shared, output);
    // SAFETY: the matrices and panels are whole by construction, the lengths are checked, the grid covers all tiles and
    // splits, for which there is room where tiles are shared.
    unsafe { device.launch(tiling.kernel, config, arguments) }
}
