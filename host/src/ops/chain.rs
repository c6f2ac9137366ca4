//! The chain: the operations of a step as a list that one kernel goes through ([`gpu_kernels::chain`]).
//!
//! [`ChainBuilder`] has one safe function per operation, as the other launchers: it checks the shapes and adds a stage to
//! the list. [`Chain::run`] launches stages.

use super::gemv::pair_order;
use super::{AttentionShape, KvLayer, Matrix, Norm, QkvWeights, Rope, aligned, at_least, dim, launch_1d};
use crate::device::{Buffer, Device, Kept};
use anyhow::{Context as _, Result, ensure};
use bytemuck::Zeroable;
use cuda_std::launch::Kernel;
use gpu_kernels::activations::{Activations as _, F32Vector, Q8_1};
use gpu_kernels::chain::attention::{MAX_HEADS, MAX_SPLITS, combine_words, shared_words};
use gpu_kernels::chain::stage::{Heads, Kind, Part, Share, Stage};
use gpu_kernels::chain::vector::{Narrow, UNWRITTEN};
use gpu_kernels::chain::{self as kernel, Arguments, Layout};
use gpu_kernels::formats::{Format, UNIT};
use gpu_kernels::formats::tile::{TILE_ROWS, TILE_UNITS};
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::rows::{Order, RowOrder};
use gpu_kernels::step::Step;
use std::ops::Range;
use std::ptr;

/// A vector of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vector {
    /// The word of the set at which it starts.
    at: usize,
    len: usize,
    /// Whether two values share a word, as bfloat16.
    is_narrow: bool,
}

/// Queries, keys and values of a step.
#[derive(Clone, Copy, Debug)]
pub struct Qkv {
    /// One behind the other.
    all: Vector,
    heads: Heads,
}

impl Qkv {
    /// The queries: `[n_head, head_dim]`.
    pub fn queries(&self) -> Vector {
        Vector { len: (self.heads.n_head * self.heads.head_dim) as usize, ..self.all }
    }
}

/// The most bands that a block finishes on the CPU, where there can be any number of blocks.
const MOST_TURNS: usize = 1024;

/// Adds operations to a chain, in the order in which they run.
pub struct ChainBuilder<'d> {
    device: &'d Device,
    is_exact: bool,
    n_blocks: usize,
    n_warps: u32,
    stages: Vec<Stage>,
    /// Words that the vectors take so far.
    n_words: usize,
    /// Words of shared memory that a stage needs for itself.
    stage_words: usize,
    /// Bytes of the largest tile.
    largest_tile: usize,
    formats: Vec<Format>,
    /// Query heads that a block of attention takes.
    heads_per_block: usize,
    kept: Vec<Kept>,
}

impl<'d> ChainBuilder<'d> {
    /// A chain of no operations, on f32 or on Q8_1 activations, whose products have no more than `most_rows` rows.
    pub fn new(device: &'d Device, is_exact: bool, most_rows: usize) -> Self {
        let cores = device.multiprocessors() as usize;
        let (n_blocks, n_warps) = if device.is_cuda() {
            (cores, kernel::MAX_WARPS)
        } else {
            // The threads of a block take turns there: more of them only cost.
            (most_rows.div_ceil(TILE_ROWS).div_ceil(MOST_TURNS).next_multiple_of(cores), 4)
        };
        Self {
            device,
            is_exact,
            n_blocks,
            n_warps,
            stages: Vec::new(),
            n_words: 0,
            stage_words: 0,
            largest_tile: 0,
            formats: Vec::new(),
            heads_per_block: 1,
            kept: Vec::new(),
        }
    }

    /// A vector of `len` values. The first one is what [`embed_chain`](super::embed_chain) writes.
    pub fn vector(&mut self, len: usize) -> Vector {
        let at = self.n_words;
        self.n_words += len.next_multiple_of(4);
        Vector { at, len, is_narrow: false }
    }

    /// Operations so far.
    pub fn len(&self) -> usize {
        self.stages.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }

    /// Queries of a token, rotated; its keys, rotated, and values, which also go to the cache at the step's position.
    ///
    /// `rotation` is what [`embed_chain`](super::embed_chain) leaves for the step.
    ///
    /// # Errors
    /// When a shape does not fit the others.
    #[allow(clippy::too_many_arguments, reason = "each is one thing")]
    pub fn qkv(
        &mut self,
        weights: QkvWeights,
        x: Vector,
        norm: Norm,
        rope: &Rope,
        rotation: &Buffer<[f32; 2]>,
        shape: AttentionShape,
        cache: &mut KvLayer,
    ) -> Result<Qkv> {
        let heads = self.heads(weights, rope, rotation, shape, cache)?;
        let n_kv = cache.n_head_kv * cache.head_dim;
        let all = self.vector(shape.n_head * cache.head_dim + 2 * n_kv);
        let stage = self.product("qkv", Kind::Qkv, &weights.matrices, x, Some(norm))?;
        self.stages.push(Stage { output: dim(all.at)?, heads, ..stage });
        Ok(Qkv { all, heads })
    }

    /// Attention of the queries over the cache's positions up to the step's: `[n_head, head_dim]`.
    ///
    /// # Errors
    /// When a dimension does not fit 32 bits.
    pub fn attention(&mut self, qkv: Qkv) -> Result<Vector> {
        let mut heads = qkv.heads;
        let n_q = qkv.queries().len;
        let (n_splits, n_head) = (heads.n_splits as usize, heads.n_head as usize);
        let output = self.vector(n_q);
        let is_split = n_splits > 1;
        if is_split {
            heads.split_values = dim(self.vector(n_splits * n_q).at)?;
            heads.split_sums = dim(self.vector(n_splits * n_head * 4).at)?;
        }
        self.heads_per_block = heads.heads_per_block as usize;
        let n_warps = self.n_warps;
        let words = shared_words(n_warps, heads.heads_per_block, heads.head_dim);
        self.stage_words = self.stage_words.max(words.max(combine_words(32 * n_warps)) as usize);
        let stage = Stage {
            kind: Kind::Attention as u32,
            input: dim(qkv.all.at)?,
            output: dim(output.at)?,
            heads,
            ..Stage::zeroed()
        };
        self.stages.push(stage);
        if is_split {
            self.stages.push(Stage { kind: Kind::Combine as u32, ..stage });
        }
        Ok(output)
    }

    /// `residual + W x`.
    ///
    /// # Errors
    /// When a length does not fit the matrix or its rows are not in natural order.
    pub fn add(&mut self, weights: &Matrix, x: Vector, residual: Vector) -> Result<Vector> {
        natural("add", weights)?;
        ensure!(
            residual.len == weights.n_rows(),
            "add: {} products are added to {} values",
            weights.n_rows(),
            residual.len
        );
        let output = self.vector(weights.n_rows());
        let stage = self.product("add", Kind::Add, &[weights], x, None)?;
        self.stages.push(Stage { output: dim(output.at)?, residual: dim(residual.at)?, ..stage });
        Ok(output)
    }

    /// `silu(G x) * (U x)` of a matrix that has `G` above `U`, in [`Order::Halves`].
    ///
    /// # Errors
    /// When a length does not fit the matrix or its rows are in another order.
    pub fn swiglu(&mut self, gate_up: &Matrix, x: Vector, norm: Norm) -> Result<Vector> {
        ensure!(
            gate_up.order().order == Order::Halves as u32,
            "swiglu: gate and up must be one matrix in halves, found {:?}",
            gate_up.order()
        );
        let mut output = self.vector(gate_up.n_rows() / 2);
        // It is rounded to eight bits next.
        output.is_narrow = !self.is_exact;
        let stage = self.product("swiglu", Kind::Swiglu, &[gate_up], x, Some(norm))?;
        let output_is_narrow = output.is_narrow.into();
        self.stages.push(Stage { output: dim(output.at)?, output_is_narrow, ..stage });
        Ok(output)
    }

    /// `logits = W x`.
    ///
    /// # Errors
    /// When a length does not fit the matrix or its rows are not in natural order.
    pub fn logits(
        &mut self,
        weights: &Matrix,
        x: Vector,
        norm: Norm,
        logits: &mut Buffer<f32>,
    ) -> Result<()> {
        natural("logits", weights)?;
        at_least("logits", "logits", logits, weights.n_rows())?;
        self.kept.push(logits.keep());
        let stage = self.product("logits", Kind::Logits, &[weights], x, Some(norm))?;
        self.stages.push(Stage { logits: logits.as_mut_ptr(), ..stage });
        Ok(())
    }

    /// What queries, keys, values and attention have in common.
    fn heads(
        &mut self,
        weights: QkvWeights,
        rope: &Rope,
        rotation: &Buffer<[f32; 2]>,
        AttentionShape { n_head, scale }: AttentionShape,
        cache: &mut KvLayer,
    ) -> Result<Heads> {
        let (head_dim, n_head_kv) = (cache.head_dim, cache.n_head_kv);
        let n_rot = 2 * rope.frequencies.len();
        ensure!(n_rot <= head_dim, "qkv: {n_rot} values to rotate in heads of {head_dim}");
        ensure!(
            n_head > 0 && n_head.is_multiple_of(n_head_kv),
            "qkv: {n_head} query heads over {n_head_kv} key-value heads"
        );
        at_least("qkv", "rotation", rotation, n_rot / 2)?;
        let order = pair_order(rope.layout, head_dim, n_rot);
        let n_rows = [n_head, n_head_kv, n_head_kv].map(|n| n * head_dim);
        let names = ["q", "k", "v"];
        for (i, matrix) in weights.matrices.into_iter().enumerate() {
            let name = names[i];
            ensure!(
                matrix.n_rows() == n_rows[i] && matrix.n_cols() == weights.matrices[0].n_cols(),
                "qkv: {name} is {} x {}, for {} rows and {} columns",
                matrix.n_rows(),
                matrix.n_cols(),
                n_rows[i],
                weights.matrices[0].n_cols()
            );
            let order = if i < 2 { order } else { RowOrder::NATURAL };
            ensure!(matrix.order() == order, "qkv: {name} is in {:?}, not {order:?}", matrix.order());
            if let Some(bias) = weights.biases[i] {
                at_least("qkv", "bias", bias, n_rows[i])?;
                self.kept.push(bias.keep());
            }
        }
        self.kept.extend([cache.k.keep(), cache.v.keep(), rotation.keep()]);

        let heads_per_kv = n_head / n_head_kv;
        let blocks_per_kv = heads_per_kv.div_ceil(MAX_HEADS);
        // On the CPU the heads are blocks enough.
        let n_splits = match self.device.is_cuda() {
            true => (self.n_blocks / (n_head_kv * blocks_per_kv)).clamp(1, MAX_SPLITS),
            false => 1,
        };
        Ok(Heads {
            k_cache: cache.k.as_mut_ptr(),
            v_cache: cache.v.as_mut_ptr(),
            bias: weights.biases.map(|bias| bias.map_or(ptr::null(), |bias| bias.as_ptr())),
            rotation: rotation.as_ptr(),
            n_head: dim(n_head)?,
            n_head_kv: dim(n_head_kv)?,
            head_dim: dim(head_dim)?,
            per_head_dim: Heads::reciprocal(dim(head_dim)?),
            n_ctx: dim(cache.n_ctx)?,
            n_rot: dim(n_rot)?,
            pair_distance: match rope.layout {
                RopeLayout::Interleaved => 1,
                RopeLayout::HalfSplit => dim(n_rot / 2)?,
            },
            blocks_per_kv: dim(blocks_per_kv)?,
            heads_per_block: dim(heads_per_kv.div_ceil(blocks_per_kv))?,
            lanes: dim((head_dim / 8).next_power_of_two().max(8))?,
            chunk: 0,
            reserved: 0,
            n_splits: dim(n_splits)?,
            scale,
            split_values: 0,
            split_sums: 0,
        })
    }

    /// A stage that multiplies matrices, one below the other, with a vector.
    fn product(
        &mut self,
        operation: &str,
        kind: Kind,
        matrices: &[&Matrix],
        x: Vector,
        norm: Option<Norm>,
    ) -> Result<Stage> {
        let n_cols = matrices[0].n_cols();
        ensure!(
            x.len == n_cols,
            "{operation}: the matrix is {} x {n_cols}, the vector has {} values",
            matrices[0].n_rows(),
            x.len
        );
        let n_tiles = n_cols.div_ceil(UNIT).div_ceil(TILE_UNITS);
        let unit_words = if self.is_exact { F32Vector::UNIT_WORDS } else { Q8_1::UNIT_WORDS };
        self.stage_words = self.stage_words.max(n_tiles * TILE_UNITS * unit_words);
        let mut parts = [Part::NONE; 3];
        for (part, matrix) in parts.iter_mut().zip(matrices) {
            *part = matrix.as_part()?;
            self.formats.push(matrix.format());
            self.largest_tile = self.largest_tile.max(matrix.largest_tile());
            self.kept.push(matrix.keep());
        }
        let n_bands: usize = matrices.iter().map(|matrix| matrix.n_bands()).sum();
        let mut stage = Stage {
            kind: kind as u32,
            n: dim(n_cols)?,
            per_n: 1.0 / n_cols as f32,
            input: dim(x.at)?,
            input_is_narrow: x.is_narrow.into(),
            turns: dim(n_bands / self.n_blocks)?,
            blocks_with_more: dim(n_bands % self.n_blocks)?,
            n_tiles: dim(n_tiles)?,
            reserved: std::env::var("MODE").ok().and_then(|m| m.parse().ok()).unwrap_or(0),
            per_n_tiles: Stage::reciprocal(dim(n_tiles)?),
            parts,
            ..Stage::zeroed()
        };
        if let Some(norm) = norm {
            ensure!(
                norm.gamma.len() == n_cols,
                "{operation}: gamma has {} values, the vector {n_cols}",
                norm.gamma.len()
            );
            aligned(operation, "gamma", norm.gamma, n_cols)?;
            self.kept.push(norm.gamma.keep());
            (stage.gamma, stage.eps) = (norm.gamma.as_ptr(), norm.eps);
        }
        Ok(stage)
    }

    /// The chain.
    ///
    /// # Errors
    /// When the vectors do not fit shared memory beside two tiles for each warp, or the device has no room.
    pub fn build(self) -> Result<Chain> {
        let whole = self.device.shared_bytes();
        let turns = |stage: &Stage| stage.turns + u32::from(stage.blocks_with_more > 0);
        let turns = self.stages.iter().map(turns).max().context("the chain has no operation")?;
        let (kernel, most_warps) = kernel::kernel_for(self.is_exact, &self.formats, self.heads_per_block);
        let stage_words = dim(self.stage_words.next_multiple_of(4))?;
        // Places are as large as the largest tile; a key and a value of a position must fit as well.
        let row_bytes = |stage: &Stage| 4 * stage.heads.head_dim as usize;
        let largest_row = self.stages.iter().map(row_bytes).max().unwrap_or(0);
        let place_bytes = self.largest_tile.max(largest_row);
        let place_words = dim(place_bytes / 4)?;
        let fewer = [12, 8, 4, 2, 1].into_iter().filter(|&n| n <= self.n_warps.min(most_warps));
        let layout = { fewer }.find_map(|n_warps| {
            let mut layout = Layout { n_warps, stage_words, turns, places: 0, place_words };
            let fits = |places: &u32| {
                layout.places = *places;
                4 * layout.starts()[4] <= whole
            };
            // Two pieces are read at a time. Copies ahead of their time only cost on the CPU, where the warp must have met
            // between a copy's start and its reads, though.
            let mut places = if self.device.is_cuda() { 2..=32 } else { 4..=4 };
            layout.places = places.rfind(fits)?;
            Some(layout)
        });
        let layout = layout.with_context(|| {
            format!(
                "{whole} bytes of shared memory do not hold two pieces of {place_bytes} bytes for a warp beside a vector of {} bytes and the \
                 sums of {turns} bands",
                4 * stage_words
            )
        })?;
        let mut stages = self.stages;
        for stage in stages.iter_mut().filter(|stage| stage.n_tiles > 0) {
            let share = |turns: u32| Share::new(turns * stage.n_tiles, layout.n_warps);
            stage.shares = [share(stage.turns), share(stage.turns + 1)];
        }
        for stage in stages.iter_mut().filter(|stage| stage.heads.head_dim > 0) {
            stage.heads.chunk = 1 << (place_bytes / row_bytes(stage)).ilog2().min(3);
        }
        let mut chain = Chain {
            kernel,
            list: self.device.alloc_from(&stages)?,
            sets: self.device.alloc(2 * self.n_words)?,
            set_words: self.n_words,
            n_blocks: self.n_blocks,
            layout,
            _kept: self.kept,
        };
        chain.clear(self.device)?;
        Ok(chain)
    }
}

/// Refuses rows in another order than the file's.
fn natural(operation: &str, weights: &Matrix) -> Result<()> {
    let order = weights.order();
    ensure!(order == RowOrder::NATURAL, "{operation}: the rows must be in natural order, found {order:?}");
    Ok(())
}

/// The operations of a step, in device memory.
pub struct Chain {
    kernel: &'static Kernel<(Arguments,)>,
    list: Buffer<Stage>,
    /// Two sets of vectors, which steps use in turns.
    pub(super) sets: Buffer<f32>,
    pub(super) set_words: usize,
    n_blocks: usize,
    layout: Layout,
    /// What the list points to.
    _kept: Vec<Kept>,
}

impl Chain {
    /// Makes all vectors unwritten, as they were in the beginning.
    ///
    /// # Errors
    /// When the device fails.
    pub fn clear(&mut self, device: &Device) -> Result<()> {
        const { assert!(UNWRITTEN == u32::from_ne_bytes([0xff; 4])) };
        device.fill(&mut self.sets, 0xff)
    }

    /// Operations in the chain.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Blocks that go through the list.
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// The values of a vector of the set that a step uses, 0 or 1.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When the vector is not one of the chain.
    pub fn values(&self, device: &Device, vector: Vector, set: u32) -> Result<Buffer<f32>> {
        let start = set as usize * self.set_words + vector.at;
        let values = self.sets.part(start..start + vector.len);
        if !vector.is_narrow {
            return Ok(values);
        }
        let words = device.to_vec(&values)?;
        let pairs = words.chunks_exact(2).take(vector.len.div_ceil(4));
        let values = pairs.flat_map(|pair| Narrow::widen4([pair[0].to_bits(), pair[1].to_bits()]));
        device.alloc_from(&values.take(vector.len).collect::<Vec<f32>>())
    }

    /// Runs operations: on a GPU in one launch, on the CPU in one for each.
    ///
    /// In one step each operation runs once, in order, after [`embed_chain`](super::embed_chain); where a launch runs
    /// several, those before have run. `times` gets nanoseconds at which each block started each operation, and ended the
    /// last one: `[operations + 1, n_blocks]`.
    ///
    /// # Errors
    /// When `times` is too short or the launch fails.
    ///
    /// # Panics
    /// When the range is not inside the chain.
    pub fn run(
        &mut self,
        device: &Device,
        step: &Buffer<Step>,
        operations: Range<usize>,
        times: Option<&mut Buffer<u64>>,
    ) -> Result<()> {
        assert!(operations.start <= operations.end && operations.end <= self.len(), "operations {operations:?}");
        at_least("chain", "step", step, 1)?;
        let mut arguments = Arguments {
            stages: self.list.as_ptr(),
            first: dim(operations.start)?,
            end: dim(operations.end)?,
            step: step.as_ptr(),
            vectors: self.sets.as_mut_ptr(),
            set_words: dim(self.set_words)?,
            times: ptr::null_mut(),
            layout: self.layout,
        };
        if let Some(times) = times {
            at_least("chain", "times", times, (operations.len() + 1) * self.n_blocks * 8)?;
            arguments.times = times.as_mut_ptr();
        }
        let mut config = launch_1d(self.n_blocks, 32 * self.layout.n_warps as usize)?;
        config.dynamic_shared_bytes = 4 * self.layout.starts()[4];
        if device.is_cuda() {
            // More than half of a multiprocessor's: its blocks are one on each.
            config.dynamic_shared_bytes = config.dynamic_shared_bytes.max(device.shared_bytes() / 2 + 1024);
        }
        let at_once = if device.is_cuda() { operations.len() } else { 1 };
        for first in operations.step_by(at_once.max(1)) {
            (arguments.first, arguments.end) = (dim(first)?, dim(first + at_once)?);
            // SAFETY: the stages are whole by construction, and what they point to is kept; the order is the caller's, and
            // on a GPU there are as many blocks as multiprocessors.
            unsafe { device.launch(self.kernel, config, (arguments,))? };
            if !arguments.times.is_null() {
                arguments.times = arguments.times.wrapping_add(self.n_blocks);
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Chain of {} operations in {} blocks, {:?}", self.len(), self.n_blocks, self.layout)
    }
}
