//! Warpline's command line: `host model.gguf`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
