//! Which tensors a model needs, and in which shapes.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};
use gpu_kernels::formats::Format;

use super::Config;
use crate::gguf::{Gguf, Shown, TensorInfo};

const QKV_BIASES: [&str; 3] = ["attn_q.bias", "attn_k.bias", "attn_v.bias"];

/// What a model must or may have: a matrix in any [`Format`] that kernels read, or an F32 vector.
struct Expected {
    name: &'static str,
    shape: Vec<usize>,
    required: bool,
}

impl Expected {
    fn required(name: &'static str, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), required: true }
    }

    fn optional(name: &'static str, shape: &[usize]) -> Self {
        Self { required: false, ..Self::required(name, shape) }
    }

    fn check(&self, gguf: &Gguf, name: &str) -> Result<()> {
        let info = match gguf.tensor_info(name) {
            Some(info) => info,
            None if self.required => bail!(
                "{}: tensor \"{name}\" is missing: needed one of shape {:?}",
                gguf.file().display(),
                self.shape
            ),
            None => return Ok(()),
        };
        self.check_shape(gguf, info)?;
        self.check_type(gguf, info)
    }

    fn check_shape(&self, gguf: &Gguf, info: &TensorInfo) -> Result<()> {
        ensure!(
            info.shape == self.shape,
            "{}: tensor \"{}\": needed the shape {:?}, found {:?}",
            gguf.file().display(),
            info.name,
            self.shape,
            info.shape,
        );
        Ok(())
    }

    fn check_type(&self, gguf: &Gguf, info: &TensorInfo) -> Result<()> {
        let formats = if self.shape.len() == 1 { &[Format::F32][..] } else { Format::ALL };
        let types: Vec<&str> = formats.iter().map(|format| format.name()).collect();
        ensure!(
            types.contains(&info.ggml_type.name()),
            "{}: tensor \"{}\": needed the type {}, found {}",
            gguf.file().display(),
            info.name,
            types.join(", "),
            info.ggml_type,
        );
        Ok(())
    }
}

impl Config {
    /// Checks that every tensor the model needs is there, in a shape that fits and a format that can be run, and that
    /// there is no tensor besides: leaving one out would give wrong text without a word.
    pub fn check_tensors(&self, gguf: &Gguf) -> Result<()> {
        let mut known = HashSet::new();
        for expected in self.global_tensors() {
            expected.check(gguf, expected.name)?;
            known.insert(expected.name.to_owned());
        }
        let layer = self.layer_tensors();
        for index in 0..self.n_layer {
            for expected in &layer {
                let name = format!("blk.{index}.{}", expected.name);
                expected.check(gguf, &name)?;
                known.insert(name);
            }
            Self::check_biases(gguf, index)?;
        }
        let unknown = gguf.tensors().find(|tensor| !known.contains(&tensor.info.name));
        if let Some(tensor) = unknown {
            bail!(
                "{}: tensor \"{}\": needed only tensors of a {} model with {} layers, found one that Warpline cannot use",
                gguf.file().display(),
                Shown::new(&tensor.info.name),
                self.architecture,
                self.n_layer,
            );
        }
        Ok(())
    }

    /// Names and shapes of the tensors that a model of these dimensions can have.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let global = self.global_tensors().into_iter().map(|tensor| (tensor.name.to_owned(), tensor.shape));
        let layers = (0..self.n_layer).flat_map(|index| {
            let tensors = self.layer_tensors().into_iter();
            tensors.map(move |tensor| (format!("blk.{index}.{}", tensor.name), tensor.shape))
        });
        global.chain(layers)
    }

    fn global_tensors(&self) -> Vec<Expected> {
        vec![
            Expected::required("token_embd.weight", &[self.n_embd, self.n_vocab]),
            Expected::required("output_norm.weight", &[self.n_embd]),
            // Without it the embeddings serve again.
            Expected::optional("output.weight", &[self.n_embd, self.n_vocab]),
            Expected::optional("rope_freqs.weight", &[self.rope.n_rot / 2]),
        ]
    }

    fn layer_tensors(&self) -> Vec<Expected> {
        let (n_embd, n_ff) = (self.n_embd, self.n_ff);
        let (n_q, n_kv) = (self.n_embd_q(), self.n_embd_kv());
        let [q_bias, k_bias, v_bias] = QKV_BIASES;
        vec![
            Expected::required("attn_norm.weight", &[n_embd]),
            Expected::required("attn_q.weight", &[n_embd, n_q]),
            Expected::required("attn_k.weight", &[n_embd, n_kv]),
            Expected::required("attn_v.weight", &[n_embd, n_kv]),
            Expected::optional(q_bias, &[n_q]),
            Expected::optional(k_bias, &[n_kv]),
            Expected::optional(v_bias, &[n_kv]),
            Expected::required("attn_output.weight", &[n_q, n_embd]),
            Expected::required("ffn_norm.weight", &[n_embd]),
            Expected::required("ffn_gate.weight", &[n_embd, n_ff]),
            Expected::required("ffn_up.weight", &[n_embd, n_ff]),
            Expected::required("ffn_down.weight", &[n_ff, n_embd]),
        ]
    }

    /// A layer has all three biases or none.
    fn check_biases(gguf: &Gguf, layer: usize) -> Result<()> {
        let names = QKV_BIASES.map(|name| format!("blk.{layer}.{name}"));
        let is_there = |name: &&String| gguf.tensor_info(name).is_some();
        let present = names.iter().find(is_there);
        let missing = names.iter().find(|name| !is_there(name));
        if let (Some(present), Some(missing)) = (present, missing) {
            let file = gguf.file().display();
            bail!("{file}: tensor \"{missing}\" is missing: needed together with \"{present}\"");
        }
        Ok(())
    }
}
