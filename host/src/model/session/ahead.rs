//! Tokens that the device chooses and feeds itself, ahead of the host.

use super::{Kind, MOST_TOGETHER, RecordedStep, Session, Way};
use crate::model::trace::{Halt, Probe};
use crate::ops;
use anyhow::{Context as _, Result, ensure};
use gpu_kernels::sample::{MAX_VOCAB, NO_TOKEN};
use gpu_kernels::step::Step;

/// Steps that the device can be ahead of the host.
pub const MAX_AHEAD: usize = 16;
/// Steps that it is at least, once somebody generates.
const AHEAD: usize = 1;
/// Steps that are replayed as one launch where tokens go through all layers in one: a launch's start is 1% of such a step.
const STEPS_AT_ONCE: usize = 8;
/// Steps that the device is then ahead at least: the host may be kept from its work for longer than a step.
const SEVERAL_AHEAD: usize = 4;
const _: () = assert!(SEVERAL_AHEAD + STEPS_AT_ONCE <= MAX_AHEAD);

/// What stands for a token that is still to be chosen.
const PENDING: u32 = NO_TOKEN - 1;
const _: () = assert!(PENDING as usize >= MAX_VOCAB);

impl Session<'_> {
    /// Chooses the next token on the device, without waiting: [`next_chosen`](Self::next_chosen) gives it. Asked again at the same
    /// position it is the same.
    ///
    /// # Errors
    /// When no token was fed since the session began or was truncated, or the device fails.
    pub fn choose(&mut self) -> Result<()> {
        ensure!(self.has_logits, "there are no logits: no token was fed");
        self.forget_ahead();
        // Choosing advances the step.
        let position = self.position - 1;
        let device = &self.model.device;
        device.upload(&mut self.buffers.steps, &[Step { token: 0, position: position as u32 }])?;
        self.await_choice(position)?;
        let (logits, n_vocab) = (&self.logits, self.model.config.n_vocab);
        let (workspace, step) = (&mut self.sample_workspace, &mut self.buffers.steps);
        let chosen = self.chosen.as_buffer();
        ops::sample(device, logits, n_vocab, &self.sampling, workspace, None, step, chosen, MAX_AHEAD)?;
        self.has_chosen = true;
        self.n_ahead = 1;
        Ok(())
    }

    /// Feeds the token that was chosen last and chooses the next one, without waiting: neither passes through the host.
    /// [`next_chosen`](Self::next_chosen) gives the tokens in order; up to [`MAX_AHEAD`] can be outstanding.
    ///
    /// # Errors
    /// When no token was chosen since something else was fed, the context has no room, as many as allowed are
    /// outstanding, or the device fails.
    pub fn advance(&mut self) -> Result<()> {
        self.check_advance(1)?;
        self.await_choice(self.position)?;
        self.step(Kind::Choice)?;
        self.has_chosen = true;
        self.n_ahead += 1;
        Ok(())
    }

    /// Keeps the device ahead of a host that knows the first `known` tokens of the cache: has it feed what it chooses as
    /// [`advance`](Self::advance) does, several tokens at once where that is faster, but none at position `end` or beyond.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub fn run_ahead(&mut self, known: usize, end: usize) -> Result<()> {
        loop {
            let takes_several = self.position + STEPS_AT_ONCE <= end && self.has_several()?;
            let ahead = if takes_several { SEVERAL_AHEAD } else { AHEAD };
            if self.position >= end.min(known + ahead) {
                return Ok(());
            }
            if takes_several {
                self.advance_several()?;
            } else {
                self.advance()?;
            }
        }
    }

    /// Waits for the oldest outstanding token.
    ///
    /// # Errors
    /// When there is none, no logit was a number above -inf, or the device failed.
    pub fn next_chosen(&mut self) -> Result<u32> {
        ensure!(self.n_ahead > 0, "no token is outstanding");
        let position = self.position - self.n_ahead;
        let token = self.model.device.wait_for(&self.chosen, position % MAX_AHEAD, PENDING)?;
        self.n_ahead -= 1;
        ensure!(token != NO_TOKEN, "the model gave no usable logits: all are NaN or -inf");
        Ok(token)
    }

    /// Refuses to feed `n` tokens that the device chooses.
    fn check_advance(&self, n: usize) -> Result<()> {
        let n_ctx = self.model.n_ctx;
        ensure!(self.has_chosen, "no token was chosen that could be fed");
        ensure!(self.position + n <= n_ctx, "the context of {n_ctx} tokens is full");
        ensure!(self.n_ahead + n <= MAX_AHEAD, "{} steps are under way already", self.n_ahead);
        Ok(())
    }

    /// Makes the token that will be chosen after the one at `position` a pending one.
    fn await_choice(&mut self, position: usize) -> Result<()> {
        if self.has_strays {
            // One of them might still leave its token there.
            self.model.device.synchronize()?;
            self.has_strays = false;
        }
        self.chosen.set(position % MAX_AHEAD, PENDING);
        Ok(())
    }

    /// Nobody will ask for tokens that are outstanding.
    pub(super) fn forget_ahead(&mut self) {
        self.has_strays |= self.n_ahead > 0;
        self.n_ahead = 0;
    }

    /// Whether the next steps can be replayed as one launch, which is recorded when it is first asked for.
    fn has_several(&mut self) -> Result<bool> {
        let is_together = self.together.is_some() && self.position + STEPS_AT_ONCE <= MOST_TOGETHER;
        if is_together && self.several.is_none() && !matches!(self.together_choice(), RecordedStep::Fresh) {
            let device = &self.model.device;
            let issue = || (0..STEPS_AT_ONCE).try_for_each(|_| self.issue(Kind::Choice, Probe::default()));
            // SAFETY: as in `run`.
            self.several = match unsafe { device.record(issue) } {
                Ok(recording) => recording,
                Err(Halt::Error(error)) => return Err(error),
                Err(Halt::At(_)) => unreachable!("no probe is set"),
            };
        }
        Ok(is_together && self.several.is_some())
    }

    /// [`advance`](Self::advance), as often as is replayed at once.
    fn advance_several(&mut self) -> Result<()> {
        self.check_advance(STEPS_AT_ONCE)?;
        for position in self.position..self.position + STEPS_AT_ONCE {
            self.await_choice(position)?;
        }
        let several = self.several.as_ref().context("no steps were recorded")?;
        self.model.device.replay(several)?;
        self.position += STEPS_AT_ONCE;
        self.n_ahead += STEPS_AT_ONCE;
        self.has_logits = true;
        Ok(())
    }

    /// How far recording a step through all layers in one launch, with the choice of the next token, has come.
    fn together_choice(&self) -> &RecordedStep {
        &self.steps[Way::Together.number()][Kind::Choice as usize]
    }
}
