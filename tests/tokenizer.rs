//! The tokenizer and chat templates: real models against golden ids, and a tiny vocabulary for all the rest.

use host::chat::{ChatTemplate, Message, Role};
use host::gguf::{Gguf, Value};
use host::tokenizer::{Tokenizer, Utf8Stream, Vocabulary};
use serde_json::Value as Json;
use std::path::Path;
use std::time::Instant;

use crate::model_files::{qwen, smollm2};
use crate::tiny_model::TinyModel;
use crate::tiny_vocabulary::{HELLO, IM_START, SPACE_HELLO, TinyVocabulary};

/// Ids equal the golden ones, and decoding gives the text back, whole and streamed token by token.
fn check_golden(path: &Path, golden: &str) {
    let texts: Json = serde_json::from_str(include_str!("golden/texts.json")).unwrap();
    let golden: Json = serde_json::from_str(golden).unwrap();
    let gguf = Gguf::open(path).unwrap();
    let start = Instant::now();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    println!("{} tokens: built in {} ms", tokenizer.n_vocab(), start.elapsed().as_millis());

    for (name, text) in texts.as_object().unwrap() {
        let text = text.as_str().unwrap();
        let wanted: Vec<u32> = serde_json::from_value(golden[name]["tokens"].clone()).unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids, wanted, "{name}");
        assert_eq!(tokenizer.decode(&ids), text, "{name}");
        let mut stream = Utf8Stream::new();
        let mut streamed: String = ids.iter().map(|&id| stream.push(tokenizer.decode_bytes(id))).collect();
        streamed += &stream.finish();
        assert_eq!(streamed, text, "{name}");
    }
}

#[test]
fn smollm2_matches_golden() {
    check_golden(&smollm2(), include_str!("golden/smollm2.json"));
}

#[test]
fn qwen_matches_golden() {
    match qwen() {
        Some(path) => check_golden(&path, include_str!("golden/qwen.json")),
        None => println!("skipped: scripts/fetch-model qwen brings the model"),
    }
}

#[test]
fn smollm2_chat_matches_its_training_format() {
    let gguf = Gguf::open(smollm2()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let template = ChatTemplate::from_gguf(&gguf, &tokenizer).unwrap();
    let mut messages = vec![Message::new(Role::User, "Hi")];
    let first = template.render(&messages, true).unwrap();
    assert_eq!(
        first,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = tokenizer.encode_with_special(&first).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 3, "<|im_start|> is one token");
    assert!(tokenizer.is_end(2) && tokenizer.is_end(0) && !tokenizer.is_end(1));

    // what the KV cache lives on: the next turn begins with this one
    messages.extend([Message::new(Role::Assistant, "Hello!"), Message::new(Role::User, "Bye")]);
    let second = tokenizer.encode_with_special(&template.render(&messages, true).unwrap()).unwrap();
    assert!(second.starts_with(&ids));
}

#[test]
fn merges_apply_in_order() {
    let vocabulary = TinyVocabulary::new();
    let tokenizer = Tokenizer::new(&vocabulary.parts()).unwrap();
    assert_eq!(tokenizer.encode("hello hello").unwrap(), [HELLO, SPACE_HELLO]);
    assert_eq!(tokenizer.encode("é\0").unwrap(), [0xC3, 0xA9, 0]);
    assert_eq!(tokenizer.encode("").unwrap(), [0u32; 0]);
    assert_eq!(tokenizer.decode(&[SPACE_HELLO, 0xF0, 0x9F, 0x90, 0x8B, 0xFF]), " hello🐋\u{FFFD}");
    assert_eq!(tokenizer.decode_bytes(9999), b"");
}

#[test]
fn special_tokens_are_found_when_asked_only() {
    let vocabulary = TinyVocabulary::new();
    let tokenizer = Tokenizer::new(&vocabulary.parts()).unwrap();
    let text = "<|im_start|>hello<tool>s<tool><|im_end|>";
    let special = tokenizer.encode_with_special(text).unwrap();
    assert_eq!(special, [IM_START, HELLO, IM_START + 3, IM_START + 2, IM_START + 1]);
    let plain = tokenizer.encode(text).unwrap();
    assert!(plain.iter().all(|&id| id < IM_START) && plain.contains(&HELLO));
    for ids in [special, plain] {
        assert_eq!(tokenizer.decode(&ids), text);
    }
    assert!(tokenizer.is_control(IM_START) && !tokenizer.is_control(IM_START + 2));
}

#[test]
fn bos_and_eos_are_added_as_the_file_says() {
    let vocabulary = TinyVocabulary::new();
    let (bos, eos) = (IM_START, IM_START + 1);
    let encode = |parts: Vocabulary| Tokenizer::new(&parts).unwrap().encode("hello").unwrap();
    let parts = || Vocabulary { bos: Some(bos), eos: Some(eos), ..vocabulary.parts() };
    assert_eq!(encode(parts()), [HELLO]);
    assert_eq!(encode(Vocabulary { add_bos: Some(true), ..parts() }), [bos, HELLO]);
    assert_eq!(encode(Vocabulary { add_bos: Some(true), add_eos: Some(true), ..parts() }), [bos, HELLO, eos]);
    // llama 3 adds BOS unless told not to
    assert_eq!(encode(Vocabulary { pre: "llama-bpe", ..parts() }), [bos, HELLO]);
    assert_eq!(encode(Vocabulary { pre: "llama-bpe", add_bos: Some(false), ..parts() }), [HELLO]);
}

#[test]
fn generation_ends_at_named_and_known_tokens() {
    let vocabulary = TinyVocabulary::new();
    let parts = Vocabulary { eos: Some(5), eot: Some(6), eom: Some(7), ..vocabulary.parts() };
    let tokenizer = Tokenizer::new(&parts).unwrap();
    let ends: Vec<u32> = (0..tokenizer.n_vocab() as u32).filter(|&id| tokenizer.is_end(id)).collect();
    assert_eq!(ends, [5, 6, 7, IM_START + 1]);
}

#[test]
fn bad_vocabularies_are_errors_that_name_the_key() {
    type Damage = fn(&mut TinyModel) -> &mut TinyModel;
    let cases: [(Damage, &[&str]); 11] = [
        (|m| m.set("tokenizer.ggml.model", "no_vocab"), &["no tokenizer", "no_vocab"]),
        (|m| m.set("tokenizer.ggml.model", "llama"), &["tokenizer.ggml.model", "gpt2", "\"llama\""]),
        (|m| m.set("tokenizer.ggml.pre", "tekken"), &["tokenizer.ggml.pre", "smollm", "\"tekken\""]),
        (|m| m.unset("tokenizer.ggml.tokens"), &["tokenizer.ggml.tokens"]),
        (|m| m.set("tokenizer.ggml.tokens", 5u32), &["tokenizer.ggml.tokens"]),
        (|m| m.set("tokenizer.ggml.token_type", Value::from(vec![1u32])), &["token_type", "found 1"]),
        (|m| m.set("tokenizer.ggml.token_type", Value::from(vec![9u32; 265])), &["token_type", "found 9"]),
        (|m| m.set("tokenizer.ggml.eos_token_id", 265u32), &["eos_token_id", "265"]),
        (|m| m.set("tokenizer.ggml.add_bos_token", true), &["bos_token_id", "missing"]),
        (
            |m| m.set("tokenizer.ggml.merges", Value::from(vec!["h e".to_owned(), "hello".to_owned()])),
            &["tokenizer.ggml.merges", "\"hello\""],
        ),
        (
            |m| m.set("tokenizer.ggml.merges", Value::from(vec!["h zz".to_owned()])),
            &["tokenizer.ggml.merges", "zz"],
        ),
    ];
    for (damage, needles) in cases {
        let mut model = TinyModel::llama();
        TinyVocabulary::new().add_to(&mut model);
        assert!(Tokenizer::from_gguf(&model.to_gguf()).is_ok());
        damage(&mut model);
        let error = Tokenizer::from_gguf(&model.to_gguf()).err().expect("the vocabulary is damaged");
        let line = format!("{error:#}");
        assert!(line.starts_with("(memory): ") && !line.contains('\n'), "{line}");
        for needle in needles {
            assert!(line.contains(needle), "{line} lacks {needle}");
        }
    }
}

#[test]
fn a_missing_or_broken_template_is_an_error() {
    let mut model = TinyModel::llama();
    TinyVocabulary::new().add_to(&mut model);
    let error = |model: &TinyModel| {
        let gguf = model.to_gguf();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        format!("{:#}", ChatTemplate::from_gguf(&gguf, &tokenizer).unwrap_err())
    };
    assert!(error(&model).contains("tokenizer.chat_template") && error(&model).contains("-p"));
    model.set("tokenizer.chat_template", "{% if %}");
    assert!(error(&model).contains("tokenizer.chat_template") && error(&model).contains("syntax"));
}
