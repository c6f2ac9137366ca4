//! Launchers of the matrix-vector products.

use super::{Input, Matrix, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use cuda_std::launch::LaunchConfig;
use gpu_kernels::gemv::{self as kernels, Addend};
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

/// `y = W x`, with a bias or added onto `y`.
///
/// # Errors
/// When `x` has not `weights.n_cols()` values, another buffer is too short, or the launch fails.
pub fn gemv(device: &Device, weights: &Matrix, x: Input, output: Output) -> Result<()> {
    let (y, bias, addend) = match output {
        Output::Set(y) => (y, None, Addend::None),
        Output::SetBiased(y, bias) => (y, Some(bias), Addend::Bias),
        Output::Add(y) => (y, None, Addend::Residual),
    };
    check_input("gemv", weights, x)?;
    at_least("gemv", "y", y, weights.n_rows)?;
    if let Some(bias) = bias {
        at_least("gemv", "bias", bias, weights.n_rows)?;
    }
    let config = config(device, weights.n_rows, kernels::ROWS_PER_BLOCK)?;
    let (blocks, y) = (weights.blocks.as_ptr(), y.as_mut_ptr());
    let bias = bias.map_or(ptr::null(), |bias| bias.as_ptr());
    let (n_rows, n_cols) = (dim(weights.n_rows)?, dim(weights.n_cols)?);
    let kernel = kernels::kernels(weights.format);
    // SAFETY: the matrix is whole by construction, and the lengths are checked.
    unsafe {
        match x {
            Input::Q8_1(x) => device.launch(
                kernel.q8_1,
                config,
                (blocks, x.quants.as_ptr().cast(), x.scales.as_ptr(), bias, y, n_rows, n_cols, addend as u32),
            ),
            Input::F32(x) => device.launch(
                kernel.f32,
                config,
                (blocks, x.as_ptr(), bias, y, n_rows, n_cols, addend as u32),
            ),
        }
    }
}

/// `y = silu(G x) * (U x)`, both matrices of the same shape and format.
///
/// # Errors
/// When the matrices differ, `x` has not their `n_cols()` values, `y` is too short, or the launch fails.
pub fn gemv_swiglu(device: &Device, gate: &Matrix, up: &Matrix, x: Input, y: &mut Buffer<f32>) -> Result<()> {
    let key = |matrix: &Matrix| (matrix.format, matrix.n_rows, matrix.n_cols);
    ensure!(key(gate) == key(up), "gemv_swiglu: gate is {:?}, up is {:?}", key(gate), key(up));
    check_input("gemv_swiglu", gate, x)?;
    at_least("gemv_swiglu", "y", y, gate.n_rows)?;
    let config = config(device, gate.n_rows, kernels::ROWS_PER_BLOCK / 2)?;
    let (gate_blocks, up_blocks, y) = (gate.blocks.as_ptr(), up.blocks.as_ptr(), y.as_mut_ptr());
    let (n_rows, n_cols) = (dim(gate.n_rows)?, dim(gate.n_cols)?);
    let kernel = kernels::kernels(gate.format);
    // SAFETY: the matrices are whole by construction, and the lengths are checked.
    unsafe {
        match x {
            Input::Q8_1(x) => device.launch(
                kernel.swiglu_q8_1,
                config,
                (gate_blocks, up_blocks, x.quants.as_ptr().cast(), x.scales.as_ptr(), y, n_rows, n_cols),
            ),
            Input::F32(x) => device.launch(
                kernel.swiglu_f32,
                config,
                (gate_blocks, up_blocks, x.as_ptr(), y, n_rows, n_cols),
            ),
        }
    }
}

fn check_input(operation: &str, weights: &Matrix, x: Input) -> Result<()> {
    ensure!(
        x.len() == weights.n_cols,
        "{operation}: the matrix is {} x {}, the vector has {} values",
        weights.n_rows,
        weights.n_cols,
        x.len()
    );
    Ok(())
}

/// Enough blocks for all rows, or to keep the device busy: a block takes further rows until none is left.
fn config(device: &Device, n_rows: usize, rows_per_block: usize) -> Result<LaunchConfig> {
    let blocks = n_rows.div_ceil(rows_per_block).min(device.saturating_blocks() as usize);
    launch_1d(blocks, kernels::BLOCK_DIM)
}
