//! Models with made-up weights, small enough to run in f64, each of another shape.

use crate::kernels::Random;
use crate::kernels::formats::{dequantize, random_blocks};
use gpu_kernels::formats::Format;
use host::gguf::writer::GgufWriter;
use host::gguf::{GgmlType, Gguf};
use std::collections::HashMap;

/// What a model looks like.
pub struct Shape {
    pub what: &'static str,
    pub architecture: &'static str,
    pub n_vocab: usize,
    pub n_embd: usize,
    pub n_ff: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    pub head_dim: usize,
    pub n_rot: usize,
    pub rope_base: f32,
    /// Positions are divided by this.
    pub rope_scale: Option<f32>,
    /// Whether there is a `rope_freqs.weight`.
    pub rope_factors: bool,
    /// Whether the embeddings also make the logits.
    pub tied: bool,
    /// Whether q, k and v have biases.
    pub biases: bool,
    pub rms_eps: f32,
    /// The format of a matrix, by layer (0 outside the layers) and name (`attn_q`, `token_embd`).
    pub format: fn(layer: usize, name: &str) -> Format,
}

/// A llama: pairs side by side in rope, three query heads to a key-value head, the embeddings used twice.
pub const LLAMA: Shape = Shape {
    what: "llama in F32",
    architecture: "llama",
    n_vocab: 37,
    n_embd: 96,
    n_ff: 160,
    n_layer: 3,
    n_head: 3,
    n_head_kv: 1,
    head_dim: 32,
    n_rot: 32,
    rope_base: 10_000.0,
    rope_scale: None,
    rope_factors: false,
    tied: true,
    biases: false,
    rms_eps: 1e-5,
    format: |_, _| Format::F32,
};

/// A qwen2: pairs half a head apart, biases, an output matrix of its own, heads longer together than `n_embd`.
pub const QWEN2: Shape = Shape {
    what: "qwen2 in F32",
    architecture: "qwen2",
    n_vocab: 41,
    n_ff: 224,
    n_layer: 2,
    n_head: 6,
    n_head_kv: 2,
    head_dim: 64,
    n_rot: 64,
    rope_base: 1e6,
    tied: false,
    biases: true,
    rms_eps: 1e-6,
    ..LLAMA
};

/// Formats side by side: fused and unfused SwiGLU, rope over half a head, with factors and scaled positions.
pub const MIXED: Shape = Shape {
    what: "llama in mixed formats",
    n_embd: 160,
    n_ff: 288,
    n_head: 5,
    n_rot: 16,
    rope_base: 500_000.0,
    rope_scale: Some(4.0),
    rope_factors: true,
    format: |layer, name| match name {
        "token_embd" | "attn_v" | "ffn_gate" => Format::Q8_0,
        "attn_q" | "ffn_down" => Format::F16,
        "ffn_up" if layer == 1 => Format::Q8_0,
        "ffn_up" => Format::F32,
        _ => Format::Q4_1,
    },
    ..LLAMA
};

/// Super-blocks of 256, and the one test whose output matrix is in another format than the embeddings.
pub const K_QUANTS: Shape = Shape {
    what: "qwen2 in K-quants",
    n_embd: 256,
    n_ff: 768,
    n_layer: 1,
    n_head: 4,
    n_head_kv: 2,
    format: |_, name| match name {
        "attn_v" | "ffn_down" | "output" => Format::Q6_K,
        _ => Format::Q4_K,
    },
    ..QWEN2
};

/// Dimensions that are a multiple of nothing.
pub const ODD: Shape = Shape {
    what: "qwen2 of odd dimensions",
    n_vocab: 11,
    n_embd: 75,
    n_ff: 101,
    format: |_, name| if name.starts_with("ffn") { Format::F16 } else { Format::F32 },
    ..QWEN2
};

/// All of them.
pub const SHAPES: [&Shape; 5] = [&LLAMA, &QWEN2, &MIXED, &K_QUANTS, &ODD];

/// A model as a file, and its weights in f64.
pub struct MadeUp {
    pub shape: &'static Shape,
    pub gguf: Gguf,
    /// By tensor name; matrices row by row.
    pub weights: HashMap<String, Vec<f64>>,
}

impl MadeUp {
    pub fn new(shape: &'static Shape) -> Self {
        let mut file =
            Contents { writer: GgufWriter::new(), weights: HashMap::new(), random: Random::new(7) };
        metadata(shape, &mut file.writer);
        file.tensors(shape);
        let gguf = Gguf::from_bytes(file.writer.to_bytes().unwrap()).unwrap();
        Self { shape, gguf, weights: file.weights }
    }
}

fn metadata(shape: &Shape, writer: &mut GgufWriter) {
    let architecture = shape.architecture;
    let key = |name: &str| format!("{architecture}.{name}");
    writer.metadata("general.architecture", architecture).metadata("tokenizer.ggml.model", "no_vocab");
    for (name, value) in [
        ("embedding_length", shape.n_embd),
        ("feed_forward_length", shape.n_ff),
        ("block_count", shape.n_layer),
        ("attention.head_count", shape.n_head),
        ("attention.head_count_kv", shape.n_head_kv),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("rope.dimension_count", shape.n_rot),
        ("context_length", 512),
    ] {
        writer.metadata(key(name), value as u32);
    }
    writer.metadata(key("attention.layer_norm_rms_epsilon"), shape.rms_eps);
    writer.metadata(key("rope.freq_base"), shape.rope_base);
    if let Some(scale) = shape.rope_scale {
        writer.metadata(key("rope.scaling.type"), "linear").metadata(key("rope.scaling.factor"), scale);
    }
}

/// A file being filled.
struct Contents {
    writer: GgufWriter<'static>,
    weights: HashMap<String, Vec<f64>>,
    random: Random,
}

impl Contents {
    fn tensors(&mut self, shape: &Shape) {
        let &Shape { n_vocab, n_embd, n_ff, .. } = shape;
        let (n_q, n_kv) = (shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim);
        self.matrix("token_embd.weight", (shape.format)(0, "token_embd"), n_vocab, n_embd);
        if !shape.tied {
            self.matrix("output.weight", (shape.format)(0, "output"), n_vocab, n_embd);
        }
        // Gains of less than 1 keep the scores small enough for attention to see more than one token.
        self.vector("output_norm.weight", n_embd, 0.1, 0.5);
        if shape.rope_factors {
            self.vector("rope_freqs.weight", shape.n_rot / 2, 1.0, 8.0);
        }
        for layer in 0..shape.n_layer {
            for (name, n_rows, n_cols) in [
                ("attn_q", n_q, n_embd),
                ("attn_k", n_kv, n_embd),
                ("attn_v", n_kv, n_embd),
                ("attn_output", n_embd, n_q),
                ("ffn_gate", n_ff, n_embd),
                ("ffn_up", n_ff, n_embd),
                ("ffn_down", n_embd, n_ff),
            ] {
                let format = (shape.format)(layer, name);
                self.matrix(&format!("blk.{layer}.{name}.weight"), format, n_rows, n_cols);
            }
            self.vector(&format!("blk.{layer}.attn_norm.weight"), n_embd, 0.1, 0.5);
            self.vector(&format!("blk.{layer}.ffn_norm.weight"), n_embd, 0.1, 0.5);
            for (name, len) in [("q", n_q), ("k", n_kv), ("v", n_kv)] {
                if shape.biases {
                    self.vector(&format!("blk.{layer}.attn_{name}.bias"), len, -1.0, 1.0);
                }
            }
        }
    }

    fn matrix(&mut self, name: &str, format: Format, n_rows: usize, n_cols: usize) {
        let blocks = random_blocks(format, n_rows, n_cols, &mut self.random);
        self.weights.insert(name.to_owned(), dequantize(format, &blocks));
        let ggml_type = match format {
            Format::F32 => GgmlType::F32,
            Format::F16 => GgmlType::F16,
            Format::Q8_0 => GgmlType::Q8_0,
            Format::Q4_1 => GgmlType::Q4_1,
            Format::Q4_K => GgmlType::Q4_K,
            Format::Q6_K => GgmlType::Q6_K,
        };
        self.writer.tensor(name, &[n_cols, n_rows], ggml_type, blocks);
    }

    /// Evenly between `low` and `high`.
    fn vector(&mut self, name: &str, len: usize, low: f32, high: f32) {
        let value = |v: f32| low + (high - low) * (v + 1.0) / 2.0;
        let values: Vec<f32> = self.random.vector(len).into_iter().map(value).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.weights.insert(name.to_owned(), values.iter().map(|&v| v.into()).collect());
        self.writer.tensor(name, &[len], GgmlType::F32, bytes);
    }
}
