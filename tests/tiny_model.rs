//! Models of a few kilobytes: complete GGUF files of a supported architecture, to be changed and broken at will.

use host::gguf::writer::GgufWriter;
use host::gguf::{GgmlType, Gguf, Value};

pub const N_EMBD: usize = 64;
pub const N_HEAD: usize = 2;
pub const N_HEAD_KV: usize = 1;
pub const HEAD_DIM: usize = 32;
pub const N_FF: usize = 96;
pub const N_LAYER: usize = 2;
pub const N_VOCAB: usize = 16;

/// The metadata and tensors of a model; weights are F32 and small.
pub struct TinyModel {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<usize>, GgmlType)>,
}

impl TinyModel {
    /// A llama without `output.weight`, vocabulary as `no_vocab`.
    pub fn llama() -> Self {
        Self::new("llama")
    }

    /// A qwen2, which has biases on q, k and v.
    pub fn qwen2() -> Self {
        let mut model = Self::new("qwen2");
        for layer in 0..N_LAYER {
            for (name, len) in
                [("q", N_HEAD * HEAD_DIM), ("k", N_HEAD_KV * HEAD_DIM), ("v", N_HEAD_KV * HEAD_DIM)]
            {
                model.set_tensor(&format!("blk.{layer}.attn_{name}.bias"), &[len], GgmlType::F32);
            }
        }
        model
    }

    fn new(architecture: &str) -> Self {
        let mut model = Self { metadata: Vec::new(), tensors: Vec::new() };
        model.set("general.architecture", architecture);
        model.set("tokenizer.ggml.model", "no_vocab");
        let numbers = [
            ("embedding_length", N_EMBD),
            ("feed_forward_length", N_FF),
            ("block_count", N_LAYER),
            ("attention.head_count", N_HEAD),
            ("attention.head_count_kv", N_HEAD_KV),
            ("context_length", 128),
        ];
        for (key, value) in numbers {
            model.set(&format!("{architecture}.{key}"), value as u32);
        }
        model.set(&format!("{architecture}.attention.layer_norm_rms_epsilon"), 1e-5f32);

        model.set_tensor("token_embd.weight", &[N_EMBD, N_VOCAB], GgmlType::F32);
        model.set_tensor("output_norm.weight", &[N_EMBD], GgmlType::F32);
        for layer in 0..N_LAYER {
            let tensors: [(&str, &[usize]); 9] = [
                ("attn_norm", &[N_EMBD]),
                ("attn_q", &[N_EMBD, N_HEAD * HEAD_DIM]),
                ("attn_k", &[N_EMBD, N_HEAD_KV * HEAD_DIM]),
                ("attn_v", &[N_EMBD, N_HEAD_KV * HEAD_DIM]),
                ("attn_output", &[N_HEAD * HEAD_DIM, N_EMBD]),
                ("ffn_norm", &[N_EMBD]),
                ("ffn_gate", &[N_EMBD, N_FF]),
                ("ffn_up", &[N_EMBD, N_FF]),
                ("ffn_down", &[N_FF, N_EMBD]),
            ];
            for (name, shape) in tensors {
                model.set_tensor(&format!("blk.{layer}.{name}.weight"), shape, GgmlType::F32);
            }
        }
        model
    }

    /// Adds a key or changes its value.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        self.unset(key).metadata.push((key.to_owned(), value.into()));
        self
    }

    pub fn unset(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(existing, _)| existing != key);
        self
    }

    /// Adds a tensor, or gives it another shape and type.
    pub fn set_tensor(&mut self, name: &str, shape: &[usize], ggml_type: GgmlType) -> &mut Self {
        self.unset_tensor(name).tensors.push((name.to_owned(), shape.to_vec(), ggml_type));
        self
    }

    pub fn unset_tensor(&mut self, name: &str) -> &mut Self {
        self.tensors.retain(|(existing, ..)| existing != name);
        self
    }

    /// The file's bytes. F32 weights are deterministic and between -0.1 and 0.1; other types are all zeros.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = GgufWriter::new();
        for (key, value) in &self.metadata {
            writer.metadata(key.as_str(), value.clone());
        }
        let mut state = 1u32;
        for (name, shape, ggml_type) in &self.tensors {
            let n_bytes = ggml_type.n_bytes(shape).expect("a test's tensor has a valid shape");
            let data: Vec<u8> = if *ggml_type == GgmlType::F32 {
                (0..n_bytes / 4).flat_map(|_| next_weight(&mut state).to_le_bytes()).collect()
            } else {
                vec![0; n_bytes]
            };
            writer.tensor(name.as_str(), shape, *ggml_type, data);
        }
        writer.to_bytes().expect("a test's model can be written")
    }

    pub fn to_gguf(&self) -> Gguf {
        Gguf::from_bytes(self.to_bytes()).expect("a test's model can be read")
    }
}

/// A linear congruential generator: the same weights on every machine and in every release.
fn next_weight(state: &mut u32) -> f32 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    ((*state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.2
}
