//! Steps for [`crate::profile`]: watched, repeated, and in part. None of them counts as fed.

use super::{Kind, Session};
use crate::device::Recording;
use crate::model::{Model, Op};
use crate::model::trace::{Halt, Point, Probe};
use anyhow::{Result, ensure};
use std::cell::Cell;

impl Session<'_> {
    /// Makes token 0 the one to be fed next, at the present position: where a step that is timed starts.
    pub(crate) fn rewind(&mut self) -> Result<()> {
        ensure!(self.position < self.model.n_ctx, "the context of {} tokens is full", self.model.n_ctx);
        self.has_logits = false;
        if let Some(chain) = &mut self.chain {
            chain.clear(&self.model.device)?;
        }
        self.place(0)
    }

    /// Launches a step that ends with the choice of the next token, kernel by kernel, and tells `watch` after each
    /// operation. The choice is the next step's token: without [`rewind`](Self::rewind) that runs at the next position.
    pub(crate) fn watch_step(&mut self, watch: &dyn Fn(Point) -> Result<()>) -> Result<()> {
        self.has_logits = false;
        self.has_chosen = false;
        let set = self.set;
        self.set ^= 1;
        self.issue(Kind::Choice, set, Probe::Watch(watch)).map_err(error)
    }

    /// Records such a step as sessions run it and calls `replay` with it. `None` where the device records nothing.
    pub(crate) fn with_step<T>(
        &mut self,
        replay: impl FnOnce(&mut Self, &Recording) -> Result<T>,
    ) -> Result<Option<T>> {
        let device = &self.model.device;
        let set = self.set;
        let issue = || self.issue(Kind::Choice, set, Probe::Nothing).map_err(error);
        // SAFETY: the buffers are this session's or the model's, and the recording ends with this call.
        let recording = unsafe { device.record(issue)? };
        let Some(recording) = recording else { return Ok(None) };
        let result = replay(self, &recording);
        // The recording may be under way.
        device.synchronize()?;
        result.map(Some)
    }

    /// Runs a step and says how long each operation took, in microseconds: those that are one launch, where they are.
    pub(crate) fn times_in_step(&mut self) -> Result<Option<Vec<(Point, f64)>>> {
        let Model { device, settings, weights, .. } = self.model;
        match &mut self.chain {
            Some(chain) => chain.times(device, weights, settings, &mut self.buffers).map(Some),
            None => Ok(None),
        }
    }

    /// Records the operations of such a step that `wanted` names, `n` times over, and calls `replay` with them. `points`
    /// are all of the step's, in order; it must have run once. `None` where the device records nothing.
    pub(crate) fn with_recording<T>(
        &mut self,
        points: &[Point],
        wanted: &dyn Fn(Op) -> bool,
        n: usize,
        replay: impl FnOnce(&mut Self, &Recording) -> Result<T>,
    ) -> Result<Option<T>> {
        let device = &self.model.device;
        let passed = Cell::new(0);
        // What follows belongs to the next point; behind the last one it is the first again.
        let look_ahead = || device.leave_out(!wanted(points[passed.get() % points.len()].op));
        let watch = |point: Point| {
            ensure!(
                points[passed.get() % points.len()] == point,
                "{point:?} is not where it was in the step before"
            );
            passed.set(passed.get() + 1);
            look_ahead();
            Ok(())
        };
        let issue = || -> Result<()> {
            look_ahead();
            (0..n).try_for_each(|_| self.watch_step(&watch))
        };
        // SAFETY: the buffers are this session's or the model's, and the recording ends with this call.
        match unsafe { device.record(issue)? } {
            Some(recording) => {
                let result = replay(self, &recording);
                // The recording may be under way.
                device.synchronize()?;
                result.map(Some)
            }
            None => Ok(None),
        }
    }
}

/// Why a run that stops nowhere ended.
fn error(halt: Halt) -> anyhow::Error {
    match halt {
        Halt::Error(error) => error,
        Halt::At(_) => unreachable!("a run that is watched stops nowhere"),
    }
}
