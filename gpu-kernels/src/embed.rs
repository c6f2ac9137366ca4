//! The start of tokens: their embeddings, and the angles of their positions.

use crate::activations::{OCTET, UNIT_OCTETS};
use crate::block::block_sum;
use crate::formats::tile::{DeviceTile, Geometry};
use crate::formats::{Format, UNIT, WeightFormat, WeightUnit};
use crate::gemv::MatrixRef;
use crate::operand::{Operand, octet_of};
use crate::rope::angle;
use crate::step::Step;
use cuda_std::grid::{let_next_start, wait_for_previous};
use cuda_std::thread::{block_idx_x, block_idx_y, index_1d, thread_idx_x};
use cuda_std::{kernel, shared_array};

/// Threads in a block.
pub const BLOCK_DIM: usize = 64;

/// `out = weights[token]`, one row of the token-embedding matrix dequantized, and cosine and sine of every rotated
/// pair's angle at the step's position; for as many tokens as the grid has rows.
///
/// # Safety
/// The pointers are to device memory of the sizes below, the matrix is as its fields say with its rows in natural
/// order, and the steps' tokens are among them.
///
/// # Parameters
/// - `weights`: `[n_vocab, n_embd]`
/// - `steps`: `[n_tokens]`, hold token and position
/// - `out`: `[n_tokens, stride]`, of which `n_embd` are written
/// - `frequencies`: `[n_pairs]`, radians per position
/// - `rotation`: `[n_tokens, n_pairs]`, cosine and sine, both times `magnitude`
/// - `operand`: `out` of the only token as the next product reads it, with a sum of squares for each block; or nothing
/// - `before_layers`: not 0 where the next kernel is [`layers`](crate::layers), which looks at the steps once it has waited; others look
///   at them as soon as they start, so that those must be there
///
/// # Thread mapping
/// A row of the grid per token; in it one thread per unit of 32 columns, and one per pair; blocks of whole warps, rows that
/// cover both.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
#[kernel(overlapping)]
pub unsafe fn embed(
    weights: MatrixRef,
    steps: *const Step,
    out: *mut f32,
    n_embd: u32,
    stride: u32,
    frequencies: *const f64,
    rotation: *mut [f32; 2],
    n_pairs: u32,
    magnitude: f32,
    operand: Operand,
    before_layers: u32,
) {
    let scratch = shared_array!(EMBED_SUMS: [f32; 32]);
    if before_layers != 0 {
        let_next_start();
    }
    wait_for_previous();
    if before_layers == 0 {
        let_next_start();
    }
    let (index, n_embd) = (index_1d() as usize, n_embd as usize);
    let number = block_idx_y() as usize;
    // SAFETY: the caller vouches for the steps; each thread writes its own pair.
    let step = unsafe {
        let step = *steps.add(number);
        if index < n_pairs as usize {
            *rotation.add(number * n_pairs as usize + index) =
                angle(step.position, frequencies, index, magnitude);
        }
        step
    };
    let geometry = Geometry {
        n_units: n_embd.div_ceil(UNIT),
        strip_quads: weights.strip_quads as usize,
        tile_bytes: weights.tile_bytes as usize,
        last_tile_bytes: weights.last_tile_bytes as usize,
    };
    let mut values = [0.0; UNIT];
    if index < geometry.n_units {
        let (offset, place) = geometry.find(step.token as usize, index);
        // SAFETY: the row is one of the matrix's.
        let source = unsafe { DeviceTile::at(weights.tiles.add(offset)) };
        macro_rules! dequantize {
            ($(($Type:ident, $name:ident))*) => {
                match weights.format {
                    $(f if f == Format::$Type as u32 =>
                        <crate::formats::$Type>::unpack(source, place).dequantize(),)*
                    _ => [0.0; UNIT],
                }
            };
        }
        values = crate::for_each_format!(dequantize);
    }
    let mut squares = 0.0;
    for (i, value) in values.iter_mut().enumerate() {
        if index * UNIT + i < n_embd {
            // SAFETY: the column is inside `out`, and this thread's own.
            unsafe { *out.add(number * stride as usize + index * UNIT + i) = *value };
            squares += *value * *value;
        } else {
            *value = 0.0;
        }
    }
    if operand.squares.is_null() {
        return;
    }
    let sum = block_sum(squares, scratch);
    if thread_idx_x() == 0 {
        // SAFETY: the block's own sum.
        unsafe { *operand.squares.add(block_idx_x() as usize) = sum };
    }
    if operand.words.is_null() {
        return;
    }
    for part in 0..UNIT_OCTETS {
        let octet = index * UNIT_OCTETS + part;
        if octet * OCTET < n_embd {
            // SAFETY: the octet is inside the operand, and this thread's own.
            unsafe {
                let gamma = octet_of(operand.gamma, n_embd, octet);
                operand.store_8(octet * OCTET, core::array::from_fn(|i| values[part * OCTET + i] * gamma[i]));
            }
        }
    }
}
