//! Whole models against golden figures: what a float32 forward pass in numpy gives, with the weights dequantized by
//! PyPI's `gguf` package (tests/golden/*.json: per position the negative log-likelihood, the argmax, and the margin
//! of the top logit over the second).
//!
//! By default SmolLM2 runs, the short texts whole and of `gpl` the first 128 ids, on every device. With
//! `WARPLINE_GOLDEN_MODEL` all of every text of that model runs, as `make golden` does.

use crate::kernels::devices;
use host::device::Device;
use host::gguf::Gguf;
use host::model::{Activations, Model, ModelOptions};
use host::eval::evaluate;
use serde_json::Value;
use std::path::PathBuf;

/// Bounds for one model's evaluation.
struct Bounds {
    golden: &'static str,
    /// Mean |dNLL| on the Q8_1 path: what rounding activations to Q8_1 costs in numpy (0.055 for SmolLM2, 0.024 for
    /// Qwen), and some room.
    q8_1_mean: f64,
}

/// Mean |dNLL| on the exact path.
const F32_MEAN: f64 = 0.005;
/// Relative change of perplexity on the long text `gpl`, Q8_1 path.
const PERPLEXITY: f64 = 0.02;
/// Argmax must agree where the top logit leads by this much.
const CLEAR_MARGIN: f64 = 1.0;
/// On the exact path, max |dNLL| between the CPU and a GPU.
const DEVICES_MAX: f64 = 0.02;

fn bounds(architecture: &str) -> Bounds {
    match architecture {
        "llama" => Bounds { golden: include_str!("golden/smollm2.json"), q8_1_mean: 0.08 },
        "qwen2" => Bounds { golden: include_str!("golden/qwen.json"), q8_1_mean: 0.05 },
        other => panic!("there are no golden figures for architecture {other}"),
    }
}

/// Where SmolLM2 is: `make test` says; scripts/fetch-model puts it into the cache.
fn smollm2() -> PathBuf {
    let path = std::env::var_os("WARPLINE_SMOLLM2").map_or_else(
        || {
            let home = PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
            home.join(".cache/warpline/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        PathBuf::from,
    );
    assert!(path.is_file(), "{} is not there: scripts/fetch-model smollm2 brings it", path.display());
    path
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Evaluates one text and compares it; `limit` cuts it to its first ids. Returns the nll per position.
fn check_text(model: &Model, name: &str, golden: &Value, limit: usize, bounds: &Bounds, exact: bool) -> Vec<f64> {
    let tokens: Vec<u32> = numbers(&golden["tokens"]).into_iter().take(limit).map(|t| t as u32).collect();
    let (argmax, margin) = (numbers(&golden["argmax"]), numbers(&golden["margin"]));
    let found = evaluate(&mut model.session().unwrap(), &tokens, |_| {}).unwrap();
    let expected = &numbers(&golden["nll"])[..tokens.len() - 1];

    assert_eq!(found.nll.len(), expected.len());
    let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / expected.len() as f64;
    let error = mean(&mut found.nll.iter().zip(expected).map(|(a, b)| (a - b).abs()));
    let worst = found.nll.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let perplexity = mean(&mut found.nll.iter().copied()).exp() / mean(&mut expected.iter().copied()).exp() - 1.0;
    let clear: Vec<usize> = (0..tokens.len()).filter(|&i| margin[i] >= CLEAR_MARGIN).collect();
    let agree = clear.iter().filter(|&&i| f64::from(found.argmax[i]) == argmax[i]).count();
    println!(
        "  {name:8} {:4} ids: mean |dNLL| {error:.5}, max {worst:.5}, perplexity {:+.2}%, argmax {agree} of {} clear ones",
        tokens.len(),
        100.0 * perplexity,
        clear.len()
    );
    let allowed = if exact { F32_MEAN } else { bounds.q8_1_mean };
    assert!(error <= allowed, "{name}: mean |dNLL| {error} is over {allowed}");
    assert!(exact || name != "gpl" || perplexity.abs() <= PERPLEXITY, "{name}: perplexity is off by {perplexity}");
    assert_eq!(agree, clear.len(), "{name}: argmax differs where the margin is clear");
    found.nll
}

/// All texts on both paths on one device; returns the exact path's nlls.
fn check_model(device: &Device, gguf: &Gguf, limit: impl Fn(&str) -> usize) -> Vec<f64> {
    let bounds = bounds(gguf.require::<&str>("general.architecture").unwrap());
    let golden: Value = serde_json::from_str(bounds.golden).unwrap();
    let mut exact_nlls = Vec::new();
    for activations in [Activations::F32, Activations::Q8_1] {
        println!("{} with {activations:?} activations on {}", gguf.file().display(), device.describe());
        let options = ModelOptions { activations, n_ctx: None };
        let model = Model::load(device.clone(), gguf, &options, &mut |_, _| {}).unwrap();
        for (name, text) in golden.as_object().unwrap() {
            let limit = limit(name);
            if limit > 0 {
                let exact = activations == Activations::F32;
                let nll = check_text(&model, name, text, limit, &bounds, exact);
                if exact {
                    exact_nlls.extend(nll);
                }
            }
        }
    }
    exact_nlls
}

/// The exact path on every device, against each other.
fn check_devices(gguf: &Gguf, limit: impl Fn(&str) -> usize) {
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
        Some(path) => check_devices(&Gguf::open(PathBuf::from(path)).unwrap(), |_| usize::MAX),
        None => check_devices(&Gguf::open(smollm2()).unwrap(), |text| match text {
            "long" => 0,
            "gpl" => 128,
            _ => usize::MAX,
        }),
    }
}
