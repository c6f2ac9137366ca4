//! A file's chat template: messages in, the text the model was trained on out.

use anyhow::{Context, Result, anyhow};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;

const KEY: &str = "tokenizer.chat_template";
const NAME: &str = "chat_template";

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sets the scene.
    System,
    /// Asks.
    User,
    /// Answers: the model.
    Assistant,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A Jinja template, set up as the `transformers` library sets up its own.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: Option<String>,
    eos: Option<String>,
}

impl ChatTemplate {
    /// The template of a file.
    pub fn from_gguf(gguf: &Gguf, tokenizer: &Tokenizer) -> Result<Self> {
        let file = gguf.file().display();
        let source: &str = gguf.get(KEY)?.with_context(|| {
            format!("{file}: the file has no chat template (key {KEY:?}): complete text with -p instead")
        })?;
        let text = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id]));
        Self::new(source, text(tokenizer.bos()), text(tokenizer.eos()))
            .with_context(|| format!("{file}: key {KEY:?}"))
    }

    /// A template from its source and the texts of the tokens that it may name.
    pub fn new(source: &str, bos: Option<String>, eos: Option<String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_template_owned(NAME, source.to_owned()).map_err(one_line)?;
        Ok(Self { environment, bos, eos })
    }

    /// Renders a conversation; with `answer` it ends where the assistant's next message begins.
    pub fn render(&self, messages: &[Message], answer: bool) -> Result<String> {
        let nothing = Value::from(());
        let variables = context! {
            messages,
            add_generation_prompt => answer,
            bos_token => self.bos.as_deref().unwrap_or_default(),
            eos_token => self.eos.as_deref().unwrap_or_default(),
            tools => nothing,
            documents => nothing,
        };
        let template = self.environment.get_template(NAME).map_err(one_line)?;
        template.render(variables).map_err(one_line).context("chat template")
    }
}

/// The error and its causes without the source excerpts, which would take many lines.
fn one_line(error: Error) -> anyhow::Error {
    anyhow!("{}", format!("{:#}", anyhow::Error::from(error)).replace('\n', " "))
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}")))
}

/// JSON as Python writes it: not escaped for HTML, with spaces after commas and colons.
fn tojson(value: Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let written = match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            write_json(&value, serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes()))
        }
        None => write_json(&value, PythonFormatter),
    };
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))
}

fn write_json(value: &Value, formatter: impl serde_json::ser::Formatter) -> Result<String> {
    let mut out = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8(out)?)
}

struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        let messages =
            [Message::new(Role::System, " Be brief. "), Message::new(Role::User, "Hi <&> \"you\"")];
        ChatTemplate::new(source, Some("<s>".into()), None)?.render(&messages, true)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_trims_them() {
        let source = "{{ bos_token }}\n  {% for m in messages %}\n[{{ m.role }}]\n    {% endfor %}\nend\n";
        assert_eq!(render(source).unwrap(), "<s>\n[system]\n[user]\nend");
    }

    #[test]
    fn python_methods_and_slices_work() {
        let source = "{{ messages[0].content.strip().upper() }}|{{ messages[1:][0]['content'].split(' ')[-1] }}\
                      |{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}\
                      |{{ 'x' if eos_token else 'none' }}|{{ messages[0].get('name', 'anon') }}";
        assert_eq!(render(source).unwrap(), "BE BRIEF.|\"you\"|2|none|anon");
    }

    #[test]
    fn missing_things_behave_as_in_transformers() {
        let source = "{% if tools is not none %}tools{% endif %}{% if tools %}tools{% endif %}\
                      {% if messages[0].tool_calls %}calls{% endif %}{% if add_generation_prompt %}go{% endif %}";
        assert_eq!(render(source).unwrap(), "go");
    }

    #[test]
    fn tojson_matches_python() {
        assert_eq!(
            render("{{ messages[1] | tojson }}").unwrap(),
            r#"{"role": "user", "content": "Hi <&> \"you\""}"#
        );
        assert_eq!(render("{{ [1, 'ä'] | tojson(indent=2) }}").unwrap(), "[\n  1,\n  \"ä\"\n]");
    }

    #[test]
    fn the_date_is_formatted() {
        let date = render("{{ strftime_now('%Y-%m-%d %B') }}").unwrap();
        assert!(date.len() > 12 && date.starts_with("20"), "{date}");
        assert!(render("{{ strftime_now('%!') }}").is_err());
    }

    #[test]
    fn errors_are_one_line() {
        let error = render("{{ raise_exception('roles must\\nalternate') }}").unwrap_err();
        let line = format!("{error:#}");
        assert!(line.contains("roles must alternate") && !line.contains('\n'), "{line}");
        let line = format!("{:#}", render("{% for %}\n\n{{").unwrap_err());
        assert!(line.contains("syntax error") && !line.contains('\n'), "{line}");
    }
}
