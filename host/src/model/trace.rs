//! Stopping or watching a run after any operation: for debugging a kernel, for timing, and for tests.

use crate::device::{Buffer, Device};
use crate::ops::{KvCache, Q8_1Vector};
use anyhow::Result;
use std::fmt;

/// An operation of the forward pass, named for what it leaves in its buffer.
///
/// The fused pass does several in one kernel and names the last of them; it also stops at [`KvAppend`](Self::KvAppend), which
/// one of these does besides. What is in Q8_1 is handed back as the numbers
/// that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The token's embedding: `[n_embd]`.
    Embed,
    /// Normalised input of attention: `[n_embd]`.
    AttnNorm,
    /// The same in Q8_1.
    AttnNormQ8,
    /// Queries, before rotation: `[n_head, head_dim]`.
    Q,
    /// Keys, before rotation: `[n_head_kv, head_dim]`.
    K,
    /// Values: `[n_head_kv, head_dim]`.
    V,
    /// Queries, rotated: `[n_head, head_dim]`.
    QRope,
    /// Keys, rotated: `[n_head_kv, head_dim]`.
    KRope,
    /// The layer's KV cache with the token in it: keys, then values, `[n_head_kv, n_ctx, head_dim]` each.
    KvAppend,
    /// Attention's heads: `[n_head, head_dim]`.
    Attention,
    /// The same in Q8_1.
    AttentionQ8,
    /// Hidden state after attention's projection is added: `[n_embd]`.
    AttnOutput,
    /// Normalised input of the feed-forward network: `[n_embd]`.
    FfnNorm,
    /// The same in Q8_1.
    FfnNormQ8,
    /// Gate, and behind it up where they are one matrix: `[n_ff]` or `[2 * n_ff]`.
    FfnGateUp,
    /// `silu(gate) * up`: `[n_ff]`.
    FfnSwiglu,
    /// The same in Q8_1.
    FfnSwigluQ8,
    /// Hidden state after the feed-forward network is added: `[n_embd]`.
    FfnOutput,
    /// All layers, where a token goes through them in one launch: a run cannot stop here.
    Layers,
    /// Normalised hidden state of the last layer: `[n_embd]`.
    OutputNorm,
    /// The same in Q8_1.
    OutputNormQ8,
    /// The logits: `[n_vocab]`.
    Logits,
    /// The next token, chosen from the logits: a run cannot stop here.
    Choice,
}

/// A place in the forward pass: after `op` of layer `layer` (0 for operations outside the layers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Point {
    /// The operation.
    pub op: Op,
    /// The layer, counted from 0.
    pub layer: usize,
}

/// Why a run ended early.
#[derive(Debug)]
pub enum Halt {
    /// It reached the point to stop at; what the operation left in its buffer.
    At(Vec<f32>),
    /// It failed.
    Error(anyhow::Error),
}

impl From<anyhow::Error> for Halt {
    fn from(error: anyhow::Error) -> Self {
        Halt::Error(error)
    }
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Halt::At(values) => write!(f, "stopped with {} values", values.len()),
            Halt::Error(error) => write!(f, "{error:#}"),
        }
    }
}

/// What happens after each operation.
#[derive(Clone, Copy, Default)]
pub enum Probe<'a> {
    /// Nothing: the run goes on.
    #[default]
    Nothing,
    /// The run ends at this point.
    StopAt(Point),
    /// Someone is told; an error ends the run.
    Watch(&'a dyn Fn(Point) -> Result<()>),
}

impl Probe<'_> {
    /// To be called after each operation, with the buffer that it is named for.
    pub(super) fn after(
        &self,
        op: Op,
        layer: usize,
        device: &Device,
        buffer: &impl Values,
    ) -> Result<(), Halt> {
        self.beside(op, layer, device, buffer)?;
        Ok(self.passed(op, layer)?)
    }

    /// To be called with what a fused operation has left beside the buffer that it is named for: a run can stop for it, but
    /// it is no operation of its own.
    pub(super) fn beside(
        &self,
        op: Op,
        layer: usize,
        device: &Device,
        buffer: &impl Values,
    ) -> Result<(), Halt> {
        match self {
            Probe::StopAt(point) if *point == (Point { op, layer }) => Err(Halt::At(buffer.values(device)?)),
            _ => Ok(()),
        }
    }

    /// To be called after an operation that a run cannot stop at.
    pub(super) fn passed(&self, op: Op, layer: usize) -> Result<()> {
        match self {
            Probe::Watch(watch) => watch(Point { op, layer }),
            Probe::Nothing | Probe::StopAt(_) => Ok(()),
        }
    }
}

/// What an operation leaves, as numbers.
pub(super) trait Values {
    /// Waits for the device and brings them.
    fn values(&self, device: &Device) -> Result<Vec<f32>>;
}

impl Values for Buffer<f32> {
    fn values(&self, device: &Device) -> Result<Vec<f32>> {
        device.to_vec(self)
    }
}

impl Values for Q8_1Vector {
    fn values(&self, device: &Device) -> Result<Vec<f32>> {
        self.to_f32(device)
    }
}

impl Values for KvCache {
    fn values(&self, device: &Device) -> Result<Vec<f32>> {
        self.to_f32(device)
    }
}
