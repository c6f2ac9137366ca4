//! What an operation has to move and to compute, whatever the kernel makes of it.

use crate::device::Buffer;
use crate::model::{Activations, Fusion, GateUp, Linear, Model, Op, Point, kv_bytes};
use crate::ops::Matrix;
use anyhow::Result;
use gpu_kernels::activations::{Q8_1_BLOCK, Q8_1Scale};
use std::iter::Sum;
use std::ops::Add;

/// Bytes and arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes of weights, norms and biases, once.
    pub weight_bytes: u64,
    /// Bytes of vectors and of the KV cache, once in and once out.
    pub other_bytes: u64,
    /// Multiplications and additions of matrices and attention: `2 * n_rows * n_cols` of a product with a vector,
    /// `4 * positions * head_dim * n_head` of attention. Others are not counted.
    pub flops: u64,
}

impl Cost {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.other_bytes
    }

    fn weights(bytes: usize) -> Self {
        Self { weight_bytes: bytes as u64, ..Self::default() }
    }

    fn other(bytes: usize) -> Self {
        Self { other_bytes: bytes as u64, ..Self::default() }
    }

    /// A matrix, without the vectors.
    fn matrix(matrix: &Matrix) -> Self {
        let flops = 2 * matrix.n_rows() as u64 * matrix.n_cols() as u64;
        Self { flops, ..Self::weights(matrix.weight_bytes()) }
    }

    /// A matrix and its bias.
    fn linear(linear: &Linear) -> Self {
        Self::matrix(&linear.weight) + Self::weights(linear.bias.as_ref().map_or(0, Buffer::n_bytes))
    }

    fn gate_up(weights: &GateUp) -> Self {
        match weights {
            GateUp::Joined(matrix) => Self::matrix(matrix),
            GateUp::Apart { gate, up } => Self::matrix(gate) + Self::matrix(up),
        }
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weight_bytes: self.weight_bytes + other.weight_bytes,
            other_bytes: self.other_bytes + other.other_bytes,
            flops: self.flops + other.flops,
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Add::add)
    }
}

/// Bytes of `n` values.
const fn f32s(n: usize) -> usize {
    n * size_of::<f32>()
}

/// Bytes of `n` values in Q8_1.
const fn q8_1s(n: usize) -> usize {
    n.next_multiple_of(Q8_1_BLOCK) + n.div_ceil(Q8_1_BLOCK) * size_of::<Q8_1Scale>()
}

/// The cost of an operation of a step whose token sees `n_positions` tokens, itself among them.
///
/// # Errors
/// When the model has no such layer.
pub fn cost(model: &Model, Point { op, layer }: Point, n_positions: usize) -> Result<Cost> {
    let (config, settings, weights) = (model.config(), model.settings(), model.weights());
    let is_fused = settings.fusion == Fusion::Fused;
    let layer = weights.layer(layer)?;
    let (n_embd, n_ff, n_vocab) = (config.n_embd, config.n_ff, config.n_vocab);
    let n_q = config.n_head * config.head_dim;
    let n_kv = config.n_head_kv * config.head_dim;
    let n_pairs = config.rope.n_rot / 2;
    let rotation = n_pairs * size_of::<[f32; 2]>();
    let frequencies = n_pairs * size_of::<f64>();
    // Fused kernels quantize what they read.
    let input = |n| match (settings.fusion, settings.activations) {
        (Fusion::Unfused, Activations::Q8_1) => q8_1s(n),
        _ => f32s(n),
    };
    let cached = |n| kv_bytes(settings.kv_format, n);
    let norm = |gamma: &Buffer<f32>| if is_fused { Cost::weights(gamma.n_bytes()) } else { Cost::default() };

    Ok(match op {
        Op::Embed => {
            let row = weights.token_embd.weight_bytes() / weights.token_embd.n_rows();
            Cost::weights(row) + Cost::other(f32s(n_embd) + frequencies + rotation)
        }
        Op::AttnNorm | Op::FfnNorm | Op::OutputNorm => {
            let gamma = match op {
                Op::AttnNorm => &layer.attn_norm,
                Op::FfnNorm => &layer.ffn_norm,
                _ => &weights.output_norm,
            };
            Cost::weights(gamma.n_bytes()) + Cost::other(2 * f32s(n_embd))
        }
        Op::AttnNormQ8 | Op::FfnNormQ8 | Op::OutputNormQ8 => Cost::other(f32s(n_embd) + q8_1s(n_embd)),
        Op::AttentionQ8 => Cost::other(f32s(n_q) + q8_1s(n_q)),
        Op::FfnSwigluQ8 => Cost::other(f32s(n_ff) + q8_1s(n_ff)),
        Op::Q => Cost::linear(&layer.attn_q) + Cost::other(input(n_embd) + f32s(n_q)),
        Op::K => Cost::linear(&layer.attn_k) + Cost::other(input(n_embd) + f32s(n_kv)),
        Op::V => Cost::linear(&layer.attn_v) + Cost::other(input(n_embd) + f32s(n_kv)),
        Op::QRope if is_fused => {
            let linears = [&layer.attn_q, &layer.attn_k, &layer.attn_v];
            let vectors = input(n_embd) + rotation + f32s(n_q) + 2 * cached(n_kv);
            norm(&layer.attn_norm) + linears.into_iter().map(Cost::linear).sum() + Cost::other(vectors)
        }
        Op::QRope => Cost::other(2 * f32s(n_q) + frequencies),
        Op::KRope => Cost::other(2 * f32s(n_kv) + frequencies),
        Op::KvAppend => Cost::other(2 * f32s(n_kv) + 2 * cached(n_kv)),
        Op::Attention => Cost {
            flops: 4 * (n_positions * n_q) as u64,
            ..Cost::other(2 * cached(n_kv) * n_positions + 2 * f32s(n_q))
        },
        Op::AttnOutput => Cost::matrix(&layer.attn_output) + Cost::other(input(n_q) + 2 * f32s(n_embd)),
        Op::FfnGateUp => Cost::gate_up(&layer.ffn_gate_up) + Cost::other(input(n_embd) + 2 * f32s(n_ff)),
        Op::FfnSwiglu if is_fused => {
            let vectors = input(n_embd) + f32s(n_ff);
            norm(&layer.ffn_norm) + Cost::gate_up(&layer.ffn_gate_up) + Cost::other(vectors)
        }
        Op::FfnSwiglu => Cost::other(3 * f32s(n_ff)),
        Op::FfnOutput => Cost::matrix(&layer.ffn_down) + Cost::other(input(n_ff) + 2 * f32s(n_embd)),
        Op::Logits => {
            let vectors = input(n_embd) + f32s(n_vocab);
            norm(&weights.output_norm) + Cost::matrix(weights.output()) + Cost::other(vectors)
        }
        Op::Layers => {
            let of_layer = [Op::QRope, Op::Attention, Op::AttnOutput, Op::FfnSwiglu, Op::FfnOutput];
            let points = (0..config.n_layer).flat_map(|layer| of_layer.map(|op| Point { op, layer }));
            points.map(|point| cost(model, point, n_positions)).sum::<Result<_>>()?
        }
        Op::Choice => Cost::other(f32s(n_vocab)),
    })
}
