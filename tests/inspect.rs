//! What `host inspect` shows.

use host::gguf::GgmlType;
use host::inspect;
use serde_json::{Value, json};

use crate::tiny_model::TinyModel;

fn model() -> TinyModel {
    let mut model = TinyModel::llama();
    model
        .set("tokenizer.chat_template", "{% if x %}\n\u{1b}[31m{{ 'a' }}{% endif %}")
        .set("tokenizer.ggml.merges", (0..100).map(|i| format!("a {i}")).collect::<Vec<_>>())
        .set_tensor("output.weight", &[64, 16], GgmlType::Q8_0);
    model
}

fn print(json: bool) -> String {
    let mut out = Vec::new();
    inspect::print(&model().to_gguf(), json, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn tables_are_aligned_and_short() {
    let text = print(false);
    for line in text.lines() {
        assert!(line.chars().count() < 120, "{line}");
        assert!(!line.contains('\u{1b}'), "{line}");
    }
    let line = |start: &str| {
        let found = text.lines().find(|line| line.trim_start().starts_with(start));
        found.unwrap_or_else(|| panic!("no line starts with {start}:\n{text}")).trim()
    };
    let words: Vec<_> = line("llama.block_count").split_whitespace().collect();
    assert_eq!(words, ["llama.block_count", "u32", "2"], "{text}");
    assert!(
        line("tokenizer.chat_template").ends_with(r"{% if x %}\n\u{1b}[31m{{ 'a' }}{% endif %}"),
        "{text}"
    );
    assert!(
        line("tokenizer.ggml.merges").ends_with(r#"string[100]  ["a 0", "a 1", "a 2", "a 3", …]"#),
        "{text}"
    );
    assert!(line("output.weight").contains(" 64 x 16  Q8_0"), "{text}");

    let header = line("name");
    let end = header.find("bytes").unwrap() + "bytes".len();
    let row = line("output_norm.weight");
    assert_eq!(row[..end].rsplit(' ').next(), Some("256"), "{text}");
    assert!(line("Q8_0").contains("1088"), "{text}");
    assert!(text.lines().last().unwrap().contains("63.8 k parameters in 252 kB"), "{text}");
}

#[test]
fn json_holds_whole_arrays_and_every_tensor() {
    let gguf = model().to_gguf();
    let document: Value = serde_json::from_str(&print(true)).unwrap();
    assert_eq!(document["version"], 3);
    assert_eq!(document["metadata"]["general.architecture"], "llama");
    assert_eq!(document["metadata"]["llama.block_count"], 2);
    assert_eq!(document["metadata"]["tokenizer.ggml.merges"].as_array().unwrap().len(), 100);
    assert_eq!(document["tensors"].as_array().unwrap().len(), gguf.tensors().len());
    let info = gguf.tensor_info("output.weight").unwrap();
    let expected = json!({
        "name": "output.weight", "shape": [64, 16], "type": "Q8_0", "bytes": 1088, "offset": info.offset,
    });
    assert!(document["tensors"].as_array().unwrap().contains(&expected));
    assert_eq!(
        document["summary"]["types"]["Q8_0"],
        json!({"tensors": 1, "parameters": 1024, "bytes": 1088})
    );
    assert_eq!(document["summary"]["tensors"], gguf.tensors().len());
}

#[test]
fn a_closed_pipe_is_an_io_error() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    for json in [false, true] {
        let e = inspect::print(&model().to_gguf(), json, &mut Closed).unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::BrokenPipe);
    }
}
