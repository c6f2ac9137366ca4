//! A byte-level vocabulary of a few hundred tokens, for models that must read and write text.

use host::gguf::Value;
use host::tokenizer::{TokenType, Vocabulary};

use crate::tiny_model::TinyModel;

/// All bytes, `TOKENS` and `SPECIAL`, in this order.
pub struct TinyVocabulary {
    pub tokens: Vec<String>,
    pub types: Vec<u32>,
    pub merges: Vec<String>,
}

const MERGES: [&str; 5] = ["h e", "l l", "he ll", "hell o", "Ġ hello"];
const SPECIAL: [(&str, TokenType); 4] = [
    ("<|im_start|>", TokenType::Control),
    ("<|im_end|>", TokenType::Control),
    ("<tool>", TokenType::UserDefined),
    ("<tool>s", TokenType::UserDefined),
];

/// The id of `hello`: after all bytes and the first three merges.
pub const HELLO: u32 = 256 + 3;
/// The id of ` hello`.
pub const SPACE_HELLO: u32 = HELLO + 1;
/// The id of the first special token; the others follow.
pub const IM_START: u32 = SPACE_HELLO + 1;

impl TinyVocabulary {
    pub fn new() -> Self {
        let mut tokens: Vec<String> = alphabet().map(String::from).collect();
        let mut types = vec![1; tokens.len()];
        for merge in MERGES {
            tokens.push(merge.replace(' ', ""));
            types.push(1);
        }
        for (token, token_type) in SPECIAL {
            tokens.push(token.to_owned());
            types.push(if token_type == TokenType::Control { 3 } else { 4 });
        }
        Self { tokens, types, merges: MERGES.map(str::to_owned).to_vec() }
    }

    /// The vocabulary as a tokenizer takes it.
    pub fn parts(&self) -> Vocabulary<'_> {
        let token_types = self.types.iter().map(|&id| match id {
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            _ => TokenType::Normal,
        });
        Vocabulary {
            pre: "qwen2",
            tokens: &self.tokens,
            token_types: token_types.collect(),
            merges: &self.merges,
            ..Vocabulary::default()
        }
    }

    /// Gives a model this vocabulary and embeddings to match.
    pub fn add_to(self, model: &mut TinyModel) {
        let n_vocab = self.tokens.len();
        model
            .set("tokenizer.ggml.model", "gpt2")
            .set("tokenizer.ggml.pre", "qwen2")
            .set("tokenizer.ggml.tokens", Value::from(self.tokens))
            .set("tokenizer.ggml.token_type", Value::from(self.types))
            .set("tokenizer.ggml.merges", Value::from(self.merges))
            .set_tensor(
                "token_embd.weight",
                &[crate::tiny_model::N_EMBD, n_vocab],
                host::gguf::GgmlType::F32,
            );
    }
}

/// The characters of the byte-level alphabet, in order of their bytes.
fn alphabet() -> impl Iterator<Item = char> {
    let mut stand_ins = '\u{100}'..;
    (0..=255u8).map(move |byte| match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => stand_ins.next().expect("there are enough characters"),
    })
}
