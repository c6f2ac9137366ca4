//! Pre-tokenizers: the regular expressions that cut text into words before BPE merges inside each word.
//!
//! A file names its own in `tokenizer.ggml.pre`. The expressions are those the models were trained with.

use anyhow::{Result, anyhow, bail};
use tokenizers::SplitDelimiterBehavior;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};

/// GPT-2's words: contractions, letters, numbers, the rest, and spaces, of which a word takes the last.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const QWEN2: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// As [`QWEN2`], with numbers in groups of up to three digits.
const LLAMA3: &str = concat!(
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// What a value of `tokenizer.ggml.pre` stands for.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    /// The values of the key.
    names: &'static [&'static str],
    /// Applied one after the other, each inside the pieces that the one before it left.
    expressions: &'static [&'static str],
    /// A word that is in the vocabulary is that token, whatever the merges would make of it.
    pub(super) ignore_merges: bool,
    /// Whether text begins with the BOS token where the file does not say.
    pub(super) add_bos: bool,
}

const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        expressions: &[r"\p{N}", GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["qwen2", "stablelm2", "deepseek-r1-qwen"],
        expressions: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3"],
        expressions: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["gpt-2", "phi-2", "olmo"],
        expressions: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["default"],
        expressions: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        add_bos: false,
    },
];

impl PreTokenizer {
    /// The pre-tokenizer called `name`.
    pub(super) fn named(name: &str) -> Result<&'static Self> {
        if let Some(found) = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)) {
            return Ok(found);
        }
        let supported: Vec<_> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect();
        bail!("key \"tokenizer.ggml.pre\": needed one of {}, found {name:?}", supported.join(", "))
    }

    /// Cuts text into words, then writes each word's bytes in the byte-level alphabet.
    pub(super) fn build(&self) -> Result<PreTokenizerWrapper> {
        let mut steps = Vec::with_capacity(self.expressions.len() + 1);
        for expression in self.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|e| anyhow!("pre-tokenizer {:?}: {e}", self.names[0]))?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn words(pre: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        PreTokenizer::named(pre).unwrap().build().unwrap().pre_tokenize(&mut pieces).unwrap();
        let offsets = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        offsets.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn every_name_is_there_once_and_builds() {
        let mut names: Vec<_> = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).collect();
        names.sort();
        let unique = names.len();
        names.dedup();
        assert_eq!(names.len(), unique);
        for pre in PRE_TOKENIZERS {
            pre.build().unwrap();
        }
    }

    #[test]
    fn words_match_each_models_rules() {
        let text = "It's 1234 x+=y\n\n  Z";
        assert_eq!(
            words("smollm", text),
            ["It", "'s", " ", "1", "2", "3", "4", " x", "+=", "y", "\n\n ", " Z"]
        );
        assert_eq!(
            words("qwen2", text),
            ["It", "'s", " ", "1", "2", "3", "4", " x", "+=", "y", "\n\n", " ", " Z"]
        );
        assert_eq!(
            words("llama-bpe", text),
            ["It", "'s", " ", "123", "4", " x", "+=", "y", "\n\n", " ", " Z"]
        );
        assert_eq!(words("gpt-2", text), ["It", "'s", " 1234", " x", "+=", "y", "\n\n ", " Z"]);
    }

    #[test]
    fn unknown_name_is_an_error_that_lists_the_known() {
        let error = PreTokenizer::named("tekken").unwrap_err().to_string();
        assert!(error.contains("tokenizer.ggml.pre") && error.contains("\"tekken\""), "{error}");
        assert!(error.contains("smollm") && error.contains("qwen2"), "{error}");
    }
}
