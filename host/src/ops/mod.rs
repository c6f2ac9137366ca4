//! One safe, typed function per kernel: it checks the shapes, chooses the grid and launches. Nothing else launches.
//!
//! Buffers may be longer than an operation needs; what lies beyond is not touched.

mod attention;
mod elementwise;
mod few;
mod gemm;
mod gemv;
mod kv;
mod layers;
mod matrix;
mod read;
mod sample;
mod schedule;
mod types;

pub use attention::{
    AttentionShape, AttentionWorkspace, CONTEXT_KINDS, attention, kv_append, prefill_attention, rope,
};
pub use elementwise::{argmax, embed, make_operand, quantize_q8_1, residual_add, rms_norm, swiglu};
pub use few::has_few_products;
pub use gemm::{ManyOutput, Panels, gemm, gemm_qkv, pack_panels};
pub use gemv::{Output, QkvWeights, gemv, gemv_logits, gemv_qkv, gemv_swiglu, pair_order};
pub use kv::{KvCache, KvLayer, KvStage, KvView, QuantizedKvLayer, quantize_kv};
pub use layers::{LayerWeights, Layers, layers};
pub use matrix::{Matrix, Packer};
pub use read::read;
pub use sample::{Ranks, SampleWorkspace, sample};
pub use types::{Chunk, Input, Next, Norm, Operand, Q8_1Vector, Rope};

use crate::device::Buffer;
use anyhow::{Context as _, Result, ensure};
use bytemuck::Pod;
use cuda_std::launch::LaunchConfig;

/// A one-dimensional launch.
fn launch_1d(blocks: usize, threads: usize) -> Result<LaunchConfig> {
    let blocks = u32::try_from(blocks).ok().filter(|&blocks| blocks <= i32::MAX as u32);
    let blocks = blocks.context("a grid of more than 2,147,483,647 blocks")?;
    Ok(LaunchConfig {
        grid: [blocks, 1, 1],
        block: [threads as u32, 1, 1],
        dynamic_shared_bytes: 0,
        cluster: 1,
    })
}

/// A length as a kernel's `u32` parameter.
fn dim(value: usize) -> Result<u32> {
    u32::try_from(value).ok().with_context(|| format!("a dimension of {value} does not fit 32 bits"))
}

/// Refuses a buffer that is shorter than an operation needs.
fn at_least<T: Pod>(operation: &str, name: &str, buffer: &Buffer<T>, needed: usize) -> Result<()> {
    ensure!(
        buffer.len() >= needed,
        "{operation}: buffer {name} has {} values, {needed} are needed",
        buffer.len()
    );
    Ok(())
}

/// Refuses a buffer that is shorter than an operation needs, or a part of one that it cannot read 16 bytes at a time.
fn aligned<T: Pod>(operation: &str, name: &str, buffer: &Buffer<T>, needed: usize) -> Result<()> {
    at_least(operation, name, buffer, needed)?;
    ensure!(
        buffer.as_ptr().addr().is_multiple_of(16),
        "{operation}: {name} starts at {:p}, needed a multiple of 16 bytes",
        buffer.as_ptr()
    );
    Ok(())
}
