//! The forward pass in one kernel per operation: what the fused one is measured against, and where a run can be
//! stopped after each of them.

use super::forward;
use super::trace::{Halt, Op, Probe};
use super::weights::{GateUp, Layer, Linear, Weights};
use super::{Activations, Settings};
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{self, Input, KvCache, Output, Q8_1Vector};
use anyhow::{Context as _, Result, anyhow};

/// The buffers that only this pass needs.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The hidden state, normalised: `[n_embd]`.
    normed: Buffer<f32>,
    /// `normed` in Q8_1: `[n_embd]`.
    normed_q8: Q8_1Vector,
    /// Keys: `[n_head_kv, head_dim]`.
    k: Buffer<f32>,
    /// Values: `[n_head_kv, head_dim]`.
    v: Buffer<f32>,
    /// Attention's heads in Q8_1: `[n_head * head_dim]`.
    heads_q8: Q8_1Vector,
}

impl Buffers {
    pub(super) fn alloc(device: &Device, config: &Config) -> Result<Self> {
        let (n_q, n_kv) = (config.n_head * config.head_dim, config.n_head_kv * config.head_dim);
        Ok(Self {
            normed: device.alloc(config.n_embd)?,
            normed_q8: Q8_1Vector::alloc(device, config.n_embd)?,
            k: device.alloc(n_kv)?,
            v: device.alloc(n_kv)?,
            heads_q8: Q8_1Vector::alloc(device, n_q)?,
        })
    }
}

/// The buffers of this pass, where there are any.
pub(super) fn buffers(buffers: &mut Option<Buffers>) -> Result<&mut Buffers> {
    buffers.as_mut().context("the unfused pass takes one token at a time")
}

/// One layer, as [`forward::layer`].
pub(super) fn layer(
    device: &Device,
    weights: &Layer,
    settings: &Settings,
    cache: &mut KvCache,
    b: &mut forward::Buffers,
    index: usize,
    probe: Probe,
) -> Result<(), Halt> {
    let Settings { activations, rms_eps, head_dim, n_head_kv, ref rope, attention, .. } = *settings;
    let u = buffers(&mut b.unfused)?;

    ops::rms_norm(device, &b.x, &weights.attn_norm, rms_eps, &mut u.normed)?;
    probe.after(Op::AttnNorm, index, device, &u.normed)?;
    let normed = input(device, activations, &u.normed, &mut u.normed_q8, probe, Op::AttnNormQ8, index)?;
    linear(device, &weights.attn_q, normed, &mut b.q)?;
    probe.after(Op::Q, index, device, &b.q)?;
    linear(device, &weights.attn_k, normed, &mut u.k)?;
    probe.after(Op::K, index, device, &u.k)?;
    linear(device, &weights.attn_v, normed, &mut u.v)?;
    probe.after(Op::V, index, device, &u.v)?;

    ops::rope(device, &mut b.q, rope, &b.steps, attention.n_head, head_dim)?;
    probe.after(Op::QRope, index, device, &b.q)?;
    ops::rope(device, &mut u.k, rope, &b.steps, n_head_kv, head_dim)?;
    probe.after(Op::KRope, index, device, &u.k)?;
    match (&mut *cache, &mut b.stage) {
        (KvCache::F16(layer), _) => ops::kv_append(device, &u.k, &u.v, layer, &b.steps)?,
        (KvCache::Q8_0(cache), Some(stage)) => {
            ops::kv_append(device, &u.k, &u.v, &mut stage.layer, &stage.rows)?;
            ops::quantize_kv(device, stage, &b.steps, 1, cache)?;
        }
        (KvCache::Q8_0(_), None) => {
            return Err(anyhow!("the buffers have no stage for a cache in Q8_0").into());
        }
    }
    probe.after(Op::KvAppend, index, device, cache)?;
    ops::attention(device, &b.q, &*cache, &b.steps, attention, &mut b.attention, &mut b.heads, None)?;
    probe.after(Op::Attention, index, device, &b.heads)?;
    let heads = input(device, activations, &b.heads, &mut u.heads_q8, probe, Op::AttentionQ8, index)?;
    ops::gemv(device, &weights.attn_output, heads, None, Output::Add(&mut b.x, None))?;
    probe.after(Op::AttnOutput, index, device, &b.x)?;

    ops::rms_norm(device, &b.x, &weights.ffn_norm, rms_eps, &mut u.normed)?;
    probe.after(Op::FfnNorm, index, device, &u.normed)?;
    let normed = input(device, activations, &u.normed, &mut u.normed_q8, probe, Op::FfnNormQ8, index)?;
    let ffn = &mut b.ffn;
    let n_ff = ffn.hidden.len();
    let (mut hidden, up_values) = match &weights.ffn_gate_up {
        GateUp::Joined(matrix) => {
            ops::gemv(device, matrix, normed, None, Output::Set(&mut ffn.gate_up))?;
            probe.after(Op::FfnGateUp, index, device, &ffn.gate_up)?;
            (ffn.gate_up.part(0..n_ff), ffn.gate_up.part(n_ff..2 * n_ff))
        }
        GateUp::Apart { gate, up } => {
            let mut up_values = ffn.gate_up.part(0..n_ff);
            ops::gemv(device, gate, normed, None, Output::Set(&mut ffn.hidden))?;
            ops::gemv(device, up, normed, None, Output::Set(&mut up_values))?;
            probe.after(Op::FfnGateUp, index, device, &ffn.hidden)?;
            (ffn.hidden.part(0..n_ff), up_values)
        }
    };
    ops::swiglu(device, &mut hidden, &up_values)?;
    probe.after(Op::FfnSwiglu, index, device, &hidden)?;
    let hidden = input(device, activations, &hidden, &mut ffn.hidden_q8, probe, Op::FfnSwigluQ8, index)?;
    ops::gemv(device, &weights.ffn_down, hidden, None, Output::Add(&mut b.x, None))?;
    probe.after(Op::FfnOutput, index, device, &b.x)
}

/// The logits of the hidden state `x`.
pub(super) fn logits(
    device: &Device,
    weights: &Weights,
    settings: &Settings,
    x: &Buffer<f32>,
    u: &mut Buffers,
    logits: &mut Buffer<f32>,
    probe: Probe,
) -> Result<(), Halt> {
    ops::rms_norm(device, x, &weights.output_norm, settings.rms_eps, &mut u.normed)?;
    probe.after(Op::OutputNorm, 0, device, &u.normed)?;
    let normed =
        input(device, settings.activations, &u.normed, &mut u.normed_q8, probe, Op::OutputNormQ8, 0)?;
    Ok(ops::gemv(device, weights.output(), normed, None, Output::Set(logits))?)
}

/// `y = W x + b`, the bias where there is one.
fn linear(device: &Device, weights: &Linear, x: Input, y: &mut Buffer<f32>) -> Result<()> {
    let output = match &weights.bias {
        Some(bias) => Output::SetBiased(y, bias),
        None => Output::Set(y),
    };
    ops::gemv(device, &weights.weight, x, None, output)
}

/// A vector as the matrices take it: as it is on the exact path, quantized into `q8` on the fast one, which is `op` of
/// layer `index`.
fn input<'a>(
    device: &Device,
    activations: Activations,
    values: &'a Buffer<f32>,
    q8: &'a mut Q8_1Vector,
    probe: Probe,
    op: Op,
    index: usize,
) -> Result<Input<'a>, Halt> {
    match activations {
        Activations::F32 => Ok(Input::F32(values, None)),
        Activations::Q8_1 => {
            ops::quantize_q8_1(device, values, q8)?;
            probe.after(op, index, device, q8)?;
            Ok(Input::Q8_1(q8))
        }
    }
}
