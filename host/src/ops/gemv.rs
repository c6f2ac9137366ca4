//! Launchers of the matrix-vector products.

use super::schedule::{Chain, Family, MOST_BESIDE_BYTES, schedule};
use super::{Input, KvLayer, Matrix, Next, Norm, Ranks, Rope, SampleWorkspace, aligned, at_least, dim};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use cuda_std::launch::Kernel;
use gpu_kernels::activations::Q8_1_BLOCK;
use gpu_kernels::gemv::epilogue::{Add, Qkv, Store, StoreOrdered, Swiglu};
use gpu_kernels::gemv::input::Input as KernelInput;
use gpu_kernels::gemv::{self as kernels, Kernels, MatrixRef, QkvKernel, Schedule};
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
    let matrix = weights.as_ref()?;
    let (kernels, family) = kernels(device, weights, x);
    let is_natural = weights.order() == RowOrder::NATURAL;
    let ordered_output = match output {
        Output::Set(y) if is_natural => {
            aligned("gemv", "y", y, weights.n_rows())?;
            let (schedule, config) = schedule::<Store>(device, &[weights], family, Chain::OTHER)?;
            let output = Store { y: y.as_mut_ptr(), largest: ptr::null_mut() };
            // SAFETY: the matrix is whole by construction, the lengths are checked, the schedule is of the grid.
            return unsafe { device.launch(kernels.gemv, config, (matrix, input, schedule, output)) };
        }
        Output::Add(y, next) => {
            aligned("gemv", "y", y, weights.n_rows())?;
            ensure!(is_natural, "gemv: only rows in natural order are added, found {:?}", weights.order());
            ensure!(is_plain, "gemv: an input that is to be normalised has a product that is not added");
            let (schedule, config) = schedule::<Add>(device, &[weights], family, Chain::OTHER)?;
            let operand = Next::of_launch(next, "gemv", weights.n_rows(), weights.n_quads())?;
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
    let (schedule, config) = schedule::<StoreOrdered>(device, &[weights], Family::Any, Chain::OTHER)?;
    // SAFETY: as above.
    unsafe { device.launch(ordered(x), config, (matrix, input, schedule, ordered_output)) }
}

/// Logits, `y = W x` with `x` normalised, whose rows are in natural order; with the largest rank of each block's rows in `workspace`,
/// where there is one that has the room. `after_layers` says that it is directly behind [`layers`](super::layers) of the same token.
///
/// # Errors
/// As [`gemv`]; also when the rows are in another order.
pub fn gemv_logits(
    device: &Device,
    weights: &Matrix,
    x: Input,
    norm: Norm,
    after_layers: bool,
    y: &mut Buffer<f32>,
    workspace: Option<&mut SampleWorkspace>,
) -> Result<Option<Ranks>> {
    let input = input("gemv_logits", weights, x, Some(norm))?;
    let (kernels, family) = kernels(device, weights, x);
    let order = weights.order();
    ensure!(order == RowOrder::NATURAL, "gemv_logits: the rows must be in natural order, found {order:?}");
    aligned("gemv_logits", "y", y, weights.n_rows())?;
    let chain = if after_layers { Chain::AFTER_LAYERS } else { Chain::OTHER };
    let (schedule, config) = schedule::<Store>(device, &[weights], family, chain)?;
    let groups =
        workspace.and_then(|workspace| workspace.bands(schedule.shares[0], weights.strip_shape().quads));
    let largest = groups.map_or(ptr::null_mut(), |groups| groups.largest);
    let output = Store { y: y.as_mut_ptr(), largest };
    // SAFETY: the matrix is whole by construction, the lengths are checked, the schedule is of the grid.
    unsafe { device.launch(kernels.gemv, config, (weights.as_ref()?, input, schedule, output))? };
    Ok(groups.map(Ranks::of))
}

/// The kernels for an input and a matrix: of its own format where there are any that take both. They read operands, and not vectors in
/// Q8_1, which only steps of one kernel for each operation have.
fn kernels(device: &Device, matrix: &Matrix, x: Input) -> (Kernels, Family) {
    if x.is_exact() {
        return (kernels::exact::KERNELS, Family::Any);
    }
    let is_operand = matches!(x, Input::Operand(_));
    let own = kernels::own_kernels(matrix.format()).filter(|_| is_operand && !is_long(device, matrix, 1));
    own.map_or((kernels::mixed::KERNELS, Family::Any), |own| (own, Family::Own))
}

/// Likewise the kernel for queries, keys and values.
fn qkv_kernel(device: &Device, matrices: [&Matrix; 3], x: Input) -> (&'static QkvKernel, Family) {
    if x.is_exact() {
        return (&kernels::exact::GEMV_QKV, Family::Any);
    }
    let fit = matches!(x, Input::Operand(_)) && matrices.iter().all(|matrix| !is_long(device, matrix, 1));
    let own = kernels::own_qkv_kernel(matrices.map(Matrix::format)).filter(|_| fit);
    own.map_or((&kernels::mixed::GEMV_QKV, Family::Any), |own| (own, Family::Own))
}

/// Whether a strip does not fit shared memory, for a product with so many vectors.
pub(super) fn is_long(device: &Device, matrix: &Matrix, n_tokens: usize) -> bool {
    matrix.strip_bytes() + n_tokens * MOST_BESIDE_BYTES > device.shared_bytes() as usize
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
    let is_plain = next.as_ref().is_none_or(|next| next.gamma.is_none());
    ensure!(is_plain, "gemv_swiglu: its result is not normalised");
    let input = input("gemv_swiglu", gate_up, x, norm)?;
    at_least("gemv_swiglu", "y", y, gate_up.n_rows() / 2)?;
    let (kernels, family) = kernels(device, gate_up, x);
    let (schedule, config) = schedule::<Swiglu>(device, &[gate_up], family, Chain::OTHER)?;
    let operand = Next::of_launch(next, "gemv_swiglu", gate_up.n_rows() / 2, gate_up.n_quads())?;
    let output = Swiglu { y: y.as_mut_ptr(), operand };
    // SAFETY: the matrix is whole by construction, the lengths are checked, the schedule covers the matrix.
    unsafe { device.launch(kernels.gemv_swiglu, config, (gate_up.as_ref()?, input, schedule, output)) }
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
    let (kernel, family) = qkv_kernel(device, weights.matrices, x);
    let (schedule, config) = schedule::<Qkv>(device, &weights.matrices, family, Chain::QKV)?;
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
