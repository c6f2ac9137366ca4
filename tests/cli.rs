//! The command line: what goes to stdout, what to stderr, and how it fails.

use host::device::{Device, DeviceChoice};
use serde_json::Value as Json;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::tiny_model::TinyModel;
use crate::tiny_vocabulary::TinyVocabulary;

/// A folder of the test's own, gone when the test ends.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A model with a vocabulary that covers all bytes and no end token that random weights would soon reach.
    fn model(&self) -> PathBuf {
        self.write("model.gguf", with_vocabulary().to_bytes())
    }

    /// A model without a tokenizer.
    fn no_vocab(&self) -> PathBuf {
        self.write("no_vocab.gguf", TinyModel::qwen2().to_bytes())
    }
}

fn with_vocabulary() -> TinyModel {
    let mut model = TinyModel::llama();
    TinyVocabulary::new().add_to(&mut model);
    model
}

fn host<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let program = std::env::var_os("WARPLINE_HOST").unwrap_or_else(|| env!("CARGO_BIN_EXE_host").into());
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command
}

/// `host MODEL ARGS --device cpu`
fn generate(model: &Path, args: &[&str]) -> Output {
    host([model.as_os_str()]).args(args).args(["--device", "cpu"]).output().unwrap()
}

/// `host COMMAND MODEL ARGS --device cpu`
fn subcommand(name: &str, model: &Path, args: &[&str]) -> Output {
    host([OsStr::new(name), model.as_os_str()]).args(args).args(["--device", "cpu"]).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> Json {
    serde_json::from_str(&stdout(output)).unwrap()
}

#[test]
fn only_generated_text_goes_to_stdout() {
    let files = Files::new();
    let model = files.model();
    let nothing = generate(&model, &["-p", "hello", "-n", "0"]);
    assert_eq!(stdout(&nothing), "");
    let some = generate(&model, &["-p", "hello", "-n", "12"]);
    let status = stderr(&some);
    assert!(!stdout(&some).is_empty() && !stdout(&some).contains("tok/s"));
    assert!(status.contains("prefill 1 tokens") && status.contains("tok/s"), "{status}");
    let longer = generate(&model, &["-p", "hello", "-n", "24"]);
    assert!(stdout(&longer).starts_with(stdout(&some).trim_end_matches('\u{FFFD}')));
}

#[test]
fn a_pipe_on_stdin_is_the_prompt() {
    let files = Files::new();
    let model = files.model();
    let mut child = host([model.as_os_str()])
        .args(["-n", "8", "--device", "cpu"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello there\n").unwrap();
    let piped = child.wait_with_output().unwrap();
    let given = generate(&model, &["-n", "8", "-p", "hello there"]);
    assert_eq!(stdout(&piped), stdout(&given));
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let files = Files::new();
    let model = files.model();
    let text = |seed: &str| {
        let args = ["-p", "hello", "-n", "24", "--temp", "1.5", "--top-k", "200", "--seed", seed];
        stdout(&generate(&model, &args))
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    let unseeded = generate(&model, &["-p", "hello", "-n", "1", "--temp", "1"]);
    assert!(stderr(&unseeded).contains("seed "), "a seed that was drawn is told");
}

#[test]
fn chat_wraps_the_prompt_in_the_template() {
    let files = Files::new();
    let mut model = with_vocabulary();
    model.set("tokenizer.chat_template", "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}");
    let path = files.write("chat.gguf", model.to_bytes());
    let plain = generate(&path, &["-p", "hello", "-n", "1"]);
    let chat = generate(&path, &["-p", "hello", "-n", "1", "--chat"]);
    let system = generate(&path, &["-p", "hello", "-n", "1", "--system", "hello"]);
    for (output, tokens) in [(plain, 1), (chat, 2), (system, 4)] {
        assert!(stderr(&output).contains(&format!("prefill {tokens} tokens")), "{}", stderr(&output));
    }
}

/// What a program on a terminal shows.
#[cfg(target_os = "linux")]
struct Screen {
    output: std::sync::mpsc::Receiver<Vec<u8>>,
    unread: String,
}

#[cfg(target_os = "linux")]
impl Screen {
    /// Reads up to and with `end`; fails after a minute.
    fn wait_for(&mut self, end: &str) {
        loop {
            if let Some((_, rest)) = self.unread.split_once(end) {
                self.unread = rest.to_owned();
                return;
            }
            match self.output.recv_timeout(std::time::Duration::from_secs(60)) {
                Ok(bytes) => self.unread += &String::from_utf8_lossy(&bytes),
                Err(error) => panic!("{error} while waiting for {end:?} after {:?}", self.unread),
            }
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_terminal_opens_a_chat_that_keeps_its_cache() {
    let files = Files::new();
    let mut model = with_vocabulary();
    let template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}";
    model.set("tokenizer.chat_template", template);
    let path = files.write("chat.gguf", model.to_bytes());
    let host = host([path.as_os_str()]);
    let line = format!("{:?} {path:?} -n 3 --device cpu", host.get_program());
    // script runs it on a terminal of its own
    let mut child = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keyboard = child.stdin.take().unwrap();
    let mut output = child.stdout.take().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let mut screen = Screen { output: receiver, unread: String::new() };
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = output.read(&mut bytes) {
            let _ = sender.send(bytes[..n].to_vec()); // the test may be over
        }
    });

    screen.wait_for("> ");
    keyboard.write_all(b"hello\r").unwrap();
    screen.wait_for("prefill 2 tokens,");
    screen.wait_for("> ");
    keyboard.write_all(b"hello\r").unwrap();
    screen.wait_for("more were cached");
    screen.wait_for("> ");
    keyboard.write_all(b"/clear\r").unwrap();
    screen.wait_for("> ");
    keyboard.write_all(b"hello\r").unwrap();
    screen.wait_for("prefill 1 tokens (1 more were cached)");
    screen.wait_for("> ");
    keyboard.write_all(b"\x04").unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn generation_stops_where_the_context_ends() {
    let files = Files::new();
    let output = generate(&files.model(), &["-p", "hello hello", "-n", "100", "--ctx", "8"]);
    assert!(stderr(&output).contains("context is full"), "{}", stderr(&output));
    assert!(stderr(&output).contains("decode 6 tokens"), "{}", stderr(&output));
    stdout(&output);
}

#[test]
fn a_reader_that_leaves_ends_the_program_quietly() {
    let files = Files::new();
    let mut child = host([files.model().as_os_str()])
        .args(["-p", "hello", "-n", "100", "--device", "cpu"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(!stderr(&output).contains("rror") && !stderr(&output).contains("panic"), "{}", stderr(&output));
}

#[test]
fn eval_prints_nll_and_argmax() {
    let files = Files::new();
    let model = files.model();
    let text = files.write("text.txt", "hello there, hello");
    let ids = subcommand_without_device("tokenize", &model, &["--text", text.to_str().unwrap()]);
    let n = json(&ids).as_array().unwrap().len();
    let ids = files.write("ids.json", stdout(&ids));

    let by_ids = subcommand("eval", &model, &["--ids", ids.to_str().unwrap()]);
    let by_text = subcommand("eval", &model, &["--text", text.to_str().unwrap()]);
    assert_eq!(stdout(&by_ids), stdout(&by_text));
    let result = json(&by_ids);
    assert_eq!(result["nll"].as_array().unwrap().len(), n - 1);
    assert_eq!(result["argmax"].as_array().unwrap().len(), n);
    assert!(result["nll"].as_array().unwrap().iter().all(|nll| nll.as_f64().unwrap() > 0.0));
}

fn subcommand_without_device(name: &str, model: &Path, args: &[&str]) -> Output {
    host([OsStr::new(name), model.as_os_str()]).args(args).output().unwrap()
}

#[test]
fn bench_needs_no_tokenizer() {
    let files = Files::new();
    let model = files.no_vocab();
    let args = ["-p", "5", "-n", "3", "-r", "2"];
    let report = json(&subcommand("bench", &model, &[args.as_slice(), &["--json"]].concat()));
    let results = report["results"].as_array().unwrap();
    let tests: Vec<_> = results.iter().map(|r| (r["test"].as_str().unwrap(), r["tokens"].as_u64())).collect();
    assert_eq!(tests, [("prefill", Some(5)), ("decode", Some(3))]);
    for result in results {
        assert_eq!(result["runs"].as_array().unwrap().len(), 2);
        assert!(result["mean"].as_f64().unwrap() > 0.0 && result["deviation"].as_f64().unwrap() >= 0.0);
    }
    assert!(results[1]["gb_per_s"].as_f64().unwrap() > 0.0);
    let deep = json(&subcommand("bench", &model, &["-p", "0", "-n", "3", "-r", "1", "-d", "100", "--json"]));
    assert_eq!(deep["depth"].as_u64(), Some(100));
    assert_eq!(deep["results"].as_array().unwrap().len(), 1);
    let table = stdout(&subcommand("bench", &model, &args));
    assert!(table.contains("prefill") && table.contains("decode") && table.contains("GB/s"), "{table}");
}

#[test]
fn presets_are_named_when_there_is_none_of_a_name() {
    let output = host(["bench", "--preset", "llama3-9b"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    for word in ["llama3-9b", "llama3-8b", "llama3.2-1b", "qwen2.5-1.5b", "qwen2.5-7b"] {
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn profile_shows_each_operation_against_its_floor() {
    let files = Files::new();
    let model = files.no_vocab();
    let args = ["-d", "20", "-r", "2"];
    let report = json(&subcommand("profile", &model, &[args.as_slice(), &["--json"]].concat()));
    let number =
        |value: &Json, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"));
    let ceiling = number(&report, "ceiling_gb_per_s");
    assert!(ceiling > 0.0);
    assert_eq!(report["depth"], 20);
    assert!(report["not_captured"].as_str().unwrap().contains("CPU"));
    let paths = report["paths"].as_array().unwrap();
    assert_eq!(
        paths.iter().map(|path| path["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["unfused", "fused"]
    );
    for path in paths {
        assert!(number(path, "step_us") > 0.0);
        let operations = path["operations"].as_array().unwrap();
        for key in ["us", "bytes", "flops", "calls", "share", "floor_us"] {
            let sum: f64 = operations.iter().map(|operation| number(operation, key)).sum();
            let levels: f64 = path["levels"].as_array().unwrap().iter().map(|level| number(level, key)).sum();
            let total = number(&path["total"], key);
            assert!((sum - total).abs() <= 1e-9 * total && (levels - total).abs() <= 1e-9 * total, "{key}");
        }
        for operation in operations {
            let (us, bytes) = (number(operation, "us"), number(operation, "bytes"));
            let floor = number(operation, "floor_us");
            assert!((floor - bytes / ceiling / 1e3).abs() <= 1e-9 * floor, "{operation}");
            // What took no time on a coarse clock has no rate.
            if us > 0.0 {
                assert!(
                    (number(operation, "gb_per_s") - bytes / us / 1e3).abs() <= 1e-9 * bytes / us,
                    "{operation}"
                );
                assert!(
                    (number(operation, "of_ceiling") - floor / us).abs() <= 1e-9 * floor / us,
                    "{operation}"
                );
            }
            assert!(
                ["macro", "midi", "micro"].contains(&operation["level"].as_str().unwrap()),
                "{operation}"
            );
        }
    }
    let count = |path: &Json| path["operations"].as_array().unwrap().len();
    assert_eq!((count(&paths[0]), count(&paths[1])), (22, 8));

    let table = stdout(&subcommand("profile", &model, &args));
    for word in [
        "Macro",
        "Midi",
        "Micro",
        "of ceiling",
        "GFLOP/s",
        "a layer",
        "captured: not timed",
        "apart, taken off",
    ] {
        assert!(table.contains(word), "{table} lacks {word}");
    }
    let unfused = json(&subcommand("profile", &model, &["-r", "1", "--unfused", "--json"]));
    let names: Vec<&Json> = unfused["paths"].as_array().unwrap().iter().map(|path| &path["name"]).collect();
    assert_eq!(names, ["unfused"]);
}

#[test]
fn profile_draws_a_bar_per_operation() {
    let files = Files::new();
    let chart = files.0.path().join("chart.svg");
    let args = ["-r", "1", "--json", "--chart", chart.to_str().unwrap()];
    let report = json(&subcommand("profile", &files.no_vocab(), &args));
    let text = fs::read_to_string(&chart).unwrap();
    let svg = roxmltree::Document::parse(&text).unwrap();
    let of_kind = |kind: &'static str| svg.descendants().filter(move |node| node.has_tag_name(kind));
    let operations = report["paths"][1]["operations"].as_array().unwrap();
    // One of them is the background.
    assert_eq!(of_kind("rect").count(), operations.len() + 1);
    let texts: Vec<&str> = of_kind("text").map(|node| node.text().unwrap().trim()).collect();
    for operation in operations {
        let name = operation["name"].as_str().unwrap();
        assert!(texts.contains(&name), "{texts:?} lack {name}");
        let label = format!(
            "{:.1} us, floor {:.1} ",
            operation["us"].as_f64().unwrap(),
            operation["floor_us"].as_f64().unwrap()
        );
        assert!(texts.iter().any(|text| text.starts_with(&label)), "{texts:?} lack {label}");
    }
    let width: f64 = svg.root_element().attribute("width").unwrap().parse().unwrap();
    for rect in of_kind("rect") {
        let of = |name| -> f64 { rect.attribute(name).unwrap().parse().unwrap() };
        assert!(of("width") >= 1.0 && of("x") + of("width") <= width, "{rect:?}");
    }
}

#[test]
fn inspect_shows_tables_and_json() {
    let files = Files::new();
    let model = files.no_vocab();
    let tables = stdout(&subcommand_without_device("inspect", &model, &[]));
    assert!(tables.contains("general.architecture") && tables.contains("blk.0.attn_q.weight"), "{tables}");
    json(&subcommand_without_device("inspect", &model, &["--json"]));
}

#[test]
fn version_and_help_are_there() {
    assert!(stdout(&host(["--version"]).output().unwrap()).starts_with("host 0."));
    let help = stdout(&host(["--help"]).output().unwrap());
    for word in ["--device", "--activations", "--top-p", "eval", "tokenize", "inspect", "bench", "profile"] {
        assert!(help.contains(word), "{word}");
    }
}

/// One line on stderr that begins with `error: ` and contains the needles, nothing on stdout, exit code 1.
fn assert_fails(output: &Output, needles: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(output.stdout, b"", "{text}");
    let errors: Vec<_> = text.lines().filter(|line| line.contains("error: ")).collect();
    let [line] = errors[..] else { panic!("{text}") };
    assert_eq!(text.lines().last(), Some(line), "{text}");
    assert!(line.starts_with("error: "), "{line}");
    for needle in needles {
        assert!(line.contains(needle), "{line} lacks {needle}");
    }
}

#[test]
fn bad_prompts_are_one_error_line() {
    let files = Files::new();
    let (model, no_vocab) = (files.model(), files.no_vocab());
    let long = "hello ".repeat(20);
    assert_fails(&generate(&model, &["-p", ""]), &["prompt is empty"]);
    assert_fails(&generate(&model, &[]), &["prompt is empty"]); // an empty pipe
    assert_fails(&generate(&model, &["-p", &long, "--ctx", "8"]), &["prompt is too long", "8"]);
    assert_fails(&generate(&model, &["-p", "x", "--ctx", "0"]), &["context"]);
    assert_fails(&generate(&model, &["-p", "x", "--ctx", "100000"]), &["context", "100000", "128"]);
    assert_fails(&generate(&model, &["-p", "x", "--chat"]), &["chat template", "-p"]);
    assert_fails(&generate(&no_vocab, &["-p", "x"]), &["no_vocab.gguf", "no tokenizer"]);
}

#[test]
fn bad_files_are_one_error_line() {
    let files = Files::new();
    let model = files.model();
    let missing = files.0.path().join("missing.gguf");
    let text = files.write("text.gguf", "hello");
    assert_fails(&generate(&missing, &["-p", "x"]), &["missing.gguf", "No such file"]);
    assert_fails(&generate(&text, &["-p", "x"]), &["text.gguf", "not a GGUF file"]);
    let cut = fs::read(&model).unwrap();
    let cut = files.write("cut.gguf", &cut[..cut.len() / 2]);
    assert_fails(&generate(&cut, &["-p", "x"]), &["cut.gguf"]);

    let eval = |flag: &str, bytes: &[u8]| {
        let path = files.write("input", bytes);
        subcommand("eval", &model, &[flag, path.to_str().unwrap()])
    };
    assert_fails(&eval("--ids", b"[1, 2, 100000]"), &["input", "100000", "vocabulary"]);
    assert_fails(&eval("--ids", b"[1, -2]"), &["input", "JSON list"]);
    assert_fails(&eval("--ids", b"[]"), &["input", "no tokens"]);
    assert_fails(&eval("--ids", format!("{:?}", vec![1; 129]).as_bytes()), &["129", "128"]);
    assert_fails(&eval("--text", b"caf\xE9"), &["input", "UTF-8", "0xe9", "3"]);
    assert_fails(&subcommand("eval", &model, &["--ids", "missing.json"]), &["missing.json"]);
    assert_fails(&subcommand("bench", &model, &["-p", "129"]), &["129", "128"]);
    assert_fails(&subcommand("profile", &model, &["-d", "121"]), &["129", "128"]);
    assert_fails(&subcommand("profile", &model, &["-d", "9", "--ctx", "16"]), &["9 tokens", "8 steps", "16"]);
    assert_fails(&subcommand("profile", &model, &["--chart", "chart.png"]), &["chart.png", ".svg"]);
    let nowhere = ["--chart", "/missing/chart.svg"];
    assert_fails(&subcommand("profile", &model, &nowhere), &["/missing/chart.svg", "No such file"]);
    assert_fails(&subcommand("bench", &model, &["-p", "9", "-n", "1", "--ctx", "8"]), &["9 tokens", "8"]);
    assert_fails(&subcommand("bench", &model, &["-n", "9", "-d", "120"]), &["632 tokens", "128"]);
}

#[test]
fn a_missing_gpu_is_one_error_line() {
    if Device::open(DeviceChoice::Cuda).is_ok() {
        println!("skipped: there is a GPU");
        return;
    }
    let files = Files::new();
    let output = host([files.model().as_os_str()]).args(["-p", "x", "--device", "cuda"]).output().unwrap();
    assert_fails(&output, &[]);
    let auto = host([files.model().as_os_str()]).args(["-p", "x", "-n", "1"]).output().unwrap();
    assert!(auto.status.success(), "{}", stderr(&auto));
    assert!(stderr(&auto).to_lowercase().contains("cpu"), "{}", stderr(&auto));
}
