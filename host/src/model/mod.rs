//! A model on a device: weights, KV cache, and the chain of operations that makes a token's logits.

mod forward;
mod session;
mod source;
mod trace;
mod unfused;
mod weights;

pub use forward::{Buffers, FfnBuffers, Tokens, ffn, layer, together};
pub use session::Session;
pub use trace::{Halt, Op, Point, Probe};
pub use weights::{GateUp, Layer, Linear, Weights};

use crate::config::{Config, Preset};
use crate::device::Device;
use crate::gguf::Gguf;
use crate::ops::{self, AttentionShape, Input, Next, Operand, Rope};
use anyhow::{Context as _, Result, ensure};
pub use gpu_kernels::kv_cache::KvFormat;
use gpu_kernels::kv_cache::Q8_0_BLOCK;
use source::TensorSource;

/// How activations meet the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Quantized to Q8_1, integer products: fast.
    #[default]
    Q8_1,
    /// In f32, weights dequantized: exact.
    F32,
}

/// How many operations a kernel does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fusion {
    /// As many as go together: five kernels a layer.
    #[default]
    Fused,
    /// One: for measuring and debugging.
    Unfused,
}

/// What a user may choose about a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct ModelOptions {
    /// How activations meet the weights.
    pub activations: Activations,
    /// How many operations a kernel does.
    pub fusion: Fusion,
    /// Tokens that the KV cache has room for; by default what the model was trained for, at most
    /// [`DEFAULT_N_CTX`].
    pub n_ctx: Option<usize>,
    /// Tokens of a prompt that go through the model at once; by default [`DEFAULT_N_BATCH`], on the CPU
    /// [`DEFAULT_N_BATCH_CPU`].
    pub n_batch: Option<usize>,
    /// How keys and values are stored.
    pub kv_format: KvFormat,
}

/// Room in the KV cache where none is asked for: more costs memory whether it is used or not.
pub const DEFAULT_N_CTX: usize = 4096;

/// Tokens of a prompt that go through the model at once: as many as keep tensor cores busy.
pub const DEFAULT_N_BATCH: usize = 512;
/// Likewise on the CPU, which has no use for more: somebody may be waiting to interrupt it.
pub const DEFAULT_N_BATCH_CPU: usize = 64;
/// The most: the rows of a grid.
pub const MAX_N_BATCH: usize = 65_535;

/// A model whose weights are on a device.
pub struct Model {
    device: Device,
    config: Config,
    settings: Settings,
    n_ctx: usize,
    n_batch: usize,
    weights: Weights,
}

/// The numbers that every layer's operations share.
#[derive(Debug)]
pub struct Settings {
    /// How activations meet the weights.
    pub activations: Activations,
    /// How many operations a kernel does.
    pub fusion: Fusion,
    /// What RMSNorm adds to the mean square.
    pub rms_eps: f32,
    /// Query heads and the factor of the scores.
    pub attention: AttentionShape,
    /// Length of a head.
    pub head_dim: usize,
    /// Key-value heads.
    pub n_head_kv: usize,
    /// How queries and keys are rotated.
    pub rope: Rope,
    /// How keys and values are stored.
    pub kv_format: KvFormat,
}

/// Bytes of `n` keys or values in the cache.
pub(crate) fn kv_bytes(format: KvFormat, n: usize) -> usize {
    match format {
        KvFormat::F16 => n * size_of::<half::f16>(),
        KvFormat::Q8_0 => n + n / Q8_0_BLOCK * size_of::<half::f16>(),
    }
}

impl Model {
    /// Reads the configuration, checks every tensor, and uploads the weights.
    ///
    /// `progress` is called with the bytes uploaded so far and the bytes in all.
    ///
    /// # Errors
    /// When the file is not a model that Warpline runs, `options` do not fit it, or the device has no room.
    pub fn load(
        device: Device,
        gguf: &Gguf,
        options: &ModelOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let config = Config::from_gguf(gguf)?;
        config.check_tensors(gguf)?;
        Self::new(device, gguf, config, options, progress).with_context(|| gguf.file().display().to_string())
    }

    /// A model of well-known dimensions with random weights, made on the device.
    ///
    /// # Errors
    /// When `options` do not fit it, or the device has no room.
    pub fn random(
        device: Device,
        preset: &Preset,
        options: &ModelOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        Self::new(device, preset, preset.config.clone(), options, progress).context(preset.name)
    }

    fn new(
        device: Device,
        source: &dyn TensorSource,
        config: Config,
        options: &ModelOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let n_ctx = options.n_ctx.unwrap_or(config.n_ctx_train.min(DEFAULT_N_CTX));
        ensure!(n_ctx > 0, "a context of 0 tokens has no room for a prompt");
        ensure!(
            n_ctx <= config.n_ctx_train,
            "a context of {n_ctx} tokens is wanted, the model was trained for {}",
            config.n_ctx_train
        );
        let default = if device.is_cuda() { DEFAULT_N_BATCH } else { DEFAULT_N_BATCH_CPU };
        let n_batch = options.n_batch.unwrap_or(default);
        ensure!(
            (1..=MAX_N_BATCH).contains(&n_batch),
            "{n_batch} tokens at a time are wanted, 1 to {MAX_N_BATCH} are possible"
        );
        let frequencies = config.rope.frequencies(source.rope_factors()?.as_deref());
        let settings = Settings {
            activations: options.activations,
            fusion: options.fusion,
            rms_eps: config.rms_eps,
            attention: AttentionShape {
                n_head: config.n_head,
                scale: 1.0 / (config.head_dim as f32).sqrt(),
                n_fresh: 1,
            },
            head_dim: config.head_dim,
            n_head_kv: config.n_head_kv,
            rope: Rope {
                frequencies: device.alloc_from(&frequencies)?,
                layout: config.rope.layout,
                magnitude: config.rope.magnitude(),
            },
            kv_format: options.kv_format,
        };
        let weights = Weights::load(&device, source, &config, progress)?;
        Ok(Self { device, config, settings, n_ctx, n_batch, weights })
    }

    /// The model's dimensions.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tokens that a session has room for.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Tokens of a prompt that go through the model at once.
    pub fn n_batch(&self) -> usize {
        self.n_batch
    }

    /// The device that holds the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The weights, layer by layer.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// What every layer's operations share.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Does as many operations in a kernel from now on; the weights stay as they are.
    pub fn set_fusion(&mut self, fusion: Fusion) {
        self.settings.fusion = fusion;
    }

    /// Bytes of weights that one decode step reads: every matrix and norm once, of the embeddings one row.
    pub fn weight_bytes_per_token(&self) -> u64 {
        self.weights.bytes_per_token()
    }

    /// Bytes of keys and values that one decode step reads with `n` tokens in the cache.
    pub fn kv_bytes_per_token(&self, n: usize) -> u64 {
        let Config { n_layer, n_head_kv, head_dim, .. } = self.config;
        (2 * n_layer * kv_bytes(self.settings.kv_format, n_head_kv * head_dim) * n) as u64
    }

    /// An empty conversation with the model: its own KV cache and scratch buffers.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn session(&self) -> Result<Session<'_>> {
        Session::new(self)
    }

    /// The feed-forward network of layer `layer` on a hidden state in host memory: `W_down(silu(W_gate x) * W_up x)`.
    ///
    /// Allocates and waits on each call; [`ffn`] works on device buffers.
    ///
    /// # Errors
    /// When there is no such layer, `x` has not `n_embd` values, or the device fails.
    pub fn ffn_from_slice(&self, layer: usize, x: &[f32]) -> Result<Vec<f32>> {
        ensure!(
            x.len() == self.config.n_embd,
            "the hidden state has {} values, not {}",
            x.len(),
            self.config.n_embd
        );
        let weights = self.weights.layer(layer)?;
        let input = self.device.alloc_from(x)?;
        let mut output = self.device.alloc_from(&vec![0.0f32; x.len()])?;
        let activations = self.settings.activations;
        let mut buffers = FfnBuffers::alloc(&self.device, self.config.n_ff, activations)?;
        let mut operand = Operand::alloc(&self.device, x.len(), activations == Activations::F32)?;
        ops::make_operand(&self.device, &input, Next { operand: &mut operand, gamma: None })?;
        let input = match activations {
            Activations::F32 => Input::F32(&input, None),
            Activations::Q8_1 => Input::Operand(&operand),
        };
        ffn(&self.device, weights, input, &mut output, &mut buffers)?;
        self.device.to_vec(&output)
    }
}
