//! The forward pass: a fixed sequence of launches, with nothing that waits for the device.
//!
//! One token at a time it is five kernels a layer: queries, keys and values; attention; its projection; gate and up; down.
//! Norms, quantization, bias, rotation, cache, SwiGLU and residuals are parts of them ([`gpu_kernels::gemv`]). Many tokens
//! at a time are the same five operations on tensor cores ([`gpu_kernels::gemm`]), and one before each product that puts its
//! input into panels, normalised where it has to be; of up to four tokens these products may be on Q8_1 activations as well
//! ([`gpu_kernels::gemv::few`]). [`super::unfused`] does the same in one kernel per operation.

use super::trace::{Halt, Op, Probe};
use super::unfused;
use super::weights::{GateUp, Layer, Linear, Weights};
use super::{Activations, Fusion, Settings};
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{
    self, AttentionShape, AttentionWorkspace, Chunk, Input, KvCache, KvStage, LayerWeights, Layers,
    ManyOutput, Matrix, Next, Norm, Operand, Output, Panels, Q8_1Vector, QkvWeights, Ranks, SampleWorkspace,
};
use anyhow::{Context as _, Result, bail};
use gpu_kernels::kv_cache::KvFormat;
use gpu_kernels::step::Step;

/// What goes through the model at once.
#[derive(Clone, Copy, Debug)]
pub enum Tokens {
    /// The token of the step in device memory: the host need not know it.
    One,
    /// Those of as many steps, whose positions follow each other.
    Many(Chunk),
}

impl Tokens {
    /// How many there are.
    pub fn len(self) -> usize {
        match self {
            Tokens::One => 1,
            Tokens::Many(chunk) => chunk.n_tokens,
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// The feed-forward network's scratch buffers.
#[derive(Debug)]
pub struct FfnBuffers {
    /// `silu(gate) * up`: `[n_tokens, n_ff]`.
    pub(super) hidden: Buffer<f32>,
    /// Gate and up, where they are not fused: `[2 * n_ff]`, of many tokens up alone: `[n_tokens, n_ff]`.
    pub(super) gate_up: Buffer<f32>,
    /// `hidden` in Q8_1, where that is a step of its own: `[n_ff]`.
    pub(super) hidden_q8: Q8_1Vector,
    /// `hidden` of one token as the next product reads it: `[n_ff]`.
    operand: Operand,
}

impl FfnBuffers {
    /// Buffers for a network of this size, and one token.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, n_ff: usize, activations: Activations) -> Result<Self> {
        Ok(Self {
            hidden: device.alloc(n_ff)?,
            gate_up: device.alloc(2 * n_ff)?,
            hidden_q8: Q8_1Vector::alloc(device, n_ff)?,
            operand: Operand::alloc(device, n_ff, activations == Activations::F32)?,
        })
    }
}

/// All buffers between the operations of a forward pass. Of many tokens the rows of `x` and `hidden` are filled up to a
/// multiple of four values.
#[derive(Debug)]
pub struct Buffers {
    /// The tokens and their positions: `[n_tokens]`.
    pub steps: Buffer<Step>,
    /// Cosine and sine of each rotated pair's angle at the positions: `[n_tokens, n_rot / 2]`.
    pub rotation: Buffer<[f32; 2]>,
    /// The hidden state, which every layer adds to: `[n_tokens, n_embd]`.
    pub x: Buffer<f32>,
    /// That of one token, of many the last one, as the next product reads it: `[n_embd]`.
    pub x_operand: Operand,
    /// Queries: `[n_tokens, n_head, head_dim]`.
    pub(super) q: Buffer<f32>,
    /// Attention's heads: `[n_tokens, n_head, head_dim]`.
    pub(super) heads: Buffer<f32>,
    /// Those of one token as the next product reads them: `[n_head * head_dim]`.
    heads_operand: Operand,
    /// Scratch of the feed-forward network.
    pub(super) ffn: FfnBuffers,
    /// Inputs of products for many tokens, of at most the largest of `n_embd`, `n_head * head_dim` and `n_ff` columns.
    panels: Option<Panels>,
    /// Where keys and values wait to be quantized, for a cache in Q8_0.
    pub(super) stage: Option<KvStage>,
    /// What attention's blocks leave each other, for one token.
    pub(super) attention: AttentionWorkspace,
    /// What only the unfused pass needs, which takes one token.
    pub(super) unfused: Option<unfused::Buffers>,
}

/// A stage for as many tokens, where the cache's format needs one.
fn stage(device: &Device, config: &Config, format: KvFormat, n_tokens: usize) -> Result<Option<KvStage>> {
    match format {
        KvFormat::F16 => Ok(None),
        KvFormat::Q8_0 => KvStage::alloc(device, config.n_head_kv, n_tokens, config.head_dim).map(Some),
    }
}

/// Values from one token's row to the next, of many tokens.
fn stride(n: usize) -> usize {
    n.next_multiple_of(4)
}

impl Buffers {
    /// Buffers for a model of these dimensions, and one token.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, config: &Config, settings: &Settings) -> Result<Self> {
        let n_q = config.n_head * config.head_dim;
        let is_exact = settings.activations == Activations::F32;
        Ok(Self {
            stage: stage(device, config, settings.kv_format, 1)?,
            steps: device.alloc_from(&[Step::default()])?,
            rotation: device.alloc(config.rope.n_rot / 2)?,
            x: device.alloc(config.n_embd)?,
            x_operand: Operand::alloc(device, config.n_embd, is_exact)?,
            q: device.alloc(n_q)?,
            heads: device.alloc(n_q)?,
            heads_operand: Operand::alloc(device, n_q, is_exact)?,
            ffn: FfnBuffers::alloc(device, config.n_ff, settings.activations)?,
            panels: None,
            attention: AttentionWorkspace::alloc(device, config.n_head, config.n_head_kv, config.head_dim)?,
            unfused: Some(unfused::Buffers::alloc(device, config)?),
        })
    }

    /// The same for `n_tokens` tokens; `gate_up` says whether some layer has gate and up apart.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn alloc_many(
        device: &Device,
        config: &Config,
        n_tokens: usize,
        settings: &Settings,
        gate_up: bool,
    ) -> Result<Self> {
        let n_q = config.n_head * config.head_dim;
        let (n_ff, widest) = (stride(config.n_ff), config.n_embd.max(n_q).max(config.n_ff));
        let is_exact = settings.activations == Activations::F32;
        // Queries and heads are done with when the feed-forward network begins: they lie where its hidden values will.
        let (all_q, all_hidden) = (n_tokens * n_q, n_tokens * n_ff);
        let in_layer: Buffer<f32> = device.alloc(all_hidden.max(2 * all_q))?;
        Ok(Self {
            steps: device.alloc(n_tokens)?,
            rotation: device.alloc(n_tokens * config.rope.n_rot / 2)?,
            x: device.alloc(n_tokens * stride(config.n_embd))?,
            x_operand: Operand::alloc(device, config.n_embd, is_exact)?,
            q: in_layer.part(0..all_q),
            heads: in_layer.part(all_q..2 * all_q),
            heads_operand: Operand::alloc(device, 0, is_exact)?,
            ffn: FfnBuffers {
                hidden: in_layer.part(0..all_hidden),
                gate_up: device.alloc(if gate_up { n_tokens * n_ff } else { 0 })?,
                hidden_q8: Q8_1Vector::alloc(device, 0)?,
                operand: Operand::alloc(device, 0, is_exact)?,
            },
            panels: Some(Panels::alloc(device, n_tokens, widest, is_exact)?),
            stage: stage(device, config, settings.kv_format, n_tokens)?,
            attention: AttentionWorkspace::alloc(device, config.n_head, config.n_head_kv, config.head_dim)?,
            unfused: None,
        })
    }
}

/// Where the logits of a token go.
pub(super) struct Logits<'a> {
    /// `[n_vocab]`.
    pub(super) to: &'a mut Buffer<f32>,
    /// Where their largest ranks go, if a token will be chosen by them.
    pub(super) workspace: Option<&'a mut SampleWorkspace>,
}

/// Tokens through the whole model: appends to the caches at their positions, and leaves the logits of the last one in
/// `logits` where they are wanted (all but the last chunk of a prompt do without). One token goes through all layers in one
/// launch where `together` is given: no probe stops in there. Gives the ranks of the logits where they were left.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub(super) fn forward(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    caches: &mut [KvCache],
    b: &mut Buffers,
    tokens: Tokens,
    together: Option<&mut Layers>,
    logits: Option<Logits>,
    probe: Probe,
) -> Result<Option<Ranks>, Halt> {
    let (token_embd, rope) = (&weights.token_embd, &settings.rope);
    // What follows each layer, and before them the embedding, is normalised with these.
    let norm_of =
        |layer: usize| weights.layers.get(layer).map_or(&weights.output_norm, |layer| &layer.attn_norm);
    let next = match (tokens, settings.fusion, &together) {
        (Tokens::One, Fusion::Fused, None) => {
            Some(Next { operand: &mut b.x_operand, gamma: Some(norm_of(0)) })
        }
        _ => None,
    };
    ops::embed(
        device,
        token_embd,
        &b.steps,
        tokens.len(),
        rope,
        &mut b.x,
        &mut b.rotation,
        next,
        together.is_some(),
    )?;
    probe.after(Op::Embed, 0, device, &b.x)?;

    let are_together = together.is_some();
    if let Some(together) = together {
        let next = Next { operand: &mut b.x_operand, gamma: Some(&weights.output_norm) };
        ops::layers(device, together, &b.steps, &b.rotation, &mut b.x, next)?;
        probe.passed(Op::Layers, 0)?;
    } else {
        for (i, (weights, cache)) in weights.layers.iter().zip(caches).enumerate() {
            layer(device, weights, norm_of(i + 1), settings, cache, b, tokens, i, probe)?;
        }
    }

    let mut ranks = None;
    if let Some(Logits { to: logits, workspace }) = logits {
        let n_embd = weights.token_embd.n_cols();
        let last = (tokens.len() - 1) * stride(n_embd);
        let x = b.x.part(last..last + n_embd);
        match settings.fusion {
            Fusion::Fused => {
                let norm = Norm { gamma: &weights.output_norm, eps: settings.rms_eps };
                if let Tokens::Many(_) = tokens {
                    let next = Next { operand: &mut b.x_operand, gamma: Some(&weights.output_norm) };
                    ops::make_operand(device, &x, next)?;
                }
                let x = input(settings.activations, &x, &b.x_operand);
                ranks = ops::gemv_logits(device, weights.output(), x, norm, are_together, logits, workspace)?;
            }
            Fusion::Unfused => {
                let unfused = unfused::buffers(&mut b.unfused)?;
                unfused::logits(device, weights, settings, &x, unfused, logits, probe)?;
            }
        }
        probe.after(Op::Logits, 0, device, logits)?;
    }
    Ok(ranks)
}

/// The layers as one launch goes through them, for one token; `None` where they have to go kernel by kernel ([`Layers::new`]).
///
/// # Errors
/// As [`Layers::new`].
///
/// # Safety
/// Weights and caches must live as long as what this gives.
pub unsafe fn together(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    caches: &mut [KvCache],
) -> Result<Option<Layers>> {
    if settings.activations != Activations::Q8_1 || settings.fusion != Fusion::Fused {
        return Ok(None);
    }
    let both = weights.layers.iter().zip(caches).map(|(layer, cache)| match (&layer.ffn_gate_up, cache) {
        (GateUp::Joined(gate_up), KvCache::F16(cache)) => {
            let Layer { attn_norm, attn_output, ffn_norm, ffn_down: down, .. } = layer;
            let weights = LayerWeights { attn_norm, qkv: qkv(layer), attn_output, ffn_norm, gate_up, down };
            Some((weights, cache))
        }
        _ => None,
    });
    let Some(both) = both.collect::<Option<Vec<_>>>() else { return Ok(None) };
    let (AttentionShape { n_head, scale, .. }, eps) = (settings.attention, settings.rms_eps);
    // SAFETY: the caller's promise.
    unsafe { Layers::new(device, both.into_iter(), n_head, &settings.rope, eps, scale) }
}

/// The logits of tokens `range` of the many that went through the model last: `[range.len(), n_vocab]`, rows filled up to a
/// multiple of four values.
pub(super) fn logits_of_many(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    b: &mut Buffers,
    range: std::ops::Range<usize>,
    logits: &mut Buffer<f32>,
) -> Result<()> {
    let n_embd = weights.token_embd.n_cols();
    let x = b.x.part(range.start * stride(n_embd)..range.end * stride(n_embd));
    let norm = Norm { gamma: &weights.output_norm, eps: settings.rms_eps };
    let panels = pack(device, b.panels.as_mut(), &x, range.len(), Some(norm), &[weights.output()])?;
    ops::gemm(device, weights.output(), panels, ManyOutput::Set(logits))
}

/// One layer: attention over its cache, then the feed-forward network, each added to the hidden state `b.x`. The
/// steps' angles must be in `b.rotation`, where [`ops::embed`] leaves them, and one token's hidden state in `b.x_operand` as
/// well; the layer leaves it there for the norm `next_norm`.
///
/// # Errors
/// When a launch fails, or the probe stops the run after one of this layer's operations.
#[allow(clippy::too_many_arguments, reason = "each is one thing")]
pub fn layer(
    device: &Device,
    weights: &Layer,
    next_norm: &Buffer<f32>,
    settings: &Settings,
    cache: &mut KvCache,
    b: &mut Buffers,
    tokens: Tokens,
    index: usize,
    probe: Probe,
) -> Result<(), Halt> {
    if settings.fusion == Fusion::Unfused {
        return unfused::layer(device, weights, settings, cache, b, index, probe);
    }
    let Settings { activations, rms_eps, attention, .. } = *settings;
    let norm = |gamma| Some(Norm { gamma, eps: rms_eps });

    queries_keys_values(device, weights, settings, norm(&weights.attn_norm), cache, b, tokens)?;
    probe.beside(Op::KvAppend, index, device, &*cache)?;
    probe.after(Op::QRope, index, device, &b.q)?;
    match tokens {
        Tokens::One => {
            let next = Next { operand: &mut b.heads_operand, gamma: None };
            let (steps, workspace) = (&b.steps, &mut b.attention);
            ops::attention(device, &b.q, &*cache, steps, attention, workspace, &mut b.heads, Some(next))?;
        }
        Tokens::Many(chunk) if activations == Activations::Q8_1 => {
            ops::prefill_attention(device, &b.q, &*cache, chunk, attention, &mut b.heads)?;
        }
        Tokens::Many(chunk) => exact_attention(device, chunk, cache, attention, b)?,
    }
    probe.after(Op::Attention, index, device, &b.heads)?;
    match tokens {
        Tokens::One => {
            let heads = input(activations, &b.heads, &b.heads_operand);
            let next = Next { operand: &mut b.x_operand, gamma: Some(&weights.ffn_norm) };
            ops::gemv(device, &weights.attn_output, heads, None, Output::Add(&mut b.x, Some(next)))?;
        }
        Tokens::Many(_) => {
            let panels = b.panels.as_mut();
            add_many(device, &weights.attn_output, &b.heads, tokens.len(), &mut b.x, panels)?;
        }
    }
    probe.after(Op::AttnOutput, index, device, &b.x)?;

    let gate_up = &weights.ffn_gate_up;
    match tokens {
        Tokens::One => {
            let x = input(activations, &b.x, &b.x_operand);
            swiglu(device, gate_up, x, norm(&weights.ffn_norm), &mut b.ffn)?;
        }
        Tokens::Many(_) => {
            let norm = norm(&weights.ffn_norm);
            let panels = pack(device, b.panels.as_mut(), &b.x, tokens.len(), norm, &gate_up.matrices())?;
            swiglu_of_many(device, gate_up, panels, tokens.len(), &mut b.ffn)?;
        }
    }
    probe.after(Op::FfnSwiglu, index, device, &b.ffn.hidden)?;
    match tokens {
        Tokens::One => {
            let hidden = input(activations, &b.ffn.hidden, &b.ffn.operand);
            let next = Next { operand: &mut b.x_operand, gamma: Some(next_norm) };
            ops::gemv(device, &weights.ffn_down, hidden, None, Output::Add(&mut b.x, Some(next)))?;
        }
        Tokens::Many(_) => {
            let panels = b.panels.as_mut();
            add_many(device, &weights.ffn_down, &b.ffn.hidden, tokens.len(), &mut b.x, panels)?;
        }
    }
    probe.after(Op::FfnOutput, index, device, &b.x)
}

/// Attention of many tokens without rounding their queries: token by token.
fn exact_attention(
    device: &Device,
    chunk: Chunk,
    cache: &KvCache,
    shape: AttentionShape,
    b: &mut Buffers,
) -> Result<()> {
    let n_q = b.q.len() / b.steps.len();
    for token in 0..chunk.n_tokens {
        let (q, step) = (b.q.part(token * n_q..(token + 1) * n_q), b.steps.part(token..token + 1));
        let mut heads = b.heads.part(token * n_q..(token + 1) * n_q);
        b.attention.suit(chunk.position + token + 1);
        // The chunk's keys and values are all of this moment.
        let shape = AttentionShape { n_fresh: token + 1, ..shape };
        ops::attention(device, &q, cache, &step, shape, &mut b.attention, &mut heads, None)?;
    }
    Ok(())
}

/// Queries into `b.q`, keys and values into the cache, of `b.x` normalised.
fn queries_keys_values(
    device: &Device,
    weights: &Layer,
    settings: &Settings,
    norm: Option<Norm>,
    cache: &mut KvCache,
    b: &mut Buffers,
    tokens: Tokens,
) -> Result<()> {
    let (matrices, rope) = (qkv(weights), &settings.rope);
    // To a cache in Q8_0 they go by way of the stage.
    let (layer, steps) = match (&mut *cache, &mut b.stage) {
        (KvCache::F16(layer), _) => (layer, &b.steps),
        (KvCache::Q8_0(_), Some(stage)) => (&mut stage.layer, &stage.rows),
        (KvCache::Q8_0(_), None) => bail!("the buffers have no stage for a cache in Q8_0"),
    };
    match tokens {
        Tokens::One => {
            let x = input(settings.activations, &b.x, &b.x_operand);
            ops::gemv_qkv(device, matrices, x, norm, rope, &b.rotation, steps, &mut b.q, layer)?;
        }
        Tokens::Many(_) => {
            let panels = pack(device, b.panels.as_mut(), &b.x, tokens.len(), norm, &matrices.matrices)?;
            ops::gemm_qkv(device, matrices, panels, rope, &b.rotation, steps, &mut b.q, layer)?;
        }
    }
    match (cache, &b.stage) {
        (KvCache::Q8_0(cache), Some(stage)) => ops::quantize_kv(device, stage, &b.steps, tokens.len(), cache),
        _ => Ok(()),
    }
}

/// `output += W x` of many tokens.
fn add_many(
    device: &Device,
    weights: &Matrix,
    x: &Buffer<f32>,
    n_tokens: usize,
    output: &mut Buffer<f32>,
    panels: Option<&mut Panels>,
) -> Result<()> {
    let panels = pack(device, panels, x, n_tokens, None, &[weights])?;
    ops::gemm(device, weights, panels, ManyOutput::Add(output))
}

/// Vectors as products for many tokens take them, of which `readers` are all the matrices.
fn pack<'p>(
    device: &Device,
    panels: Option<&'p mut Panels>,
    x: &Buffer<f32>,
    n_tokens: usize,
    norm: Option<Norm>,
    readers: &[&Matrix],
) -> Result<&'p mut Panels> {
    let panels = panels.context("the buffers are for one token")?;
    let n_cols = readers.first().context("no matrix reads the vectors")?.n_cols();
    ops::pack_panels(device, x, n_tokens, n_cols, norm, readers, panels)?;
    Ok(panels)
}

/// Whether all products of the layers take a few tokens at once on Q8_1 activations.
pub(super) fn has_few_products(device: &Device, weights: &Weights, settings: &Settings) -> bool {
    let has = |readers: &[&Matrix]| ops::has_few_products(device, readers);
    settings.activations == Activations::Q8_1
        && weights.layers.iter().all(|layer| {
            let added = [&layer.attn_output, &layer.ffn_down];
            has(&qkv(layer).matrices)
                && has(&layer.ffn_gate_up.matrices())
                && added.iter().all(|&one| has(&[one]))
        })
}

/// The feed-forward network of a layer, added to `output`: `output += W_down(silu(W_gate x) * W_up x)`.
///
/// # Errors
/// When a buffer does not fit the weights or a launch fails.
pub fn ffn(
    device: &Device,
    weights: &Layer,
    x: Input,
    output: &mut Buffer<f32>,
    b: &mut FfnBuffers,
) -> Result<()> {
    swiglu(device, &weights.ffn_gate_up, x, None, b)?;
    let hidden = match x {
        Input::F32(..) => Input::F32(&b.hidden, None),
        Input::Operand(_) | Input::Q8_1(_) => Input::Operand(&b.operand),
    };
    ops::gemv(device, &weights.ffn_down, hidden, None, Output::Add(output, None))
}

/// `b.hidden = silu(gate x) * (up x)`, in `b.operand` as well.
fn swiglu(device: &Device, weights: &GateUp, x: Input, norm: Option<Norm>, b: &mut FfnBuffers) -> Result<()> {
    let next = Next { operand: &mut b.operand, gamma: None };
    match weights {
        GateUp::Joined(matrix) => ops::gemv_swiglu(device, matrix, x, norm, &mut b.hidden, Some(next)),
        GateUp::Apart { gate, up } => {
            let mut up_values = b.gate_up.part(0..up.n_rows());
            ops::gemv(device, gate, x, norm, Output::Set(&mut b.hidden))?;
            ops::gemv(device, up, x, norm, Output::Set(&mut up_values))?;
            ops::swiglu(device, &mut b.hidden, &up_values)?;
            ops::make_operand(device, &b.hidden, next)
        }
    }
}

/// The same of many tokens.
fn swiglu_of_many(
    device: &Device,
    weights: &GateUp,
    x: &mut Panels,
    n_tokens: usize,
    b: &mut FfnBuffers,
) -> Result<()> {
    match weights {
        GateUp::Joined(matrix) => ops::gemm(device, matrix, x, ManyOutput::Swiglu(&mut b.hidden)),
        GateUp::Apart { gate, up } => {
            let mut up_values = b.gate_up.part(0..n_tokens * stride(up.n_rows()));
            ops::gemm(device, gate, x, ManyOutput::Set(&mut b.hidden))?;
            ops::gemm(device, up, x, ManyOutput::Set(&mut up_values))?;
            ops::swiglu(device, &mut b.hidden, &up_values)
        }
    }
}

/// The three matrices that a token's queries, keys and values come from.
fn qkv(weights: &Layer) -> QkvWeights<'_> {
    let linears = [&weights.attn_q, &weights.attn_k, &weights.attn_v];
    QkvWeights {
        matrices: linears.map(|linear: &Linear| &linear.weight),
        biases: linears.map(|linear| linear.bias.as_ref()),
    }
}

/// A vector as the matrices take it.
fn input<'a>(activations: Activations, values: &'a Buffer<f32>, operand: &'a Operand) -> Input<'a> {
    match activations {
        Activations::F32 => Input::F32(values, Some(operand)),
        Activations::Q8_1 => Input::Operand(operand),
    }
}
