//! Times and costs as figures: rates, shares, floors, and sums over levels, a layer and the step.

use super::{Cost, Level};
use serde::Serialize;

/// An operation is slow below this share of the ceiling ...
pub const SLOW_OF_CEILING: f64 = 0.6;
/// ... if it takes more than this share of the token.
pub const SLOW_SHARE: f64 = 0.02;

/// One way to run a step.
#[derive(Debug, Serialize)]
pub struct PathProfile {
    /// `unfused`, `fused`, `captured` or `together`.
    pub name: &'static str,
    /// A whole step, in a row of [`STEPS`](super::STEPS) of them, without events between operations.
    pub step_us: f64,
    /// Its operations, in the order of their first launches.
    pub operations: Vec<Figures>,
    /// Their sums by level.
    pub levels: Vec<Figures>,
    /// A layer: the sum of the operations that layers have, over the number of layers.
    pub layer: Figures,
    /// The sum of all.
    pub total: Figures,
}

/// An operation's figures for a token, or those of several together.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// What it is.
    pub name: &'static str,
    /// Its level, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<Level>,
    /// How often it is called for a token.
    pub calls: usize,
    /// Microseconds a call.
    pub us_per_call: f64,
    /// Microseconds a token.
    pub us: f64,
    /// By how many microseconds a captured step is shorter without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub us_in_step: Option<f64>,
    /// Bytes that it has to move for a token.
    pub bytes: u64,
    /// Those of them that are weights.
    pub weight_bytes: u64,
    /// Multiplications and additions for a token.
    pub flops: u64,
    /// 10^9 bytes per second.
    pub gb_per_s: f64,
    /// 10^9 multiplications and additions per second.
    pub gflop_per_s: f64,
    /// Its part of all operations' time.
    pub share: f64,
    /// Microseconds for its bytes at the ceiling.
    pub floor_us: f64,
    /// The floor over the time: its part of the ceiling. More than 1 where its bytes came out of a cache.
    pub of_ceiling: f64,
    /// Whether it is far from its floor and matters ([`SLOW_OF_CEILING`], [`SLOW_SHARE`]).
    pub is_slow: bool,
}

/// What figures are made of.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    pub(super) calls: usize,
    pub(super) us: f64,
    pub(super) us_in_step: Option<f64>,
    pub(super) cost: Cost,
}

/// A name, a level, and whether each layer has it.
pub(super) type Described = (&'static str, Level, bool);

impl Sums {
    fn of<'a>(operations: impl Iterator<Item = &'a Self>) -> Self {
        operations.fold(Self::default(), |sums, other| Self {
            calls: sums.calls + other.calls,
            us: sums.us + other.us,
            us_in_step: other.us_in_step.map(|us| sums.us_in_step.unwrap_or(0.0) + us),
            cost: sums.cost + other.cost,
        })
    }

    fn figures(self, name: &'static str, level: Option<Level>, total_us: f64, gb_per_s: f64) -> Figures {
        let Self { calls, us, us_in_step, cost } = self;
        // A clock may be too coarse for what takes no time.
        let per_us = |amount: f64| if us > 0.0 { amount / us } else { 0.0 };
        let floor_us = cost.bytes() as f64 / gb_per_s / 1e3;
        let (share, of_ceiling) = (us / total_us, per_us(floor_us));
        Figures {
            name,
            level,
            calls,
            us_per_call: us / calls.max(1) as f64,
            us,
            us_in_step,
            bytes: cost.bytes(),
            weight_bytes: cost.weight_bytes,
            flops: cost.flops,
            gb_per_s: per_us(cost.bytes() as f64) / 1e3,
            gflop_per_s: per_us(cost.flops as f64) / 1e3,
            share,
            floor_us,
            of_ceiling,
            is_slow: share > SLOW_SHARE && of_ceiling < SLOW_OF_CEILING,
        }
    }
}

/// Adds up operations.
pub(super) fn summarize(
    name: &'static str,
    step_us: f64,
    operations: &[(Described, Sums)],
    n_layer: usize,
    gb_per_s: f64,
) -> PathProfile {
    let total = Sums::of(operations.iter().map(|(_, sums)| sums));
    let figures = |sums: Sums, name, level| sums.figures(name, level, total.us, gb_per_s);
    let in_layers = operations.iter().filter(|((_, _, in_layers), _)| *in_layers);
    let layers = Sums::of(in_layers.map(|(_, sums)| sums));
    let n = n_layer as u64;
    let layer = Sums {
        calls: layers.calls / n_layer,
        us: layers.us / n_layer as f64,
        us_in_step: layers.us_in_step.map(|us| us / n_layer as f64),
        cost: Cost {
            weight_bytes: layers.cost.weight_bytes / n,
            other_bytes: layers.cost.other_bytes / n,
            flops: layers.cost.flops / n,
        },
    };
    let of_level = |level| {
        let sums = operations.iter().filter(|((_, other, _), _)| *other == level).map(|(_, sums)| sums);
        Figures { is_slow: false, ..figures(Sums::of(sums), Level::name(level), Some(level)) }
    };
    PathProfile {
        name,
        step_us,
        operations: operations
            .iter()
            .map(|&((name, level, _), sums)| figures(sums, name, Some(level)))
            .collect(),
        levels: Level::ALL.map(of_level).into(),
        layer: Figures { is_slow: false, ..figures(layer, "a layer", None) },
        total: Figures { is_slow: false, ..figures(total, "all operations", None) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-9 * expected.abs(), "{found}, not {expected}");
    }

    fn sums(calls: usize, us: f64, weight_bytes: u64, flops: u64) -> Sums {
        Sums { calls, us, us_in_step: Some(us / 2.0), cost: Cost { weight_bytes, other_bytes: 0, flops } }
    }

    /// Two layers at a ceiling of 1,000 GB/s, which is 10^6 bytes a microsecond.
    fn summary() -> PathProfile {
        let operations = [
            (("matrix", Level::Macro, true), sums(2, 50.0, 40_000_000, 100_000_000)),
            (("attention", Level::Midi, true), sums(2, 40.0, 20_000_000, 0)),
            (("norm", Level::Micro, true), sums(2, 1.0, 100_000, 0)),
            (("logits", Level::Macro, false), sums(1, 9.0, 9_000_000, 0)),
        ];
        summarize("fused", 90.0, &operations, 2, 1000.0)
    }

    #[test]
    fn an_operation_is_measured_against_its_floor() {
        let matrix = &summary().operations[0];
        assert_eq!((matrix.calls, matrix.bytes), (2, 40_000_000));
        close(matrix.us_per_call, 25.0);
        close(matrix.gb_per_s, 800.0);
        close(matrix.gflop_per_s, 2000.0);
        close(matrix.floor_us, 40.0);
        close(matrix.of_ceiling, 0.8);
        close(matrix.share, 0.5);
    }

    #[test]
    fn slow_is_what_matters_and_is_far_from_its_floor() {
        let slow: Vec<&str> = summary()
            .operations
            .iter()
            .filter(|figures| figures.is_slow)
            .map(|figures| figures.name)
            .collect();
        // The norm is farther from its floor, but 1% of the token.
        assert_eq!(slow, ["attention"]);
    }

    #[test]
    fn levels_layer_and_total_are_sums() {
        let summary = summary();
        let times: Vec<(&str, f64)> = summary.levels.iter().map(|level| (level.name, level.us)).collect();
        assert_eq!(times, [("Macro", 59.0), ("Midi", 40.0), ("Micro", 1.0)]);
        assert_eq!((summary.layer.calls, summary.layer.bytes), (3, 30_050_000));
        close(summary.layer.us, 45.5);
        close(summary.layer.us_in_step.unwrap(), 22.75);
        assert_eq!((summary.total.calls, summary.total.bytes), (7, 69_100_000));
        close(summary.total.us, 100.0);
        close(summary.total.share, 1.0);
    }

    #[test]
    fn what_takes_no_time_has_no_rate() {
        let figures = sums(1, 0.0, 64, 64).figures("norm", None, 1.0, 1000.0);
        assert_eq!((figures.gb_per_s, figures.gflop_per_s, figures.of_ceiling), (0.0, 0.0, 0.0));
    }
}
