//! A conversation with a model: the KV cache and where it stands.

mod ahead;
mod timing;

pub use ahead::MAX_AHEAD;

use super::forward::{Buffers, Logits, Tokens, forward, has_few_products, logits_of_many, together};
use super::trace::{Halt, Op, Point, Probe};
use super::weights::GateUp;
use super::{Fusion, Model, weights};
use crate::device::{Buffer, HostBuffer, Recording};
use crate::ops::{self, AttentionWorkspace, CONTEXT_KINDS, Chunk, KvCache, Layers, SampleWorkspace};
use crate::sampling::SamplingOptions;
use anyhow::{Context as _, Result, bail, ensure};
use gpu_kernels::sample::SamplingParameters;
use gpu_kernels::step::Step;
use std::ops::Range;

/// Fewest tokens that go through the model at once on tensor cores: fewer are sooner done one after the other.
const MIN_CHUNK: usize = 4;
/// Likewise where all layers have products for a few tokens.
const MIN_FEW: usize = 2;

/// Fewest tokens that go through this model at once.
fn min_chunk(model: &Model) -> usize {
    if has_few_products(&model.device, &model.weights, &model.settings) { MIN_FEW } else { MIN_CHUNK }
}

/// Tokens whose logits are made at once, where all are wanted: they take more memory than anything else between layers.
const LOGITS_AT_ONCE: usize = 64;

/// Tokens in a KV cache, and the logits of the last one fed.
pub struct Session<'m> {
    model: &'m Model,
    /// The launches of each kind of step, for each way ([`Session::way`]). Declared, and so dropped, before the buffers they use.
    steps: [[RecordedStep; 3]; WAYS],
    /// As many steps as are taken at once (`ahead.rs`) through all layers in one launch, each with the choice of the next token.
    several: Option<Recording>,
    /// All layers in one launch, where the model and the device allow for it.
    together: Option<Layers>,
    /// Whether steps that are watched go that way as well.
    watches_together: bool,
    buffers: Buffers,
    /// Where many tokens go through at once; none where they do not.
    many: Option<Buffers>,
    /// Fewest tokens that do.
    min_chunk: usize,
    /// The logits of the last token fed: `[n_vocab]`.
    logits: Buffer<f32>,
    /// Those of several tokens, once somebody has wanted them: `[LOGITS_AT_ONCE, n_vocab]`, rows filled up to a multiple of
    /// four values.
    many_logits: Option<Buffer<f32>>,
    caches: Vec<KvCache>,
    /// Where [`greedy`](Self::greedy) leaves its token.
    next: Buffer<u32>,
    /// How the device is to choose, what it needs for that, and where it leaves the tokens that it chose: the one after position `p` in place
    /// `p % MAX_AHEAD`.
    sampling: Buffer<SamplingParameters>,
    sample_workspace: SampleWorkspace,
    chosen: HostBuffer<u32>,
    /// How many of these nobody has asked for yet.
    n_ahead: usize,
    /// Whether steps may be under way whose tokens nobody will ask for.
    has_strays: bool,
    /// Whether the step in device memory is the token that was chosen last, to be fed next.
    has_chosen: bool,
    /// Tokens in the cache.
    position: usize,
    /// Whether the logits are those of the last token in the cache.
    has_logits: bool,
}

/// A kind of step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A token of a prompt, not the last one.
    Prompt = 0,
    /// With logits.
    Logits = 1,
    /// With logits, and the choice of the next token.
    Choice = 2,
}

/// How a token goes through the layers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// In one launch.
    Together,
    /// Kernel by kernel, with a context of this kind ([`AttentionWorkspace::kind_of`]).
    Apart(usize),
}

/// How many ways there are.
const WAYS: usize = 1 + CONTEXT_KINDS;

impl Way {
    /// Its number.
    fn number(self) -> usize {
        match self {
            Self::Together => 0,
            Self::Apart(kind) => 1 + kind,
        }
    }
}

/// Longest context with which a token goes through all layers in one launch, where it can: attention of a few multiprocessors takes
/// longer than that of all the more positions there are (docs/performance.md, version 13).
const MOST_TOGETHER: usize = 1080;

/// How far recording a step's launches has come.
enum RecordedStep {
    /// It has not run yet: its first run launches one kernel after the other.
    Fresh,
    /// All of its kernels have run once, so that it can be recorded.
    Warm,
    /// It is replayed as one launch.
    Recorded(Recording),
}

impl<'m> Session<'m> {
    pub(super) fn new(model: &'m Model) -> Result<Self> {
        let (device, config) = (&model.device, &model.config);
        let kv_format = model.settings.kv_format;
        let cache = |_| KvCache::alloc(device, kv_format, config.n_head_kv, model.n_ctx, config.head_dim);
        let caches = (0..config.n_layer).map(cache).collect::<Result<Vec<_>>>();
        let mut caches =
            caches.with_context(|| format!("no room for a KV cache of {} tokens", model.n_ctx))?;
        let n_batch = model.n_batch.min(model.n_ctx);
        let min_chunk = min_chunk(model);
        let many = if model.settings.fusion == Fusion::Fused && n_batch >= min_chunk {
            let layers = &model.weights.layers;
            let has_apart = layers.iter().any(|layer| matches!(layer.ffn_gate_up, GateUp::Apart { .. }));
            let many = Buffers::alloc_many(device, config, n_batch, &model.settings, has_apart);
            Some(many.with_context(|| format!("no room for {n_batch} tokens at a time (--batch)"))?)
        } else {
            None
        };
        // On the CPU it would all be one core's.
        let together = if device.is_cuda() {
            // SAFETY: the session keeps the caches, and borrows the weights.
            unsafe { together(device, &model.weights, &model.settings, &mut caches)? }
        } else {
            None
        };
        Ok(Self {
            model,
            steps: [const { [const { RecordedStep::Fresh }; 3] }; WAYS],
            several: None,
            together,
            watches_together: false,
            buffers: Buffers::alloc(device, config, &model.settings)?,
            many,
            min_chunk,
            logits: device.alloc(config.n_vocab)?,
            many_logits: None,
            caches,
            next: device.alloc_from(&[0u32])?,
            sampling: device.alloc_from(&[SamplingOptions::default().parameters()])?,
            sample_workspace: SampleWorkspace::alloc(device)?,
            chosen: device.alloc_host(MAX_AHEAD)?,
            n_ahead: 0,
            has_strays: false,
            has_chosen: false,
            position: 0,
            has_logits: false,
        })
    }

    /// Tokens in the KV cache.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets all but the first `len` tokens; nothing happens when there are no more.
    pub fn truncate(&mut self, len: usize) {
        if len < self.position {
            self.position = len;
            self.has_logits = false;
            self.has_chosen = false;
            // Steps under way write to positions that count as free again, before anything that is issued later.
            self.forget_ahead();
        }
    }

    /// Puts `n` tokens into the cache whose keys and values are random numbers: for timing what follows.
    ///
    /// # Errors
    /// When the context has no room, or the device fails.
    pub fn fill_with_noise(&mut self, n: usize) -> Result<()> {
        ensure!(
            n <= self.model.n_ctx,
            "{n} tokens do not fit: the context has room for {}",
            self.model.n_ctx
        );
        for (i, cache) in self.caches.iter_mut().enumerate() {
            cache.fill_with_noise(&self.model.device, i as u32)?;
        }
        self.forget_ahead();
        self.position = n;
        self.has_logits = false;
        self.has_chosen = false;
        Ok(())
    }

    /// Runs tokens, each at the next position, as many at once as the model's `n_batch` says. The logits of the last one are
    /// left on the device; nothing waits for them.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, the context has no room, or the device fails.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        let mut left = tokens;
        while !left.is_empty() {
            let (chunk, rest) = left.split_at(left.len().min(self.model.n_batch));
            if self.many.is_some() && chunk.len() >= self.min_chunk {
                self.feed_chunk(chunk, rest.is_empty())?;
            } else {
                for (i, &token) in chunk.iter().enumerate() {
                    let is_last = rest.is_empty() && i + 1 == chunk.len();
                    self.place(token)?;
                    self.step(if is_last { Kind::Logits } else { Kind::Prompt })?;
                }
            }
            left = rest;
        }
        Ok(())
    }

    /// As [`feed`](Self::feed), and waits for the logits after every token: `each` is called with the token's number and its
    /// `[n_vocab]` logits, in order.
    ///
    /// # Errors
    /// As [`feed`](Self::feed); also those of `each`.
    pub fn feed_watched(
        &mut self,
        tokens: &[u32],
        mut each: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        self.check(tokens)?;
        let n_vocab = self.model.config.n_vocab;
        let mut logits = Vec::new();
        let mut done = 0;
        while done < tokens.len() {
            let chunk = &tokens[done..tokens.len().min(done + self.model.n_batch)];
            if self.many.is_none() || chunk.len() < self.min_chunk {
                self.feed(&chunk[..1])?;
                self.logits(&mut logits)?;
                each(done, &logits)?;
                done += 1;
                continue;
            }
            self.feed_chunk(chunk, true)?;
            let stride = n_vocab.next_multiple_of(4);
            for first in (0..chunk.len()).step_by(LOGITS_AT_ONCE) {
                let range = first..chunk.len().min(first + LOGITS_AT_ONCE);
                let rows = self.logits_of_many(range.clone(), stride)?;
                for (row, token) in rows.chunks_exact(stride).zip(range) {
                    each(done + token, &row[..n_vocab])?;
                }
            }
            done += chunk.len();
        }
        Ok(())
    }

    /// The logits of some tokens of the chunk that was fed last, `[range.len(), stride]`.
    fn logits_of_many(&mut self, range: Range<usize>, stride: usize) -> Result<Vec<f32>> {
        let Model { device, settings, weights, .. } = self.model;
        let all = match &mut self.many_logits {
            Some(all) => all,
            none => none.insert(device.alloc(LOGITS_AT_ONCE * stride)?),
        };
        let mut logits = all.part(0..range.len() * stride);
        let many = self.many.as_mut().context("no chunk was fed")?;
        logits_of_many(device, weights, settings, many, range, &mut logits)?;
        device.to_vec(&logits)
    }

    /// Runs tokens at once, at least `min_chunk` and at most the model's `n_batch`.
    fn feed_chunk(&mut self, tokens: &[u32], with_logits: bool) -> Result<()> {
        let Model { device, settings, weights, .. } = self.model;
        self.forget_ahead();
        let many = self.many.as_mut().context("the session takes one token at a time")?;
        self.has_chosen = false;
        self.has_logits = false;
        let position = self.position;
        let step = |(i, &token)| Step { token, position: (position + i) as u32 };
        let steps: Vec<Step> = tokens.iter().enumerate().map(step).collect();
        device.upload(&mut many.steps.part(0..steps.len()), &steps)?;
        let chunk = Tokens::Many(Chunk { position, n_tokens: tokens.len() });
        let logits = with_logits.then_some(Logits { to: &mut self.logits, workspace: None });
        let run =
            forward(device, weights, settings, &mut self.caches, many, chunk, None, logits, Probe::default());
        match run {
            Ok(_) => {
                self.position += tokens.len();
                self.has_logits = with_logits;
                Ok(())
            }
            Err(Halt::Error(error)) => Err(error),
            Err(Halt::At(_)) => unreachable!("no probe is set"),
        }
    }

    /// Runs one token up to `point` and returns what that operation left in its buffer. The token does not count
    /// as fed.
    ///
    /// # Errors
    /// As [`feed`](Self::feed); also when the model has no such layer.
    pub fn run_until(&mut self, token: u32, point: Point) -> Result<Vec<f32>> {
        self.check(&[token])?;
        self.model.weights.layer(point.layer)?;
        self.has_logits = false;
        self.place(token)?;
        match self.run(Kind::Logits, Probe::StopAt(point)) {
            Err(Halt::At(values)) => Ok(values),
            Err(Halt::Error(error)) => Err(error),
            Ok(()) => bail!(
                "{point:?} is not a point of the forward pass: operations outside the layers count as layer 0"
            ),
        }
    }

    /// Waits for the logits of the last token fed and copies them into `logits`: `[n_vocab]`.
    ///
    /// # Errors
    /// When no token was fed since the session began or was truncated, or the device failed.
    pub fn logits(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        ensure!(self.has_logits, "there are no logits: no token was fed");
        logits.resize(self.model.config.n_vocab, 0.0);
        self.model.device.download(&self.logits, logits)
    }

    /// The most likely next token, found on the device. Waits for it.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn greedy(&mut self) -> Result<u32> {
        ensure!(self.has_logits, "there are no logits: no token was fed");
        ops::argmax(&self.model.device, &self.logits, &mut self.next)?;
        let mut token = [0];
        self.model.device.download(&self.next, &mut token)?;
        Ok(token[0])
    }

    /// How the device [chooses](Self::choose) from now on; greedily before this is called.
    ///
    /// # Errors
    /// When the options make no sense, or the device fails.
    pub fn set_sampling(&mut self, options: &SamplingOptions) -> Result<()> {
        options.check()?;
        self.model.device.upload(&mut self.sampling, &[options.parameters()])
    }

    /// Whether `tokens` can be fed.
    ///
    /// # Errors
    /// When one is not in the vocabulary, or the context has no room for all of them.
    pub fn check(&self, tokens: &[u32]) -> Result<()> {
        let (n_vocab, n_ctx) = (self.model.config.n_vocab, self.model.n_ctx);
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= n_vocab) {
            bail!("token {token} is not in the vocabulary of {n_vocab} tokens");
        }
        ensure!(
            tokens.len() <= n_ctx - self.position,
            "{} tokens do not fit: the context has room for {n_ctx}, {} are in it",
            tokens.len(),
            self.position
        );
        Ok(())
    }

    /// Makes a token the one to be fed next.
    fn place(&mut self, token: u32) -> Result<()> {
        self.forget_ahead();
        self.has_chosen = false;
        let step = Step { token, position: self.position as u32 };
        self.model.device.upload(&mut self.buffers.steps, &[step])
    }

    /// Feeds the token that the step in device memory holds.
    fn step(&mut self, kind: Kind) -> Result<()> {
        match self.run(kind, Probe::default()) {
            Ok(()) => {
                self.position += 1;
                self.has_logits = kind != Kind::Prompt;
                Ok(())
            }
            Err(Halt::Error(error)) => Err(error),
            Err(Halt::At(_)) => unreachable!("no probe is set"),
        }
    }

    /// One step; whether its token counts as fed is the caller's business.
    fn run(&mut self, kind: Kind, probe: Probe) -> Result<(), Halt> {
        self.has_logits = false;
        self.has_chosen = false;
        if !matches!(probe, Probe::Nothing) {
            // A run that stops half-way waits for the device, and differs from the next one.
            return self.issue(kind, probe);
        }
        let device = &self.model.device;
        let recorded = (self.way(probe).number(), kind as usize);
        match &self.steps[recorded.0][recorded.1] {
            RecordedStep::Fresh => {
                self.issue(kind, probe)?;
                self.steps[recorded.0][recorded.1] = RecordedStep::Warm;
            }
            RecordedStep::Warm => {
                // SAFETY: the buffers are this session's or the model's, and the session's recordings go first.
                match unsafe { device.record(|| self.issue(kind, probe))? } {
                    Some(recording) => {
                        device.replay(&recording)?;
                        self.steps[recorded.0][recorded.1] = RecordedStep::Recorded(recording);
                    }
                    None => self.issue(kind, probe)?,
                }
            }
            RecordedStep::Recorded(recording) => device.replay(recording)?,
        }
        Ok(())
    }

    /// How the next token goes through the layers.
    fn way(&self, probe: Probe) -> Way {
        let length = self.position + 1;
        let is_allowed = match probe {
            Probe::Nothing => true,
            Probe::Watch(_) => self.watches_together,
            Probe::StopAt(_) => false,
        };
        if self.together.is_some() && length <= MOST_TOGETHER && is_allowed {
            Way::Together
        } else {
            Way::Apart(AttentionWorkspace::kind_of(length))
        }
    }

    /// Launches a step's kernels, one after the other.
    fn issue(&mut self, kind: Kind, probe: Probe) -> Result<(), Halt> {
        let Model { device, config, settings, weights, .. } = self.model;
        let weights: &weights::Weights = weights;
        let together = if self.way(probe) == Way::Together { self.together.as_mut() } else { None };
        let b = &mut self.buffers;
        b.attention.suit(self.position + 1);
        let workspace = (kind == Kind::Choice).then_some(&mut self.sample_workspace);
        let logits = (kind != Kind::Prompt).then_some(Logits { to: &mut self.logits, workspace });
        let ranks =
            forward(device, weights, settings, &mut self.caches, b, Tokens::One, together, logits, probe)?;
        if kind == Kind::Choice {
            let chosen = self.chosen.as_buffer();
            let (logits, sampling) = (&self.logits, &self.sampling);
            let (workspace, steps) = (&mut self.sample_workspace, &mut b.steps);
            ops::sample(
                device,
                logits,
                config.n_vocab,
                sampling,
                workspace,
                ranks,
                steps,
                chosen,
                MAX_AHEAD,
            )?;
            probe.passed(Op::Choice, 0)?;
        }
        Ok(())
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // Steps may be under way that write to its memory. An error shows at the next use of the device.
        let _ = self.model.device.synchronize();
    }
}
