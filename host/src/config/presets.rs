//! Dimensions of well-known models, to be timed with random weights.

use super::{Architecture, Config, RopeConfig, RopeScaling};
use gpu_kernels::formats::Format;

/// A well-known model as files of it have it.
#[derive(Debug, Clone)]
pub struct Preset {
    /// Its name on the command line.
    pub name: &'static str,
    /// Its dimensions.
    pub config: Config,
    /// Whether queries, keys and values have biases.
    has_bias: bool,
    /// Whether the embeddings make the logits too.
    is_tied: bool,
    mix: Mix,
}

/// Which matrices are in which format.
#[derive(Clone, Copy, Debug)]
enum Mix {
    /// What llama.cpp calls Q4_K_M.
    Q4KM,
    /// Q4_1, but Q8_0 for the embeddings: for rows that are no multiple of the 256 values of a K-quant.
    Q4_1,
}

/// A tensor of a preset.
#[derive(Debug, Clone, PartialEq)]
pub struct PresetTensor {
    /// How its values are stored.
    pub format: Format,
    /// As GGUF has it: a row's length first.
    pub shape: Vec<usize>,
}

impl PresetTensor {
    /// Its size in a file.
    pub fn n_bytes(&self) -> usize {
        self.format.row_bytes(self.shape[0]) * self.shape[1..].iter().product::<usize>()
    }
}

/// A row of the table below.
struct Row {
    name: &'static str,
    architecture: Architecture,
    n_vocab: usize,
    n_embd: usize,
    n_ff: usize,
    n_layer: usize,
    n_head: usize,
    n_head_kv: usize,
    n_ctx_train: usize,
    rope_base: f32,
    rms_eps: f32,
    is_tied: bool,
    mix: Mix,
}

/// From the models' published configurations; llama3-8b is Llama 3.1 with its long context.
const TABLE: [Row; 5] = [
    Row {
        name: "llama3-8b",
        architecture: Architecture::Llama,
        n_vocab: 128_256,
        n_embd: 4096,
        n_ff: 14_336,
        n_layer: 32,
        n_head: 32,
        n_head_kv: 8,
        n_ctx_train: 131_072,
        rope_base: 500_000.0,
        rms_eps: 1e-5,
        is_tied: false,
        mix: Mix::Q4KM,
    },
    Row {
        name: "llama3.2-1b",
        architecture: Architecture::Llama,
        n_vocab: 128_256,
        n_embd: 2048,
        n_ff: 8192,
        n_layer: 16,
        n_head: 32,
        n_head_kv: 8,
        n_ctx_train: 131_072,
        rope_base: 500_000.0,
        rms_eps: 1e-5,
        is_tied: true,
        mix: Mix::Q4KM,
    },
    Row {
        name: "qwen2.5-1.5b",
        architecture: Architecture::Qwen2,
        n_vocab: 151_936,
        n_embd: 1536,
        n_ff: 8960,
        n_layer: 28,
        n_head: 12,
        n_head_kv: 2,
        n_ctx_train: 32_768,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        is_tied: false,
        mix: Mix::Q4KM,
    },
    Row {
        name: "qwen2.5-7b",
        architecture: Architecture::Qwen2,
        n_vocab: 152_064,
        n_embd: 3584,
        n_ff: 18_944,
        n_layer: 28,
        n_head: 28,
        n_head_kv: 4,
        n_ctx_train: 32_768,
        rope_base: 1_000_000.0,
        rms_eps: 1e-6,
        is_tied: false,
        mix: Mix::Q4KM,
    },
    Row {
        name: "smollm2-135m",
        architecture: Architecture::Llama,
        n_vocab: 49_152,
        n_embd: 576,
        n_ff: 1536,
        n_layer: 30,
        n_head: 9,
        n_head_kv: 3,
        n_ctx_train: 8192,
        rope_base: 100_000.0,
        rms_eps: 1e-5,
        is_tied: true,
        mix: Mix::Q4_1,
    },
];

impl Preset {
    /// Every preset.
    pub fn all() -> Vec<Self> {
        TABLE.iter().map(Self::from_row).collect()
    }

    fn from_row(row: &Row) -> Self {
        let head_dim = row.n_embd / row.n_head;
        let config = Config {
            architecture: row.architecture,
            name: Some(row.name.to_owned()),
            n_vocab: row.n_vocab,
            n_embd: row.n_embd,
            n_ff: row.n_ff,
            n_layer: row.n_layer,
            n_head: row.n_head,
            n_head_kv: row.n_head_kv,
            head_dim,
            n_ctx_train: row.n_ctx_train,
            rms_eps: row.rms_eps,
            rope: RopeConfig {
                base: row.rope_base,
                n_rot: head_dim,
                layout: row.architecture.rope_layout(),
                scaling: RopeScaling::None,
            },
        };
        let has_bias = row.architecture == Architecture::Qwen2;
        Self { name: row.name, config, has_bias, is_tied: row.is_tied, mix: row.mix }
    }

    /// A tensor by its name in GGUF files.
    pub fn tensor(&self, name: &str) -> Option<PresetTensor> {
        // A handful of shapes: looked up rarely, kept nowhere.
        self.tensors().find(|(other, _)| other == name).map(|(_, tensor)| tensor)
    }

    /// Every tensor.
    pub fn tensors(&self) -> impl Iterator<Item = (String, PresetTensor)> {
        let is_there = |name: &str| match name {
            "output.weight" => !self.is_tied,
            "rope_freqs.weight" => false,
            _ => self.has_bias || !name.ends_with(".bias"),
        };
        self.config.tensors().filter(move |(name, _)| is_there(name)).map(|(name, shape)| {
            let format = self.format(&name, shape.len());
            (name, PresetTensor { format, shape })
        })
    }

    /// The format of a tensor. Q4_K_M (`llama-quant.cpp`) is Q4_K, but Q6_K for what makes the logits, and for values and down in
    /// the first and last eighth of the layers and every third in between.
    fn format(&self, name: &str, dimensions: usize) -> Format {
        match self.mix {
            _ if dimensions == 1 => return Format::F32,
            Mix::Q4_1 if name == "token_embd.weight" => return Format::Q8_0,
            Mix::Q4_1 => return Format::Q4_1,
            Mix::Q4KM => {}
        }
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let wants_more = match layer {
            Some((index, "attn_v.weight" | "ffn_down.weight")) => {
                let (i, n) = (index.parse().unwrap_or(0), self.config.n_layer);
                i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
            }
            Some(_) => false,
            None => name == "output.weight" || self.is_tied,
        };
        if wants_more { Format::Q6_K } else { Format::Q4_K }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_as_many_bytes_as_of_the_files() {
        // All tensors but the embeddings, of which a token reads one row, where there is an output matrix.
        let read: Vec<(&str, f64)> = Preset::all()
            .iter()
            .map(|preset| {
                let is_read = |name: &str| preset.is_tied || name != "token_embd.weight";
                let tensors = preset.tensors().filter(|(name, _)| is_read(name));
                (preset.name, tensors.map(|(_, tensor)| tensor.n_bytes()).sum::<usize>() as f64 / 1e9)
            })
            .collect();
        let expected = [
            ("llama3-8b", 4.617),
            ("llama3.2-1b", 0.800),
            ("qwen2.5-1.5b", 0.980),
            ("qwen2.5-7b", 4.371),
            ("smollm2-135m", 0.0966),
        ];
        for ((name, read), (expected_name, expected)) in read.into_iter().zip(expected) {
            assert_eq!(name, expected_name);
            assert!((read - expected).abs() < 0.001, "{name}: {read} GB");
        }
    }
}
