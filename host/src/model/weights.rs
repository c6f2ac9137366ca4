//! A model's weights, each resolved once into a device buffer.

use crate::config::Config;
use crate::device::{Buffer, Device};
use crate::gguf::{GgmlType, Gguf, GgufError};
use crate::ops::{self, Matrix, Packer};
use anyhow::{Context as _, Result, bail};
use gpu_kernels::formats::Format;
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
    /// Uploads every tensor that `config` asks for.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit, or the device has no room: the message names the tensor.
    pub fn upload(
        device: &Device,
        gguf: &Gguf,
        config: &Config,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let uploaded = gguf.tensors().filter(|tensor| tensor.info.name != ROPE_FACTORS);
        let total = uploaded.map(|tensor| tensor.info.n_bytes as u64).sum();
        let n_rot = config.rope.n_rot;
        let pairs = ops::pair_order(config.rope.layout, config.head_dim, n_rot);
        let mut loader =
            Loader { packer: Packer::new(device), device, gguf, progress, pairs, done: 0, total };
        let output = match gguf.tensor_info("output.weight").is_some() {
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

/// Goes into the rotation's frequencies, and is no weight on the device.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The factors that divide the rotation's frequencies, where the file has them (llama 3).
pub(super) fn rope_factors(gguf: &Gguf) -> Result<Option<Vec<f32>>> {
    if gguf.tensor_info(ROPE_FACTORS).is_none() {
        return Ok(None);
    }
    Ok(Some(floats(gguf, ROPE_FACTORS)?))
}

/// Uploads tensors by name and reports how far it is.
struct Loader<'a> {
    device: &'a Device,
    gguf: &'a Gguf,
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
            bias: if self.gguf.tensor_info(&bias).is_some() { Some(self.vector(&bias)?) } else { None },
        })
    }

    fn gate_up(&mut self, gate: &str, up: &str) -> Result<GateUp> {
        let info = |name| self.gguf.tensor_info(name).map(|info| (info.ggml_type, info.shape.clone()));
        let n_ff = info(gate).and_then(|(_, shape)| shape.get(1).copied()).unwrap_or(0);
        if info(gate) != info(up) || !n_ff.is_multiple_of(2) {
            return Ok(GateUp::Apart { gate: self.matrix(gate)?, up: self.matrix(up)? });
        }
        let order = RowOrder { order: Order::Halves as u32, group: u32::try_from(n_ff)?, n_rot: 0 };
        Ok(GateUp::Joined(self.ordered(order, &[gate, up])?))
    }

    fn matrix(&mut self, name: &str) -> Result<Matrix> {
        self.ordered(RowOrder::NATURAL, &[name])
    }

    /// The rows of tensors of one type and width, one below the other.
    fn ordered(&mut self, order: RowOrder, names: &[&str]) -> Result<Matrix> {
        let tensors = names.iter().map(|name| self.gguf.tensor(name)).collect::<Result<Vec<_>, _>>()?;
        let (name, info) = (names[0], tensors[0].info);
        let [n_cols, _] = info.shape[..] else {
            bail!("tensor {name} has {} dimensions, a matrix has 2", info.shape.len())
        };
        let format = format_of(info.ggml_type);
        let format = format.with_context(|| format!("tensor {name}: no kernels for {}", info.ggml_type))?;
        let n_rows = tensors.iter().map(|tensor| tensor.info.shape.get(1).copied().unwrap_or(1)).sum();
        let parts: Vec<&[u8]> = tensors.iter().map(|tensor| tensor.data).collect();
        let matrix = self.packer.matrix(format, n_rows, n_cols, order, &parts);
        let matrix = matrix.with_context(|| format!("cannot load tensor {}", names.join(" and ")))?;
        self.advance(parts.iter().map(|part| part.len()).sum());
        Ok(matrix)
    }

    fn vector(&mut self, name: &str) -> Result<Buffer<f32>> {
        let values = floats(self.gguf, name)?;
        let buffer = self.device.alloc_from(&values).with_context(|| format!("cannot load tensor {name}"))?;
        self.advance(buffer.n_bytes());
        Ok(buffer)
    }

    fn advance(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }
}

/// An F32 tensor's values.
fn floats(gguf: &Gguf, name: &str) -> Result<Vec<f32>, GgufError> {
    let (chunks, _) = gguf.tensor(name)?.data.as_chunks::<4>();
    Ok(chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// The kernels' format for a tensor type, by GGUF's name of both.
pub(crate) fn format_of(ggml_type: GgmlType) -> Option<Format> {
    Format::ALL.iter().copied().find(|format| format.name() == ggml_type.name())
}
