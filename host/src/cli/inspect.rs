//! `host inspect`: what is in a file.

use std::io::{self, BufWriter, Write};

use anyhow::Result;
use host::gguf::Gguf;

use super::args::InspectArgs;

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let gguf = Gguf::open(&args.model)?;
    let mut out = BufWriter::new(io::stdout().lock());
    host::inspect::print(&gguf, args.json, &mut out)?;
    Ok(out.flush()?)
}
