//! Writes GGUF files (version 3): for tests, and for models with made-up weights.
//!
//! ```
//! use host::gguf::{Gguf, GgmlType, writer::GgufWriter};
//! # fn main() -> Result<(), host::gguf::GgufError> {
//! let mut writer = GgufWriter::new();
//! writer.metadata("general.architecture", "llama").metadata("llama.block_count", 1u32);
//! writer.tensor("output_norm.weight", &[4], GgmlType::F32, vec![0; 16]);
//! let gguf = Gguf::from_bytes(writer.to_bytes()?)?;
//! assert_eq!(gguf.require::<u32>("llama.block_count")?, 1);
//! # Ok(())
//! # }
//! ```

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{ALIGNMENT_KEY, Array, ErrorKind, GgmlType, GgufError, Value, parse};

/// Collects metadata and tensors, then writes them in the order they came.
///
/// The same checks hold as for reading: what is wrong with a name, a shape or a length comes out of the writing call.
#[derive(Debug, Clone, Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<PendingTensor<'a>>,
}

#[derive(Debug, Clone)]
struct PendingTensor<'a> {
    name: String,
    shape: Vec<usize>,
    ggml_type: GgmlType,
    data: Cow<'a, [u8]>,
}

impl<'a> GgufWriter<'a> {
    /// A file with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key; one that is there already gets the new value. `general.alignment` is honoured.
    pub fn metadata(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        let (key, value) = (key.into(), value.into());
        match self.metadata.iter_mut().find(|(existing, _)| *existing == key) {
            Some((_, existing)) => *existing = value,
            None => self.metadata.push((key, value)),
        }
        self
    }

    /// Adds a tensor: `shape` in ggml's order (contiguous dimension first), `data` as the type's blocks.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        ggml_type: GgmlType,
        data: impl Into<Cow<'a, [u8]>>,
    ) -> &mut Self {
        self.tensors.push(PendingTensor {
            name: name.into(),
            shape: shape.to_vec(),
            ggml_type,
            data: data.into(),
        });
        self
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, GgufError> {
        let mut bytes = Vec::new();
        self.write(&mut bytes).map_err(|kind| GgufError::new(Path::new("(memory)"), kind))?;
        Ok(bytes)
    }

    /// Writes the file at `path`, replacing what is there.
    pub fn write_file(&self, path: impl AsRef<Path>) -> Result<(), GgufError> {
        let path = path.as_ref();
        let write = || -> Result<(), ErrorKind> {
            let mut out = BufWriter::new(File::create(path).map_err(ErrorKind::Io)?);
            self.write(&mut out)?;
            out.flush().map_err(ErrorKind::Io)
        };
        write().map_err(|kind| GgufError::new(path, kind))
    }

    fn write(&self, out: &mut impl Write) -> Result<(), ErrorKind> {
        let alignment = self.alignment()?;
        let header = self.header(alignment)?;
        write_padded(out, &header, alignment).map_err(ErrorKind::Io)?;
        for tensor in &self.tensors {
            write_padded(out, &tensor.data, alignment).map_err(ErrorKind::Io)?;
        }
        Ok(())
    }

    fn alignment(&self) -> Result<usize, ErrorKind> {
        let value = self.metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY);
        parse::alignment(value.map(|(_, value)| value))
    }

    fn header(&self, alignment: usize) -> Result<Vec<u8>, ErrorKind> {
        let mut header = b"GGUF".to_vec();
        put_u32(&mut header, 3);
        put_u64(&mut header, self.tensors.len());
        put_u64(&mut header, self.metadata.len());
        for (key, value) in &self.metadata {
            put_string(&mut header, key);
            put_u32(&mut header, value.value_type() as u32);
            put_value(&mut header, value);
        }
        let mut offset = 0;
        let mut names = HashSet::new();
        for tensor in &self.tensors {
            tensor.check()?;
            if !names.insert(&tensor.name) {
                return Err(ErrorKind::DuplicateTensor { name: tensor.name.clone() });
            }
            put_string(&mut header, &tensor.name);
            put_u32(&mut header, tensor.shape.len() as u32);
            for &dim in &tensor.shape {
                put_u64(&mut header, dim);
            }
            put_u32(&mut header, tensor.ggml_type.id());
            put_u64(&mut header, offset);
            offset += tensor.data.len().next_multiple_of(alignment);
        }
        Ok(header)
    }
}

impl PendingTensor<'_> {
    fn check(&self) -> Result<(), ErrorKind> {
        let dims: Vec<u64> = self.shape.iter().map(|&dim| dim as u64).collect();
        let (_, needed) = parse::check_shape(&self.name, self.ggml_type, &dims)?;
        let found = self.data.len();
        if found == needed {
            Ok(())
        } else {
            Err(ErrorKind::DataLength { name: self.name.clone(), needed, found })
        }
    }
}

fn write_padded(out: &mut impl Write, bytes: &[u8], alignment: usize) -> io::Result<()> {
    out.write_all(bytes)?;
    let padding = bytes.len().next_multiple_of(alignment) - bytes.len();
    io::copy(&mut io::Read::take(io::repeat(0), padding as u64), out).map(drop)
}

fn put_u32(out: &mut Vec<u8>, number: u32) {
    out.extend(number.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, number: usize) {
    out.extend((number as u64).to_le_bytes());
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(n) => out.extend(n.to_le_bytes()),
        Value::I8(n) => out.extend(n.to_le_bytes()),
        Value::U16(n) => out.extend(n.to_le_bytes()),
        Value::I16(n) => out.extend(n.to_le_bytes()),
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::I32(n) => out.extend(n.to_le_bytes()),
        Value::F32(x) => out.extend(x.to_le_bytes()),
        Value::U64(n) => out.extend(n.to_le_bytes()),
        Value::I64(n) => out.extend(n.to_le_bytes()),
        Value::F64(x) => out.extend(x.to_le_bytes()),
        Value::Bool(yes) => out.push(u8::from(*yes)),
        Value::String(text) => put_string(out, text),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    put_u32(out, array.element_type() as u32);
    put_u64(out, array.len());
    if let Array::Array(arrays) = array {
        arrays.iter().for_each(|inner| put_array(out, inner));
    } else {
        array.iter().for_each(|item| put_value(out, &item));
    }
}
