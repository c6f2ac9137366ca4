//! The forward pass of one token as a chain: all of its operations in one launch.

use super::forward::Buffers;
use super::trace::{Halt, Op, Point, Probe};
use super::weights::{GateUp, Layer, Linear, Weights};
use super::{Activations, Settings};
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{self, Chain, ChainBuilder, KvLayer, Norm, QkvWeights, Vector};
use anyhow::{Result, bail};

/// The chain, and where in it each operation of the model ends.
pub(super) struct ForwardChain {
    chain: Chain,
    /// Where the token's embedding goes.
    x: Vector,
    ends: Vec<End>,
}

/// What an operation leaves, and how many of the chain's have run then.
struct End {
    point: Point,
    /// `None` for the logits, which have a buffer of their own.
    vector: Option<Vector>,
    len: usize,
}

impl ForwardChain {
    /// One token through the whole model: appends to the caches at the step's position, and leaves the logits in their
    /// buffer.
    pub(super) fn new(
        device: &Device,
        config: &Config,
        weights: &Weights,
        settings: &Settings,
        caches: &mut [KvLayer],
        b: &mut Buffers,
    ) -> Result<Self> {
        let Settings { activations, rms_eps: eps, ref rope, attention, .. } = *settings;
        let n_qkv = (config.n_head + 2 * config.n_head_kv) * config.head_dim;
        let most_rows = config.n_vocab.max(2 * config.n_ff).max(n_qkv);
        let mut c = ChainBuilder::new(device, activations == Activations::F32, most_rows);
        let mut ends = Vec::new();
        let mut leaves = |op, layer, c: &ChainBuilder, vector| {
            ends.push(End { point: Point { op, layer }, vector, len: c.len() });
        };

        let embedding = c.vector(config.n_embd);
        let mut x = embedding;
        for (i, (weights, cache)) in weights.layers.iter().zip(caches).enumerate() {
            let norm = Norm { gamma: &weights.attn_norm, eps };
            let qkv = c.qkv(qkv(weights), x, norm, rope, &b.rotation, attention, cache)?;
            leaves(Op::QRope, i, &c, Some(qkv.queries()));
            let heads = c.attention(qkv)?;
            leaves(Op::Attention, i, &c, Some(heads));
            x = c.add(&weights.attn_output, heads, x)?;
            leaves(Op::AttnOutput, i, &c, Some(x));

            let norm = Norm { gamma: &weights.ffn_norm, eps };
            let GateUp::Joined(gate_up) = &weights.ffn_gate_up else {
                bail!("layer {i}: gate and up are not one matrix");
            };
            let hidden = c.swiglu(gate_up, x, norm)?;
            leaves(Op::FfnSwiglu, i, &c, Some(hidden));
            x = c.add(&weights.ffn_down, hidden, x)?;
            leaves(Op::FfnOutput, i, &c, Some(x));
        }
        let norm = Norm { gamma: &weights.output_norm, eps };
        c.logits(weights.output(), x, norm, &mut b.logits)?;
        leaves(Op::Logits, 0, &c, None);
        Ok(Self { chain: c.build()?, x: embedding, ends })
    }

    /// Runs the step whose vectors are those of set `set`; without the logits if `with_logits` is not set, as for all
    /// but the last token of a prompt.
    ///
    /// Where nobody watches or stops it, it is two launches.
    pub(super) fn run(
        &mut self,
        device: &Device,
        weights: &Weights,
        settings: &Settings,
        b: &mut Buffers,
        set: u32,
        with_logits: bool,
        probe: Probe,
    ) -> Result<(), Halt> {
        let Self { chain, x, ends } = self;
        ops::embed_chain(device, &weights.token_embd, &b.step, &settings.rope, chain, &mut b.rotation)?;
        probe.after(Op::Embed, 0, device, &chain.values(device, *x, set)?)?;
        let n_ends = if with_logits { ends.len() } else { ends.len() - 1 };
        if matches!(probe, Probe::Nothing) {
            return Ok(chain.run(device, &b.step, 0..ends[n_ends - 1].len, None)?);
        }
        let mut start = 0;
        for End { point: Point { op, layer }, vector, len } in &ends[..n_ends] {
            chain.run(device, &b.step, start..*len, None)?;
            match vector {
                Some(vector) => probe.after(*op, *layer, device, &chain.values(device, *vector, set)?)?,
                None => probe.after(*op, *layer, device, &b.logits)?,
            }
            start = *len;
        }
        Ok(())
    }

    /// Makes all vectors unwritten: the next step may use either set.
    pub(super) fn clear(&mut self, device: &Device) -> Result<()> {
        self.chain.clear(device)
    }

    /// Runs a step, and says how long each operation took while all were under way: means over the blocks, in microseconds.
    pub(super) fn times(
        &mut self,
        device: &Device,
        weights: &Weights,
        settings: &Settings,
        b: &mut Buffers,
    ) -> Result<Vec<(Point, f64)>> {
        let (n, n_blocks) = (self.chain.len(), self.chain.n_blocks());
        let mut times: Buffer<u64> = device.alloc((n + 1) * n_blocks * 8)?;
        let (chain, rope) = (&mut self.chain, &settings.rope);
        ops::embed_chain(device, &weights.token_embd, &b.step, rope, chain, &mut b.rotation)?;
        self.chain.run(device, &b.step, 0..n, Some(&mut times))?;
        let times = device.to_vec(&times)?;
        if let Ok(path) = std::env::var("RAW") {
            std::fs::write(path, bytemuck::cast_slice::<u64, u8>(&times[..n * n_blocks * 8])).unwrap();
        }
        let mean = |operation: usize| {
            let all = &times[operation * n_blocks..][..n_blocks];
            let first = times[0];
            all.iter().map(|&time| time as f64 - first as f64).sum::<f64>() / n_blocks as f64 / 1e3
        };
        let mut start = 0;
        let spent = |end: &End| {
            let spent = mean(end.len) - mean(start);
            start = end.len;
            (end.point, spent)
        };
        Ok(self.ends.iter().map(spent).collect())
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
