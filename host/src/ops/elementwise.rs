//! Launchers of the vector operations.

use super::{Matrix, Next, Q8_1Vector, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use gpu_kernels::activations::{OCTET, Q8_1_BLOCK};
use gpu_kernels::formats::UNIT;
use gpu_kernels::operand;
use gpu_kernels::rows::RowOrder;
use gpu_kernels::step::Step;
use gpu_kernels::{
    argmax as argmax_kernel, embed as embed_kernel, quantize, residual, rms_norm as rms_norm_kernel,
    swiglu as swiglu_kernel,
};

/// `out[i] = weights[steps[i].token]`, each of `weights.n_cols()` values, rows of several filled up to a multiple of four;
/// into `rotation` cosine and sine of every rotated
/// pair's angle at the step's position. For the first `n_tokens` steps; of one alone also what the next product reads. `before_layers`
/// says that the next launch is [`layers`](super::layers), which may start sooner than others.
///
/// The tokens are in device memory: whoever writes them keeps them below `weights.n_rows()`.
///
/// # Errors
/// When a buffer is too short, there are more than 65,535 tokens, the matrix's rows are not in natural order, or the launch
/// fails.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn embed(
    device: &Device,
    weights: &Matrix,
    steps: &Buffer<Step>,
    n_tokens: usize,
    rope: &Rope,
    out: &mut Buffer<f32>,
    rotation: &mut Buffer<[f32; 2]>,
    next: Option<Next>,
    before_layers: bool,
) -> Result<()> {
    let pairs = rope.frequencies.len();
    ensure!((1..=65_535).contains(&n_tokens), "embed: {n_tokens} tokens, 1 to 65,535 are possible");
    at_least("embed", "steps", steps, n_tokens)?;
    let stride = weights.n_cols().next_multiple_of(4);
    at_least("embed", "out", out, (n_tokens - 1) * stride + weights.n_cols())?;
    at_least("embed", "rotation", rotation, n_tokens * pairs)?;
    ensure!(weights.order() == RowOrder::NATURAL, "embed: the rows are in {:?}", weights.order());
    let threads = weights.n_cols().div_ceil(UNIT).max(pairs);
    let mut config = launch_1d(threads.div_ceil(embed_kernel::BLOCK_DIM), embed_kernel::BLOCK_DIM)?;
    config.grid[1] = n_tokens as u32;
    ensure!(next.is_none() || n_tokens == 1, "embed: an operand is of one token, found {n_tokens}");
    let operand = Next::of_launch(next, "embed", weights.n_cols(), config.grid[0] as usize)?;
    let arguments = (
        weights.as_ref()?,
        steps.as_ptr(),
        out.as_mut_ptr(),
        dim(weights.n_cols())?,
        dim(stride)?,
        rope.frequencies.as_ptr(),
        rotation.as_mut_ptr(),
        dim(pairs)?,
        rope.magnitude,
        operand,
        u32::from(before_layers),
    );
    // SAFETY: the matrix is whole by construction, the lengths are checked, and the tokens are below n_rows.
    unsafe { device.launch(&embed_kernel::EMBED, config, arguments) }
}

/// `y[i] = x[i] * gamma[i] / sqrt(mean(x^2) + eps)` over `gamma.len()` values.
///
/// # Errors
/// When a buffer is too short or the launch fails.
pub fn rms_norm(
    device: &Device,
    x: &Buffer<f32>,
    gamma: &Buffer<f32>,
    eps: f32,
    y: &mut Buffer<f32>,
) -> Result<()> {
    let n = gamma.len();
    ensure!(n > 0, "rms_norm: gamma is empty");
    at_least("rms_norm", "x", x, n)?;
    at_least("rms_norm", "y", y, n)?;
    let arguments = (x.as_ptr(), gamma.as_ptr(), y.as_mut_ptr(), dim(n)?, eps);
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&rms_norm_kernel::RMS_NORM, launch_1d(1, rms_norm_kernel::BLOCK_DIM)?, arguments) }
}

/// `x` as the next product reads it.
///
/// # Errors
/// When the operand is not of as many values, or the launch fails.
pub fn make_operand(device: &Device, x: &Buffer<f32>, next: Next) -> Result<()> {
    aligned("make_operand", "x", x, x.len())?;
    let config = launch_1d(x.len().div_ceil(operand::BLOCK_DIM * OCTET), operand::BLOCK_DIM)?;
    let operand = Next::of_launch(Some(next), "make_operand", x.len(), config.grid[0] as usize)?;
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&operand::MAKE_OPERAND, config, (x.as_ptr(), dim(x.len())?, operand)) }
}

/// Quantizes `out.len()` values to Q8_1.
///
/// # Errors
/// When a buffer is too short or the launch fails.
pub fn quantize_q8_1(device: &Device, x: &Buffer<f32>, out: &mut Q8_1Vector) -> Result<()> {
    at_least("quantize_q8_1", "x", x, out.len)?;
    at_least("quantize_q8_1", "quants", &out.quants, out.len.div_ceil(Q8_1_BLOCK) * Q8_1_BLOCK / 4)?;
    at_least("quantize_q8_1", "scales", &out.scales, out.len.div_ceil(Q8_1_BLOCK))?;
    let per_block = quantize::BLOCK_DIM * OCTET;
    let config = launch_1d(out.len.div_ceil(per_block), quantize::BLOCK_DIM)?;
    let arguments = (x.as_ptr(), out.quants.as_mut_ptr(), out.scales.as_mut_ptr(), dim(out.len)?);
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&quantize::QUANTIZE_Q8_1, config, arguments) }
}

/// `x[i] += y[i]` over `y.len()` values.
///
/// # Errors
/// When `x` is too short or the launch fails.
pub fn residual_add(device: &Device, x: &mut Buffer<f32>, y: &Buffer<f32>) -> Result<()> {
    at_least("residual_add", "x", x, y.len())?;
    let config = launch_1d(y.len().div_ceil(residual::BLOCK_DIM), residual::BLOCK_DIM)?;
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&residual::RESIDUAL_ADD, config, (x.as_mut_ptr(), y.as_ptr(), dim(y.len())?)) }
}

/// `gate[i] = silu(gate[i]) * up[i]` over `up.len()` values.
///
/// # Errors
/// When `gate` is too short or the launch fails.
pub fn swiglu(device: &Device, gate: &mut Buffer<f32>, up: &Buffer<f32>) -> Result<()> {
    at_least("swiglu", "gate", gate, up.len())?;
    let config = launch_1d(up.len().div_ceil(swiglu_kernel::BLOCK_DIM), swiglu_kernel::BLOCK_DIM)?;
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&swiglu_kernel::SWIGLU, config, (gate.as_mut_ptr(), up.as_ptr(), dim(up.len())?)) }
}

/// The index of the largest value of `x`, the lowest one of equals, into `index[0]`.
///
/// # Errors
/// When `x` is empty, `index` is, or the launch fails.
pub fn argmax(device: &Device, x: &Buffer<f32>, index: &mut Buffer<u32>) -> Result<()> {
    at_least("argmax", "x", x, 1)?;
    at_least("argmax", "index", index, 1)?;
    let arguments = (x.as_ptr(), index.as_mut_ptr(), dim(x.len())?);
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&argmax_kernel::ARGMAX, launch_1d(1, argmax_kernel::BLOCK_DIM)?, arguments) }
}
