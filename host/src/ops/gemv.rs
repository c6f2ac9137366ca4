//! Launchers of the matrix-vector products.

use super::{Input, KvLayer, Matrix, Next, Norm, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use cuda_std::launch::{Kernel, LaunchConfig};
use gpu_kernels::activations::Q8_1_BLOCK;
use gpu_kernels::formats::UNIT;
use gpu_kernels::formats::tile::TILE_UNITS;
use gpu_kernels::gemv::epilogue::{Add, Epilogue, Prepared as _, Qkv, Store, StoreOrdered, Swiglu};
use gpu_kernels::gemv::input::Input as KernelInput;
use gpu_kernels::gemv::{self as kernels, Kernels, MAX_QUADS, MatrixRef, Schedule, Shares};
use gpu_kernels::operand::Operand;
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
    /// `y += W x`; and `y` as the next product reads it.
    Add(&'a mut Buffer<f32>, Option<Next<'a>>),
}

/// `y = W x`, with a bias or added onto `y`; `x` is normalised first where there is a norm.
///
/// # Errors
/// When `x` has not `weights.n_cols()` values, another buffer is too short, there is a norm and `y` is more than set, or the
/// launch fails.
pub fn gemv(device: &Device, weights: &Matrix, x: Input, norm: Option<Norm>, output: Output) -> Result<()> {
    let is_plain = norm.is_none();
    let input = input("gemv", weights, x, norm)?;
    let (schedule, config) = match output { Output::Add(..) => schedule::<Add>(device, &[weights], x.is_exact())?, _ => schedule::<Store>(device, &[weights], x.is_exact())? };
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
        Output::Add(y, next) => {
            aligned("gemv", "y", y, weights.n_rows())?;
            ensure!(is_natural, "gemv: only rows in natural order are added, found {:?}", weights.order());
            ensure!(is_plain, "gemv: an input that is to be normalised has a product that is not added");
            let operand = operand("gemv", next, weights.n_rows(), config)?;
            let output = Add { y: y.as_mut_ptr(), operand };
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

/// What the next product reads, as a launch passes it.
fn operand(operation: &str, next: Option<Next>, n: usize, config: LaunchConfig) -> Result<Operand> {
    match next {
        Some(mut next) => next.as_ref(operation, n, config.grid[0] as usize),
        None => Ok(Operand::NOTHING),
    }
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
    next: Option<Next>,
) -> Result<()> {
    ensure!(
        gate_up.order().order == Order::Halves as u32,
        "gemv_swiglu: gate and up must be one matrix in halves, found {:?}",
        gate_up.order()
    );
    let input = input("gemv_swiglu", gate_up, x, norm)?;
    at_least("gemv_swiglu", "y", y, gate_up.n_rows() / 2)?;
    let (schedule, config) = schedule::<Swiglu>(device, &[gate_up], x.is_exact())?;
    let kernel = kernels(gate_up, x).gemv_swiglu;
    let operand = operand("gemv_swiglu", next, gate_up.n_rows() / 2, config)?;
    let output = Swiglu { y: y.as_mut_ptr(), operand };
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
    let (schedule, config) = schedule::<Qkv>(device, &weights.matrices, x.is_exact())?;
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
        words: ptr::null(),
        quants: ptr::null(),
        scales: ptr::null(),
        values: ptr::null(),
        gamma: ptr::null(),
        squares: ptr::null(),
        n_squares: 0,
        n: dim(x.len())?,
        per_n: 1.0 / x.len() as f32,
        eps: 0.0,
    };
    let squares = match x {
        Input::F32(values, operand) => {
            aligned(operation, "x", values, x.len())?;
            input.values = values.as_ptr();
            operand
        }
        Input::Operand(operand) => {
            ensure!(!operand.words.is_empty(), "{operation}: the operand is of the exact path");
            input.words = operand.words.as_ptr();
            Some(operand)
        }
        Input::Q8_1(vector) => {
            ensure!(norm.is_none(), "{operation}: a vector in Q8_1 cannot be normalised");
            let blocks = vector.len().div_ceil(Q8_1_BLOCK);
            at_least(operation, "quants", &vector.quants, blocks * Q8_1_BLOCK / 4)?;
            at_least(operation, "scales", &vector.scales, blocks)?;
            input.quants = vector.quants.as_ptr();
            input.scales = vector.scales.as_ptr();
            None
        }
    };
    if let Some(norm) = norm {
        ensure!(
            norm.gamma.len() == x.len(),
            "{operation}: gamma has {} values, the vector {}",
            norm.gamma.len(),
            x.len()
        );
        aligned(operation, "gamma", norm.gamma, x.len())?;
        let squares = squares.filter(|operand| operand.n_squares > 0 && operand.len == x.len());
        let squares = squares.with_context(|| {
            format!("{operation}: the vector is to be normalised, and nobody left the sums of its squares")
        })?;
        input.squares = squares.squares.as_ptr();
        input.n_squares = dim(squares.n_squares)?;
        input.eps = norm.eps;
        // An operand's values are multiplied with the factors already.
        if x.is_exact() {
            input.gamma = norm.gamma.as_ptr();
        }
    }
    Ok(input)
}

/// Bytes of weights that a block asks for, about: several blocks on a multiprocessor have as many on their way.

/// Deals out the work.
fn schedule<E: Epilogue>(device: &Device, matrices: &[&Matrix], is_exact: bool) -> Result<(Schedule, LaunchConfig)> {
    let _ = is_exact;
    let n_tiles = matrices[0].n_cols().div_ceil(UNIT).div_ceil(TILE_UNITS);
    let n_quads: usize = matrices.iter().map(|matrix| matrix.n_quads()).sum();
    let quad_bytes = matrices.iter().map(|matrix| matrix.quad_bytes()).max().unwrap_or(0);
    let tile_bytes = matrices.iter().map(|matrix| matrix.largest_tile()).max().unwrap_or(0);
    let room = device.shared_bytes() as usize;
    let env = |name: &str, default: usize| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);

    // On the CPU the threads of a block take turns: more of them only cost.
    let is_cuda = device.is_cuda();
    let multiprocessors = device.multiprocessors() as usize;
    let n_copiers = usize::from(is_cuda);
    let per_multiprocessor = (n_quads * quad_bytes).div_ceil(multiprocessors);
    let (mut rounds, mut slots) = (1, 4);
    if is_cuda {
        slots = per_multiprocessor.div_ceil(env("WL_SLOT", 60_000));
        if n_quads > env("WL_FEW", 4) * multiprocessors { slots = slots.max(env("WL_SMALL", 2)) }
        if slots > env("WL_ROUND", 4) { (rounds, slots) = (2, 4) }
    }
    let most_warps = if is_cuda { ((env("WL_TOTAL", 20) / slots - 1).min(env("WL_MOST", 9))).max(4) } else { 1 };
    let tile_warps = n_tiles.div_ceil(n_tiles.div_ceil(most_warps));
    let quad_warps = if is_cuda { (most_warps.min(8) / tile_warps).max(1) } else { 1 };
    let fits = |quads: usize| {
        let schedule = of_quads(quads, n_tiles, tile_warps, n_tiles, quads * quad_bytes);
        4 * schedule.shared_words(n_tiles as u32, E::Prepared::WORDS) as usize <= room
    };
    let fair = n_quads.div_ceil(multiprocessors * slots);
    let quads = if rounds > 1 { (env("WL_BAND", 50_000) / quad_bytes).max(1) } else { fair };
    let quads = quads.min(MAX_QUADS as usize);
    let quads = (1..=quads).rev().find(|&quads| fits(quads));
    let mut schedule = match quads {
        Some(quads) => of_quads(quads, n_tiles, tile_warps, n_tiles, quads * quad_bytes),
        None => {
            let fixed = of_quads(1, n_tiles, tile_warps, 0, 0);
            // The barriers' room is not known yet, and is small.
            let left = room.saturating_sub(4 * fixed.shared_words(n_tiles as u32, E::Prepared::WORDS) as usize + 1024);
            let slab_tiles = left / tile_bytes;
            ensure!(
                slab_tiles > 0,
                "gemv: {room} bytes of shared memory do not hold a tile of {tile_bytes} bytes and the sums of a \
                 row of {} values",
                matrices[0].n_cols()
            );
            of_quads(1, n_tiles, tile_warps.min(slab_tiles), slab_tiles, slab_tiles * tile_bytes)
        }
    };
    for (shares, matrix) in schedule.shares.iter_mut().zip(matrices) {
        // Each block as many as any other, or one more.
        let blocks = matrix.n_quads().div_ceil(schedule.quads as usize);
        *shares = Shares {
            blocks: blocks as u32,
            quads: (matrix.n_quads() / blocks) as u32,
            blocks_with_more: (matrix.n_quads() % blocks) as u32,
        };
    }
    let n_blocks: usize = schedule.shares.iter().map(|shares| shares.blocks as usize).sum();
    schedule.warps = schedule.tile_warps * quad_warps.min(schedule.quads as usize) as u32;
    let n_warps = schedule.warps as usize + n_copiers;
    schedule.window = if is_cuda { env("WL_WINDOW", 2) as u32 } else { u32::MAX };
    let mut config = launch_1d(n_blocks, 32 * n_warps)?;
    config.dynamic_shared_bytes = 4 * schedule.shared_words(n_tiles as u32, E::Prepared::WORDS);
    schedule.trace = trace(device, n_blocks);
    Ok((schedule, config))
}

fn of_quads(quads: usize, _n_tiles: usize, tile_warps: usize, slab_tiles: usize, bytes: usize) -> Schedule {
    Schedule {
        quads: quads as u32,
        shares: [Shares::default(); 3],
        tile_warps: tile_warps as u32,
        slab_tiles: slab_tiles as u32,
        weight_words: bytes as u32 / 4,
        warps: 0,
        window: 0,
        trace: ptr::null_mut(),
    }
}

/// scratch
pub static TRACE: std::sync::Mutex<(Option<Buffer<u64>>, usize, Vec<(usize, usize)>)> = std::sync::Mutex::new((None, 0, Vec::new()));
fn trace(device: &Device, n_blocks: usize) -> *mut u64 {
    if std::env::var("WL_TRACE").is_err() { return ptr::null_mut(); }
    let mut t = TRACE.lock().unwrap();
    if t.0.is_none() { t.0 = Some(device.alloc_zeroed(64 << 20).unwrap()); }
    let at = t.1;
    if at + n_blocks * 8 > 64 << 20 { return ptr::null_mut(); }
    t.1 += n_blocks * 8;
    t.2.push((at, n_blocks));
    t.0.as_mut().unwrap().as_mut_ptr().wrapping_add(at)
}
/// scratch
pub fn dump_trace(device: &Device) {
    let Ok(path) = std::env::var("WL_TRACE") else { return };
    let t = TRACE.lock().unwrap();
    let values = device.to_vec(t.0.as_ref().unwrap()).unwrap();
    let mut out = Vec::<u8>::new();
    out.extend((t.2.len() as u64).to_le_bytes());
    for (a, n) in &t.2 { out.extend((*a as u64).to_le_bytes()); out.extend((*n as u64).to_le_bytes()); }
    out.extend(bytemuck::cast_slice::<u64, u8>(&values[..t.1]));
    std::fs::write(path, out).unwrap();
}
