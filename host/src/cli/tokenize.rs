//! `host tokenize`: a text's token ids.

use anyhow::Result;
use host::gguf::Gguf;
use host::tokenizer::Tokenizer;

use super::args::TokenizeArgs;
use super::{load, print_json};

pub(super) fn run(args: &TokenizeArgs) -> Result<()> {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&args.model)?)?;
    let text = load::text(&args.text)?;
    let ids = if args.special { tokenizer.encode_with_special(&text) } else { tokenizer.encode(&text) };
    print_json(&ids?)
}
