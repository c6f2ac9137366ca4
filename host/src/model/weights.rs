//! A model's weights, each resolved once into a device buffer.

use super::source::TensorSource;
use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::ops::{self, Matrix, Packer};
use anyhow::{Context as _, Result};
use gpu_kernels::rows::{Order, RowOrder};

/// A matrix with its bias, where the model has one.
#[derive(Debug)]
pub struct Linear {
    /// `[n_out, n_in]`.
    pub weight: Matrix,
    /// `[n_out]`.
    pub bias: Option<Buffer<f32>>,
}

/// The first half of a feed-forward network.
#[derive(Debug)]
pub enum GateUp {
    /// Gate above up, their rows dealt out to the same quads: `[2 * n_ff, n_embd]`.
    Joined(Matrix),
    /// `[n_ff, n_embd]` each, where their formats differ.
    Apart {
        /// Gate.
        gate: Matrix,
        /// Up.
        up: Matrix,
    },
}

impl GateUp {
    /// The matrix of gate and that of up, which may be the same.
    pub(super) fn matrices(&self) -> [&Matrix; 2] {
        match self {
            Self::Joined(matrix) => [matrix, matrix],
            Self::Apart { gate, up } => [gate, up],
        }
    }
}

/// The weights of one layer.
#[derive(Debug)]
pub struct Layer {
    /// `[n_embd]`.
    pub attn_norm: Buffer<f32>,
    /// `[n_head * head_dim, n_embd]`.
    pub attn_q: Linear,
    /// `[n_head_kv * head_dim, n_embd]`.
    pub attn_k: Linear,
    /// `[n_head_kv * head_dim, n_embd]`.
    pub attn_v: Linear,
    /// `[n_embd, n_head * head_dim]`.
    pub attn_output: Matrix,
    /// `[n_embd]`.
    pub ffn_norm: Buffer<f32>,
    /// Gate and up.
    pub ffn_gate_up: GateUp,
    /// `[n_embd, n_ff]`.
    pub ffn_down: Matrix,
}

/// All weights of a model.
#[derive(Debug)]
pub struct Weights {
    /// `[n_vocab, n_embd]`.
    pub token_embd: Matrix,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// `[n_embd]`.
    pub output_norm: Buffer<f32>,
    /// `[n_vocab, n_embd]`, where it is not the embeddings themselves.
    output: Option<Matrix>,
}

impl Weights {
    /// Puts every tensor that `config` asks for on the device.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit, or the device has no room: the message names the tensor.
    pub(super) fn load(
        device: &Device,
        source: &dyn TensorSource,
        config: &Config,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let n_rot = config.rope.n_rot;
        let pairs = ops::pair_order(config.rope.layout, config.head_dim, n_rot);
        let packer = Packer::new(device);
        let mut loader = Loader { packer, device, source, progress, pairs, done: 0, total: source.n_bytes() };
        let output = match source.has("output.weight") {
            true => Some(loader.matrix("output.weight")?),
            false => None,
        };
        let weights = Self {
            token_embd: loader.matrix("token_embd.weight")?,
            layers: (0..config.n_layer).map(|i| loader.layer(i)).collect::<Result<_>>()?,
            output_norm: loader.vector("output_norm.weight")?,
            output,
        };
        device.synchronize()?;
        Ok(weights)
    }

    /// The matrix that makes the logits: `[n_vocab, n_embd]`.
    pub fn output(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.token_embd)
    }

    /// Layer `index`, counted from 0.
    ///
    /// # Errors
    /// When the model has no such layer.
    pub fn layer(&self, index: usize) -> Result<&Layer> {
        let n_layer = self.layers.len();
        self.layers
            .get(index)
            .with_context(|| format!("the model has {n_layer} layers, there is no layer {index}"))
    }

    pub(super) fn bytes_per_token(&self) -> u64 {
        let layers = self.layers.iter().map(Layer::n_bytes).sum::<usize>();
        let embedding_row = self.token_embd.weight_bytes() / self.token_embd.n_rows();
        (layers + self.output_norm.n_bytes() + self.output().weight_bytes() + embedding_row) as u64
    }
}

impl Layer {
    fn n_bytes(&self) -> usize {
        let linears = [&self.attn_q, &self.attn_k, &self.attn_v];
        let matrices = [&self.attn_output, &self.ffn_down];
        let gate_up = match &self.ffn_gate_up {
            GateUp::Joined(matrix) => matrix.weight_bytes(),
            GateUp::Apart { gate, up } => gate.weight_bytes() + up.weight_bytes(),
        };
        let bias = |linear: &&Linear| linear.bias.as_ref().map_or(0, Buffer::n_bytes);
        self.attn_norm.n_bytes()
            + self.ffn_norm.n_bytes()
            + gate_up
            + linears.iter().map(|linear| linear.weight.weight_bytes() + bias(linear)).sum::<usize>()
            + matrices.iter().map(|matrix| matrix.weight_bytes()).sum::<usize>()
    }
}

/// Loads tensors by name and reports how far it is.
struct Loader<'a> {
    device: &'a Device,
    source: &'a dyn TensorSource,
    packer: Packer<'a>,
    progress: &'a mut dyn FnMut(u64, u64),
    /// The order of the rows that make queries and keys.
    pairs: RowOrder,
    done: u64,
    total: u64,
}

impl Loader<'_> {
    fn layer(&mut self, index: usize) -> Result<Layer> {
        let name = |part: &str| format!("blk.{index}.{part}");
        Ok(Layer {
            attn_norm: self.vector(&name("attn_norm.weight"))?,
            attn_q: self.linear(&name("attn_q"), self.pairs)?,
            attn_k: self.linear(&name("attn_k"), self.pairs)?,
            attn_v: self.linear(&name("attn_v"), RowOrder::NATURAL)?,
            attn_output: self.matrix(&name("attn_output.weight"))?,
            ffn_norm: self.vector(&name("ffn_norm.weight"))?,
            ffn_gate_up: self.gate_up(&name("ffn_gate.weight"), &name("ffn_up.weight"))?,
            ffn_down: self.matrix(&name("ffn_down.weight"))?,
        })
    }

    fn linear(&mut self, name: &str, order: RowOrder) -> Result<Linear> {
        let bias = format!("{name}.bias");
        Ok(Linear {
            weight: self.ordered(order, &[&format!("{name}.weight")])?,
            bias: if self.source.has(&bias) { Some(self.vector(&bias)?) } else { None },
        })
    }

    fn gate_up(&mut self, gate: &str, up: &str) -> Result<GateUp> {
        let [shape, other] = [self.source.matrix_shape(gate)?, self.source.matrix_shape(up)?];
        if shape != other || !shape.n_rows.is_multiple_of(2) {
            return Ok(GateUp::Apart { gate: self.matrix(gate)?, up: self.matrix(up)? });
        }
        let order = RowOrder { order: Order::Halves as u32, group: u32::try_from(shape.n_rows)?, n_rot: 0 };
        Ok(GateUp::Joined(self.ordered(order, &[gate, up])?))
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix> {
        self.ordered(RowOrder::NATURAL, &[name])
    }

    /// The rows of tensors of one type and width, one below the other.
    fn ordered(&mut self, order: RowOrder, names: &[&str]) -> Result<Matrix> {
        let matrix = self.source.matrix(&mut self.packer, names, order);
        let matrix = matrix.with_context(|| format!("cannot load tensor {}", names.join(" and ")))?;
        self.advance(matrix.weight_bytes());
        Ok(matrix)
    }

    fn vector(&mut self, name: &str) -> Result<Buffer<f32>> {
        let values = self.source.vector(name)?;
        let buffer = self.device.alloc_from(&values).with_context(|| format!("cannot load tensor {name}"))?;
        self.advance(buffer.n_bytes());
        Ok(buffer)
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }
}
