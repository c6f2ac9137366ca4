//! Steps for [`crate::profile`]: watched, repeated, and in part. None of them counts as fed.

use super::{Kind, MOST_TOGETHER, Session};
use crate::device::Recording;
use crate::model::Op;
use crate::model::trace::{Halt, Point, Probe};
use anyhow::{Result, ensure};
use std::cell::Cell;

impl Session<'_> {
    /// Makes token 0 the one to be fed next, at the present position: where a step that is timed starts.
    pub(crate) fn rewind(&mut self) -> Result<()> {
        ensure!(self.position < self.model.n_ctx, "the context of {} tokens is full", self.model.n_ctx);
        self.has_logits = false;
        self.place(0)
    }

    /// From now on steps go through all layers in one launch, as those do that are not timed, if the next `n` of them do.
    pub(crate) fn watch_together(&mut self, n: usize) -> bool {
        self.watches_together = self.together.is_some() && self.position + n <= MOST_TOGETHER;
        self.watches_together
    }

    /// Launches a step that ends with the choice of the next token, kernel by kernel, and tells `watch` after each
    /// operation. The choice is the next step's token: without [`rewind`](Self::rewind) that runs at the next position.
    pub(crate) fn watch_step(&mut self, watch: &dyn Fn(Point) -> Result<()>) -> Result<()> {
        self.has_logits = false;
        self.has_chosen = false;
        self.has_strays = true;
        self.issue(Kind::Choice, Probe::Watch(watch)).map_err(error)
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
