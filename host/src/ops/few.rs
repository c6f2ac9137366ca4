//! Launchers of the products for a few tokens at once, on Q8_1 activations ([`gpu_kernels::gemv::few`]). The vectors are part
//! of [`Panels`](super::Panels), which says whether it holds these or panels.

use super::gemv::is_long;
use super::schedule::{Chain, Family, schedule};
use super::{Matrix, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result};
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use gpu_kernels::formats::UNIT;
use gpu_kernels::gemv::epilogue::{Add, Qkv, Store, Swiglu};
use gpu_kernels::gemv::few::{FEW_TOKENS, FewKernel, Vectors, kernel_for};
use gpu_kernels::many_output::{Output, OutputKind};
use gpu_kernels::quantize::{QUANTIZE_TOKENS, TOKEN_BLOCK_DIM};

/// Vectors of a few tokens in Q8_1: one after the other, each filled up to a whole block.
#[derive(Debug)]
pub(super) struct FewVectors {
    quants: Buffer<u32>,
    scales: Buffer<Q8_1Scale>,
}

impl FewVectors {
    /// Room for `n_tokens` vectors of `n_cols` values, or for as many as there can be.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn alloc(device: &Device, n_tokens: usize, n_cols: usize) -> Result<Self> {
        let blocks = n_tokens.min(FEW_TOKENS) * n_cols.div_ceil(Q8_1_BLOCK);
        Ok(Self { quants: device.alloc(blocks * Q8_1_BLOCK / 4)?, scales: device.alloc(blocks)? })
    }

    /// Whether there is room for so many.
    pub(super) fn has_room(&self, n_tokens: usize, n_cols: usize) -> bool {
        self.scales.len() >= n_tokens * n_cols.div_ceil(Q8_1_BLOCK)
    }

    /// Quantizes `n_tokens` vectors of `n_cols` values, for which there is room.
    ///
    /// # Safety
    /// `x` and `gamma` are as [`quantize_tokens`](gpu_kernels::quantize::quantize_tokens) asks for.
    ///
    /// # Errors
    /// When the launch fails.
    pub(super) unsafe fn pack(
        &mut self,
        device: &Device,
        (x, n_tokens, n_cols): (*const f32, usize, usize),
        (gamma, eps): (*const f32, f32),
    ) -> Result<()> {
        let config = launch_1d(n_tokens, TOKEN_BLOCK_DIM)?;
        let (quants, scales) = (self.quants.as_mut_ptr(), self.scales.as_mut_ptr());
        // SAFETY: the caller vouches for the input, and that there is room.
        unsafe { device.launch(&QUANTIZE_TOKENS, config, (x, gamma, dim(n_cols)?, eps, quants, scales)) }
    }

    /// The products of `matrices`, one below the other, with the vectors.
    ///
    /// # Safety
    /// There are so many vectors, of as many columns as the matrices have; `output` is as its fields say, for these tokens,
    /// and of kind `kind`, whose order the rows are in.
    ///
    /// # Errors
    /// When there is no kernel for the matrices together, or the launch fails.
    pub(super) unsafe fn multiply(
        &self,
        device: &Device,
        matrices: &[&Matrix],
        n_tokens: usize,
        kind: OutputKind,
        output: Output,
    ) -> Result<()> {
        let kernel = kernel(device, matrices).with_context(|| {
            let formats: Vec<&str> = matrices.iter().map(|matrix| matrix.format().name()).collect();
            let formats = formats.join(", ");
            format!("gemm: the vectors were packed for other matrices than {formats}, which have no kernel for them")
        })?;
        let family = Family::Few { n_tokens };
        let (schedule, config) = match kind {
            OutputKind::Store => schedule::<Store>(device, matrices, family, Chain::OTHER)?,
            OutputKind::Add => schedule::<Add>(device, matrices, family, Chain::OTHER)?,
            OutputKind::Swiglu => schedule::<Swiglu>(device, matrices, family, Chain::OTHER)?,
            OutputKind::Qkv => schedule::<Qkv>(device, matrices, family, Chain::QKV)?,
        };
        let vectors = Vectors {
            quants: self.quants.as_ptr(),
            scales: self.scales.as_ptr(),
            n_units: dim(matrices[0].n_cols().div_ceil(UNIT))?,
            n_tokens: dim(n_tokens)?,
        };
        // Where there are fewer than three, the schedule deals out none of the others.
        let matrix = |i: usize| matrices[i.min(matrices.len() - 1)].as_ref();
        let arguments = (matrix(0)?, matrix(1)?, matrix(2)?, vectors, schedule, output);
        // SAFETY: the matrices are whole by construction, the schedule covers them; the caller vouches for the rest.
        unsafe { device.launch(kernel, config, arguments) }
    }
}

/// The kernel for these matrices together, where there is one and their strips fit shared memory.
fn kernel(device: &Device, matrices: &[&Matrix]) -> Option<&'static FewKernel> {
    let fit = matrices.iter().all(|matrix| !is_long(device, matrix, FEW_TOKENS));
    kernel_for(matrices.iter().map(|matrix| matrix.format())).filter(|_| fit)
}

/// Whether matrices that read the same vectors have products for a few tokens at once on Q8_1 activations.
pub fn has_few_products(device: &Device, readers: &[&Matrix]) -> bool {
    kernel(device, readers).is_some()
}
