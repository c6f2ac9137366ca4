//! `host eval`: how well a model predicts a text.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use host::eval::evaluate;
use host::gguf::Gguf;
use host::tokenizer::Tokenizer;

use super::args::EvalArgs;
use super::{load, print_json};

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let (ids, source) = match (&args.input.ids, &args.input.text) {
        (Some(path), _) => (read_ids(path)?, path),
        (None, Some(path)) => (Tokenizer::from_gguf(&gguf)?.encode(&load::text(path)?)?, path),
        (None, None) => unreachable!("clap asks for one of the two"),
    };
    ensure!(!ids.is_empty(), "{}: there are no tokens to evaluate", source.display());

    let model = load::model(&gguf, &args.run, &args.run.model_options(Some(ids.len())))?;
    let bar = load::progress_bar("evaluating {bar:30} {pos} of {len} tokens, {eta} left");
    bar.set_length(ids.len() as u64);
    let evaluation = evaluate(&mut model.session()?, &ids, |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let evaluation = evaluation.with_context(|| source.display().to_string())?;
    if let Some(at) = evaluation.nll.iter().position(|nll| !nll.is_finite()) {
        anyhow::bail!("the model gave no usable logits at position {at}: its nll is {}", evaluation.nll[at]);
    }
    print_json(&evaluation)
}

/// Reads a JSON list of token ids.
fn read_ids(path: &Path) -> Result<Vec<u32>> {
    let name = || path.display().to_string();
    let bytes = fs::read(path).with_context(name)?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: needed a JSON list of token ids", name()))
}
