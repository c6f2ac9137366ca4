//! Stopping a run after any operation: for debugging a kernel, and for tests.

use crate::device::{Buffer, Device};
use std::fmt;

/// An operation of the forward pass, named for what it leaves in its buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The token's embedding: `[n_embd]`.
    Embed,
    /// Normalised input of attention: `[n_embd]`.
    AttnNorm,
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
    /// Attention's heads: `[n_head, head_dim]`.
    Attention,
    /// Hidden state after attention's projection is added: `[n_embd]`.
    AttnOutput,
    /// Normalised input of the feed-forward network: `[n_embd]`.
    FfnNorm,
    /// `silu(gate) * up`: `[n_ff]`.
    FfnSwiglu,
    /// Hidden state after the feed-forward network is added: `[n_embd]`.
    FfnOutput,
    /// Normalised hidden state of the last layer: `[n_embd]`.
    OutputNorm,
    /// The logits: `[n_vocab]`.
    Logits,
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

/// Where to stop, if anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Probe {
    /// The point to stop at.
    pub stop: Option<Point>,
}

impl Probe {
    /// To be called after each operation: ends the run where it should stop.
    pub(super) fn after(
        &self,
        op: Op,
        layer: usize,
        device: &Device,
        buffer: &Buffer<f32>,
    ) -> Result<(), Halt> {
        if self.stop == Some(Point { op, layer }) { Err(Halt::At(device.to_vec(buffer)?)) } else { Ok(()) }
    }
}
