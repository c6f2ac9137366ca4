//! GGUF files, version 2 and 3, little-endian: metadata and tensors, read in place from a memory map.
//!
//! Nothing in a file is trusted. Every length and count is compared with the bytes that are left before anything is
//! allocated or sliced, so a damaged file costs an error that names what is wrong, never a panic or a huge allocation.
//!
//! ```no_run
//! use host::gguf::Gguf;
//! # fn main() -> Result<(), host::gguf::GgufError> {
//! let gguf = Gguf::open("model.gguf")?;
//! let architecture: &str = gguf.require("general.architecture")?;
//! let rope_base: Option<f32> = gguf.get(&format!("{architecture}.rope.freq_base"))?;
//! let embeddings = gguf.tensor("token_embd.weight")?;
//! println!("{} {:?} {rope_base:?}", embeddings.info.ggml_type, embeddings.info.shape);
//! # Ok(())
//! # }
//! ```

mod error;
mod ggml_type;
mod parse;
mod text;
mod value;
pub mod writer;

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use memmap2::Mmap;

pub use error::{ErrorKind, GgufError};
pub use ggml_type::GgmlType;
pub use text::Shown;
pub use value::{Array, FromValue, Value, ValueType};

/// Most dimensions a tensor may have.
pub const MAX_DIMS: usize = 4;

/// Alignment of tensor data where `general.alignment` is not given.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// The key that sets the alignment of tensor data.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// An open GGUF file: its metadata, and its tensors, whose data stays in the memory map.
pub struct Gguf {
    file: PathBuf,
    bytes: Storage,
    header: parse::Header,
}

/// What the file says of one tensor; its size and place have been checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The tensor's name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Sizes in ggml's order: `shape[0]` is the contiguous (input) dimension.
    pub shape: Vec<usize>,
    /// How the weights are stored.
    pub ggml_type: GgmlType,
    /// Where the data begins, in bytes from the start of the file.
    pub offset: usize,
    /// Size of the data.
    pub n_bytes: usize,
}

impl TensorInfo {
    /// Number of weights.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product() // the reader checked that this fits
    }
}

/// A tensor and its data.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Name, shape and type.
    pub info: &'a TensorInfo,
    /// The blocks as they lie in the file, `info.n_bytes` long.
    pub data: &'a [u8],
}

impl Gguf {
    /// Maps the file at `path` and reads its header.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        let bytes = map_file(path).map_err(|e| GgufError::new(path, ErrorKind::Io(e)))?;
        Self::new(path.to_owned(), Storage::Mapped(bytes))
    }

    /// Reads a GGUF that is already in memory. Errors call it `(memory)`.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        Self::new(PathBuf::from("(memory)"), Storage::Owned(bytes))
    }

    fn new(file: PathBuf, bytes: Storage) -> Result<Self, GgufError> {
        match parse::header(&bytes) {
            Ok(header) => Ok(Self { file, bytes, header }),
            Err(kind) => Err(GgufError::new(&file, kind)),
        }
    }

    /// The file this was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Size of the file in bytes.
    pub fn file_len(&self) -> usize {
        self.bytes.len()
    }

    /// GGUF version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Alignment of every tensor's data, a power of two.
    pub fn alignment(&self) -> usize {
        self.header.alignment
    }

    /// Where the tensor data begins, in bytes from the start of the file.
    pub fn data_offset(&self) -> usize {
        self.header.data_offset
    }

    /// All metadata in the file's order.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.header.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`, whatever its type.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    /// The value of `key` as a `T`; `None` where the file has no such key, an error where it is of another type.
    ///
    /// Integers are accepted at any width and sign as long as the number fits; so are floats.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        T::from_value(value).map(Some).ok_or_else(|| {
            self.error(ErrorKind::WrongType { key: key.into(), wanted: T::WANTED, found: value.to_string() })
        })
    }

    /// As [`get`](Self::get), but a missing key is an error.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        self.get(key)?.ok_or_else(|| self.error(ErrorKind::MissingKey { key: key.into(), wanted: T::WANTED }))
    }

    /// All tensors in the file's order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.header.tensors.values().map(|info| self.with_data(info))
    }

    /// What the file says of the tensor called `name`, if it has one.
    pub fn tensor_info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors.get(name)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, GgufError> {
        match self.tensor_info(name) {
            Some(info) => Ok(self.with_data(info)),
            None => Err(self.error(ErrorKind::MissingTensor { name: name.into() })),
        }
    }

    fn with_data<'a>(&'a self, info: &'a TensorInfo) -> Tensor<'a> {
        Tensor { info, data: &self.bytes[info.offset..][..info.n_bytes] }
    }

    fn error(&self, kind: ErrorKind) -> GgufError {
        GgufError::new(&self.file, kind)
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("file", &self.file)
            .field("file_len", &self.file_len())
            .field("header", &self.header)
            .finish()
    }
}

type Metadata = IndexMap<String, Value>;
type Tensors = IndexMap<String, TensorInfo>;

enum Storage {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Deref for Storage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

fn map_file(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    // SAFETY: the map is private to this process and only read. Another process that shortens the file while it is
    // mapped would end this one with SIGBUS; as every program that maps its weights, we rely on the file staying put.
    unsafe { Mmap::map(&file) }
}
