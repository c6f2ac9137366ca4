//! All layers of a small model in one launch ([`gpu_kernels::layers`]).

use super::{KvLayer, Matrix, Next, QkvWeights, Rope, aligned, at_least, dim, gemv};
use crate::device::{Buffer, Device};
use anyhow::{Result, bail, ensure};
use cuda_std::launch::{Kernel, LaunchConfig};
use gpu_kernels::attention::HEAD_DIM_STEP;
use gpu_kernels::formats::UNIT;
use gpu_kernels::formats::tile::TILE_ROWS;
use gpu_kernels::layers::{self as kernel, Arguments, LayerRef, Layout, MAX_HEADS, Shape};
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::rows::Order;
use gpu_kernels::step::Step;

/// The weights of a layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a> {
    /// `[n_embd]`.
    pub attn_norm: &'a Buffer<f32>,
    /// Queries, keys and values.
    pub qkv: QkvWeights<'a>,
    /// `[n_embd, n_head * head_dim]`.
    pub attn_output: &'a Matrix,
    /// `[n_embd]`.
    pub ffn_norm: &'a Buffer<f32>,
    /// Gate above up, in [`Order::Halves`]: `[2 * n_ff, n_embd]`.
    pub gate_up: &'a Matrix,
    /// `[n_embd, n_ff]`.
    pub down: &'a Matrix,
}

/// Layers with their caches that one launch can go through.
#[derive(Debug)]
pub struct Layers {
    kernel: &'static Kernel<(Arguments,)>,
    config: LaunchConfig,
    shape: Shape,
    layout: Layout,
    layers: Buffer<LayerRef>,
}

impl Layers {
    /// Those of a model, each with its cache; `None` where they have to go kernel by kernel: their format has no kernel, a share of
    /// one does not fit a block's shared memory, the GPU has no clusters, or they have something that the kernel does not take.
    ///
    /// # Errors
    /// When buffers do not fit each other, the kernel does not load, or the device has no room.
    ///
    /// # Safety
    /// The weights and caches must live as long as this.
    pub unsafe fn new<'a>(
        device: &Device,
        layers: impl ExactSizeIterator<Item = (LayerWeights<'a>, &'a mut KvLayer)>,
        n_head: usize,
        rope: &Rope,
        eps: f32,
        scale: f32,
    ) -> Result<Option<Self>> {
        let n_layer = layers.len();
        let mut refs = Vec::with_capacity(n_layer);
        let mut model: Option<(Shape, gpu_kernels::formats::Format)> = None;
        for (weights, cache) in layers {
            gemv::check_qkv("layers", weights.qkv, rope, cache)?;
            let (head_dim, n_embd) = (cache.head_dim, weights.qkv.matrices[0].n_cols());
            let (n_ff, n_rot) = (weights.down.n_cols(), 2 * rope.frequencies.len());
            let shape = Shape {
                n_layer: dim(n_layer)?,
                n_embd: dim(n_embd)?,
                n_head: dim(n_head)?,
                heads_per_kv: dim(n_head / cache.n_head_kv)?,
                head_dim: dim(head_dim)?,
                n_ff: dim(n_ff)?,
                n_ctx: dim(cache.n_ctx)?,
                n_rot: dim(n_rot)?,
                pair_distance: match rope.layout {
                    RopeLayout::Interleaved => 1,
                    RopeLayout::HalfSplit => dim(n_rot / 2)?,
                },
                per_n_embd: 1.0 / n_embd as f32,
                eps,
                scale,
            };
            let [q, k, v] = weights.qkv.matrices;
            let matrices = [q, k, v, weights.attn_output, weights.gate_up, weights.down];
            let (first, format) = *model.get_or_insert((shape, q.format()));
            let is_alike = first == shape && matrices.iter().all(|matrix| matrix.format() == format);
            let n_q = n_head * head_dim;
            let is_whole = [n_embd, n_q, n_ff].iter().all(|n| n.is_multiple_of(UNIT));
            let has_biases = weights.qkv.biases.iter().any(Option::is_some);
            let heads_fit = shape.n_head <= MAX_HEADS
                && head_dim.is_multiple_of(HEAD_DIM_STEP)
                && n_rot.is_multiple_of(TILE_ROWS);
            let cache_fits = u32::try_from(cache.k.len()).is_ok();
            if !is_alike
                || !is_whole
                || !heads_fit
                || !cache_fits
                || has_biases
                || !n_head.is_multiple_of(cache.n_head_kv)
            {
                return Ok(None);
            }
            for (name, matrix, n_rows, n_cols) in [
                ("q", q, n_q, n_embd),
                ("attn_output", weights.attn_output, n_embd, n_q),
                ("gate and up", weights.gate_up, 2 * n_ff, n_embd),
                ("down", weights.down, n_embd, n_ff),
            ] {
                ensure!(
                    (matrix.n_rows(), matrix.n_cols()) == (n_rows, n_cols),
                    "layers: {name} is {} x {}, not {n_rows} x {n_cols}",
                    matrix.n_rows(),
                    matrix.n_cols()
                );
            }
            ensure!(
                weights.gate_up.order().order == Order::Halves as u32,
                "layers: gate and up are in {:?}",
                weights.gate_up.order()
            );
            for (name, norm) in [("attn_norm", weights.attn_norm), ("ffn_norm", weights.ffn_norm)] {
                aligned("layers", name, norm, n_embd)?;
            }
            let tiles =
                |matrix: &Matrix| Ok::<_, anyhow::Error>(matrix.as_ref()?.tiles.expose_provenance() as u64);
            refs.push(LayerRef {
                attn_norm: weights.attn_norm.as_ptr().expose_provenance() as u64,
                ffn_norm: weights.ffn_norm.as_ptr().expose_provenance() as u64,
                q: tiles(q)?,
                k: tiles(k)?,
                v: tiles(v)?,
                attn_output: tiles(weights.attn_output)?,
                gate_up: tiles(weights.gate_up)?,
                down: tiles(weights.down)?,
                k_cache: cache.k.as_mut_ptr().expose_provenance() as u64,
                v_cache: cache.v.as_mut_ptr().expose_provenance() as u64,
            });
        }
        let Some((shape, format)) = model else { bail!("layers: there are none") };
        let Some((kernel, layout)) = kernel::own_kernel(format, &shape) else { return Ok(None) };
        let config = LaunchConfig {
            grid: [kernel::BLOCKS, 1, 1],
            block: [kernel::BLOCK_DIM, 1, 1],
            dynamic_shared_bytes: layout.bytes(),
            cluster: kernel::BLOCKS,
        };
        if !device.has_room_for_cluster(kernel, config)? {
            return Ok(None);
        }
        Ok(Some(Self { kernel, config, shape, layout, layers: device.alloc_from(&refs)? }))
    }
}

/// The hidden state `x` of a token, `[n_embd]`, through all layers: keys and values go into the caches at the step's position. `next`
/// is the operand of what comes after them, which normalises it; `rotation` are the angles of the position, as
/// [`embed`](super::embed) leaves them.
///
/// The position is in device memory: whoever writes it keeps it below the caches' `n_ctx`.
///
/// # Errors
/// When a buffer is too short, `next` has no norm, or the launch fails.
pub fn layers(
    device: &Device,
    layers: &mut Layers,
    step: &Buffer<Step>,
    rotation: &Buffer<[f32; 2]>,
    x: &mut Buffer<f32>,
    next: Next,
) -> Result<()> {
    let n_embd = layers.shape.n_embd as usize;
    aligned("layers", "x", x, n_embd)?;
    at_least("layers", "step", step, 1)?;
    at_least("layers", "rotation", rotation, layers.shape.n_rot as usize / 2)?;
    ensure!(next.gamma.is_some(), "layers: what comes after them is to normalise their result");
    let operand = Next::of_launch(Some(next), "layers", n_embd, n_embd / TILE_ROWS)?;
    ensure!(!operand.words.is_null(), "layers: the operand is of the exact path");
    let arguments = Arguments {
        layers: layers.layers.as_ptr(),
        step: step.as_ptr(),
        rotation: rotation.as_ptr(),
        x: x.as_mut_ptr(),
        operand,
        shape: layers.shape,
        layout: layers.layout,
    };
    // SAFETY: shapes and lengths are checked here and in `new`, whose caller keeps weights and caches; the launch is the layout's.
    unsafe { device.launch(layers.kernel, layers.config, (arguments,)) }
}
