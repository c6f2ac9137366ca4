//! The forward pass in f64, by the formulas: nothing here comes from the host crate but the names of the operations.

use super::made_up::{MadeUp, Shape};
use half::f16;
use host::model::Op;
use std::iter::zip;

/// Sees what each operation makes, by operation and layer, and says what the next one gets to work with.
pub type Watch<'a> = &'a mut dyn FnMut(Op, usize, Vec<f64>) -> Vec<f64>;

/// Changes nothing.
pub fn unwatched(_: Op, _: usize, values: Vec<f64>) -> Vec<f64> {
    values
}

/// A conversation: the tokens so far, as keys and values.
pub struct Reference<'a> {
    model: &'a MadeUp,
    /// By layer and position, rounded to f16 as the KV cache is: `[n_head_kv, head_dim]` each.
    caches: Vec<Vec<(Vec<f64>, Vec<f64>)>>,
}

impl<'a> Reference<'a> {
    pub fn new(model: &'a MadeUp) -> Self {
        Self { model, caches: vec![Vec::new(); model.shape.n_layer] }
    }

    /// The logits after one more token.
    pub fn token(&mut self, token: u32, watch: Watch) -> Vec<f64> {
        let &Shape { n_embd, tied, .. } = self.model.shape;
        let row = &self.tensor("token_embd.weight")[token as usize * n_embd..][..n_embd];
        let mut x = watch(Op::Embed, 0, row.to_vec());
        for index in 0..self.model.shape.n_layer {
            x = self.layer(index, x, watch);
        }
        let normed = watch(Op::OutputNorm, 0, self.rms_norm("output_norm.weight", &x));
        let output = if tied { "token_embd.weight" } else { "output.weight" };
        watch(Op::Logits, 0, self.product(output, &normed))
    }

    /// The hidden state `x` after layer `index`, at the next position of that layer's cache.
    pub fn layer(&mut self, index: usize, x: Vec<f64>, watch: Watch) -> Vec<f64> {
        let name = |part: &str| format!("blk.{index}.{part}");
        let position = self.caches[index].len();

        let normed = watch(Op::AttnNorm, index, self.rms_norm(&name("attn_norm.weight"), &x));
        let q = watch(Op::Q, index, self.linear(&name("attn_q"), &normed));
        let k = watch(Op::K, index, self.linear(&name("attn_k"), &normed));
        let v = watch(Op::V, index, self.linear(&name("attn_v"), &normed));
        let q = watch(Op::QRope, index, self.rope(q, position));
        let k = watch(Op::KRope, index, self.rope(k, position));
        let rounded = k.iter().chain(&v).map(|&value| f16::from_f64(value).to_f64()).collect();
        let mut k = watch(Op::KvAppend, index, rounded);
        let v = k.split_off(k.len() / 2);
        self.caches[index].push((k, v));
        let heads = watch(Op::Attention, index, self.attention(index, &q));
        let x = watch(Op::AttnOutput, index, sum(&x, &self.product(&name("attn_output.weight"), &heads)));

        let normed = watch(Op::FfnNorm, index, self.rms_norm(&name("ffn_norm.weight"), &x));
        let hidden = watch(Op::FfnSwiglu, index, self.swiglu(index, &normed));
        watch(Op::FfnOutput, index, sum(&x, &self.product(&name("ffn_down.weight"), &hidden)))
    }

    /// The feed-forward network of layer `index` alone.
    pub fn ffn(&self, index: usize, x: &[f64]) -> Vec<f64> {
        self.product(&format!("blk.{index}.ffn_down.weight"), &self.swiglu(index, x))
    }

    fn tensor(&self, name: &str) -> &'a [f64] {
        &self.model.weights[name]
    }

    fn rms_norm(&self, gamma: &str, x: &[f64]) -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + f64::from(self.model.shape.rms_eps)).sqrt();
        zip(x, self.tensor(gamma)).map(|(v, gamma)| v * factor * gamma).collect()
    }

    fn product(&self, matrix: &str, x: &[f64]) -> Vec<f64> {
        let rows = self.tensor(matrix).chunks_exact(x.len());
        rows.map(|row| zip(row, x).map(|(w, x)| w * x).sum()).collect()
    }

    fn linear(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let product = self.product(&format!("{name}.weight"), x);
        if self.model.shape.biases { sum(&product, self.tensor(&format!("{name}.bias"))) } else { product }
    }

    fn swiglu(&self, index: usize, x: &[f64]) -> Vec<f64> {
        let gate = self.product(&format!("blk.{index}.ffn_gate.weight"), x);
        let up = self.product(&format!("blk.{index}.ffn_up.weight"), x);
        zip(gate, up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
    }

    fn rope(&self, mut x: Vec<f64>, position: usize) -> Vec<f64> {
        let shape = self.model.shape;
        for head in x.chunks_exact_mut(shape.head_dim) {
            for pair in 0..shape.n_rot / 2 {
                let mut angle = position as f64;
                angle *= f64::from(shape.rope_base).powf(-((2 * pair) as f64) / shape.n_rot as f64);
                angle /= f64::from(shape.rope_scale.unwrap_or(1.0));
                if shape.rope_factors {
                    angle /= self.tensor("rope_freqs.weight")[pair];
                }
                let (a, b) = match shape.architecture {
                    "llama" => (2 * pair, 2 * pair + 1),
                    "qwen2" => (pair, pair + shape.n_rot / 2),
                    other => panic!("no rope for {other}"),
                };
                let (sin, cos) = angle.sin_cos();
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
            }
        }
        x
    }

    fn attention(&self, index: usize, q: &[f64]) -> Vec<f64> {
        let &Shape { n_head, n_head_kv, head_dim, .. } = self.model.shape;
        let cache = &self.caches[index];
        let mut heads = Vec::new();
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let at = head / (n_head / n_head_kv) * head_dim;
            let score = |(k, _): &(Vec<f64>, _)| {
                zip(q, &k[at..]).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()
            };
            let scores: Vec<f64> = cache.iter().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            let value =
                |d| zip(&weights, cache).map(|(weight, (_, v))| weight * v[at + d]).sum::<f64>() / total;
            heads.extend((0..head_dim).map(value));
        }
        heads
    }
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    zip(a, b).map(|(a, b)| a + b).collect()
}
