//! A model's dimensions, read from GGUF metadata and checked against each other.

mod presets;
mod tensors;

use std::fmt;

use anyhow::{Result, anyhow, bail, ensure};
use gpu_kernels::attention::{HEAD_DIM_STEP, MAX_HEAD_DIM};

pub use gpu_kernels::rope::RopeLayout;
pub use presets::{Preset, PresetTensor};

use crate::gguf::{FromValue, Gguf, Shown};

/// A family of models: which metadata keys and tensors there are, and how they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and what follows it, such as SmolLM2 and Mistral.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Llama, Self::Qwen2];

    /// The name in `general.architecture`, which also begins the family's metadata keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
        }
    }

    fn rope_layout(self) -> RopeLayout {
        match self {
            // Converters permute llama's q and k rows so that a pair lies side by side.
            Self::Llama => RopeLayout::Interleaved,
            Self::Qwen2 => RopeLayout::HalfSplit,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A model's dimensions. [`Config::from_gguf`] has checked that they fit each other.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The model's family.
    pub architecture: Architecture,
    /// The model's own name, `general.name`.
    pub name: Option<String>,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Length of a token's hidden state.
    pub n_embd: usize,
    /// Inner length of the feed-forward network.
    pub n_ff: usize,
    /// Number of layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Length of one head: a multiple of 16, at most 256.
    pub head_dim: usize,
    /// The context the model was trained for.
    pub n_ctx_train: usize,
    /// What RMSNorm adds to the mean square.
    pub rms_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
}

/// Rotary position embedding: pair `i` of a head turns by `position * base^(-2i / n_rot)`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub base: f32,
    /// How many of a head's first elements turn: even, at most `head_dim`.
    pub n_rot: usize,
    /// Which elements make a pair.
    pub layout: RopeLayout,
    /// Whether positions are scaled.
    pub scaling: RopeScaling,
}

/// How positions are scaled to reach beyond the trained context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions are divided by this factor.
    Linear(f32),
    /// By YaRN (Peng et al., 2023): pairs that turn often within the trained context keep their positions, those that
    /// hardly turn have them divided, and those between are in between.
    Yarn(Yarn),
}

/// YaRN's parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How many times as long as the trained context the new one is.
    pub factor: f32,
    /// Positions of the trained context.
    pub original_context: usize,
    /// Pairs that turn more often than this in the trained context keep their positions.
    pub beta_fast: f32,
    /// Pairs that turn less often have theirs divided.
    pub beta_slow: f32,
    /// Multiplies the magnitude that follows from the factor.
    pub attention_factor: f32,
}

impl RopeConfig {
    /// The angle that each pair turns per position, scaling included. `factors` is what the tensor
    /// `rope_freqs.weight` holds, where there is one: one divisor per pair.
    pub fn frequencies(&self, factors: Option<&[f32]>) -> Vec<f64> {
        let (base, n_rot) = (f64::from(self.base), self.n_rot as f64);
        (0..self.n_rot / 2)
            .map(|pair| {
                let frequency = base.powf(-2.0 * pair as f64 / n_rot);
                let frequency = frequency / factors.map_or(1.0, |factors| f64::from(factors[pair]));
                match self.scaling {
                    RopeScaling::None => frequency,
                    RopeScaling::Linear(factor) => frequency / f64::from(factor),
                    RopeScaling::Yarn(yarn) => {
                        let kept = yarn.kept(pair, base, n_rot);
                        frequency * (kept + (1.0 - kept) / f64::from(yarn.factor))
                    }
                }
            })
            .collect()
    }

    /// What rotated values are multiplied with: with YaRN, which sharpens attention for longer contexts,
    /// `attention_factor * (1 + 0.1 ln(factor))`, otherwise 1.
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::None | RopeScaling::Linear(_) => 1.0,
            RopeScaling::Yarn(yarn) => yarn.attention_factor * (1.0 + 0.1 * yarn.factor.ln()),
        }
    }
}

impl Yarn {
    /// How much of its frequency a pair keeps, from 1 for the fast ones to 0 for the slow ones.
    fn kept(&self, pair: usize, base: f64, n_rot: f64) -> f64 {
        // The pair that turns `n` times within the trained context: `base^(-2i / n_rot) * context = 2 pi n`.
        let pair_of = |n: f32| {
            let radians = std::f64::consts::TAU * f64::from(n);
            n_rot * (self.original_context as f64 / radians).ln() / (2.0 * base.ln())
        };
        let fast = pair_of(self.beta_fast).floor().max(0.0);
        let slow = pair_of(self.beta_slow).ceil().min(n_rot - 1.0);
        1.0 - ((pair as f64 - fast) / (slow - fast).max(0.001)).clamp(0.0, 1.0)
    }
}

impl Config {
    /// Reads the dimensions. The tensors are [`check_tensors`](Self::check_tensors)' business, except for
    /// the embeddings, which have the last word on the vocabulary's size.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let architecture = architecture(gguf)?;
        let keys = Keys { gguf, prefix: architecture.name() };

        let n_experts = keys.get::<usize>("expert_count")?.unwrap_or(0);
        keys.ensure(n_experts == 0, "expert_count", "a dense model (0 experts)", n_experts)?;

        let n_ctx_train = keys.positive("context_length")?;
        let n_embd = keys.positive("embedding_length")?;
        let n_head = keys.positive("attention.head_count")?;
        let n_head_kv = keys.positive_or("attention.head_count_kv", n_head)?;
        keys.ensure(
            n_head.is_multiple_of(n_head_kv),
            "attention.head_count_kv",
            format_args!("a divisor of the {n_head} query heads"),
            n_head_kv,
        )?;
        let head_dim = head_dim(&keys, n_embd, n_head)?;

        let rms_eps = keys.require::<f32>("attention.layer_norm_rms_epsilon")?;
        keys.ensure(
            rms_eps.is_finite() && rms_eps > 0.0,
            "attention.layer_norm_rms_epsilon",
            "a positive number",
            rms_eps,
        )?;
        Ok(Self {
            architecture,
            name: gguf.get::<&str>("general.name")?.map(str::to_owned),
            n_vocab: n_vocab(&keys)?,
            n_embd,
            n_ff: keys.positive("feed_forward_length")?,
            n_layer: keys.positive("block_count")?,
            n_head,
            n_head_kv,
            head_dim,
            n_ctx_train,
            rms_eps,
            rope: rope(&keys, architecture.rope_layout(), head_dim, n_ctx_train)?,
        })
    }

    /// Length of all query heads together.
    pub fn n_embd_q(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Length of all key heads together, and of all value heads.
    pub fn n_embd_kv(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

fn architecture(gguf: &Gguf) -> Result<Architecture> {
    let found = gguf.require::<&str>("general.architecture")?;
    Architecture::ALL.into_iter().find(|architecture| architecture.name() == found).ok_or_else(|| {
        anyhow!(
            "{}: key \"general.architecture\": needed one of {}, found \"{}\"",
            gguf.file().display(),
            Architecture::ALL.map(Architecture::name).join(", "),
            Shown::new(found),
        )
    })
}

fn head_dim(keys: &Keys<'_>, n_embd: usize, n_head: usize) -> Result<usize> {
    let (key, head_dim) = match keys.get::<usize>("attention.key_length")? {
        Some(head_dim) => ("attention.key_length", head_dim),
        None => {
            let needed = format_args!("a divisor of the embedding length {n_embd}");
            keys.ensure(n_embd.is_multiple_of(n_head), "attention.head_count", needed, n_head)?;
            ("attention.head_count", n_embd / n_head)
        }
    };
    let fits = head_dim > 0 && head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(HEAD_DIM_STEP);
    let needed = format_args!("a head length that is a multiple of {HEAD_DIM_STEP}, at most {MAX_HEAD_DIM}");
    keys.ensure(fits, key, needed, format_args!("{head_dim}"))?;

    let value_length = keys.get::<usize>("attention.value_length")?.unwrap_or(head_dim);
    let needed = format_args!("the length of a key, {head_dim}");
    keys.ensure(value_length == head_dim, "attention.value_length", needed, value_length)?;
    // With at most 2^32 heads of at most 256 elements this only fails where a `usize` is small.
    let fits = n_head.checked_mul(head_dim).is_some();
    keys.ensure(fits, "attention.head_count", "heads that fit in memory", n_head)?;
    Ok(head_dim)
}

/// The embeddings have one row per token; whatever else the file says must agree.
fn n_vocab(keys: &Keys<'_>) -> Result<usize> {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let info = keys.gguf.tensor("token_embd.weight")?.info;
    let n_vocab = info.shape.get(1).copied().unwrap_or(1);

    let needed = format_args!("{n_vocab}, the rows of token_embd.weight");
    let vocab_size = keys.get::<usize>("vocab_size")?.unwrap_or(n_vocab);
    keys.ensure(vocab_size == n_vocab, "vocab_size", needed, vocab_size)?;

    let n_tokens = keys.gguf.get::<&[String]>(TOKENS)?.map_or(n_vocab, <[String]>::len);
    ensure!(
        n_tokens == n_vocab,
        "{}: key \"{TOKENS}\": needed {n_vocab} tokens, one for each row of token_embd.weight, found {n_tokens}",
        keys.gguf.file().display(),
    );
    Ok(n_vocab)
}

fn rope(keys: &Keys<'_>, layout: RopeLayout, head_dim: usize, n_ctx_train: usize) -> Result<RopeConfig> {
    let base = keys.get::<f32>("rope.freq_base")?.unwrap_or(10_000.0);
    keys.ensure(base.is_finite() && base > 0.0, "rope.freq_base", "a positive number", base)?;

    let n_rot = keys.positive_or("rope.dimension_count", head_dim)?;
    keys.ensure(
        n_rot.is_multiple_of(2) && n_rot <= head_dim,
        "rope.dimension_count",
        format_args!("an even number of at most {head_dim}, the head length"),
        n_rot,
    )?;
    Ok(RopeConfig { base, n_rot, layout, scaling: rope_scaling(keys, n_ctx_train)? })
}

fn rope_scaling(keys: &Keys<'_>, n_ctx_train: usize) -> Result<RopeScaling> {
    let is_yarn = match keys.get::<&str>("rope.scaling.type")? {
        Some("none") => return Ok(RopeScaling::None),
        // Files older than the key's introduction scale linearly, if at all.
        Some("linear") | None => false,
        Some("yarn") => true,
        Some(other) => bail!(keys.error("rope.scaling.type", "none, linear or yarn", Shown::new(other))),
    };
    let (key, factor) = match keys.get::<f32>("rope.scaling.factor")? {
        Some(factor) => ("rope.scaling.factor", factor),
        None => ("rope.scale_linear", keys.get::<f32>("rope.scale_linear")?.unwrap_or(1.0)),
    };
    keys.ensure(factor.is_finite() && factor >= 0.0, key, "a number that is not negative", factor)?;
    // Converters write 0 for "no scaling".
    if factor == 0.0 || factor == 1.0 {
        return Ok(RopeScaling::None);
    }
    if !is_yarn {
        return Ok(RopeScaling::Linear(factor));
    }
    let positive = |key: &str, default: f32| -> Result<f32> {
        let value = keys.get::<f32>(key)?.unwrap_or(default);
        keys.ensure(value.is_finite() && value > 0.0, key, "a positive number", value)?;
        Ok(value)
    };
    Ok(RopeScaling::Yarn(Yarn {
        factor,
        original_context: keys.positive_or("rope.scaling.original_context_length", n_ctx_train)?,
        beta_fast: positive("rope.scaling.yarn_beta_fast", 32.0)?,
        beta_slow: positive("rope.scaling.yarn_beta_slow", 1.0)?,
        attention_factor: positive("rope.scaling.attn_factor", 1.0)?,
    }))
}

/// The metadata keys of one architecture, given without their prefix.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    fn get<T: FromValue<'a>>(&self, key: &str) -> Result<Option<T>> {
        Ok(self.gguf.get(&format!("{}.{key}", self.prefix))?)
    }

    fn require<T: FromValue<'a>>(&self, key: &str) -> Result<T> {
        Ok(self.gguf.require(&format!("{}.{key}", self.prefix))?)
    }

    fn positive(&self, key: &str) -> Result<usize> {
        let found = self.require::<u32>(key)? as usize;
        self.ensure(found > 0, key, "a number from 1 up", found)?;
        Ok(found)
    }

    fn positive_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get::<u32>(key)? {
            Some(_) => self.positive(key),
            None => Ok(default),
        }
    }

    fn ensure(
        &self,
        fits: bool,
        key: &str,
        needed: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Result<()> {
        if fits { Ok(()) } else { Err(self.error(key, needed, found)) }
    }

    fn error(&self, key: &str, needed: impl fmt::Display, found: impl fmt::Display) -> anyhow::Error {
        let file = self.gguf.file().display();
        anyhow!("{file}: key \"{}.{key}\": needed {needed}, found {found}", self.prefix)
    }
}
