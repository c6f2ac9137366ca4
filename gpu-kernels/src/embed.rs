//! The start of tokens: their embeddings, and the angles of their positions.

use crate::formats::tile::{DeviceTile, Geometry, TILE_ROWS, TILE_UNITS};
use crate::formats::{Format, Place, UNIT, WeightFormat, WeightUnit};
use crate::gemv::MatrixRef;
use crate::rope::angle;
use crate::step::Step;
use cuda_std::grid::let_next_start;
use cuda_std::kernel;
use cuda_std::thread::{block_idx_y, index_1d};

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
///
/// # Thread mapping
/// A row of the grid per token; in it one thread per unit of 32 columns, and one per pair; any block size, rows that
/// cover both.
#[kernel]
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
) {
    let_next_start();
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
        tile_bytes: weights.tile_bytes as usize,
        last_tile_bytes: weights.last_tile_bytes as usize,
    };
    if index >= geometry.n_units {
        return;
    }
    let (row, tile) = (step.token as usize, index / TILE_UNITS);
    let place = Place { n_units: geometry.units_of(tile), row: row % TILE_ROWS, unit: index % TILE_UNITS };
    // SAFETY: the row is one of the matrix's.
    let source = unsafe { DeviceTile::at(weights.tiles.add(geometry.offset(row / TILE_ROWS, tile))) };
    macro_rules! dequantize {
        ($(($Type:ident, $name:ident))*) => {
            match weights.format {
                $(f if f == Format::$Type as u32 => <crate::formats::$Type>::unpack(source, place).dequantize(),)*
                _ => [0.0; UNIT],
            }
        };
    }
    let values = crate::for_each_format!(dequantize);
    for (i, value) in values.into_iter().enumerate() {
        if index * UNIT + i < n_embd {
            // SAFETY: the column is inside `out`, and this thread's own.
            unsafe { *out.add(number * stride as usize + index * UNIT + i) = value };
        }
    }
}
