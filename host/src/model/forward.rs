//! The forward pass of one token: a fixed sequence of launches, with nothing that waits for the device.
//!
//! Five kernels a layer: queries, keys and values; attention; its projection; gate and up; down. Norms, quantization,
//! bias, rotation, cache, SwiGLU and residuals are parts of them ([`gpu_kernels::gemv`]). [`super::unfused`] does the
//! same in one kernel per operation.

use super::trace::{Halt, Op, Probe};
use super::unfused;
use super::weights::{GateUp, Layer, Linear, Weights};
use super::{Activations, Fusion, Settings};
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{self, AttentionWorkspace, Input, KvLayer, Norm, Output, Q8_1Vector, QkvWeights};
use anyhow::Result;
use gpu_kernels::step::Step;

/// The feed-forward network's scratch buffers.
#[derive(Debug)]
pub struct FfnBuffers {
    /// `silu(gate) * up`: `[n_ff]`.
    pub(super) hidden: Buffer<f32>,
    /// Gate and up, where they are not fused: `[2 * n_ff]`.
    pub(super) gate_up: Buffer<f32>,
    /// `hidden` in Q8_1, where that is a step of its own: `[n_ff]`.
    pub(super) hidden_q8: Q8_1Vector,
}

impl FfnBuffers {
    /// Buffers for a network of this size.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, n_ff: usize) -> Result<Self> {
        Ok(Self {
            hidden: device.alloc(n_ff)?,
            gate_up: device.alloc(2 * n_ff)?,
            hidden_q8: Q8_1Vector::alloc(device, n_ff)?,
        })
    }
}

/// All buffers between the operations of a forward pass.
#[derive(Debug)]
pub struct Buffers {
    /// The token and its position.
    pub step: Buffer<Step>,
    /// Cosine and sine of each rotated pair's angle at the position: `[n_rot / 2]`.
    pub rotation: Buffer<[f32; 2]>,
    /// The hidden state, which every layer adds to: `[n_embd]`.
    pub x: Buffer<f32>,
    /// Queries: `[n_head, head_dim]`.
    pub(super) q: Buffer<f32>,
    /// What attention's blocks leave each other.
    pub(super) attention: AttentionWorkspace,
    /// Attention's heads: `[n_head, head_dim]`.
    pub(super) heads: Buffer<f32>,
    /// Scratch of the feed-forward network.
    pub(super) ffn: FfnBuffers,
    /// The logits: `[n_vocab]`.
    pub logits: Buffer<f32>,
    /// What only the unfused pass needs.
    pub(super) unfused: unfused::Buffers,
}

impl Buffers {
    /// Buffers for a model of these dimensions.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, config: &Config) -> Result<Self> {
        let n_q = config.n_head * config.head_dim;
        Ok(Self {
            step: device.alloc_from(&[Step::default()])?,
            rotation: device.alloc(config.rope.n_rot / 2)?,
            x: device.alloc(config.n_embd)?,
            q: device.alloc(n_q)?,
            attention: AttentionWorkspace::alloc(device, config.n_head, config.n_head_kv, config.head_dim)?,
            heads: device.alloc(n_q)?,
            ffn: FfnBuffers::alloc(device, config.n_ff)?,
            logits: device.alloc(config.n_vocab)?,
            unfused: unfused::Buffers::alloc(device, config)?,
        })
    }
}

/// One token through the whole model: appends to the caches at the step's position, and leaves the logits in their
/// buffer when `with_logits` asks for them (all but the last token of a prompt do without).
pub(super) fn forward(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    caches: &mut [KvLayer],
    b: &mut Buffers,
    with_logits: bool,
    probe: Probe,
) -> Result<(), Halt> {
    ops::embed(device, &weights.token_embd, &b.step, 1, &settings.rope, &mut b.x, &mut b.rotation)?;
    probe.after(Op::Embed, 0, device, &b.x)?;

    for (i, (weights, cache)) in weights.layers.iter().zip(caches).enumerate() {
        layer(device, weights, settings, cache, b, i, probe)?;
    }

    if with_logits {
        match settings.fusion {
            Fusion::Fused => {
                let norm = Norm { gamma: &weights.output_norm, eps: settings.rms_eps };
                let x = input(settings.activations, &b.x);
                ops::gemv(device, weights.output(), x, Some(norm), Output::Set(&mut b.logits))?;
            }
            Fusion::Unfused => unfused::logits(device, weights, settings, b, probe)?,
        }
        probe.after(Op::Logits, 0, device, &b.logits)?;
    }
    Ok(())
}

/// One layer: attention over its cache, then the feed-forward network, each added to the hidden state `b.x`. The
/// step's angles must be in `b.rotation`, where [`ops::embed`] leaves them.
///
/// # Errors
/// When a launch fails, or the probe stops the run after one of this layer's operations.
pub fn layer(
    device: &Device,
    weights: &Layer,
    settings: &Settings,
    cache: &mut KvLayer,
    b: &mut Buffers,
    index: usize,
    probe: Probe,
) -> Result<(), Halt> {
    if settings.fusion == Fusion::Unfused {
        return unfused::layer(device, weights, settings, cache, b, index, probe);
    }
    let Settings { activations, rms_eps, ref rope, attention, .. } = *settings;

    let norm = Norm { gamma: &weights.attn_norm, eps: rms_eps };
    let x = input(activations, &b.x);
    ops::gemv_qkv(device, qkv(weights), x, Some(norm), rope, &b.rotation, &b.step, &mut b.q, cache)?;
    probe.after(Op::QRope, index, device, &b.q)?;
    ops::attention(device, &b.q, cache, &b.step, attention, &mut b.attention, &mut b.heads)?;
    probe.after(Op::Attention, index, device, &b.heads)?;
    ops::gemv(device, &weights.attn_output, input(activations, &b.heads), None, Output::Add(&mut b.x))?;
    probe.after(Op::AttnOutput, index, device, &b.x)?;

    let norm = Norm { gamma: &weights.ffn_norm, eps: rms_eps };
    swiglu(device, &weights.ffn_gate_up, input(activations, &b.x), Some(norm), &mut b.ffn)?;
    probe.after(Op::FfnSwiglu, index, device, &b.ffn.hidden)?;
    let hidden = input(activations, &b.ffn.hidden);
    ops::gemv(device, &weights.ffn_down, hidden, None, Output::Add(&mut b.x))?;
    probe.after(Op::FfnOutput, index, device, &b.x)
}

/// The feed-forward network of a layer, added to `output`: `output += W_down(silu(W_gate x) * W_up x)`.
///
/// # Errors
/// When a buffer does not fit the weights or a launch fails.
pub fn ffn(
    device: &Device,
    weights: &Layer,
    activations: Activations,
    x: &Buffer<f32>,
    output: &mut Buffer<f32>,
    b: &mut FfnBuffers,
) -> Result<()> {
    swiglu(device, &weights.ffn_gate_up, input(activations, x), None, b)?;
    ops::gemv(device, &weights.ffn_down, input(activations, &b.hidden), None, Output::Add(output))
}

/// `b.hidden = silu(gate x) * (up x)`.
fn swiglu(device: &Device, weights: &GateUp, x: Input, norm: Option<Norm>, b: &mut FfnBuffers) -> Result<()> {
    match weights {
        GateUp::Joined(matrix) => ops::gemv_swiglu(device, matrix, x, norm, &mut b.hidden),
        GateUp::Apart { gate, up } => {
            let mut up_values = b.gate_up.part(0..up.n_rows());
            ops::gemv(device, gate, x, norm, Output::Set(&mut b.hidden))?;
            ops::gemv(device, up, x, norm, Output::Set(&mut up_values))?;
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

/// A vector as the matrices take it: as it is on the exact path, to be quantized on the fast one.
fn input(activations: Activations, values: &Buffer<f32>) -> Input<'_> {
    match activations {
        Activations::F32 => Input::F32(values),
        Activations::Q8_1 => Input::Quantized(values),
    }
}
