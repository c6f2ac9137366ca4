//! What can be wrong with a GGUF file.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::text::Shown;
use super::{GgmlType, MAX_DIMS};

/// An error in one GGUF file; printed as one line that names the file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", file.display())]
pub struct GgufError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub kind: ErrorKind,
}

impl GgufError {
    pub(super) fn new(file: &Path, kind: ErrorKind) -> Self {
        Self { file: file.to_owned(), kind }
    }
}

/// What is wrong with a GGUF file: names the tensor or key, what was needed and what was found.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // a field is what the message next to it says
pub enum ErrorKind {
    /// The file cannot be opened, mapped or written.
    #[error("{0}")]
    Io(io::Error),
    /// The file begins with something else than `GGUF`.
    #[error("not a GGUF file: needed the magic bytes \"GGUF\", found {}", found.escape_ascii())]
    BadMagic { found: [u8; 4] },
    /// The version is one of ours with its bytes swapped.
    #[error("big-endian GGUF file (version {version}): needed a little-endian one")]
    BigEndian { version: u32 },
    /// A version that is too old or too new.
    #[error("unsupported GGUF version: needed 2 or 3, found {found}")]
    Version { found: u32 },
    /// The file ends before something does, or a count promises more than the file can hold.
    #[error("truncated or damaged: {what} needs {needed} bytes at offset {offset}, found {found}")]
    Truncated { what: String, offset: usize, needed: u128, found: usize },
    /// A string or name is not UTF-8.
    #[error("{what}: needed UTF-8 text, found the byte 0x{byte:02x} at offset {offset}")]
    BadUtf8 { what: String, byte: u8, offset: usize },
    /// A bool is neither 0 nor 1.
    #[error("key {}: needed a bool (0 or 1), found {found}", Quoted(key))]
    BadBool { key: String, found: u8 },
    /// A metadata type that GGUF does not define.
    #[error("key {}: needed a value type from 0 to 12, found {found}", Quoted(key))]
    ValueType { key: String, found: u32 },
    /// Arrays of arrays of arrays.
    #[error("key {}: needed arrays nested at most {limit} deep, found more", Quoted(key))]
    NestedTooDeep { key: String, limit: usize },
    /// A key occurs twice.
    #[error("key {}: needed once, found twice", Quoted(key))]
    DuplicateKey { key: String },
    /// The alignment of tensor data makes no sense.
    #[error("key \"general.alignment\": needed a power of two, found {found}")]
    Alignment { found: u32 },
    /// A key that is needed is not there.
    #[error("key {} is missing: needed {wanted}", Quoted(key))]
    MissingKey { key: String, wanted: &'static str },
    /// A key's value is of another type, or does not fit.
    #[error("key {}: needed {wanted}, found {found}", Quoted(key))]
    WrongType { key: String, wanted: &'static str, found: String },
    /// A tensor that is needed is not there.
    #[error("tensor {} is missing", Quoted(name))]
    MissingTensor { name: String },
    /// A tensor's name occurs twice.
    #[error("tensor {}: needed once, found twice", Quoted(name))]
    DuplicateTensor { name: String },
    /// A tensor has too many dimensions.
    #[error("tensor {}: needed at most {MAX_DIMS} dimensions, found {found}", Quoted(name))]
    TooManyDims { name: String, found: u32 },
    /// A dimension is zero, or the product of all is too large.
    #[error("tensor {}: needed dimensions from 1 up whose product fits, found {found:?}", Quoted(name))]
    BadShape { name: String, found: Vec<u64> },
    /// A tensor type that ggml does not define.
    #[error("tensor {}: needed a known tensor type, found number {found}", Quoted(name))]
    TensorType { name: String, found: u32 },
    /// A row does not consist of whole blocks.
    #[error("tensor {}: {ggml_type} needs rows of a multiple of {}, found {found}", Quoted(name), ggml_type.block_len())]
    RowLength { name: String, ggml_type: GgmlType, found: usize },
    /// A tensor's data does not begin where the alignment wants it.
    #[error("tensor {}: needed an offset that is a multiple of {alignment}, found {found}", Quoted(name))]
    Misaligned { name: String, alignment: usize, found: u64 },
    /// A tensor's data ends after the file does.
    #[error(
        "tensor {}: needed {n_bytes} bytes at offset {offset}, found a file of {file_len} bytes",
        Quoted(name)
    )]
    OutsideFile { name: String, n_bytes: usize, offset: u128, file_len: usize },
    /// Two tensors share data.
    #[error("tensor {}: needed data of its own, found that it overlaps {}", Quoted(name), Quoted(other))]
    Overlap { name: String, other: String },
    /// A tensor given to the writer has another size than its type and shape need.
    #[error("tensor {}: needed {needed} bytes of data, found {found}", Quoted(name))]
    DataLength { name: String, needed: usize, found: usize },
}

/// A key or name in quotes; it comes from the file, so it may hold anything.
pub(super) struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", Shown::new(self.0))
    }
}
