//! The command line: every argument and what it means.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use host::config::Preset;
use host::device::DeviceChoice;
use host::model::{Activations, Fusion, KvFormat, ModelOptions};
use host::sampling::SamplingOptions;

/// The version, with the commit where it is known.
static VERSION: LazyLock<String> = LazyLock::new(|| match option_env!("WARPLINE_GIT_HASH") {
    Some(hash) => format!("{} ({hash})", env!("CARGO_PKG_VERSION")),
    None => env!("CARGO_PKG_VERSION").to_owned(),
});

/// The version, with the commit where it is known.
pub(crate) fn version() -> &'static str {
    &VERSION
}

/// Runs a GGUF language model with kernels written in Rust, on an NVIDIA GPU or on the CPU.
///
/// Without -p: on a terminal it opens a chat, with a pipe on stdin it completes what it reads. Only generated text
/// goes to stdout.
#[derive(Debug, Parser)]
#[command(
    version = version(),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) generate: GenerateArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Eval(EvalArgs),
    Tokenize(TokenizeArgs),
    Inspect(InspectArgs),
    Bench(BenchArgs),
    Profile(ProfileArgs),
}

/// Generates text.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The model, a GGUF file
    #[arg(required = true)] // unless a subcommand takes its place
    model: Option<PathBuf>,

    /// Complete TEXT
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,

    /// Treat the text as a chat message: wrap it in the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,

    /// What the chat's system message says
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,

    /// Generate at most N tokens [default: in a chat as many as the model likes, else 256]
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) n_predict: Option<usize>,

    #[command(flatten)]
    pub(crate) run: RunArgs,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

impl GenerateArgs {
    /// The model's file.
    pub(crate) fn model(&self) -> &Path {
        self.model.as_deref().unwrap_or(Path::new("")) // clap has made sure that it is there
    }
}

/// Where and how the model runs.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Where to run: auto takes the GPU if there is one
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceArg,

    /// How activations meet the weights: quantized to Q8_1 (fast) or in f32 (exact)
    #[arg(long, value_enum, default_value_t)]
    pub(crate) activations: ActivationsArg,

    /// One kernel per operation, for measuring and debugging
    #[arg(long)]
    pub(crate) unfused: bool,

    /// Room for N tokens of context
    #[arg(long, value_name = "N")]
    pub(crate) ctx: Option<usize>,

    /// Run N tokens of a prompt at once [default: 512, on the CPU 64]
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,

    /// How keys and values are stored; q8_0 takes little more than half of the memory
    #[arg(long, value_enum, default_value_t)]
    pub(crate) kv_type: KvTypeArg,
}

impl RunArgs {
    /// The model's options, with room for `n_ctx` tokens unless the user says otherwise.
    pub(crate) fn model_options(&self, n_ctx: Option<usize>) -> ModelOptions {
        ModelOptions {
            activations: self.activations.into(),
            fusion: if self.unfused { Fusion::Unfused } else { Fusion::Fused },
            n_ctx: self.ctx.or(n_ctx),
            n_batch: self.batch,
            kv_format: self.kv_type.into(),
        }
    }
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum DeviceArg {
    #[default]
    Auto,
    Cuda,
    Cpu,
}

impl From<DeviceArg> for DeviceChoice {
    fn from(device: DeviceArg) -> Self {
        match device {
            DeviceArg::Auto => Self::Auto,
            DeviceArg::Cuda => Self::Cuda,
            DeviceArg::Cpu => Self::Cpu,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum ActivationsArg {
    #[default]
    #[value(name = "q8_1")]
    Q8_1,
    F32,
}

impl ActivationsArg {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Q8_1 => "q8_1",
            Self::F32 => "f32",
        }
    }
}

impl From<ActivationsArg> for Activations {
    fn from(activations: ActivationsArg) -> Self {
        match activations {
            ActivationsArg::Q8_1 => Self::Q8_1,
            ActivationsArg::F32 => Self::F32,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum KvTypeArg {
    #[default]
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl KvTypeArg {
    /// The name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl From<KvTypeArg> for KvFormat {
    fn from(kv_type: KvTypeArg) -> Self {
        match kv_type {
            KvTypeArg::F16 => Self::F16,
            KvTypeArg::Q8_0 => Self::Q8_0,
        }
    }
}

/// How tokens are chosen.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token [default: 0, or 1 where --top-k or --top-p is given]
    #[arg(long, value_name = "T", value_parser = parse_temp, allow_negative_numbers = true)]
    pub(crate) temp: Option<f32>,

    /// Choose among the K most likely tokens; 0 means all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,

    /// Choose among the most likely tokens that together have probability P
    #[arg(long, value_name = "P", value_parser = parse_top_p, allow_negative_numbers = true, default_value_t = 1.0)]
    pub(crate) top_p: f32,

    /// The same seed gives the same text [default: another one each time]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

impl SamplingArgs {
    /// The sampler's options, `random_seed` where the user gives none.
    pub(crate) fn options(&self, random_seed: u64) -> SamplingOptions {
        let narrowed = self.top_k != 0 || self.top_p != 1.0;
        SamplingOptions {
            temp: self.temp.unwrap_or(if narrowed { 1.0 } else { 0.0 }),
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed.unwrap_or(random_seed),
        }
    }
}

fn parse_temp(text: &str) -> Result<f32, String> {
    let temp: f32 = text.parse().map_err(|_| "needed a number".to_owned())?;
    if temp.is_finite() && temp >= 0.0 { Ok(temp) } else { Err("needed 0 or more".to_owned()) }
}

fn parse_top_p(text: &str) -> Result<f32, String> {
    let p: f32 = text.parse().map_err(|_| "needed a number".to_owned())?;
    if (0.0..=1.0).contains(&p) { Ok(p) } else { Err("needed a number from 0 to 1".to_owned()) }
}

/// Prints how well the model predicts a text: {"nll": [...], "argmax": [...]}
///
/// nll[i] = -log p(ids[i+1] | ids[..=i]), in nats; argmax[i] is the most likely token after ids[..=i].
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// The model, a GGUF file
    pub(crate) model: PathBuf,

    #[command(flatten)]
    pub(crate) input: EvalInput,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct EvalInput {
    /// A JSON list of token ids
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: Option<PathBuf>,

    /// A text, which is tokenized first
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
}

/// Prints a text's token ids as a JSON list
#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    /// The model, a GGUF file
    pub(crate) model: PathBuf,

    /// The text; - reads stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,

    /// Take special tokens written out in the text, such as <|im_end|>, for those tokens; add no BOS or EOS
    #[arg(long)]
    pub(crate) special: bool,
}

/// Shows a file's metadata and tensors
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The model, a GGUF file
    pub(crate) model: PathBuf,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,
}

/// A model to be timed: a file, or random weights.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct ModelArgs {
    /// The model, a GGUF file; it needs no tokenizer
    pub(crate) file: Option<PathBuf>,

    /// Random Q4_K_M weights in the dimensions of a well-known model; no file is needed
    #[arg(long, value_parser = preset_parser())]
    pub(crate) preset: Option<Preset>,
}

/// Finds a preset by its name, and lists the names in the help.
fn preset_parser() -> impl TypedValueParser<Value = Preset> {
    let names = Preset::all().into_iter().map(|preset| preset.name);
    PossibleValuesParser::new(names).try_map(|name| {
        let preset = Preset::all().into_iter().find(|preset| preset.name == name);
        preset.ok_or("there is no such preset")
    })
}

/// Times prefill and decode apart, on random tokens
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Tokens to prefill; 0 leaves prefill out
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    pub(crate) prompt: usize,

    /// Tokens to decode; 0 leaves decode out
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub(crate) n_predict: usize,

    /// Tokens that are in the cache before the clock runs
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub(crate) depth: usize,

    /// How often each is repeated
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,

    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// Times a step operation by operation, and shows how far each is from what memory allows
///
/// Kernel by kernel, unfused and fused, and the fused step as one recorded graph (with --unfused, only the unfused
/// kernels, in both ways).
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    /// Tokens that are in the cache before the step
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub(crate) depth: usize,

    /// How often each time is taken; the median counts
    #[arg(short, long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw the last path's operations and their floors as an SVG picture
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) chart: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Cli {
        Cli::try_parse_from(format!("host {line}").split(' ')).unwrap()
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_model_alone_is_a_generation() {
        let cli = parse("model.gguf -p -1 -n 3 --chat --device cpu --activations f32");
        let generate = cli.generate;
        assert_eq!(generate.model(), Path::new("model.gguf"));
        assert_eq!((generate.prompt.as_deref(), generate.n_predict), (Some("-1"), Some(3)));
        assert!(cli.command.is_none());
    }

    #[test]
    fn subcommands_take_the_place_of_the_model() {
        let cli = parse("bench model.gguf -p 16 -n 8 -r 2 --json");
        assert!(
            matches!(cli.command, Some(Command::Bench(args)) if args.prompt == 16 && args.repeat == 2 && args.json)
        );
    }

    #[test]
    fn senseless_values_are_refused() {
        for line in [
            "m --temp -1",
            "m --temp nan",
            "m --top-p 1.5",
            "m --device tpu",
            "eval m",
            "bench m -r 0",
            "eval m --ids a --text b",
        ] {
            assert!(Cli::try_parse_from(format!("host {line}").split(' ')).is_err(), "{line}");
        }
    }

    #[test]
    fn sampling_is_greedy_unless_asked_for() {
        let options = |line| parse(line).generate.sampling.options(5);
        assert!(options("m").is_greedy());
        assert!(options("m --seed 1").is_greedy());
        assert_eq!(options("m --top-k 40").temp, 1.0);
        assert_eq!(options("m --top-p 0.9").temp, 1.0);
        assert_eq!(options("m --top-p 0.9 --temp 0.5").temp, 0.5);
        assert_eq!((options("m --temp 1").seed, options("m --temp 1 --seed 9").seed), (5, 9));
    }
}
