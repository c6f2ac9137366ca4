//! Strings from a file, made fit for a line on a terminal.

use std::fmt::{self, Write};

/// Shows a string from a file on one line: control and invisible characters escaped, cut after `limit` characters.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    text: &'a str,
    limit: usize,
}

impl<'a> Shown<'a> {
    /// Shows `text`, cut after 80 characters.
    pub fn new(text: &'a str) -> Self {
        Self::cut(text, 80)
    }

    /// Shows `text`, cut after `limit` characters.
    pub fn cut(text: &'a str, limit: usize) -> Self {
        Self { text, limit }
    }
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut chars = self.text.chars();
        for c in chars.by_ref().take(self.limit) {
            match c {
                // Quotes are harmless, and escaping them would make templates hard to read.
                '\'' | '"' => f.write_char(c)?,
                _ => write!(f, "{}", c.escape_debug())?,
            }
        }
        if chars.next().is_some() { f.write_char('…') } else { Ok(()) }
    }
}
