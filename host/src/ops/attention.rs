//! Launchers of the operations on heads: rotation, the KV cache, attention.

use super::{Chunk, KvLayer, KvView, Next, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device};
use anyhow::{Context as _, Result, ensure};
use cuda_std::launch::LaunchConfig;
use cuda_std::tensor::PANEL_DEPTH;
use gpu_kernels::attention::MAX_SPLITS;
use gpu_kernels::prefill_attention::{self as prefill_kernel, MAX_WARPS, WARP_TOKENS};
use gpu_kernels::step::Step;
use gpu_kernels::{attention as attention_kernel, kv_cache, rope as rope_kernel};

/// The shape of an attention operation over a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of the cache's heads (GQA).
    pub n_head: usize,
    /// The factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Of one query token: positions up to its own, counted back from it, that the launches just before write. Attention looks
    /// at those before them while it waits for these launches.
    pub n_fresh: usize,
}

/// Rotates `n_head` heads of `head_dim` values in place, by the step's position.
///
/// # Errors
/// When a buffer is too short, there are more frequencies than pairs in a head, or the launch fails.
pub fn rope(
    device: &Device,
    x: &mut Buffer<f32>,
    rope: &Rope,
    step: &Buffer<Step>,
    n_head: usize,
    head_dim: usize,
) -> Result<()> {
    let pairs = rope.frequencies.len();
    ensure!(
        pairs > 0 && 2 * pairs <= head_dim,
        "rope: {pairs} pairs to rotate in heads of {head_dim} values"
    );
    at_least("rope", "x", x, n_head * head_dim)?;
    at_least("rope", "step", step, 1)?;
    let config = launch_1d((n_head * pairs).div_ceil(rope_kernel::BLOCK_DIM), rope_kernel::BLOCK_DIM)?;
    let arguments = (
        x.as_mut_ptr(),
        rope.frequencies.as_ptr(),
        step.as_ptr(),
        dim(n_head)?,
        dim(head_dim)?,
        dim(2 * pairs)?,
        rope.layout as u32,
        rope.magnitude,
    );
    // SAFETY: the lengths are checked.
    unsafe { device.launch(&rope_kernel::ROPE, config, arguments) }
}

/// Writes a token's keys and values, `[n_head_kv, head_dim]` each, into the cache at the step's position.
///
/// The position is in device memory: whoever writes it keeps it below the cache's `n_ctx`.
///
/// # Errors
/// When a buffer is too short or the launch fails.
pub fn kv_append(
    device: &Device,
    k: &Buffer<f32>,
    v: &Buffer<f32>,
    cache: &mut KvLayer,
    step: &Buffer<Step>,
) -> Result<()> {
    let n = cache.n_head_kv * cache.head_dim;
    at_least("kv_append", "k", k, n)?;
    at_least("kv_append", "v", v, n)?;
    at_least("kv_append", "step", step, 1)?;
    let arguments = (
        k.as_ptr(),
        v.as_ptr(),
        cache.k.as_mut_ptr(),
        cache.v.as_mut_ptr(),
        step.as_ptr(),
        dim(cache.n_head_kv)?,
        dim(cache.head_dim)?,
        dim(cache.n_ctx)?,
    );
    let config = launch_1d(n.div_ceil(kv_cache::BLOCK_DIM), kv_cache::BLOCK_DIM)?;
    // SAFETY: the lengths are checked, the cache is whole by construction, and the position is below n_ctx.
    unsafe { device.launch(&kv_cache::KV_APPEND, config, arguments) }
}

/// Kinds of contexts: one block has room for the shortest, and clusters of two, four and eight for others; the longest are shared by as many
/// as there can be.
pub const CONTEXT_KINDS: usize = attention_kernel::MAX_CLUSTER.ilog2() as usize + 2;

/// What blocks that share a context leave for the last of them, and how many there are.
#[derive(Debug)]
pub struct AttentionWorkspace {
    n_head: usize,
    n_head_kv: usize,
    /// Query heads that a block takes, and blocks that those of a key-value head go to.
    heads: usize,
    blocks_per_kv: usize,
    /// Most blocks that share a context.
    n_splits: usize,
    /// Which of the [`CONTEXT_KINDS`] it is for.
    kind: usize,
    /// Whether there is room for a cluster of each kind, once it was asked: that takes longer than a launch.
    has_room: [Option<bool>; CONTEXT_KINDS],
    rehearsals: u32,
    /// `[n_splits, n_head, head_dim]`.
    values: Buffer<f32>,
    /// `[n_splits, n_head, 2]`.
    sums: Buffer<f32>,
    /// One per row of the grid, 0 between launches.
    n_ended: Buffer<u32>,
}

impl AttentionWorkspace {
    /// Room for as many blocks as keep the device busy, for a short context at first.
    ///
    /// # Errors
    /// As [`with_splits`](Self::with_splits).
    pub fn alloc(device: &Device, n_head: usize, n_head_kv: usize, head_dim: usize) -> Result<Self> {
        // One block fits on a multiprocessor. On the CPU the heads are blocks enough.
        let wanted = if device.is_cuda() { device.multiprocessors() as usize } else { 0 };
        Self::new(device, n_head, n_head_kv, head_dim, |n_rows| (wanted / n_rows).clamp(1, MAX_SPLITS))
    }

    /// Room for `n_splits` blocks to share a context.
    ///
    /// # Errors
    /// When `n_head` is not a multiple of `n_head_kv`, `n_splits` is not from 1 to [`MAX_SPLITS`], or the device has no room.
    pub fn with_splits(
        device: &Device,
        n_head: usize,
        n_head_kv: usize,
        head_dim: usize,
        n_splits: usize,
    ) -> Result<Self> {
        ensure!(
            (1..=MAX_SPLITS).contains(&n_splits),
            "attention: a context is shared by 1 to {MAX_SPLITS} blocks, found {n_splits}"
        );
        Self::new(device, n_head, n_head_kv, head_dim, |_| n_splits)
    }

    /// With as many splits as `n_splits` says for a number of rows of the grid.
    fn new(
        device: &Device,
        n_head: usize,
        n_head_kv: usize,
        head_dim: usize,
        n_splits: impl Fn(usize) -> usize,
    ) -> Result<Self> {
        let pieces = head_dim.div_ceil(attention_kernel::PIECE).next_power_of_two();
        let most_heads = (attention_kernel::MAX_PIECES / pieces).clamp(1, attention_kernel::MAX_HEADS);
        let (blocks_per_kv, heads) = deal_heads(n_head, n_head_kv, most_heads)?;
        let n_splits = n_splits(n_head_kv * blocks_per_kv);
        Ok(Self {
            n_head,
            n_head_kv,
            heads,
            blocks_per_kv,
            n_splits,
            kind: 0,
            has_room: [None; CONTEXT_KINDS],
            // Kernels that do not overlap have nothing to wait for.
            rehearsals: u32::from(device.overlaps_kernels()),
            values: device.alloc(n_splits * n_head * head_dim)?,
            sums: device.alloc(n_splits * n_head * 2)?,
            n_ended: device.alloc_zeroed(n_head_kv * blocks_per_kv)?,
        })
    }

    /// Which of the [`CONTEXT_KINDS`] a context of `length` positions is: attention is dealt out in a way of its own for each.
    pub fn kind_of(length: usize) -> usize {
        let blocks = length.div_ceil(attention_kernel::SPLIT_POSITIONS as usize).max(1);
        (blocks.next_power_of_two().ilog2() as usize).min(CONTEXT_KINDS - 1)
    }

    /// From now on it is for a context of about `length` positions, which bears on speed alone.
    pub fn suit(&mut self, length: usize) {
        self.kind = Self::kind_of(length);
    }

    /// From now on a block goes through its work so many times before it counts, which bears on speed alone.
    pub fn rehearse(&mut self, times: u32) {
        self.rehearsals = times;
    }
}

/// Into how many blocks the query heads of a key-value head go, and how many each takes: at most `most`.
fn deal_heads(n_head: usize, n_head_kv: usize, most: usize) -> Result<(usize, usize)> {
    ensure!(
        n_head > 0 && n_head_kv > 0 && n_head.is_multiple_of(n_head_kv),
        "attention: {n_head} query heads over {n_head_kv} key-value heads"
    );
    let heads_per_kv = n_head / n_head_kv;
    let blocks = heads_per_kv.div_ceil(most);
    Ok((blocks, heads_per_kv.div_ceil(blocks)))
}

/// Attention of one query token, `[n_head, head_dim]`, over the cache's positions up to the step's; and the same as the next
/// product reads it.
///
/// # Errors
/// When `n_head` is not a multiple of the cache's heads, a buffer is too short, the workspace is of another shape, or the
/// launch fails.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn attention<'a>(
    device: &Device,
    q: &Buffer<f32>,
    cache: impl Into<KvView<'a>>,
    step: &Buffer<Step>,
    shape: AttentionShape,
    workspace: &mut AttentionWorkspace,
    out: &mut Buffer<f32>,
    next: Option<Next>,
) -> Result<()> {
    let (cache, AttentionShape { n_head, scale, n_fresh }) = (cache.into(), shape);
    ensure!(
        (n_head, cache.n_head_kv) == (workspace.n_head, workspace.n_head_kv),
        "attention: {n_head} query heads over {} key-value heads, the workspace is for {} over {}",
        cache.n_head_kv,
        workspace.n_head,
        workspace.n_head_kv
    );
    let (heads, blocks_per_kv) = (workspace.heads, workspace.blocks_per_kv);
    let n_splits = if workspace.kind + 1 == CONTEXT_KINDS {
        workspace.n_splits
    } else {
        workspace.n_splits.min(1 << workspace.kind)
    };
    let n_rows = cache.n_head_kv * blocks_per_kv;
    at_least("attention", "q", q, n_head * cache.head_dim)?;
    at_least("attention", "out", out, n_head * cache.head_dim)?;
    at_least("attention", "step", step, 1)?;
    at_least("attention", "workspace.values", &workspace.values, n_splits * n_head * cache.head_dim)?;
    at_least("attention", "workspace.sums", &workspace.sums, n_splits * n_head * 2)?;
    at_least("attention", "workspace.n_ended", &workspace.n_ended, n_rows)?;
    let is_plain = next.as_ref().is_none_or(|next| next.gamma.is_none());
    ensure!(is_plain, "attention: its result is not normalised");
    let operand = Next::of_launch(next, "attention", n_head * cache.head_dim, n_splits * n_rows)?;
    let arguments = attention_kernel::Arguments {
        q: q.as_ptr(),
        k_cache: cache.k,
        v_cache: cache.v,
        out: out.as_mut_ptr(),
        operand,
        step: step.as_ptr(),
        split_values: workspace.values.as_mut_ptr(),
        split_sums: workspace.sums.as_mut_ptr(),
        n_ended: workspace.n_ended.as_mut_ptr(),
        n_head: dim(n_head)?,
        heads_per_kv: dim(n_head / cache.n_head_kv)?,
        blocks_per_kv: dim(blocks_per_kv)?,
        heads: dim(heads)?,
        head_dim: dim(cache.head_dim)?,
        n_ctx: dim(cache.n_ctx)?,
        n_splits: dim(n_splits)?,
        n_fresh: dim(n_fresh)?,
        rehearsals: workspace.rehearsals,
        scale,
    };
    let mut config = launch_1d(n_splits, attention_kernel::BLOCK_DIM)?;
    config.grid[1] = dim(n_rows)?;
    let kernel = |in_cluster| attention_kernel::kernel_for(cache.head_dim, cache.format, in_cluster);
    if n_splits > 1 && n_splits <= attention_kernel::MAX_CLUSTER {
        let dynamic_shared_bytes = dim(4 * attention_kernel::mail_words(n_splits, heads, cache.head_dim))?;
        let config = LaunchConfig { cluster: dim(n_splits)?, dynamic_shared_bytes, ..config };
        let has_room = match workspace.has_room[workspace.kind] {
            Some(has_room) => has_room,
            None => device.has_room_for_cluster(kernel(true), config)?,
        };
        workspace.has_room[workspace.kind] = Some(has_room);
        if has_room {
            // SAFETY: the lengths are checked, the cache is whole by construction, and its positions are written; a row is a cluster,
            // with room for its mail.
            return unsafe { device.launch(kernel(true), config, (arguments,)) };
        }
    }
    // SAFETY: as above.
    unsafe { device.launch(kernel(false), config, (arguments,)) }
}

/// Attention of a chunk's tokens, `[n_tokens, n_head, head_dim]`, over the cache: each sees the positions up to its own. The
/// chunk's keys and values are in the cache already. Queries, and the weights of the values, are rounded to f16.
///
/// # Errors
/// When `n_head` is not a multiple of the cache's heads, the scores' factor is not above 0, the chunk does not
/// fit the cache, a buffer is too short, or the
/// launch fails.
pub fn prefill_attention<'a>(
    device: &Device,
    q: &Buffer<f32>,
    cache: impl Into<KvView<'a>>,
    chunk: Chunk,
    shape: AttentionShape,
    out: &mut Buffer<f32>,
) -> Result<()> {
    let (AttentionShape { n_head, scale, .. }, Chunk { position, n_tokens }) = (shape, chunk);
    let cache = cache.into();
    let head_dim = cache.head_dim;
    deal_heads(n_head, cache.n_head_kv, attention_kernel::MAX_HEADS)?;
    ensure!(n_tokens > 0, "prefill_attention: there are no tokens");
    ensure!(
        scale.is_finite() && scale > 0.0,
        "prefill_attention: the scores' factor must be a number above 0, found {scale}"
    );
    ensure!(
        position + n_tokens <= cache.n_ctx,
        "prefill_attention: {n_tokens} tokens from position {position} on, the cache has room for {}",
        cache.n_ctx
    );
    aligned("prefill_attention", "q", q, n_tokens * n_head * head_dim)?;
    aligned("prefill_attention", "out", out, n_tokens * n_head * head_dim)?;
    let panels = head_dim.div_ceil(PANEL_DEPTH);
    let bytes = |(warps, splits, stages)| 4 * prefill_kernel::shared_words(warps, panels, splits, stages);
    let room = device.shared_bytes() as usize;
    // Where there are fewer blocks than multiprocessors, two groups of warps share the tokens. Rather the next tile on its
    // way than more warps.
    let half = MAX_WARPS / 2;
    let is_few = n_tokens.div_ceil(MAX_WARPS * WARP_TOKENS) * n_head < device.multiprocessors() as usize;
    let first = if is_few { (MAX_WARPS, 2, 2) } else { (MAX_WARPS, 1, 2) };
    let choices = [first, (half, 1, 2), (half, 1, 1)];
    let choice = choices.into_iter().find(|&choice| bytes(choice) <= room);
    let (warps, splits, stages) = choice.with_context(|| {
        format!("prefill_attention: {room} bytes of shared memory hold no heads of {head_dim}")
    })?;
    let block_tokens = warps / splits * WARP_TOKENS;
    let arguments = prefill_kernel::Arguments {
        q: q.as_ptr(),
        k_cache: cache.k,
        v_cache: cache.v,
        out: out.as_mut_ptr(),
        position: dim(position)?,
        n_tokens: dim(n_tokens)?,
        n_head: dim(n_head)?,
        heads_per_kv: dim(n_head / cache.n_head_kv)?,
        head_dim: dim(head_dim)?,
        n_ctx: dim(cache.n_ctx)?,
        splits: splits as u32,
        stages: stages as u32,
        scale,
    };
    let mut config = launch_1d(n_tokens.div_ceil(block_tokens), 32 * warps)?;
    config.grid[1] = dim(n_head)?;
    config.dynamic_shared_bytes = bytes((warps, splits, stages)) as u32;
    // SAFETY: the lengths are checked, the cache is whole by construction, and its positions are written.
    unsafe { device.launch(prefill_kernel::kernel_for(panels, cache.format), config, (arguments,)) }
}
