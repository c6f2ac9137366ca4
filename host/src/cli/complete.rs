//! `host MODEL -p TEXT` and a pipe on stdin: one prompt, one answer.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anyhow::{Result, ensure};
use host::chat::{ChatTemplate, Message, Role};
use host::gguf::Gguf;
use host::tokenizer::Tokenizer;

use super::args::GenerateArgs;
use super::generate::Generator;
use super::{load, status};

/// Tokens of a completion where the user sets no limit: plain text need never end.
const DEFAULT_LIMIT: usize = 256;

pub(super) fn run(args: &GenerateArgs, prompt: &str) -> Result<()> {
    ensure!(!prompt.is_empty(), "the prompt is empty");
    let gguf = Gguf::open(args.model())?;
    let tokenizer = Tokenizer::from_gguf(&gguf)?;
    // A system message makes sense in a chat alone.
    let chat = args.chat || args.system.is_some();
    let ids = if chat {
        let template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        let messages: Vec<_> = args
            .system
            .iter()
            .map(|text| Message::new(Role::System, text))
            .chain([Message::new(Role::User, prompt)])
            .collect();
        tokenizer.encode_with_special(&template.render(&messages, true)?)?
    } else {
        tokenizer.encode(prompt)?
    };
    ensure!(!ids.is_empty(), "the prompt is empty: it has no tokens");

    let model = load::model(&gguf, &args.run, &args.run.model_options(None))?;
    let limit = args.n_predict.or((!chat).then_some(DEFAULT_LIMIT));
    let mut out = io::stdout().lock();
    let mut generator = Generator::new(&model, &tokenizer, &args.sampling)?;
    let generated = generator.run(&ids, limit, || false, &mut out)?;
    if out.is_terminal() {
        status!();
    }
    generated.report();
    Ok(())
}

/// All of stdin, without the newline at its end that `echo` and here-documents add.
pub(super) fn read_stdin() -> Result<String> {
    let mut text = load::text(Path::new("-"))?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}
