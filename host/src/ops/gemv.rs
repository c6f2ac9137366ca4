//! Launchers of the matrix-vector products.

use super::{Input, KvLayer, Matrix, Norm, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use cuda_std::launch::{Kernel, LaunchConfig};
use cuda_std::pipeline::WarpCopies;
use gpu_kernels::activations::{Activations as _, F32Vector, Q8_1, Q8_1_BLOCK};
use gpu_kernels::formats::UNIT;
use gpu_kernels::formats::tile::{TILE_ROWS, TILE_UNITS};
use gpu_kernels::gemv::epilogue::{Add, Epilogue, Prepared as _, Qkv, Store, StoreOrdered, Swiglu};
use gpu_kernels::gemv::input::{BATCH, Input as KernelInput};
use gpu_kernels::gemv::{self as kernels, Kernels, MatrixRef, Schedule};
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::rows::{Order, RowOrder};
use gpu_kernels::step::Step;
use std::ptr;

/// Where a product goes.
#[derive(Debug)]
pub enum Output<'a> {
    /// `y = W x`.
    Set(&'a mut Buffer<f32>),
    /// `y = W x + bias`.
    SetBiased(&'a mut Buffer<f32>, &'a Buffer<f32>),
    /// `y += W x`.
    Add(&'a mut Buffer<f32>),
}

/// `y = W x`, with a bias or added onto `y`; `x` is normalised first where there is a norm.
///
/// # Errors
/// When `x` has not `weights.n_cols()` values, another buffer is too short, there is a norm and `y` is more than set, or the
/// launch fails.
pub fn gemv(device: &Device, weights: &Matrix, x: Input, norm: Option<Norm>, output: Output) -> Result<()> {
    let is_plain = norm.is_none();
    let input = input("gemv", weights, x, norm)?;
    let (schedule, config) = match output {
        Output::Add(_) => schedule::<Add>(device, &[weights], x.is_exact(), Room::MoreThanHalf)?,
        _ => schedule::<Store>(device, &[weights], x.is_exact(), Room::LessThanHalf)?,
    };
    let kernels = kernels(weights, x);
    let matrix = weights.as_ref()?;
    let is_natural = weights.order() == RowOrder::NATURAL;
    let ordered_output = match output {
        Output::Set(y) if is_natural => {
            aligned("gemv", "y", y, weights.n_rows())?;
            let output = Store { y: y.as_mut_ptr() };
            // SAFETY: the matrix is whole by construction, the lengths are checked, the schedule is of the grid.
            return unsafe { device.launch(kernels.gemv, config, (matrix, input, schedule, output)) };
        }
        Output::Add(y) => {
            aligned("gemv", "y", y, weights.n_rows())?;
            ensure!(is_natural, "gemv: only rows in natural order are added, found {:?}", weights.order());
            ensure!(is_plain, "gemv: an input that is to be normalised has a product that is not added");
            let output = Add { y: y.as_mut_ptr() };
            // SAFETY: as above.
            return unsafe { device.launch(kernels.gemv_add, config, (matrix, input, schedule, output)) };
        }
        Output::Set(y) => {
            aligned("gemv", "y", y, weights.n_rows())?;
            StoreOrdered { y: y.as_mut_ptr(), bias: ptr::null() }
        }
        Output::SetBiased(y, bias) => {
            aligned("gemv", "y", y, weights.n_rows())?;
            at_least("gemv", "bias", bias, weights.n_rows())?;
            StoreOrdered { y: y.as_mut_ptr(), bias: bias.as_ptr() }
        }
    };
    ensure!(
        is_plain,
        "gemv: only rows in natural order, without a bias, have an input that is to be normalised"
    );
    // SAFETY: as above.
    unsafe { device.launch(ordered(x), config, (matrix, input, schedule, ordered_output)) }
}

/// The kernels for an input and a matrix.
fn kernels(matrix: &Matrix, x: Input) -> Kernels {
    if x.is_exact() { kernels::exact::KERNELS } else { kernels::kernels(matrix.format()) }
}

/// The kernel for rows in any order.
fn ordered(x: Input) -> &'static Kernel<(MatrixRef, KernelInput, Schedule, StoreOrdered)> {
    if x.is_exact() { &kernels::ordered_exact::GEMV } else { &kernels::ordered::GEMV }
}

/// `y = silu(G x) * (U x)` of a matrix that has `G` above `U`, in [`Order::Halves`]; `x` is normalised first where there
/// is a norm.
///
/// # Errors
/// When the rows are in another order, `x` has not `n_cols()` values, `y` is too short, or the launch fails.
pub fn gemv_swiglu(
    device: &Device,
    gate_up: &Matrix,
    x: Input,
    norm: Option<Norm>,
    y: &mut Buffer<f32>,
) -> Result<()> {
    ensure!(
        gate_up.order().order == Order::Halves as u32,
        "gemv_swiglu: gate and up must be one matrix in halves, found {:?}",
        gate_up.order()
    );
    let input = input("gemv_swiglu", gate_up, x, norm)?;
    at_least("gemv_swiglu", "y", y, gate_up.n_rows() / 2)?;
    let (schedule, config) = schedule::<Swiglu>(device, &[gate_up], x.is_exact(), Room::LessThanHalf)?;
    let kernel = kernels(gate_up, x).gemv_swiglu;
    let output = Swiglu { y: y.as_mut_ptr() };
    // SAFETY: the matrix is whole by construction, the lengths are checked, the schedule covers the matrix.
    unsafe { device.launch(kernel, config, (gate_up.as_ref()?, input, schedule, output)) }
}

/// The weights of queries, keys and values, each with its bias where there is one.
#[derive(Clone, Copy, Debug)]
pub struct QkvWeights<'a> {
    /// `[n_head * head_dim, n_embd]`, `[n_head_kv * head_dim, n_embd]` twice; the first two in [`pair_order`].
    pub matrices: [&'a Matrix; 3],
    /// As many values as the matrix has rows.
    pub biases: [Option<&'a Buffer<f32>>; 3],
}

/// The order of the rows of `W_q` and `W_k` in which the two values of a rotated pair are neighbours.
pub fn pair_order(layout: RopeLayout, head_dim: usize, n_rot: usize) -> RowOrder {
    match layout {
        RopeLayout::Interleaved => RowOrder::NATURAL,
        RopeLayout::HalfSplit => {
            RowOrder { order: Order::RotatedPairs as u32, group: head_dim as u32, n_rot: n_rot as u32 }
        }
    }
}

/// Queries of a token, rotated, into `q`; its keys, rotated, and values into the cache at the step's position.
///
/// `rotation` is what [`embed`](super::embed) has left for the step. The position is in device memory: whoever writes
/// it keeps it below the cache's `n_ctx`.
///
/// # Errors
/// When a shape does not fit the others or the launch fails.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn gemv_qkv(
    device: &Device,
    weights: QkvWeights,
    x: Input,
    norm: Option<Norm>,
    rope: &Rope,
    rotation: &Buffer<[f32; 2]>,
    step: &Buffer<Step>,
    q: &mut Buffer<f32>,
    cache: &mut KvLayer,
) -> Result<()> {
    check_qkv("gemv_qkv", weights, rope, cache)?;
    let [wq, wk, wv] = weights.matrices;
    let input = input("gemv_qkv", wq, x, norm)?;
    at_least("gemv_qkv", "q", q, wq.n_rows())?;
    at_least("gemv_qkv", "rotation", rotation, rope.frequencies.len())?;
    at_least("gemv_qkv", "step", step, 1)?;
    let output = qkv_output(weights, rope, rotation, step, q, cache)?;
    let (schedule, config) = schedule::<Qkv>(device, &weights.matrices, x.is_exact(), Room::LessThanHalf)?;
    let kernel = match x.is_exact() {
        true => &kernels::exact::GEMV_QKV,
        false => kernels::qkv_kernel(weights.matrices.map(Matrix::format)),
    };
    let arguments = (wq.as_ref()?, wk.as_ref()?, wv.as_ref()?, input, schedule, output);
    // SAFETY: the matrices are whole by construction, the shapes are checked, the schedule covers all of them.
    unsafe { device.launch(kernel, config, arguments) }
}

/// Refuses matrices and biases that do not fit the cache, the rotation or each other.
pub(super) fn check_qkv(operation: &str, weights: QkvWeights, rope: &Rope, cache: &KvLayer) -> Result<()> {
    let (head_dim, n_kv) = (cache.head_dim, cache.n_head_kv * cache.head_dim);
    let n_rot = 2 * rope.frequencies.len();
    let [wq, wk, wv] = weights.matrices;
    ensure!(n_rot <= head_dim, "{operation}: {n_rot} values to rotate in heads of {head_dim}");
    let order = pair_order(rope.layout, head_dim, n_rot);
    for (name, matrix, n_rows, order) in
        [("q", wq, wq.n_rows(), order), ("k", wk, n_kv, order), ("v", wv, n_kv, RowOrder::NATURAL)]
    {
        ensure!(
            matrix.n_rows() == n_rows && n_rows.is_multiple_of(head_dim) && matrix.n_cols() == wq.n_cols(),
            "{operation}: {name} is {} x {}, for {n_rows} rows in heads of {head_dim} and {} columns",
            matrix.n_rows(),
            matrix.n_cols(),
            wq.n_cols()
        );
        ensure!(matrix.order() == order, "{operation}: {name} is in {:?}, not {order:?}", matrix.order());
    }
    for (bias, matrix) in weights.biases.iter().zip(weights.matrices) {
        if let Some(bias) = bias {
            at_least(operation, "bias", bias, matrix.n_rows())?;
        }
    }
    Ok(())
}

/// Where queries, keys and values go, as a launch passes it; of shapes that were checked.
pub(super) fn qkv_output(
    weights: QkvWeights,
    rope: &Rope,
    rotation: &Buffer<[f32; 2]>,
    step: &Buffer<Step>,
    q: &mut Buffer<f32>,
    cache: &mut KvLayer,
) -> Result<Qkv> {
    let (head_dim, n_rot) = (dim(cache.head_dim)?, dim(2 * rope.frequencies.len())?);
    Ok(Qkv {
        q: q.as_mut_ptr(),
        k_cache: cache.k.as_mut_ptr(),
        v_cache: cache.v.as_mut_ptr(),
        bias: weights.biases.map(|bias| bias.map_or(ptr::null(), |bias| bias.as_ptr())),
        rotation: rotation.as_ptr(),
        step: step.as_ptr(),
        head_dim,
        n_ctx: dim(cache.n_ctx)?,
        n_rot,
        per_head_dim: Qkv::reciprocal(head_dim),
        pair_distance: match rope.layout {
            RopeLayout::Interleaved => 1,
            RopeLayout::HalfSplit => n_rot / 2,
        },
    })
}

/// The input as a launch passes it.
fn input(operation: &str, weights: &Matrix, x: Input, norm: Option<Norm>) -> Result<KernelInput> {
    ensure!(
        x.len() == weights.n_cols(),
        "{operation}: the matrix is {} x {}, the vector has {} values",
        weights.n_rows(),
        weights.n_cols(),
        x.len()
    );
    let mut input = KernelInput {
        values: ptr::null(),
        gamma: ptr::null(),
        quants: ptr::null(),
        scales: ptr::null(),
        n: dim(x.len())?,
        per_n: 1.0 / x.len() as f32,
        eps: 0.0,
        batch: BATCH,
    };
    match x {
        Input::F32(values) | Input::Quantized(values) => {
            aligned(operation, "x", values, x.len())?;
            input.values = values.as_ptr();
        }
        Input::Q8_1(vector) => {
            ensure!(norm.is_none(), "{operation}: a vector in Q8_1 cannot be normalised");
            let blocks = vector.len().div_ceil(Q8_1_BLOCK);
            at_least(operation, "quants", &vector.quants, blocks * Q8_1_BLOCK / 4)?;
            at_least(operation, "scales", &vector.scales, blocks)?;
            input.quants = vector.quants.as_ptr();
            input.scales = vector.scales.as_ptr();
        }
    }
    if let Some(norm) = norm {
        ensure!(
            norm.gamma.len() == x.len(),
            "{operation}: gamma has {} values, the vector {}",
            norm.gamma.len(),
            x.len()
        );
        aligned(operation, "gamma", norm.gamma, x.len())?;
        input.gamma = norm.gamma.as_ptr();
        input.eps = norm.eps;
    }
    Ok(input)
}

/// Most bytes of shared memory for what a block keeps of its quads: beyond that, more blocks take them.
const QUADS_BYTES: usize = 16 << 10;

/// How much of a multiprocessor's shared memory a block takes.
///
/// There is one block for each multiprocessor, and it starts beside the one of the kernel before. It must not start
/// beside another one of its own kernel, where the kernel before has ended early: then one multiprocessor would have
/// twice the work, another none, and so on in the kernels that follow. So products that are added, every other one in
/// a layer, take more than half, and those between them what is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    LessThanHalf,
    MoreThanHalf,
}

/// What [`Room::MoreThanHalf`] has above the half.
const ABOVE_HALF: usize = 6 << 10;

/// Deals out the work: one block per multiprocessor, of which each has its share of quads, and as many tiles on their
/// way as there is room for.
fn schedule<E: Epilogue>(
    device: &Device,
    matrices: &[&Matrix],
    is_exact: bool,
    room: Room,
) -> Result<(Schedule, LaunchConfig)> {
    let (unit_words, max_warps, in_slabs) = match is_exact {
        true => (F32Vector::UNIT_WORDS, F32Vector::MAX_WARPS, F32Vector::IN_SLABS),
        false => (Q8_1::UNIT_WORDS, Q8_1::MAX_WARPS, Q8_1::IN_SLABS),
    };
    let prepared_words = E::Prepared::WORDS;
    let n_tiles = matrices[0].n_cols().div_ceil(UNIT).div_ceil(TILE_UNITS);
    let n_quads: usize = matrices.iter().map(|matrix| matrix.n_quads()).sum();
    let stage_bytes = matrices.iter().map(|matrix| matrix.largest_tile()).max().unwrap_or(0);
    let whole = device.shared_bytes() as usize;
    // A multiprocessor has 1 KB more than a block can have, and keeps 1 KB per block for itself.
    let half = (whole + 1024) / 2 - 1024;
    let (least, wanted) = match room {
        Room::LessThanHalf => (0, half - ABOVE_HALF),
        Room::MoreThanHalf => (half + ABOVE_HALF, half + ABOVE_HALF),
    };
    // On the CPU the threads of a block take turns: more of them only cost, and so do copies ahead of their time.
    let (most_warps, most_stages) = if device.is_cuda() { (max_warps as usize, 32) } else { (4, 2) };

    let try_fit =
        |n_warps: usize, slab_tiles: usize, room: usize| -> Option<(Schedule, Result<LaunchConfig>)> {
            let quad_bytes = 4 * (TILE_ROWS + 1 + prepared_words as usize);
            let least_blocks = (n_quads * quad_bytes).div_ceil(QUADS_BYTES);
            let n_blocks = (device.multiprocessors() as usize).max(least_blocks).min(n_quads);
            let turns = n_quads.div_ceil(n_blocks);
            let mut schedule = Schedule {
                turns: (n_quads / n_blocks) as u32,
                blocks_with_more: (n_quads % n_blocks) as u32,
                slab_tiles: slab_tiles as u32,
                stages: 0,
                stage_words: stage_bytes as u32 / 4,
            };
            let fixed = 4 * schedule.shared_words(n_warps as u32, unit_words as u32, prepared_words) as usize;
            let ring = room.checked_sub(fixed)? / n_warps;
            let most_tiles = (turns * slab_tiles).div_ceil(n_warps);
            let fits = |stages: &usize| {
                4 * WarpCopies::words(*stages as u32, stage_bytes as u32 / 4) as usize <= ring
            };
            schedule.stages = (2..=most_stages.min(most_tiles.max(2))).rev().find(fits)? as u32;
            Some((schedule, launch_1d(n_blocks, 32 * n_warps)))
        };
    // Rather fewer warps than parts of the vector, rather the next kernel's block beside this one's than more warps.
    let warps = || [12, 8, 4, 2, 1].into_iter().filter(|&warps| warps <= most_warps);
    let slabs = (0..=if in_slabs { n_tiles.ilog2() } else { 0 }).map(|log| n_tiles.div_ceil(1 << log));
    let choices = slabs.flat_map(|slab_tiles| {
        let rooms = [(wanted, 4), (whole, 1)].into_iter();
        rooms.flat_map(move |(room, least)| {
            warps().filter(move |&warps| warps >= least).map(move |warps| (warps, slab_tiles, room))
        })
    });
    let schedule = { choices }.find_map(|(n_warps, slab_tiles, room)| try_fit(n_warps, slab_tiles, room));
    let (schedule, config) = schedule.with_context(|| {
        format!(
            "gemv: {whole} bytes of shared memory do not hold two tiles of {stage_bytes} bytes and their part of a \
             vector of {} values",
            matrices[0].n_cols()
        )
    })?;
    let mut config = config?;
    let shared_bytes = 4 * schedule.shared_words(config.block[0] / 32, unit_words as u32, prepared_words);
    config.dynamic_shared_bytes = shared_bytes.max(least as u32);
    Ok((schedule, config))
}
