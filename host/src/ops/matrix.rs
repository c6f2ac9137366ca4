//! Weight matrices in device memory.

use super::{dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, bail, ensure};
use gpu_kernels::formats::tile::{Geometry, TILE_ROWS, TILE_UNITS};
use gpu_kernels::formats::{Format, UNIT};
use gpu_kernels::gemv::MatrixRef;
use gpu_kernels::gemv::strip::StripShape;
use gpu_kernels::pack;
use gpu_kernels::random::{self, Factor};
use gpu_kernels::rows::{Order, RowOrder};
use half::f16;

/// Bytes of a file that are on the device at once beside the packed matrices.
const STAGING_BYTES: usize = 32 << 20;

/// A weight matrix in device memory: `n_rows` outputs, `n_cols` inputs, in tiles ([`gpu_kernels::formats::tile`]).
#[derive(Debug)]
pub struct Matrix {
    format: Format,
    n_rows: usize,
    n_cols: usize,
    order: RowOrder,
    geometry: Geometry,
    tiles: Buffer<u8>,
}

impl Matrix {
    /// Uploads a matrix of rows in GGUF blocks.
    ///
    /// # Errors
    /// As [`Packer::matrix`].
    pub fn upload(
        device: &Device,
        format: Format,
        n_rows: usize,
        n_cols: usize,
        bytes: &[u8],
    ) -> Result<Self> {
        Packer::new(device).matrix(format, n_rows, n_cols, RowOrder::NATURAL, &[bytes])
    }

    /// How the weights are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Outputs.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Inputs.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// The order of its rows in device memory.
    pub fn order(&self) -> RowOrder {
        self.order
    }

    /// Bytes of the weights themselves, as the file has them.
    pub fn weight_bytes(&self) -> usize {
        self.n_rows * self.format.row_bytes(self.n_cols)
    }

    /// Size in device memory.
    pub fn n_bytes(&self) -> usize {
        self.tiles.n_bytes()
    }

    /// Quads of four rows.
    pub(super) fn n_quads(&self) -> usize {
        self.n_rows.div_ceil(TILE_ROWS)
    }

    /// Strips of one or two quads.
    pub(super) fn n_strips(&self) -> usize {
        self.n_quads().div_ceil(self.geometry.strip_quads)
    }

    /// What they are like.
    pub(super) fn strip_shape(&self) -> StripShape {
        StripShape { quads: self.geometry.strip_quads as u32, n_units: self.geometry.n_units as u32 }
    }

    /// Bytes of one.
    pub(super) fn strip_bytes(&self) -> usize {
        self.geometry.strip_bytes()
    }

    /// Bytes of its largest tile.
    pub(super) fn largest_tile(&self) -> usize {
        self.geometry.bytes_of(0)
    }

    /// The matrix as a launch passes it.
    pub(super) fn as_ref(&self) -> Result<MatrixRef> {
        Ok(MatrixRef {
            tiles: self.tiles.as_ptr(),
            format: self.format as u32,
            n_rows: dim(self.n_rows)?,
            n_quads: dim(self.n_quads())?,
            strip_quads: dim(self.geometry.strip_quads)?,
            tile_bytes: dim(self.geometry.tile_bytes)?,
            last_tile_bytes: dim(self.geometry.bytes_of(self.geometry.n_tiles() - 1))?,
            strip_bytes: dim(self.geometry.strip_bytes())?,
            order: self.order,
        })
    }
}

/// Uploads matrices, one after the other, and packs them into tiles on the device.
pub struct Packer<'d> {
    device: &'d Device,
    /// Rows as they are in the file, on their way.
    staging: Option<Buffer<u8>>,
}

impl<'d> Packer<'d> {
    /// A packer that has packed nothing.
    pub fn new(device: &'d Device) -> Self {
        Self { device, staging: None }
    }

    /// Uploads a matrix whose rows are those of `parts`, one below the other, in GGUF blocks.
    ///
    /// # Errors
    /// When `n_cols` is not a multiple of the format's block, the bytes are not exactly the matrix's, the rows cannot be
    /// put in this order, or the device has no room.
    pub fn matrix(
        &mut self,
        format: Format,
        n_rows: usize,
        n_cols: usize,
        order: RowOrder,
        parts: &[&[u8]],
    ) -> Result<Matrix> {
        let mut matrix = self.unwritten(format, n_rows, n_cols, order)?;
        let row_bytes = format.row_bytes(n_cols);
        let needed = n_rows * row_bytes;
        let found: usize = parts.iter().map(|part| part.len()).sum();
        ensure!(
            found == needed,
            "{n_rows} x {n_cols} weights in {} need {needed} bytes, found {found}",
            format.name()
        );
        let mut first_row = 0;
        for part in parts {
            ensure!(part.len().is_multiple_of(row_bytes), "a part of a matrix ends inside a row");
            for rows in part.chunks(rows_at_once(row_bytes) * row_bytes) {
                let mut staging = self.staging(rows.len())?;
                self.device.upload(&mut staging, rows)?;
                self.pack(&mut matrix, first_row, &staging)?;
                first_row += rows.len() / row_bytes;
            }
        }
        Ok(matrix)
    }

    /// A matrix of random weights of mean 0 and variance `1 / n_cols`.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix); also when the format is not an integer format.
    pub fn random_matrix(
        &mut self,
        format: Format,
        n_rows: usize,
        n_cols: usize,
        order: RowOrder,
        seed: u32,
    ) -> Result<Matrix> {
        let mut matrix = self.unwritten(format, n_rows, n_cols, order)?;
        let row_bytes = format.row_bytes(n_cols);
        let [first, second] = random_factors(format, n_cols)?;
        let rows_at_once = rows_at_once(row_bytes);
        for first_row in (0..n_rows).step_by(rows_at_once) {
            let bytes = rows_at_once.min(n_rows - first_row) * row_bytes;
            let mut staging = self.staging(bytes)?;
            let (n_words, block_words) = (dim(bytes / 2)?, dim(format.block_bytes() / 2)?);
            let config = launch_1d((bytes / 2).div_ceil(random::BLOCK_DIM), random::BLOCK_DIM)?;
            let blocks = staging.as_mut_ptr().cast();
            let arguments = (blocks, n_words, block_words, first, second, seed ^ first_row as u32);
            // SAFETY: the staging buffer has as many bytes.
            unsafe { self.device.launch(&random::RANDOM_BLOCKS, config, arguments)? };
            self.pack(&mut matrix, first_row, &staging)?;
        }
        Ok(matrix)
    }

    /// Room for a matrix: zeros, where no rows are written.
    fn unwritten(&self, format: Format, n_rows: usize, n_cols: usize, order: RowOrder) -> Result<Matrix> {
        ensure!(n_rows > 0 && n_cols > 0, "a matrix of {n_rows} x {n_cols} weights is empty");
        ensure!(
            n_cols.is_multiple_of(format.block_len()),
            "{} needs rows of a multiple of {} weights, found {n_cols}",
            format.name(),
            format.block_len()
        );
        check_order(order, n_rows)?;
        let n_units = n_cols.div_ceil(UNIT);
        let strip_quads = format.strip_quads(n_units);
        let geometry = Geometry {
            n_units,
            strip_quads,
            tile_bytes: format.tile_bytes(TILE_UNITS),
            last_tile_bytes: format.tile_bytes(strip_quads * n_units % TILE_UNITS),
        };
        let strip_rows = strip_quads * TILE_ROWS;
        let bytes = n_rows.div_ceil(strip_rows).checked_mul(geometry.strip_bytes());
        let bytes = bytes.context("the matrix is too large to address")?;
        let tiles = if n_rows.is_multiple_of(strip_rows) && format.block_len().is_multiple_of(UNIT) {
            self.device.alloc(bytes)?
        } else {
            self.device.alloc_zeroed(bytes)?
        };
        Ok(Matrix { format, n_rows, n_cols, order, geometry, tiles })
    }

    /// Room for rows in GGUF blocks.
    fn staging(&mut self, bytes: usize) -> Result<Buffer<u8>> {
        let staging = match &self.staging {
            Some(staging) if staging.len() >= bytes => staging,
            _ => self.staging.insert(self.device.alloc(bytes.max(STAGING_BYTES))?),
        };
        Ok(staging.part(0..bytes))
    }

    /// Packs rows of GGUF blocks to their places.
    fn pack(&self, matrix: &mut Matrix, first_row: usize, rows: &Buffer<u8>) -> Result<()> {
        let n_rows = rows.len() / matrix.format.row_bytes(matrix.n_cols);
        let arguments = (
            rows.as_ptr(),
            dim(first_row)?,
            dim(n_rows)?,
            dim(matrix.n_cols)?,
            matrix.tiles.as_mut_ptr(),
            matrix.order,
            matrix.format as u32,
            dim(matrix.geometry.tile_bytes)?,
            dim(matrix.geometry.last_tile_bytes)?,
            dim(matrix.geometry.strip_quads)?,
        );
        let threads = n_rows * matrix.geometry.n_units.div_ceil(TILE_UNITS);
        let config = launch_1d(threads.div_ceil(pack::BLOCK_DIM), pack::BLOCK_DIM)?;
        // SAFETY: the rows are whole and below the matrix's n_rows, which the tiles have room for.
        unsafe { self.device.launch(&pack::PACK, config, arguments) }
    }
}

/// Rows that go through the staging buffer together.
fn rows_at_once(row_bytes: usize) -> usize {
    (STAGING_BYTES / row_bytes).max(1)
}

/// The factors that give blocks of random bits weights of variance `1 / n_cols`, and of mean 0.
fn random_factors(format: Format, n_cols: usize) -> Result<[Factor; 2]> {
    // The place of each factor in the block, in bytes, and its value where the variance is 1: the reciprocal of the
    // standard deviation of what it is multiplied with, for integers that are uniform over their range.
    let (first, second) = match format {
        Format::Q8_0 => ((0, 1.0 / 73.9), (0, 1.0 / 73.9)),
        // The nibbles' mean is 7.5.
        Format::Q4_1 => ((0, 1.0 / 4.61), (2, -7.5 / 4.61)),
        Format::Q4_K => ((0, 1.0 / 258.0), (2, 7.5 / 258.0)),
        Format::Q6_K => ((208, 1.0 / 1365.0), (208, 1.0 / 1365.0)),
        Format::F16 | Format::F32 => bail!("random bits make no weights in {}", format.name()),
    };
    let factor = |(place, value): (u32, f64)| Factor {
        place: place / 2,
        bits: f16::from_f64(value / (n_cols as f64).sqrt()).to_bits().into(),
    };
    Ok([factor(first), factor(second)])
}

/// Refuses orders that would put rows on top of each other, or part of a pair into another quad.
fn check_order(order: RowOrder, n_rows: usize) -> Result<()> {
    let (group, n_rot) = (order.group as usize, order.n_rot as usize);
    if order.order == Order::Halves as u32 {
        ensure!(
            group > 0 && group.is_multiple_of(2) && n_rows == 2 * group,
            "{n_rows} rows are not two halves of {group}"
        );
    } else if order.order == Order::RotatedPairs as u32 {
        ensure!(
            group > 0 && n_rows.is_multiple_of(group) && n_rot.is_multiple_of(2) && n_rot <= group,
            "{n_rows} rows are not heads of {group}, of which {n_rot} are rotated in pairs"
        );
    }
    Ok(())
}
