//! The launcher of the choice of a token.

use super::{aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use gpu_kernels::sample::{self as sample_kernel, CHUNK, Groups, MAX_GROUPS, SamplingParameters, WARPS};
use gpu_kernels::step::Step;

/// Most groups of logits on the CPU: a group takes some time there, however few logits it has.
const CPU_GROUPS: usize = 128;

/// What blocks that look for the most likely tokens leave for the last of them, and how many there are.
#[derive(Debug)]
pub struct SampleWorkspace {
    /// Most groups that logits are dealt out in.
    most_groups: usize,
    /// `[MAX_GROUPS]`.
    largest: Buffer<u64>,
    /// `[1]`, 0 between launches.
    n_ended: Buffer<u32>,
}

impl SampleWorkspace {
    /// For as many groups of logits as suit the device.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device) -> Result<Self> {
        Self::with_groups(device, if device.is_cuda() { MAX_GROUPS } else { CPU_GROUPS })
    }

    /// For at most so many groups of logits.
    ///
    /// # Errors
    /// When these are not from 1 to [`MAX_GROUPS`], or the device has no room.
    pub fn with_groups(device: &Device, most_groups: usize) -> Result<Self> {
        ensure!(
            (1..=MAX_GROUPS).contains(&most_groups),
            "sample: logits are dealt out in 1 to {MAX_GROUPS} groups, found {most_groups}"
        );
        Ok(Self { most_groups, largest: device.alloc(MAX_GROUPS)?, n_ended: device.alloc_zeroed(1)? })
    }

    /// How often a group's size is doubled for `n_vocab` logits, and how many blocks there are.
    fn deal(&self, n_vocab: usize) -> (u32, usize) {
        let mut shift = 0;
        while n_vocab.div_ceil(CHUNK << shift) > self.most_groups {
            shift += 1;
        }
        (shift, n_vocab.div_ceil(CHUNK << shift).div_ceil(WARPS))
    }
}

/// Chooses a token by its logit, `n_vocab` of them, into one of `n_places` places of `chosen`, number `position %
/// n_places`, and makes it the step's at the next position.
///
/// Where no logit is a number above -inf it chooses [`NO_TOKEN`](sample_kernel::NO_TOKEN), and the step's token is 0.
///
/// # Errors
/// When there are no tokens or more than [`MAX_VOCAB`](sample_kernel::MAX_VOCAB), a buffer is too short, or the launch
/// fails.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn sample(
    device: &Device,
    logits: &Buffer<f32>,
    n_vocab: usize,
    parameters: &Buffer<SamplingParameters>,
    workspace: &mut SampleWorkspace,
    step: &mut Buffer<Step>,
    chosen: &mut Buffer<u32>,
    n_places: usize,
) -> Result<()> {
    ensure!(n_places > 0, "sample: there is no place for what is chosen");
    ensure!(
        (1..=sample_kernel::MAX_VOCAB).contains(&n_vocab),
        "sample: a vocabulary of {n_vocab} tokens, 1 to {} are possible",
        sample_kernel::MAX_VOCAB
    );
    aligned("sample", "logits", logits, n_vocab.max(4))?;
    at_least("sample", "parameters", parameters, 1)?;
    at_least("sample", "step", step, 1)?;
    at_least("sample", "chosen", chosen, n_places)?;
    let (shift, n_blocks) = workspace.deal(n_vocab);
    let groups =
        Groups { largest: workspace.largest.as_mut_ptr(), n_ended: workspace.n_ended.as_mut_ptr(), shift };
    let arguments = (
        logits.as_ptr(),
        dim(n_vocab)?,
        parameters.as_ptr(),
        groups,
        step.as_mut_ptr(),
        chosen.as_mut_ptr(),
        dim(n_places)?,
    );
    // SAFETY: the lengths are checked, and the workspace has room for the groups of any vocabulary.
    unsafe {
        device.launch(&sample_kernel::SAMPLE, launch_1d(n_blocks, sample_kernel::BLOCK_DIM)?, arguments)
    }
}
