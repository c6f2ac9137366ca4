//! A step timed operation by operation, and each operation against what memory allows.
//!
//! The *floor* of an operation is the time in which its bytes ([`cost`]) are read at the *ceiling*, the bandwidth that a
//! kernel which only reads reached in the same run.
//!
//! Operations are timed in two ways. On a plain stream an event stands between each and the next one, which keeps them
//! from overlapping. Of a captured step there are no such places; there, an operation's time is that of a recording of its
//! launches alone, those of all layers, one after the other: caches are as cold as in a step where the weights of all
//! layers are larger than they are, and what overlaps are kernels of one kind. Beside it stands by how much the step is
//! shorter without the operation.

mod ceiling;
mod chart;
mod cost;
mod figures;
mod timing;

pub use chart::draw;
pub use cost::{Cost, cost};
pub use figures::{Figures, PathProfile, SLOW_OF_CEILING, SLOW_SHARE};

use crate::model::{Fusion, Model, Op, Point};
use anyhow::{Result, ensure};
use ceiling::Ceiling;
use figures::{Described, Sums, summarize};
use serde::Serialize;
use std::cell::RefCell;
use timing::{Clock, Timings};

/// Steps that run behind each other when a whole step is timed: so many positions behind the depth must be free.
pub const STEPS: usize = 8;

/// How large an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Projections, the feed-forward network, logits: whole matrices.
    Macro,
    /// Attention.
    Midi,
    /// Vectors: norms, rope, quantization and the like.
    Micro,
}

impl Level {
    /// All of them, largest first.
    pub const ALL: [Self; 3] = [Self::Macro, Self::Midi, Self::Micro];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Macro => "Macro",
            Self::Midi => "Midi",
            Self::Micro => "Micro",
        }
    }
}

/// What an operation is called, its level, and whether each layer has it.
fn describe(op: Op, fusion: Fusion) -> Described {
    use Level::{Macro, Micro, Midi};
    match (op, fusion) {
        (Op::Embed, _) => ("embedding, rope angles", Micro, false),
        (Op::AttnNorm, _) => ("attention norm", Micro, true),
        (Op::AttnNormQ8, _) => ("quantize attention norm", Micro, true),
        (Op::Q, _) => ("q", Macro, true),
        (Op::K, _) => ("k", Macro, true),
        (Op::V, _) => ("v", Macro, true),
        (Op::QRope, Fusion::Fused) => ("norm, q, k, v, rope, cache", Macro, true),
        (Op::QRope, Fusion::Unfused) => ("rope of q", Micro, true),
        (Op::KRope, _) => ("rope of k", Micro, true),
        (Op::KvAppend, _) => ("append to cache", Micro, true),
        (Op::Attention, _) => ("attention", Midi, true),
        (Op::AttentionQ8, _) => ("quantize heads", Micro, true),
        (Op::AttnOutput, _) => ("attention output, residual", Macro, true),
        (Op::FfnNorm, _) => ("ffn norm", Micro, true),
        (Op::FfnNormQ8, _) => ("quantize ffn norm", Micro, true),
        (Op::FfnGateUp, _) => ("gate, up", Macro, true),
        (Op::FfnSwiglu, Fusion::Fused) => ("norm, gate, up, swiglu", Macro, true),
        (Op::FfnSwiglu, Fusion::Unfused) => ("swiglu", Micro, true),
        (Op::FfnSwigluQ8, _) => ("quantize swiglu", Micro, true),
        (Op::FfnOutput, _) => ("down, residual", Macro, true),
        (Op::Layers, _) => ("all layers", Macro, false),
        (Op::OutputNorm, _) => ("output norm", Micro, false),
        (Op::OutputNormQ8, _) => ("quantize output norm", Micro, false),
        (Op::Logits, Fusion::Fused) => ("norm, logits", Macro, false),
        (Op::Logits, Fusion::Unfused) => ("logits", Macro, false),
        (Op::Choice, _) => ("choice of the token", Micro, false),
    }
}

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct ProfileOptions {
    /// Tokens in the cache before the step, random ones.
    pub depth: usize,
    /// How often each time is taken; the median counts.
    pub repeat: usize,
    /// The passes whose kernels are timed one by one; the last one is captured.
    pub fusions: &'static [Fusion],
}

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Profile {
    /// Tokens in the cache before the step.
    pub depth: usize,
    /// The bandwidth of a kernel that only reads, in 10^9 bytes per second.
    pub ceiling_gb_per_s: f64,
    /// How much it read.
    pub ceiling_bytes: usize,
    /// Between two events with nothing between them: taken off every operation's time on a plain stream.
    pub empty_us: f64,
    /// Unfused, fused and captured, and captured together where a token goes through all layers in one launch.
    pub paths: Vec<PathProfile>,
    /// Why there is no captured path, where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_captured: Option<&'static str>,
}

/// Times a step of the model on every path. `progress` is told which path comes next.
///
/// # Errors
/// When the context has no room for [`STEPS`] tokens behind the depth, or the device fails.
pub fn measure(
    model: &mut Model,
    options: &ProfileOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Profile> {
    let (depth, n_ctx) = (options.depth, model.n_ctx());
    ensure!(
        depth + STEPS <= n_ctx,
        "{depth} tokens and {STEPS} steps behind them do not fit: the context has room for {n_ctx}"
    );
    let device = model.device().clone();
    progress("ceiling");
    let mut ceiling = Ceiling::measure(&device)?;
    let (gb_per_s, ceiling_bytes) = (ceiling.gb_per_s(), ceiling.n_bytes());
    let mut clock = Clock::new(&device, &mut ceiling, options.repeat)?;
    let mut paths = Vec::new();
    for (i, &fusion) in options.fusions.iter().enumerate() {
        model.set_fusion(fusion);
        let mut session = model.session()?;
        if options.depth > 0 {
            session.fill_with_noise(options.depth)?;
        }
        let steps = points(&mut session)?;
        let mut add = |name, points: &[Point], timings: &Timings| -> Result<()> {
            paths.push(path(name, model, points, timings, options.depth + 1, gb_per_s)?);
            Ok(())
        };
        let name = if fusion == Fusion::Fused { "fused" } else { "unfused" };
        progress(name);
        add(name, &steps, &clock.plain(&mut session, &steps)?)?;
        if i + 1 == options.fusions.len() {
            progress("captured");
            if let Some(timings) = clock.captured(&mut session, &steps)? {
                add("captured", &steps, &timings)?;
            }
            if session.watch_together(STEPS) {
                progress("together");
                let steps = points(&mut session)?;
                if let Some(timings) = clock.captured(&mut session, &steps)? {
                    add("together", &steps, &timings)?;
                }
            }
        }
    }
    let is_captured = paths.iter().any(|path| path.name == "captured");
    let not_captured = (!is_captured).then_some("the CPU records no launches");
    let empty_us = clock.empty_us();
    Ok(Profile {
        depth: options.depth,
        ceiling_gb_per_s: gb_per_s,
        ceiling_bytes,
        empty_us,
        paths,
        not_captured,
    })
}

/// The points of a step, in order; it runs for the first time.
fn points(session: &mut crate::model::Session) -> Result<Vec<Point>> {
    let points = RefCell::new(Vec::new());
    session.rewind()?;
    session.watch_step(&|point| {
        points.borrow_mut().push(point);
        Ok(())
    })?;
    Ok(points.into_inner())
}

fn path(
    name: &'static str,
    model: &Model,
    points: &[Point],
    timings: &Timings,
    n_positions: usize,
    gb_per_s: f64,
) -> Result<PathProfile> {
    let mut operations = Vec::new();
    for time in &timings.operations {
        let of_op = points.iter().filter(|point| point.op == time.op);
        let costs: Vec<Cost> = of_op.map(|&point| cost(model, point, n_positions)).collect::<Result<_>>()?;
        let (calls, cost) = (costs.len(), costs.into_iter().sum());
        let sums = Sums { calls, us: time.us, us_in_step: time.us_in_step, cost };
        operations.push((describe(time.op, model.settings().fusion), sums));
    }
    Ok(summarize(name, timings.step_us, &operations, model.config().n_layer, gb_per_s))
}

/// The middle one, or the mean of the two in the middle; there is one at least.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 4.0]), 4.0);
        assert_eq!(median(vec![9.0, 1.0, 4.0, 2.0]), 3.0);
    }
}
