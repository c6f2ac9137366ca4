//! The command line: one file per subcommand.

mod args;
mod bench;
mod chat;
mod complete;
mod eval;
mod generate;
mod inspect;
mod load;
mod profile;
mod tokenize;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use args::{Cli, Command, GenerateArgs};

/// Prints a line to stderr; unlike `eprintln!` it survives that nobody reads it.
macro_rules! status {
    ($($arg:tt)*) => {{
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}
pub(crate) use status;

/// Runs the program.
pub(crate) fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads our output has read enough: that is no error.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            status!("error: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    match &cli.command {
        Some(Command::Eval(args)) => eval::run(args),
        Some(Command::Tokenize(args)) => tokenize::run(args),
        Some(Command::Inspect(args)) => inspect::run(args),
        Some(Command::Bench(args)) => bench::run(args),
        Some(Command::Profile(args)) => profile::run(args),
        None => generate(&cli.generate),
    }
}

fn generate(args: &GenerateArgs) -> Result<()> {
    match &args.prompt {
        Some(prompt) => complete::run(args, prompt),
        None if io::stdin().is_terminal() => chat::run(args),
        None => complete::run(args, &complete::read_stdin()?),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// Writes one JSON value and a newline to stdout.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(out.flush()?)
}
