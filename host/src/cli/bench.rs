//! `host bench`: prefill and decode, timed apart.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Result, ensure};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use host::model::{Model, Session};
use indicatif::ProgressBar;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::Serialize;

use super::args::{self, BenchArgs};
use super::{load, print_json};

/// Everything that `--json` prints.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// The file; none where weights are random.
    file: Option<String>,
    model: Option<String>,
    device: String,
    activations: &'static str,
    kv_type: &'static str,
    weight_bytes_per_token: u64,
    /// Tokens in the cache before the clock runs.
    depth: usize,
    results: Vec<Measurement>,
}

/// One kind of run, repeated.
#[derive(Serialize)]
struct Measurement {
    test: &'static str,
    tokens: usize,
    /// Of each repetition, in tok/s.
    runs: Vec<f64>,
    mean: f64,
    median: f64,
    deviation: f64,
    /// Weights, keys and values read per second, in 10^9 bytes; only decode reads all of them for each token.
    gb_per_s: Option<f64>,
}

pub(super) fn run(args: &BenchArgs) -> Result<()> {
    let longest = args.prompt.max(args.n_predict);
    ensure!(longest > 0, "there is nothing to time: -p and -n are both 0");
    let needed = longest + args.depth;
    let options = args.run.model_options(Some(needed));
    let model = load::file_or_preset(&args.model, &args.run, &options)?;
    ensure!(
        needed <= model.n_ctx(),
        "{needed} tokens do not fit: the context has room for {} (--ctx)",
        model.n_ctx()
    );
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let n_vocab = model.config().n_vocab as u64;
    let tokens: Vec<u32> = (0..longest).map(|_| (rng.next_u64() % n_vocab) as u32).collect();

    let report = Report {
        version: args::version(),
        file: args.model.file.as_ref().map(|file| file.display().to_string()),
        model: model.config().name.clone(),
        device: model.device().describe(),
        activations: args.run.activations.name(),
        kv_type: args.run.kv_type.name(),
        weight_bytes_per_token: model.weight_bytes_per_token(),
        depth: args.depth,
        results: measure_all(args, &model, &tokens)?,
    };
    if args.json { print_json(&report) } else { Ok(print_table(&report)?) }
}

fn measure_all(args: &BenchArgs, model: &Model, tokens: &[u32]) -> Result<Vec<Measurement>> {
    let mut session = model.session()?;
    if args.depth > 0 {
        session.fill_with_noise(args.depth)?;
    }
    let mut results = Vec::new();
    let mut measure = |test, n: usize, run: fn(&mut Session, &[u32]) -> Result<()>| -> Result<()> {
        if n == 0 {
            return Ok(());
        }
        let bar = load::progress_bar("{msg} {bar:30} {pos} of {len}");
        bar.set_message(test);
        let warm_up = &tokens[..n.min(model.n_batch())];
        let runs = repeat(&mut session, args, warm_up, &tokens[..n], &bar, run);
        bar.finish_and_clear();
        results.push(Measurement::new(test, n, runs?));
        Ok(())
    };
    measure("prefill", args.prompt, prefill)?;
    measure("decode", args.n_predict, decode)?;
    // On average half of the tokens are in the cache.
    let kv_bytes = model.kv_bytes_per_token(args.depth + args.n_predict / 2);
    let bytes = (model.weight_bytes_per_token() + kv_bytes) as f64;
    for result in results.iter_mut().filter(|result| result.test == "decode") {
        result.gb_per_s = Some(result.mean * bytes / 1e9);
    }
    Ok(results)
}

/// Runs the prompt and waits for its last logits.
fn prefill(session: &mut Session, tokens: &[u32]) -> Result<()> {
    session.feed(tokens)?;
    session.greedy().map(drop)
}

/// Generates as many tokens as there are, each chosen on the device and fed from there, and waits for each; the device
/// works on those after it meanwhile, as in a generation.
fn decode(session: &mut Session, tokens: &[u32]) -> Result<()> {
    let start = session.position();
    session.feed(&tokens[..1])?;
    session.choose()?;
    for known in 1..=tokens.len() {
        session.run_ahead(start + known, start + tokens.len())?;
        session.next_chosen()?;
    }
    Ok(())
}

/// Times `run` of `tokens` from the wanted depth, after one of `warm_up`; in tok/s.
fn repeat(
    session: &mut Session,
    args: &BenchArgs,
    warm_up: &[u32],
    tokens: &[u32],
    bar: &ProgressBar,
    run: fn(&mut Session, &[u32]) -> Result<()>,
) -> Result<Vec<f64>> {
    bar.set_length(args.repeat.into());
    session.truncate(args.depth);
    run(session, warm_up)?;
    let time = |_| {
        session.truncate(args.depth);
        let start = Instant::now();
        run(session, tokens)?;
        let seconds = start.elapsed().as_secs_f64();
        bar.inc(1);
        Ok(tokens.len() as f64 / seconds)
    };
    (0..args.repeat).map(time).collect()
}

impl Measurement {
    fn new(test: &'static str, tokens: usize, runs: Vec<f64>) -> Self {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let n = runs.len();
        let median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0;
        let mean = runs.iter().sum::<f64>() / n as f64;
        let squares: f64 = runs.iter().map(|run| (run - mean).powi(2)).sum();
        let deviation = (squares / (n - 1).max(1) as f64).sqrt();
        Self { test, tokens, runs, mean, median, deviation, gb_per_s: None }
    }
}

fn print_table(report: &Report) -> io::Result<()> {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(["test", "tokens", "mean tok/s", "median", "deviation", "GB/s"]);
    for result in &report.results {
        table.add_row([
            result.test.to_owned(),
            result.tokens.to_string(),
            format!("{:.2}", result.mean),
            format!("{:.2}", result.median),
            format!("{:.2}", result.deviation),
            result.gb_per_s.map_or_else(String::new, |rate| format!("{rate:.2}")),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut out = io::stdout().lock();
    let name = report.file.as_deref().or(report.model.as_deref()).unwrap_or("the model");
    let Report { activations, kv_type, depth, version, .. } = report;
    writeln!(out, "{name}, activations {activations}, cache {kv_type}, depth {depth}, host {version}")?;
    writeln!(out, "{}", table.trim_fmt())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_match_the_textbook() {
        let odd = Measurement::new("decode", 1, vec![2.0, 4.0, 9.0]);
        assert_eq!((odd.mean, odd.median), (5.0, 4.0));
        assert!((odd.deviation - 13f64.sqrt()).abs() < 1e-12);
        let even = Measurement::new("decode", 1, vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((even.mean, even.median), (2.5, 2.5));
        let single = Measurement::new("decode", 1, vec![7.0]);
        assert_eq!((single.mean, single.median, single.deviation), (7.0, 7.0, 0.0));
    }
}
