//! Tokens as bytes: the byte-level alphabet undone.

use anyhow::{Result, ensure};

use super::vocabulary::Vocabulary;

/// The bytes of every token, end to end.
#[derive(Debug)]
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// Where each token's bytes end.
    ends: Vec<u32>,
}

impl TokenBytes {
    /// Decodes the whole vocabulary.
    ///
    /// Ordinary tokens are written in the byte-level alphabet, where each byte is one printable character; special
    /// and user-defined ones as they are. A character outside the alphabet stands for itself.
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self> {
        let byte_of = byte_of_char();
        let size = vocabulary.tokens.iter().map(String::len).sum();
        ensure!(u32::try_from(size).is_ok(), "the tokens are {size} bytes long: needed less than 4 GiB");
        let mut bytes = Vec::with_capacity(size);
        let mut ends = Vec::with_capacity(vocabulary.tokens.len());
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            if vocabulary.token_type(id).is_special() {
                bytes.extend_from_slice(token.as_bytes());
            } else {
                for c in token.chars() {
                    match byte_of.get(c as usize).copied().flatten() {
                        Some(byte) => bytes.push(byte),
                        None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                    }
                }
            }
            ends.push(bytes.len() as u32);
        }
        Ok(Self { bytes, ends })
    }

    /// The token's bytes; none for an id outside the vocabulary.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// The character that stands for `byte`: itself where it is printable, else one from U+0100 on.
fn char_of_byte(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let nth = (0..byte).filter(|&byte| !printable(byte)).count() as u8;
    char::from_u32(0x100 + u32::from(nth)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The byte behind each character of the alphabet, whose characters all lie below U+0180.
fn byte_of_char() -> [Option<u8>; 0x180] {
    let mut table = [None; 0x180];
    for byte in 0..=u8::MAX {
        table[char_of_byte(byte) as usize] = Some(byte);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    #[test]
    fn the_alphabet_matches_the_pre_tokenizers() {
        let ours: HashSet<char> = (0..=255).map(char_of_byte).collect();
        assert_eq!(ours, ByteLevel::alphabet().into_iter().collect());
        assert_eq!([b' ', b'\n', b'!', 0xAD].map(char_of_byte), ['Ġ', 'Ċ', '!', 'Ń']);
    }
}
