//! Whole models against golden figures: what a float32 forward pass in numpy gives, with the weights dequantized by
//! PyPI's `gguf` package (tests/golden/*.json: per position the negative log-likelihood, the argmax, and the margin
//! of the top logit over the second).
//!
//! By default SmolLM2 runs, the short texts and `gpl` (on the exact path its first 128 ids), on every device. With
//! `WARPLINE_GOLDEN_MODEL` all of every text of that model runs, as `make golden` does.

use crate::kernels::devices;
use crate::model_files::smollm2;
use gpu_kernels::gemv::few::FEW_TOKENS;
use host::device::Device;
use host::eval::evaluate;
use host::gguf::Gguf;
use host::model::{Activations, Model, ModelOptions};
use serde_json::Value;
use std::path::PathBuf;

/// Bounds for one model's evaluation.
struct Bounds {
    golden: &'static str,
    /// Mean |dNLL| on the Q8_1 path, over all positions of all texts: what rounding activations to Q8_1 costs in
    /// numpy (0.055 for SmolLM2, 0.024 for Qwen), and some room. A single short text may be off by more: its mean is
    /// that of a dozen positions.
    q8_1_mean: f64,
}

/// Mean |dNLL| on the exact path, for every text.
const F32_MEAN: f64 = 0.005;
/// Relative change of perplexity on the long text `gpl`, Q8_1 path.
const PERPLEXITY: f64 = 0.02;
/// Argmax must agree where the top logit leads by this much.
const CLEAR_MARGIN: f64 = 1.0;
/// On the exact path, max |dNLL| between the CPU and a GPU.
const DEVICES_MAX: f64 = 0.02;
/// On the exact path, max |dNLL| between ids that go through one by one and several at once.
const BATCHES_MAX: f64 = 0.02;
/// Ids at once: one, some, and all of a text. One alone is other kernels.
const BATCHES: [usize; 3] = [1, 7, 512];

fn bounds(architecture: &str) -> Bounds {
    match architecture {
        "llama" => Bounds { golden: include_str!("golden/smollm2.json"), q8_1_mean: 0.08 },
        "qwen2" => Bounds { golden: include_str!("golden/qwen.json"), q8_1_mean: 0.05 },
        other => panic!("there are no golden figures for architecture {other}"),
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// What an evaluation gives beside what the golden figures say, per position.
#[derive(Default)]
struct Comparison {
    found: Vec<f64>,
    expected: Vec<f64>,
}

impl Comparison {
    fn mean(&self) -> f64 {
        let pairs = self.found.iter().zip(&self.expected);
        pairs.map(|(a, b)| (a - b).abs()).sum::<f64>() / self.found.len() as f64
    }
}

/// Evaluates one text and compares it; `limit` cuts it to its first ids.
fn check_text(model: &Model, name: &str, golden: &Value, limit: usize, exact: bool) -> Comparison {
    let tokens: Vec<u32> = numbers(&golden["tokens"]).into_iter().take(limit).map(|t| t as u32).collect();
    let (argmax, margin) = (numbers(&golden["argmax"]), numbers(&golden["margin"]));
    let found = evaluate(&mut model.session().unwrap(), &tokens, |_| {}).unwrap();
    let expected = numbers(&golden["nll"])[..tokens.len() - 1].to_vec();
    assert_eq!(found.nll.len(), expected.len());
    let comparison = Comparison { found: found.nll, expected };

    let error = comparison.mean();
    let pairs = comparison.found.iter().zip(&comparison.expected);
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let perplexity = (mean(&comparison.found) - mean(&comparison.expected)).exp() - 1.0;
    let clear: Vec<usize> = (0..tokens.len()).filter(|&i| margin[i] >= CLEAR_MARGIN).collect();
    let agree = clear.iter().filter(|&&i| f64::from(found.argmax[i]) == argmax[i]).count();
    println!(
        "  {name:8} {:4} ids: mean |dNLL| {error:.5}, max {worst:.5}, perplexity {:+.2}%, argmax {agree} of {} clear ones",
        tokens.len(),
        100.0 * perplexity,
        clear.len()
    );
    assert!(!exact || error <= F32_MEAN, "{name}: mean |dNLL| {error} is over {F32_MEAN}");
    assert!(
        exact || name != "gpl" || perplexity.abs() <= PERPLEXITY,
        "{name}: perplexity is off by {perplexity}"
    );
    assert_eq!(agree, clear.len(), "{name}: argmax differs where the margin is clear");
    comparison
}

/// All texts on both paths on one device, ids one by one and several at once; returns the exact path's nlls.
fn check_model(device: &Device, gguf: &Gguf, limit: impl Fn(&str, Activations) -> usize) -> Vec<f64> {
    let bounds = bounds(gguf.require::<&str>("general.architecture").unwrap());
    let golden: Value = serde_json::from_str(bounds.golden).unwrap();
    let evaluate = |activations, n_batch| {
        println!(
            "{} with {activations:?} activations, {n_batch} at once, on {}",
            gguf.file().display(),
            device.describe()
        );
        let options = ModelOptions { activations, n_batch: Some(n_batch), ..ModelOptions::default() };
        let model = Model::load(device.clone(), gguf, &options, &mut |_, _| {}).unwrap();
        let mut all = Comparison::default();
        for (name, text) in
            golden.as_object().unwrap().iter().filter(|(name, _)| limit(name, activations) > 0)
        {
            let one =
                check_text(&model, name, text, limit(name, activations), activations == Activations::F32);
            all.found.extend(one.found);
            all.expected.extend(one.expected);
        }
        println!("  all texts, {} positions: mean |dNLL| {:.5}", all.found.len(), all.mean());
        all
    };
    // Products for one token, for a few, and for many.
    for n_batch in [1, FEW_TOKENS, 512] {
        let fast = evaluate(Activations::Q8_1, n_batch).mean();
        assert!(fast <= bounds.q8_1_mean, "Q8_1: mean |dNLL| {fast} is over {}", bounds.q8_1_mean);
    }
    let exact = BATCHES.map(|n_batch| evaluate(Activations::F32, n_batch).found);
    for (n_batch, found) in BATCHES.iter().zip(&exact).skip(1) {
        let pairs = found.iter().zip(&exact[0]);
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!("{n_batch} at once and one by one, exact path: max |dNLL| {worst:.5}");
        assert!(worst <= BATCHES_MAX, "{n_batch} at once differ from one by one by {worst}");
    }
    let [one_by_one, ..] = exact;
    one_by_one
}

/// The exact path on every device, against each other.
fn check_devices(gguf: &Gguf, limit: impl Fn(&str, Activations) -> usize) {
    let all: Vec<Vec<f64>> = devices().iter().map(|device| check_model(device, gguf, &limit)).collect();
    for other in &all[1..] {
        let worst = all[0].iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        println!("between devices, exact path: max |dNLL| {worst:.5}");
        assert!(worst <= DEVICES_MAX, "devices differ by {worst}");
    }
}

#[test]
fn golden() {
    match std::env::var_os("WARPLINE_GOLDEN_MODEL") {
        Some(path) => check_devices(&Gguf::open(PathBuf::from(path)).unwrap(), |_, _| usize::MAX),
        None => {
            check_devices(&Gguf::open(smollm2()).unwrap(), |text, activations| match (text, activations) {
                ("long", _) => 0,
                // The exact path's bound is tight at any length. The fast one's need the whole text: on its first 128
                // ids Q8_1's rounding alone moves the perplexity by up to 6%, by the same simulation that gives 1% here.
                ("gpl", Activations::F32) => 128,
                _ => usize::MAX,
            })
        }
    }
}
