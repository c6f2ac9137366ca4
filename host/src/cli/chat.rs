//! A chat on the terminal.

use std::io::{self, IsTerminal, Write};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use host::chat::{ChatTemplate, Message, Role};
use host::gguf::Gguf;
use host::tokenizer::Tokenizer;
use rustyline::error::ReadlineError;
use rustyline::{Behavior, Config, DefaultEditor};

use super::args::GenerateArgs;
use super::generate::{Generated, Generator, Stop};
use super::{is_broken_pipe, load, status};

const PROMPT: &str = "> ";
const CLEAR: &str = "/clear";

/// Exit code of a program that Ctrl-C ended.
const INTERRUPTED_CODE: i32 = 130;

/// Whether Ctrl-C was pressed since the answer began.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

pub(super) fn run(args: &GenerateArgs) -> Result<()> {
    let gguf = Gguf::open(args.model())?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    let template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
    let model = load::model(&gguf, &args.run, &args.run.model_options(None))?;
    let generator = Generator::new(&model, &tokenizer, &args.sampling)?;
    let system = args.system.iter().map(|text| Message::new(Role::System, text)).collect();
    let mut chat =
        Chat { template, tokenizer: &tokenizer, generator, system, turns: Vec::new(), limit: args.n_predict };

    // Where stdout goes to a file, the editor must still draw on the terminal.
    let behavior = if io::stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
    let mut editor = DefaultEditor::with_config(Config::builder().behavior(behavior).build())?;
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            process::exit(INTERRUPTED_CODE); // pressed twice: something takes long
        }
    })
    .context("cannot watch for Ctrl-C")?;
    status!("Ctrl-C stops the answer, Ctrl-D leaves, {CLEAR} starts over.");
    loop {
        match editor.readline(PROMPT) {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) if line.trim() == CLEAR => chat.turns.clear(),
            Ok(line) => {
                editor.add_history_entry(&line)?;
                chat.turn(line)?;
            }
            Err(ReadlineError::Interrupted) => status!("Ctrl-D leaves."),
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("cannot read from the terminal"),
        }
    }
}

struct Chat<'m> {
    template: ChatTemplate,
    tokenizer: &'m Tokenizer,
    generator: Generator<'m>,
    system: Vec<Message>,
    turns: Vec<Message>,
    limit: Option<usize>,
}

impl Chat<'_> {
    /// One question and its answer. What is wrong with this turn alone is told, and the turn forgotten.
    fn turn(&mut self, question: String) -> Result<()> {
        self.turns.push(Message::new(Role::User, question));
        INTERRUPTED.store(false, Ordering::Relaxed);
        match self.answer() {
            Ok(generated) => {
                status!();
                generated.report();
                if generated.stop == Stop::Context {
                    status!("{CLEAR} starts over");
                }
                self.turns.push(Message::new(Role::Assistant, generated.text));
                Ok(())
            }
            Err(error) if is_broken_pipe(&error) => Err(error),
            Err(error) => {
                self.turns.pop();
                status!("error: {error:#}; {CLEAR} starts over");
                Ok(())
            }
        }
    }

    fn answer(&mut self) -> Result<Generated> {
        let messages: Vec<_> = self.system.iter().chain(&self.turns).cloned().collect();
        let text = self.template.render(&messages, true)?;
        let ids = self.tokenizer.encode_with_special(&text)?;
        let interrupted = || INTERRUPTED.load(Ordering::Relaxed);
        self.generator.run(&ids, self.limit, interrupted, &mut io::stdout().lock())
    }
}
