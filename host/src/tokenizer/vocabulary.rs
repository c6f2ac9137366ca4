//! What a GGUF file says of its tokenizer.

use anyhow::{Result, bail, ensure};

use crate::gguf::Gguf;

/// A tokenizer's data, as it lies under `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary<'a> {
    /// `pre`: which pre-tokenizer cuts text into words.
    pub pre: &'a str,
    /// `tokens`: the text of every token, in order of their ids.
    pub tokens: &'a [String],
    /// `token_type`: one per token, or none, which makes all of them ordinary.
    pub token_types: Vec<TokenType>,
    /// `merges`: pairs of tokens, separated by a space, the most important first.
    pub merges: &'a [String],
    /// `bos_token_id`: begins a text.
    pub bos: Option<u32>,
    /// `eos_token_id`: ends a text.
    pub eos: Option<u32>,
    /// `eot_token_id`: ends a turn of a chat.
    pub eot: Option<u32>,
    /// `eom_token_id`: ends a message of a chat.
    pub eom: Option<u32>,
    /// `add_bos_token`; where it is missing the pre-tokenizer decides.
    pub add_bos: Option<bool>,
    /// `add_eos_token`; where it is missing none is added.
    pub add_eos: Option<bool>,
}

/// What a token is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenType {
    /// Text, in the byte-level alphabet.
    Normal,
    /// Stands for what the tokenizer does not know.
    Unknown,
    /// Steers the model, such as `<|im_start|>`; its text is never shown.
    Control,
    /// A word added to the vocabulary as it is.
    UserDefined,
    /// Never used.
    Unused,
    /// A single byte, in vocabularies that are not byte-level.
    Byte,
}

impl TokenType {
    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether a token's text is written as it is, and found in text as a whole or not at all.
    pub fn is_special(self) -> bool {
        matches!(self, Self::Control | Self::UserDefined)
    }
}

impl<'a> Vocabulary<'a> {
    /// Reads the vocabulary of a file whose tokenizer is one that is supported.
    pub fn from_gguf(gguf: &'a Gguf) -> Result<Self> {
        match gguf.require("tokenizer.ggml.model")? {
            "gpt2" => {}
            "no_vocab" => bail!(
                "the file has no tokenizer (tokenizer.ggml.model is \"no_vocab\"), so it cannot read or write text"
            ),
            other => {
                bail!("key \"tokenizer.ggml.model\": needed \"gpt2\" (byte-level BPE), found {other:?}")
            }
        }
        let token_types = gguf
            .get::<Vec<u32>>("tokenizer.ggml.token_type")?
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .map(|(token, id)| match TokenType::from_id(id) {
                Some(token_type) => Ok(token_type),
                None => bail!("key \"tokenizer.ggml.token_type\": needed types from 1 to 6, found {id} for token {token}"),
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            pre: gguf.get("tokenizer.ggml.pre")?.unwrap_or("default"),
            tokens: gguf.require("tokenizer.ggml.tokens")?,
            token_types,
            merges: gguf.require("tokenizer.ggml.merges")?,
            bos: gguf.get("tokenizer.ggml.bos_token_id")?,
            eos: gguf.get("tokenizer.ggml.eos_token_id")?,
            eot: gguf.get("tokenizer.ggml.eot_token_id")?,
            eom: gguf.get("tokenizer.ggml.eom_token_id")?,
            add_bos: gguf.get("tokenizer.ggml.add_bos_token")?,
            add_eos: gguf.get("tokenizer.ggml.add_eos_token")?,
        })
    }

    /// What the token with this id is for.
    pub fn token_type(&self, id: usize) -> TokenType {
        self.token_types.get(id).copied().unwrap_or(TokenType::Normal)
    }

    /// Checks that the parts fit together.
    pub(super) fn check(&self) -> Result<()> {
        let n_vocab = self.tokens.len();
        ensure!(n_vocab > 0, "key \"tokenizer.ggml.tokens\": needed tokens, found none");
        let n_types = self.token_types.len();
        ensure!(
            n_types == 0 || n_types == n_vocab,
            "key \"tokenizer.ggml.token_type\": needed one for each of {n_vocab} tokens, found {n_types}"
        );
        let ids = [("bos", self.bos), ("eos", self.eos), ("eot", self.eot), ("eom", self.eom)];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= n_vocab) {
                bail!("key \"tokenizer.ggml.{name}_token_id\": needed an id below {n_vocab}, found {id}");
            }
        }
        Ok(())
    }
}
