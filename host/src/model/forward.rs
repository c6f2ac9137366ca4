//! The forward pass of one token: a fixed sequence of launches, with nothing that waits for the device.

use super::trace::{Halt, Op, Probe};
use super::weights::{Layer, Linear, Weights};
use super::{Activations, Settings};
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{self, Input, KvLayer, Output, Q8_1Vector};
use anyhow::Result;
use gpu_kernels::step::Step;

/// The feed-forward network's scratch buffers.
#[derive(Debug)]
pub struct FfnBuffers {
    /// The input in Q8_1: `[n_embd]`.
    input_q8: Q8_1Vector,
    /// `silu(gate) * up`: `[n_ff]`.
    hidden: Buffer<f32>,
    /// `up`, where gate and up cannot be fused: `[n_ff]`.
    up: Buffer<f32>,
    /// `hidden` in Q8_1: `[n_ff]`.
    hidden_q8: Q8_1Vector,
}

impl FfnBuffers {
    /// Buffers for a network of these dimensions.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, n_embd: usize, n_ff: usize) -> Result<Self> {
        Ok(Self {
            input_q8: Q8_1Vector::alloc(device, n_embd)?,
            hidden: device.alloc(n_ff)?,
            up: device.alloc(n_ff)?,
            hidden_q8: Q8_1Vector::alloc(device, n_ff)?,
        })
    }
}

/// All buffers between the operations of a forward pass.
#[derive(Debug)]
pub struct Buffers {
    /// The token and its position.
    pub step: Buffer<Step>,
    /// The hidden state, which every layer adds to: `[n_embd]`.
    pub x: Buffer<f32>,
    /// The hidden state, normalised: `[n_embd]`.
    normed: Buffer<f32>,
    /// `normed` in Q8_1: `[n_embd]`.
    normed_q8: Q8_1Vector,
    /// Queries: `[n_head, head_dim]`.
    q: Buffer<f32>,
    /// Keys: `[n_head_kv, head_dim]`.
    k: Buffer<f32>,
    /// Values: `[n_head_kv, head_dim]`.
    v: Buffer<f32>,
    /// Attention's heads: `[n_head, head_dim]`.
    heads: Buffer<f32>,
    /// `heads` in Q8_1: `[n_head * head_dim]`.
    heads_q8: Q8_1Vector,
    /// Scratch of the feed-forward network.
    ffn: FfnBuffers,
    /// The logits: `[n_vocab]`.
    pub logits: Buffer<f32>,
}

impl Buffers {
    /// Buffers for a model of these dimensions.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn alloc(device: &Device, config: &Config) -> Result<Self> {
        let (n_q, n_kv) = (config.n_head * config.head_dim, config.n_head_kv * config.head_dim);
        Ok(Self {
            step: device.alloc_from(&[Step::default()])?,
            x: device.alloc(config.n_embd)?,
            normed: device.alloc(config.n_embd)?,
            normed_q8: Q8_1Vector::alloc(device, config.n_embd)?,
            q: device.alloc(n_q)?,
            k: device.alloc(n_kv)?,
            v: device.alloc(n_kv)?,
            heads: device.alloc(n_q)?,
            heads_q8: Q8_1Vector::alloc(device, n_q)?,
            ffn: FfnBuffers::alloc(device, config.n_embd, config.n_ff)?,
            logits: device.alloc(config.n_vocab)?,
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
    ops::embed(device, &weights.token_embd, &b.step, &mut b.x)?;
    probe.after(Op::Embed, 0, device, &b.x)?;

    for (i, (weights, cache)) in weights.layers.iter().zip(caches).enumerate() {
        layer(device, weights, settings, cache, b, i, probe)?;
    }

    if with_logits {
        ops::rms_norm(device, &b.x, &weights.output_norm, settings.rms_eps, &mut b.normed)?;
        probe.after(Op::OutputNorm, 0, device, &b.normed)?;
        let normed = input(device, settings.activations, &b.normed, &mut b.normed_q8)?;
        ops::gemv(device, weights.output(), normed, Output::Set(&mut b.logits))?;
        probe.after(Op::Logits, 0, device, &b.logits)?;
    }
    Ok(())
}

/// One layer: attention over its cache, then the feed-forward network, each added to the hidden state `b.x`.
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
    let Settings { activations, rms_eps, head_dim, n_head_kv, ref rope, attention, .. } = *settings;

    ops::rms_norm(device, &b.x, &weights.attn_norm, rms_eps, &mut b.normed)?;
    probe.after(Op::AttnNorm, index, device, &b.normed)?;
    let normed = input(device, activations, &b.normed, &mut b.normed_q8)?;
    linear(device, &weights.attn_q, normed, &mut b.q)?;
    probe.after(Op::Q, index, device, &b.q)?;
    linear(device, &weights.attn_k, normed, &mut b.k)?;
    probe.after(Op::K, index, device, &b.k)?;
    linear(device, &weights.attn_v, normed, &mut b.v)?;
    probe.after(Op::V, index, device, &b.v)?;

    ops::rope(device, &mut b.q, rope, &b.step, attention.n_head, head_dim)?;
    probe.after(Op::QRope, index, device, &b.q)?;
    ops::rope(device, &mut b.k, rope, &b.step, n_head_kv, head_dim)?;
    probe.after(Op::KRope, index, device, &b.k)?;
    ops::kv_append(device, &b.k, &b.v, cache, &b.step)?;
    ops::attention(device, &b.q, cache, &b.step, attention, &mut b.heads)?;
    probe.after(Op::Attention, index, device, &b.heads)?;
    let heads = input(device, activations, &b.heads, &mut b.heads_q8)?;
    ops::gemv(device, &weights.attn_output, heads, Output::Add(&mut b.x))?;
    probe.after(Op::AttnOutput, index, device, &b.x)?;

    ops::rms_norm(device, &b.x, &weights.ffn_norm, rms_eps, &mut b.normed)?;
    probe.after(Op::FfnNorm, index, device, &b.normed)?;
    ffn(device, weights, activations, &b.normed, &mut b.x, &mut b.ffn)?;
    probe.after(Op::FfnSwiglu, index, device, &b.ffn.hidden)?;
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
    let (gate, up) = (&weights.ffn_gate, &weights.ffn_up);
    let x = input(device, activations, x, &mut b.input_q8)?;
    if gate.format() == up.format() {
        ops::gemv_swiglu(device, gate, up, x, &mut b.hidden)?;
    } else {
        ops::gemv(device, gate, x, Output::Set(&mut b.hidden))?;
        ops::gemv(device, up, x, Output::Set(&mut b.up))?;
        ops::swiglu(device, &mut b.hidden, &b.up)?;
    }
    let hidden = input(device, activations, &b.hidden, &mut b.hidden_q8)?;
    ops::gemv(device, &weights.ffn_down, hidden, Output::Add(output))
}

/// `y = W x + b`, the bias where there is one.
fn linear(device: &Device, weights: &Linear, x: Input, y: &mut Buffer<f32>) -> Result<()> {
    let output = match &weights.bias {
        Some(bias) => Output::SetBiased(y, bias),
        None => Output::Set(y),
    };
    ops::gemv(device, &weights.weight, x, output)
}

/// A vector as the matrices take it: as it is on the exact path, quantized into `q8` on the fast one.
fn input<'a>(
    device: &Device,
    activations: Activations,
    values: &'a Buffer<f32>,
    q8: &'a mut Q8_1Vector,
) -> Result<Input<'a>> {
    match activations {
        Activations::F32 => Ok(Input::F32(values)),
        Activations::Q8_1 => {
            ops::quantize_q8_1(device, values, q8)?;
            Ok(Input::Q8_1(q8))
        }
    }
}
