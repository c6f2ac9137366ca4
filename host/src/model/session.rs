//! A conversation with a model: the KV cache and where it stands.

use super::forward::{Buffers, forward};
use super::trace::{Halt, Point, Probe};
use super::{Model, weights};
use crate::device::{Buffer, Recording};
use crate::ops::{self, KvLayer};
use crate::sampling::SamplingOptions;
use anyhow::{Context as _, Result, bail, ensure};
use gpu_kernels::sample::{NO_TOKEN, SamplingParameters};
use gpu_kernels::step::Step;

/// Tokens in a KV cache, and the logits of the last one fed.
pub struct Session<'m> {
    model: &'m Model,
    /// The launches of a step without and with logits. Declared, and so dropped, before the buffers they use.
    steps: [RecordedStep; 2],
    buffers: Buffers,
    caches: Vec<KvLayer>,
    /// Where the device leaves the token that it chose, and how it is to choose.
    next: Buffer<u32>,
    sampling: Buffer<SamplingParameters>,
    /// Tokens in the cache.
    position: usize,
    /// Whether the logits are those of the last token in the cache.
    has_logits: bool,
}

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
        let cache = |_| KvLayer::alloc(device, config.n_head_kv, model.n_ctx, config.head_dim);
        let caches = (0..config.n_layer).map(cache).collect::<Result<_>>();
        let caches = caches.with_context(|| format!("no room for a KV cache of {} tokens", model.n_ctx))?;
        Ok(Self {
            model,
            steps: [RecordedStep::Fresh, RecordedStep::Fresh],
            buffers: Buffers::alloc(device, config)?,
            caches,
            next: device.alloc_from(&[0u32])?,
            sampling: device.alloc_from(&[SamplingOptions::default().parameters()])?,
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
        }
    }

    /// Runs tokens, one after the other, each at the next position. The logits of the last one are left on the
    /// device; nothing waits for them.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, the context has no room, or the device fails.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        for (i, &token) in tokens.iter().enumerate() {
            let with_logits = i + 1 == tokens.len();
            match self.run(token, with_logits, Probe::default()) {
                Ok(()) => {
                    self.position += 1;
                    self.has_logits = with_logits;
                }
                Err(Halt::Error(error)) => return Err(error),
                Err(Halt::At(_)) => unreachable!("no probe is set"),
            }
        }
        Ok(())
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
        match self.run(token, true, Probe { stop: Some(point) }) {
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
        self.model.device.download(&self.buffers.logits, logits)
    }

    /// The most likely next token, found on the device. Waits for it.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn greedy(&mut self) -> Result<u32> {
        ensure!(self.has_logits, "there are no logits: no token was fed");
        ops::argmax(&self.model.device, &self.buffers.logits, &mut self.next)?;
        let mut token = [0];
        self.model.device.download(&self.next, &mut token)?;
        Ok(token[0])
    }

    /// How [`sample`](Self::sample) chooses from now on; greedily before this is called.
    ///
    /// # Errors
    /// When the options make no sense, or the device fails.
    pub fn set_sampling(&mut self, options: &SamplingOptions) -> Result<()> {
        options.check()?;
        self.model.device.upload(&mut self.sampling, &[options.parameters()])
    }

    /// The next token, chosen on the device. Waits for it. Asked again at the same position it is the same.
    ///
    /// # Errors
    /// As [`logits`](Self::logits); also when no logit is a number above -inf.
    pub fn sample(&mut self) -> Result<u32> {
        ensure!(self.has_logits, "there are no logits: no token was fed");
        let device = &self.model.device;
        // Choosing advances the step.
        let step = Step { token: 0, position: self.position as u32 - 1 };
        device.upload(&mut self.buffers.step, &[step])?;
        let (logits, n_vocab) = (&self.buffers.logits, self.model.config.n_vocab);
        ops::sample(device, logits, n_vocab, &self.sampling, &mut self.buffers.step, &mut self.next)?;
        let mut token = [0];
        device.download(&self.next, &mut token)?;
        ensure!(token[0] != NO_TOKEN, "the model gave no usable logits: all are NaN or -inf");
        Ok(token[0])
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

    /// One token at the next position; whether it counts as fed is the caller's business.
    fn run(&mut self, token: u32, with_logits: bool, probe: Probe) -> Result<(), Halt> {
        let Model { device, settings, weights, .. } = self.model;
        let weights: &weights::Weights = weights;
        self.has_logits = false;
        let step = Step { token, position: self.position as u32 };
        device.upload(&mut self.buffers.step, &[step])?;

        let recorded = &mut self.steps[usize::from(with_logits)];
        let (caches, buffers) = (&mut self.caches, &mut self.buffers);
        let mut issue = || forward(device, weights, settings, caches, buffers, with_logits, probe);
        match recorded {
            // A run that stops half-way waits for the device, and differs from the next one.
            _ if probe.stop.is_some() => issue()?,
            RecordedStep::Fresh => {
                issue()?;
                *recorded = RecordedStep::Warm;
            }
            RecordedStep::Warm => {
                // SAFETY: the buffers are this session's or the model's, and the session's recordings go first.
                match unsafe { device.record(&mut issue)? } {
                    Some(recording) => {
                        device.replay(&recording)?;
                        *recorded = RecordedStep::Recorded(recording);
                    }
                    None => issue()?,
                }
            }
            RecordedStep::Recorded(recording) => device.replay(recording)?,
        }
        Ok(())
    }
}
