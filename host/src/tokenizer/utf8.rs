//! UTF-8 from a stream of byte pieces.

/// Puts a stream of bytes together to text, without tearing a character that spans two pieces.
///
/// Bytes that can no longer become a character turn into U+FFFD, by the same rule as [`String::from_utf8_lossy`].
#[derive(Debug, Default)]
pub struct Utf8Stream {
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes and gives the text that is now complete.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut done = 0;
        loop {
            let rest = &self.pending[done..];
            let error = match str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    done = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let (valid, invalid) = rest.split_at(error.valid_up_to());
            text.push_str(&String::from_utf8_lossy(valid));
            done += valid.len();
            match error.error_len() {
                Some(len) => {
                    text.push(char::REPLACEMENT_CHARACTER);
                    done += len.min(invalid.len());
                }
                None => break, // a character has begun; more of it may come
            }
        }
        self.pending.drain(..done);
        text
    }

    /// Ends the stream: what is left of an unfinished character.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pieces(bytes: &[u8], size: usize) -> String {
        let mut stream = Utf8Stream::new();
        let mut text: String = bytes.chunks(size).map(|piece| stream.push(piece)).collect();
        text += &stream.finish();
        text
    }

    #[test]
    fn a_character_that_spans_pieces_comes_when_complete() {
        let mut stream = Utf8Stream::new();
        let whale = "🐋".as_bytes();
        assert_eq!(stream.push(&whale[..1]), "");
        assert_eq!(stream.push(&whale[1..3]), "");
        assert_eq!(stream.push(&[whale[3], b'!']), "🐋!");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn any_pieces_match_the_whole() {
        let samples: [&[u8]; 7] = [
            "größte 世界 🐋\u{10FFFF}".as_bytes(),
            b"\xF0\x9F\x90",
            b"\xF0\x9F\x90a\xE4\xB8",
            b"\xC0\xAF\xFF\xFEok\x80\x80",
            b"\xED\xA0\x80\xF4\x90\x80\x80",
            b"\xE4\xE4\xB8\x96\xF0\xF0\x9F\x90\x8B",
            b"",
        ];
        for bytes in samples {
            for size in 1..=bytes.len().max(1) {
                assert_eq!(in_pieces(bytes, size), String::from_utf8_lossy(bytes), "{bytes:?} by {size}");
            }
        }
    }
}
