//! The tokenizer of a GGUF file: byte-level BPE through the `tokenizers` crate.
//!
//! ```no_run
//! use host::{gguf::Gguf, tokenizer::Tokenizer};
//! # fn main() -> anyhow::Result<()> {
//! let gguf = Gguf::open("model.gguf")?;
//! let tokenizer = Tokenizer::from_gguf(&gguf)?;
//! let ids = tokenizer.encode("The capital of France is")?;
//! assert_eq!(tokenizer.decode(&ids), "The capital of France is");
//! # Ok(())
//! # }
//! ```

mod bytes;
mod pre;
mod utf8;
mod vocabulary;

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::{Context, Result, anyhow, bail};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use crate::gguf::Gguf;
use bytes::TokenBytes;
use pre::PreTokenizer;
pub use utf8::Utf8Stream;
pub use vocabulary::{TokenType, Vocabulary};

/// Tokens that end a generation in the models we know, whether the file's metadata says so or not.
const END_TOKENS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<EOT>",
];

type Bpe = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// Turns text into token ids and back.
pub struct Tokenizer {
    bpe: Bpe,
    special: SpecialTokens,
    bytes: TokenBytes,
    n_vocab: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    end: HashSet<u32>,
    /// What the file adds before and after a text.
    prefix: Option<u32>,
    suffix: Option<u32>,
}

impl Tokenizer {
    /// Builds the tokenizer that a file describes.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Vocabulary::from_gguf(gguf)
            .and_then(|vocabulary| Self::new(&vocabulary))
            .map_err(|error| name_file(error, gguf))
    }

    /// Builds a tokenizer from its parts.
    pub fn new(vocabulary: &Vocabulary) -> Result<Self> {
        vocabulary.check()?;
        let pre = PreTokenizer::named(vocabulary.pre)?;
        let find = |name| vocabulary.tokens.iter().position(|token| token == name).map(|id| id as u32);
        let ends = [vocabulary.eos, vocabulary.eot, vocabulary.eom].into_iter();
        Ok(Self {
            bpe: build_bpe(vocabulary, pre)?,
            special: SpecialTokens::new(vocabulary)?,
            bytes: TokenBytes::new(vocabulary)?,
            n_vocab: vocabulary.tokens.len(),
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            end: ends.chain(END_TOKENS.iter().map(find)).flatten().collect(),
            prefix: added("bos", vocabulary.add_bos, pre.add_bos, vocabulary.bos)?,
            suffix: added("eos", vocabulary.add_eos, false, vocabulary.eos)?,
        })
    }

    /// Number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.n_vocab
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a generation ends at this token.
    pub fn is_end(&self, id: u32) -> bool {
        self.end.contains(&id)
    }

    /// Whether this token steers the model and is not shown.
    pub fn is_control(&self, id: u32) -> bool {
        self.special.control.contains(&id)
    }

    /// The ids of plain text, with BOS and EOS where the file asks for them. Nothing in the text is special:
    /// `<|im_end|>` in it is ten characters, not the token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.prefix.into_iter().collect();
        self.append(text, &mut ids)?;
        ids.extend(self.suffix);
        Ok(ids)
    }

    /// The ids of a rendered chat template: special tokens written out in the text become those tokens, and nothing
    /// is added to it.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        let mut rest = 0;
        for (range, id) in self.special.find(text) {
            self.append(&text[rest..range.start], &mut ids)?;
            ids.push(id);
            rest = range.end;
        }
        self.append(&text[rest..], &mut ids)?;
        Ok(ids)
    }

    fn append(&self, text: &str, ids: &mut Vec<u32>) -> Result<()> {
        if !text.is_empty() {
            let encoding = self.bpe.encode_fast(text, false).map_err(|e| anyhow!("cannot tokenize: {e}"))?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }

    /// The bytes that a token stands for; none for an id outside the vocabulary.
    pub fn decode_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// The text of a sequence of tokens, special ones written out, with U+FFFD where the bytes are not UTF-8.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.decode_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Says which file an error is about, unless it says so itself.
fn name_file(error: anyhow::Error, gguf: &Gguf) -> anyhow::Error {
    if error.is::<crate::gguf::GgufError>() {
        error
    } else {
        error.context(gguf.file().display().to_string())
    }
}

/// The token that is put at one end of every text: the file's word, else the pre-tokenizer's custom.
fn added(name: &str, wanted: Option<bool>, default: bool, id: Option<u32>) -> Result<Option<u32>> {
    if wanted == Some(true) && id.is_none() {
        bail!("key \"tokenizer.ggml.{name}_token_id\" is missing: needed by tokenizer.ggml.add_{name}_token");
    }
    Ok(id.filter(|_| wanted.unwrap_or(default)))
}

fn build_bpe(vocabulary: &Vocabulary, pre: &PreTokenizer) -> Result<Bpe> {
    let ids: Vocab = vocabulary.tokens.iter().cloned().zip(0..).collect();
    let merges = vocabulary
        .merges
        .iter()
        .map(|merge| match merge.split_once(' ') {
            Some((a, b)) => Ok((a.to_owned(), b.to_owned())),
            None => bail!(
                "key \"tokenizer.ggml.merges\": needed two tokens with a space between, found {merge:?}"
            ),
        })
        .collect::<Result<_>>()?;
    let model = BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| anyhow!("key \"tokenizer.ggml.merges\": {e}"))?;
    let mut bpe = Bpe::new(model);
    bpe.with_pre_tokenizer(Some(pre.build()?));
    Ok(bpe)
}

/// Control and user-defined tokens, and how to find them in a text.
struct SpecialTokens {
    finder: AhoCorasick,
    /// The id of each of the finder's patterns.
    ids: Vec<u32>,
    control: HashSet<u32>,
}

impl SpecialTokens {
    fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let of_type = |wanted: fn(TokenType) -> bool| {
            let types = vocabulary.token_types.iter().enumerate();
            types.filter(move |&(_, &token_type)| wanted(token_type)).map(|(id, _)| id as u32)
        };
        let text = |id: &u32| vocabulary.tokens[*id as usize].as_str();
        let ids: Vec<u32> = of_type(TokenType::is_special).filter(|id| !text(id).is_empty()).collect();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(ids.iter().map(text))
            .context("cannot index the special tokens")?;
        Ok(Self { finder, ids, control: of_type(|token_type| token_type == TokenType::Control).collect() })
    }

    fn find(&self, text: &str) -> impl Iterator<Item = (std::ops::Range<usize>, u32)> {
        self.finder.find_iter(text).map(|found| (found.range(), self.ids[found.pattern().as_usize()]))
    }
}
