//! A conversation with a model: the KV cache and where it stands.

mod timing;

use super::forward::{Buffers, forward};
use super::trace::{Halt, Op, Point, Probe};
use super::{Model, weights};
use crate::device::{Buffer, HostBuffer, Recording, Signal};
use crate::ops::{self, KvLayer};
use crate::sampling::SamplingOptions;
use anyhow::{Context as _, Result, bail, ensure};
use gpu_kernels::sample::{NO_TOKEN, SamplingParameters};
use gpu_kernels::step::Step;
use std::collections::VecDeque;

/// Steps that the device can be ahead of the host.
pub const MAX_AHEAD: usize = 16;

/// Tokens in a KV cache, and the logits of the last one fed.
pub struct Session<'m> {
    model: &'m Model,
    /// The launches of each kind of step. Declared, and so dropped, before the buffers they use.
    steps: [RecordedStep; 3],
    buffers: Buffers,
    caches: Vec<KvLayer>,
    /// Where [`greedy`](Self::greedy) leaves its token.
    next: Buffer<u32>,
    /// How the device is to choose, and where it leaves the tokens that it chose: the one after position `p` in place
    /// `p % MAX_AHEAD`.
    sampling: Buffer<SamplingParameters>,
    chosen: HostBuffer<u32>,
    /// Ends of the steps that are under way, oldest first.
    ahead: VecDeque<Signal>,
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
            steps: [const { RecordedStep::Fresh }; 3],
            buffers: Buffers::alloc(device, config)?,
            caches,
            next: device.alloc_from(&[0u32])?,
            sampling: device.alloc_from(&[SamplingOptions::default().parameters()])?,
            chosen: device.alloc_host(MAX_AHEAD)?,
            ahead: VecDeque::new(),
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
            self.ahead.clear();
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
        self.ahead.clear();
        self.position = n;
        self.has_logits = false;
        self.has_chosen = false;
        Ok(())
    }

    /// Runs tokens, one after the other, each at the next position. The logits of the last one are left on the
    /// device; nothing waits for them.
    ///
    /// # Errors
    /// When a token is not in the vocabulary, the context has no room, or the device fails.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        for (i, &token) in tokens.iter().enumerate() {
            let kind = if i + 1 == tokens.len() { Kind::Logits } else { Kind::Prompt };
            self.place(token)?;
            self.step(kind)?;
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
        self.ahead.clear();
        let device = &self.model.device;
        // Choosing advances the step.
        let step = Step { token: 0, position: self.position as u32 - 1 };
        device.upload(&mut self.buffers.step, &[step])?;
        let (logits, n_vocab) = (&self.buffers.logits, self.model.config.n_vocab);
        let (step, chosen) = (&mut self.buffers.step, self.chosen.as_buffer());
        ops::sample(device, logits, n_vocab, &self.sampling, step, chosen, MAX_AHEAD)?;
        self.has_chosen = true;
        self.ahead.push_back(device.signal()?);
        self.next_chosen()
    }

    /// Feeds the token that was chosen last and chooses the next one, without waiting: neither passes through the host.
    /// [`next_chosen`](Self::next_chosen) gives the tokens in order; up to [`MAX_AHEAD`] can be outstanding.
    ///
    /// # Errors
    /// When no token was chosen since something else was fed, the context has no room, as many as allowed are
    /// outstanding, or the device fails.
    pub fn advance(&mut self) -> Result<()> {
        ensure!(self.has_chosen, "no token was chosen that could be fed");
        ensure!(self.position < self.model.n_ctx, "the context of {} tokens is full", self.model.n_ctx);
        ensure!(self.ahead.len() < MAX_AHEAD, "{MAX_AHEAD} steps are under way already");
        self.step(Kind::Choice)?;
        self.has_chosen = true;
        self.ahead.push_back(self.model.device.signal()?);
        Ok(())
    }

    /// Waits for the oldest outstanding token.
    ///
    /// # Errors
    /// When there is none, no logit was a number above -inf, or the device failed.
    pub fn next_chosen(&mut self) -> Result<u32> {
        let position = self.position.checked_sub(self.ahead.len()).context("no token is outstanding")?;
        let signal = self.ahead.pop_front().context("no token is outstanding")?;
        self.model.device.wait(&signal)?;
        let token = self.chosen.get(position % MAX_AHEAD);
        ensure!(token != NO_TOKEN, "the model gave no usable logits: all are NaN or -inf");
        Ok(token)
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
        self.ahead.clear();
        self.has_chosen = false;
        let step = Step { token, position: self.position as u32 };
        self.model.device.upload(&mut self.buffers.step, &[step])
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
        match &self.steps[kind as usize] {
            RecordedStep::Fresh => {
                self.issue(kind, probe)?;
                self.steps[kind as usize] = RecordedStep::Warm;
            }
            RecordedStep::Warm => {
                // SAFETY: the buffers are this session's or the model's, and the session's recordings go first.
                match unsafe { device.record(|| self.issue(kind, probe))? } {
                    Some(recording) => {
                        device.replay(&recording)?;
                        self.steps[kind as usize] = RecordedStep::Recorded(recording);
                    }
                    None => self.issue(kind, probe)?,
                }
            }
            RecordedStep::Recorded(recording) => device.replay(recording)?,
        }
        Ok(())
    }

    /// Launches a step's kernels, one after the other.
    fn issue(&mut self, kind: Kind, probe: Probe) -> Result<(), Halt> {
        let Model { device, config, settings, weights, .. } = self.model;
        let weights: &weights::Weights = weights;
        let b = &mut self.buffers;
        forward(device, weights, settings, &mut self.caches, b, kind != Kind::Prompt, probe)?;
        if kind == Kind::Choice {
            let chosen = self.chosen.as_buffer();
            ops::sample(device, &b.logits, config.n_vocab, &self.sampling, &mut b.step, chosen, MAX_AHEAD)?;
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
