//! Where a model's tensors come from: a GGUF file, or chance.

use crate::config::{Preset, PresetTensor};
use crate::gguf::{GgmlType, Gguf};
use crate::ops::{Matrix, Packer};
use anyhow::{Context as _, Result, bail, ensure};
use gpu_kernels::formats::Format;
use gpu_kernels::rows::RowOrder;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::hash::{DefaultHasher, Hash, Hasher};

/// Goes into the rotation's frequencies, and is no weight on the device.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// What a matrix is, wherever it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MatrixShape {
    /// How its weights are stored.
    pub format: Format,
    /// Outputs.
    pub n_rows: usize,
    /// Inputs.
    pub n_cols: usize,
}

/// Tensors by GGUF's names.
pub(super) trait TensorSource {
    /// Whether there is such a tensor.
    fn has(&self, name: &str) -> bool;

    /// Bytes of all tensors that go to the device.
    fn n_bytes(&self) -> u64;

    /// Format and dimensions of a matrix.
    fn matrix_shape(&self, name: &str) -> Result<MatrixShape>;

    /// The rows of matrices of one format and width, one below the other, in device memory.
    fn matrix(&self, packer: &mut Packer, names: &[&str], order: RowOrder) -> Result<Matrix>;

    /// A vector's values.
    fn vector(&self, name: &str) -> Result<Vec<f32>>;

    /// The factors that divide the rotation's frequencies, where there are any (llama 3).
    fn rope_factors(&self) -> Result<Option<Vec<f32>>> {
        if self.has(ROPE_FACTORS) { self.vector(ROPE_FACTORS).map(Some) } else { Ok(None) }
    }
}

impl TensorSource for Gguf {
    fn has(&self, name: &str) -> bool {
        self.tensor_info(name).is_some()
    }

    fn n_bytes(&self) -> u64 {
        let uploaded = self.tensors().filter(|tensor| tensor.info.name != ROPE_FACTORS);
        uploaded.map(|tensor| tensor.info.n_bytes as u64).sum()
    }

    fn matrix_shape(&self, name: &str) -> Result<MatrixShape> {
        let info = self.tensor(name)?.info;
        let [n_cols, n_rows] = info.shape[..] else {
            bail!("tensor {name} has {} dimensions, a matrix has 2", info.shape.len())
        };
        let format = format_of(info.ggml_type);
        let format = format.with_context(|| format!("tensor {name}: no kernels for {}", info.ggml_type))?;
        Ok(MatrixShape { format, n_rows, n_cols })
    }

    fn matrix(&self, packer: &mut Packer, names: &[&str], order: RowOrder) -> Result<Matrix> {
        let shape = joined(self, names)?;
        let parts = names.iter().map(|name| Ok(self.tensor(name)?.data)).collect::<Result<Vec<_>>>()?;
        packer.matrix(shape.format, shape.n_rows, shape.n_cols, order, &parts)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let (chunks, _) = self.tensor(name)?.data.as_chunks::<4>();
        Ok(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// Random weights of a preset's shapes: a norm's factors are 1, biases up to 1, and a matrix leaves the length of a
/// vector about as it is.
impl TensorSource for Preset {
    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    fn n_bytes(&self) -> u64 {
        self.tensors().map(|(_, tensor)| tensor.n_bytes() as u64).sum()
    }

    fn matrix_shape(&self, name: &str) -> Result<MatrixShape> {
        match self.tensor(name) {
            Some(PresetTensor { format, shape }) if shape.len() == 2 => {
                Ok(MatrixShape { format, n_rows: shape[1], n_cols: shape[0] })
            }
            _ => bail!("{} has no matrix {name}", self.name),
        }
    }

    fn matrix(&self, packer: &mut Packer, names: &[&str], order: RowOrder) -> Result<Matrix> {
        let shape = joined(self, names)?;
        packer.random_matrix(shape.format, shape.n_rows, shape.n_cols, order, seed(names[0]) as u32)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensor(name).with_context(|| format!("{} has no tensor {name}", self.name))?;
        let mut rng = ChaCha8Rng::seed_from_u64(seed(name));
        let mut value = || match name.ends_with(".bias") {
            true => rng.next_u32() as i32 as f32 / (1u32 << 31) as f32,
            false => 1.0,
        };
        Ok((0..tensor.shape[0]).map(|_| value()).collect())
    }
}

/// The shape of matrices of one format and width, one below the other.
fn joined(source: &dyn TensorSource, names: &[&str]) -> Result<MatrixShape> {
    let mut joined = source.matrix_shape(names[0])?;
    for name in &names[1..] {
        let shape = source.matrix_shape(name)?;
        ensure!(
            (shape.format, shape.n_cols) == (joined.format, joined.n_cols),
            "{name} does not go below {}: {shape:?} and {joined:?}",
            names[0]
        );
        joined.n_rows += shape.n_rows;
    }
    Ok(joined)
}

/// Another number for each tensor.
fn seed(name: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// The kernels' format for a tensor type, by GGUF's name of both.
pub(crate) fn format_of(ggml_type: GgmlType) -> Option<Format> {
    Format::ALL.iter().copied().find(|format| format.name() == ggml_type.name())
}
