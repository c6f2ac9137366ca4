//! How long each operation of a step takes.

use super::ceiling::Ceiling;
use super::{STEPS, median};
use crate::device::{Device, Mark, Recording};
use crate::model::{Op, Point, Session};
use anyhow::Result;
use std::cell::RefCell;
use std::time::Instant;

/// Launches of an operation that one recording has, at least: a replay costs the host some time too.
const LAUNCHES: usize = 32;
/// Replays of a recording that are timed together. Each may choose a token, and so go to the next position.
const REPLAYS: usize = STEPS;
/// What a GPU is kept busy with while the host issues replays, in microseconds.
const REPLAYS_LEAD_US: f64 = 2000.0;
/// Events whose distances are measured.
const EMPTY_EVENTS: usize = 100;

/// What a path takes, in microseconds.
pub(super) struct Timings {
    /// The whole step.
    pub(super) step_us: f64,
    /// Its operations.
    pub(super) operations: Vec<OpTime>,
}

/// What all calls of an operation take in a step.
pub(super) struct OpTime {
    pub(super) op: Op,
    pub(super) us: f64,
    /// By how much the step is shorter without it.
    pub(super) us_in_step: Option<f64>,
}

/// Takes times.
pub(super) struct Clock<'a> {
    device: &'a Device,
    ceiling: &'a mut Ceiling,
    repeat: usize,
    empty_us: f64,
}

impl<'a> Clock<'a> {
    /// A clock that takes each time `repeat` times.
    pub(super) fn new(device: &'a Device, ceiling: &'a mut Ceiling, repeat: usize) -> Result<Self> {
        ceiling.keep_busy(device, REPLAYS_LEAD_US)?;
        let marks: Vec<Mark> = (0..=EMPTY_EVENTS).map(|_| device.mark()).collect::<Result<_>>()?;
        // The smallest: what else the GPU may do between two events only adds.
        let empty_us = distances(device, &marks)?.into_iter().fold(f64::INFINITY, f64::min);
        Ok(Self { device, ceiling, repeat, empty_us })
    }

    /// Between two events with nothing between them, at least.
    pub(super) fn empty_us(&self) -> f64 {
        self.empty_us
    }

    /// A step that is launched kernel by kernel: its operations with an event behind each, and several steps in a row
    /// without. The step must have run before.
    pub(super) fn plain(&mut self, session: &mut Session, points: &[Point]) -> Result<Timings> {
        let start = Instant::now();
        self.marked_step(session, 0.0)?;
        let lead_us = 1.5 * start.elapsed().as_secs_f64() * 1e6;
        let mut runs = Vec::new();
        for _ in 0..self.repeat {
            runs.push(self.marked_step(session, lead_us)?);
        }
        let sum = |op, run: &Vec<f64>| -> f64 {
            let times = points.iter().zip(run).filter(|(point, _)| point.op == op).map(|(_, us)| us);
            times.map(|us| (us - self.empty_us).max(0.0)).sum()
        };
        let operations = operations(points).into_iter().map(|op| {
            let us = median(runs.iter().map(|run| sum(op, run)).collect());
            OpTime { op, us, us_in_step: None }
        });
        Ok(Timings { operations: operations.collect(), step_us: self.steps(session)? })
    }

    /// The times of a step's operations.
    fn marked_step(&mut self, session: &mut Session, lead_us: f64) -> Result<Vec<f64>> {
        let device = self.device;
        session.rewind()?;
        self.ceiling.keep_busy(device, lead_us)?;
        let marks = RefCell::new(vec![device.mark()?]);
        session.watch_step(&|_| {
            marks.borrow_mut().push(device.mark()?);
            Ok(())
        })?;
        distances(device, &marks.into_inner())
    }

    /// The time of a step among [`STEPS`].
    fn steps(&self, session: &mut Session) -> Result<f64> {
        let time = |_| {
            session.rewind()?;
            let start = self.device.mark()?;
            for _ in 0..STEPS {
                session.watch_step(&|_| Ok(()))?;
            }
            Ok(self.device.microseconds_between(&start, &self.device.mark()?)? / STEPS as f64)
        };
        Ok(median((0..self.repeat).map(time).collect::<Result<_>>()?))
    }

    /// A step that is recorded as a whole, and its operations, each recorded by itself and left out of the whole. `None`
    /// where the device records nothing. The step must have run before.
    pub(super) fn captured(&mut self, session: &mut Session, points: &[Point]) -> Result<Option<Timings>> {
        session.with_recording(points, &|_| true, 1, |session, whole| {
            let mut times = Vec::new();
            for op in operations(points) {
                let calls = points.iter().filter(|point| point.op == op).count();
                let copies = LAUNCHES.div_ceil(calls);
                let alone =
                    session.with_recording(points, &|other| other == op, copies, |session, alone| {
                        self.replays(session, &[alone])
                    })?;
                let parts = session.with_recording(points, &|other| other != op, 1, |session, rest| {
                    self.replays(session, &[whole, rest])
                })?;
                let (Some(alone), Some(parts)) = (alone, parts) else {
                    unreachable!("a device that records once records again")
                };
                let saved = parts.iter().map(|times| times[0] - times[1]).collect();
                let us = median(alone.iter().map(|times| times[0] / copies as f64).collect());
                times.push(OpTime { op, us, us_in_step: Some(median(saved)) });
            }
            let step = self.replays(session, &[whole])?;
            Ok(Timings { step_us: median(step.iter().map(|times| times[0]).collect()), operations: times })
        })
    }

    /// The times of a replay of each recording, taken in turns: so many as the clock repeats.
    fn replays(&mut self, session: &mut Session, recordings: &[&Recording]) -> Result<Vec<Vec<f64>>> {
        let mut runs = Vec::new();
        for run in 0..=self.repeat {
            let time = |recording: &&Recording| {
                session.rewind()?;
                self.ceiling.keep_busy(self.device, REPLAYS_LEAD_US)?;
                let start = self.device.mark()?;
                for _ in 0..REPLAYS {
                    self.device.replay(recording)?;
                }
                Ok(self.device.microseconds_between(&start, &self.device.mark()?)? / REPLAYS as f64)
            };
            let times = recordings.iter().map(time).collect::<Result<_>>()?;
            // A recording's first replay brings it to the GPU.
            if run > 0 {
                runs.push(times);
            }
        }
        Ok(runs)
    }
}

/// The operations of a step, in the order in which they first come.
fn operations(points: &[Point]) -> Vec<Op> {
    let mut operations = Vec::new();
    for point in points {
        if !operations.contains(&point.op) {
            operations.push(point.op);
        }
    }
    operations
}

/// The times between marks.
fn distances(device: &Device, marks: &[Mark]) -> Result<Vec<f64>> {
    device.synchronize()?;
    marks.windows(2).map(|pair| device.microseconds_between(&pair[0], &pair[1])).collect()
}
