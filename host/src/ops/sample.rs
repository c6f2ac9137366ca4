//! The launchers of the choice of a token.

use super::{aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Result, ensure};
use cuda_std::warp::WARP_SIZE;
use gpu_kernels::formats::tile::TILE_ROWS;
use gpu_kernels::gemv::{MAX_QUADS, Shares};
use gpu_kernels::sample::{self as sample_kernel, CHUNK, Groups, MAX_GROUPS, SamplingParameters, WARPS};
use gpu_kernels::step::Step;

/// Most groups of logits on the CPU: a group takes some time there, however few logits it has.
const CPU_GROUPS: usize = 128;

/// Where the largest rank of each group of logits is left, for the choice of a token.
#[derive(Debug)]
pub struct SampleWorkspace {
    /// Most groups that logits are dealt out in, where that is not a product's business.
    most_groups: usize,
    /// `[MAX_GROUPS]`.
    largest: Buffer<u64>,
}

/// The largest ranks of some logits in groups, which the launches so far leave in a workspace.
#[derive(Debug)]
pub struct Ranks(Groups);

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
        const { assert!(MAX_GROUPS.is_multiple_of(2)) };
        // Ranks are read in pairs, of which the last one's second may be nobody's.
        Ok(Self { most_groups, largest: device.alloc_zeroed(MAX_GROUPS)? })
    }

    /// Groups of `n_vocab` logits, as few as may be and as suit a warp.
    fn deal(&mut self, n_vocab: usize) -> Groups {
        let mut shift = 0;
        while n_vocab.div_ceil(CHUNK << shift) > self.most_groups {
            shift += 1;
        }
        let shares = Shares {
            blocks: n_vocab.div_ceil(CHUNK << shift) as u32,
            strips: ((CHUNK / TILE_ROWS) << shift) as u32,
            blocks_with_more: 0,
        };
        Groups { largest: self.largest.as_mut_ptr(), shares, strip_quads: 1, shift }
    }

    /// The bands of a product's blocks, whose strips have so many quads, as groups; `None` where they are too many.
    pub(super) fn bands(&mut self, shares: Shares, strip_quads: u32) -> Option<Groups> {
        const { assert!(MAX_QUADS <= WARP_SIZE) };
        let groups = Groups { largest: self.largest.as_mut_ptr(), shares, strip_quads, shift: 0 };
        (shares.blocks as usize <= MAX_GROUPS).then_some(groups)
    }
}

impl Ranks {
    /// Those of groups whose largest ranks a launch leaves.
    pub(super) fn of(groups: Groups) -> Self {
        Self(groups)
    }
}

/// The largest ranks of `n_vocab` logits, dealt out in groups.
fn rank_groups(
    device: &Device,
    logits: &Buffer<f32>,
    n_vocab: usize,
    workspace: &mut SampleWorkspace,
) -> Result<Ranks> {
    let groups = workspace.deal(n_vocab);
    let config = launch_1d((groups.shares.blocks as usize).div_ceil(WARPS), sample_kernel::BLOCK_DIM)?;
    // SAFETY: the caller has checked the logits, and the workspace has room for the groups of any vocabulary.
    unsafe { device.launch(&sample_kernel::RANK_GROUPS, config, (logits.as_ptr(), dim(n_vocab)?, groups))? };
    Ok(Ranks(groups))
}

/// Chooses a token by its logit, `n_vocab` of them, into one of `n_places` places of `chosen`, number `position %
/// n_places`, and makes it the step's at the next position.
///
/// `ranks` are those of these logits where whoever made them has left some, in the workspace.
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
    ranks: Option<Ranks>,
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
    let Ranks(groups) = match ranks {
        Some(ranks) => ranks,
        None => rank_groups(device, logits, n_vocab, workspace)?,
    };
    let arguments = (
        logits.as_ptr(),
        dim(n_vocab)?,
        parameters.as_ptr(),
        groups,
        step.as_mut_ptr(),
        chosen.as_mut_ptr(),
        dim(n_places)?,
    );
    // SAFETY: the lengths are checked, and the groups' ranks have been left.
    unsafe { device.launch(&sample_kernel::SAMPLE, launch_1d(1, sample_kernel::BLOCK_DIM)?, arguments) }
}
