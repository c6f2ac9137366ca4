//! Reads a GGUF header: magic, version, counts, metadata, tensor infos.

use std::fmt::Display;

use indexmap::map::Entry;

use super::error::Quoted;
use super::{
    ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, ErrorKind, FromValue, GgmlType, MAX_DIMS, Metadata, TensorInfo,
    Tensors, Value, ValueType,
};

/// Arrays nested deeper than this are an attack, not a model.
const MAX_ARRAY_DEPTH: usize = 4;

type Result<T> = std::result::Result<T, ErrorKind>;

/// Everything a file says before its tensor data.
#[derive(Debug)]
pub(super) struct Header {
    pub version: u32,
    pub alignment: usize,
    pub data_offset: usize,
    pub metadata: Metadata,
    pub tensors: Tensors,
}

/// Reads the header of the file whose bytes these are, and checks that the tensors it announces lie within.
pub(super) fn header(bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { bytes, at: 0 };
    let magic: [u8; 4] = cursor.array(&"the magic number")?;
    if &magic != b"GGUF" {
        return Err(ErrorKind::BadMagic { found: magic });
    }
    let version = cursor.u32(&"the version")?;
    match version {
        2 | 3 => (),
        _ if (1..=3).contains(&version.swap_bytes()) => {
            return Err(ErrorKind::BigEndian { version: version.swap_bytes() });
        }
        _ => return Err(ErrorKind::Version { found: version }),
    }
    let n_tensors = cursor.u64(&"the tensor count")?;
    let n_metadata = cursor.u64(&"the metadata count")?;

    let metadata = read_metadata(&mut cursor, n_metadata)?;
    let alignment = alignment(metadata.get(ALIGNMENT_KEY))?;
    let mut tensors = read_tensor_infos(&mut cursor, n_tensors)?;
    // A file with no tensors may end before the padding does, so this offset may lie outside the file.
    let data_offset = cursor.at.next_multiple_of(alignment);
    place_tensors(&mut tensors, data_offset, alignment, bytes.len())?;
    Ok(Header { version, alignment, data_offset, metadata, tensors })
}

fn read_metadata(cursor: &mut Cursor<'_>, count: u64) -> Result<Metadata> {
    /// A key's length, a value's type, and a value of one byte.
    const SMALLEST_ENTRY: usize = 8 + 4 + 1;
    cursor.check(count as u128 * SMALLEST_ENTRY as u128, &format_args!("a list of {count} metadata keys"))?;
    // The map grows as entries are read: the count is no promise.
    let mut metadata = Metadata::new();
    for index in 0..count {
        let key = cursor.string(&format_args!("the name of metadata key {index}"))?;
        let what = format_args!("key {}", Quoted(&key)).to_string();
        let type_id = cursor.u32(&what)?;
        let value = read_value(cursor, &key, value_type(&key, type_id)?)?;
        match metadata.entry(key) {
            Entry::Vacant(entry) => entry.insert(value),
            Entry::Occupied(entry) => return Err(ErrorKind::DuplicateKey { key: entry.key().clone() }),
        };
    }
    Ok(metadata)
}

fn value_type(key: &str, id: u32) -> Result<ValueType> {
    ValueType::from_id(id).ok_or_else(|| ErrorKind::ValueType { key: key.into(), found: id })
}

fn read_value(cursor: &mut Cursor<'_>, key: &str, value_type: ValueType) -> Result<Value> {
    let what = &format_args!("the value of key {}", Quoted(key));
    Ok(match value_type {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        ValueType::U32 => Value::U32(u32::from_le_bytes(cursor.array(what)?)),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        ValueType::U64 => Value::U64(u64::from_le_bytes(cursor.array(what)?)),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        ValueType::Bool => {
            let [byte] = cursor.array(what)?;
            Value::Bool(to_bool(key, byte)?)
        }
        ValueType::String => Value::String(cursor.string(what)?),
        ValueType::Array => Value::Array(read_array(cursor, key, 1)?),
    })
}

fn read_array(cursor: &mut Cursor<'_>, key: &str, depth: usize) -> Result<Array> {
    if depth > MAX_ARRAY_DEPTH {
        return Err(ErrorKind::NestedTooDeep { key: key.into(), limit: MAX_ARRAY_DEPTH });
    }
    let what = &format_args!("the array of key {}", Quoted(key));
    let type_id = cursor.u32(what)?;
    let element_type = value_type(key, type_id)?;
    let count = cursor.u64(what)?;
    match element_type {
        ValueType::U8 => cursor.numbers(count, u8::from_le_bytes, what).map(Array::U8),
        ValueType::I8 => cursor.numbers(count, i8::from_le_bytes, what).map(Array::I8),
        ValueType::U16 => cursor.numbers(count, u16::from_le_bytes, what).map(Array::U16),
        ValueType::I16 => cursor.numbers(count, i16::from_le_bytes, what).map(Array::I16),
        ValueType::U32 => cursor.numbers(count, u32::from_le_bytes, what).map(Array::U32),
        ValueType::I32 => cursor.numbers(count, i32::from_le_bytes, what).map(Array::I32),
        ValueType::F32 => cursor.numbers(count, f32::from_le_bytes, what).map(Array::F32),
        ValueType::U64 => cursor.numbers(count, u64::from_le_bytes, what).map(Array::U64),
        ValueType::I64 => cursor.numbers(count, i64::from_le_bytes, what).map(Array::I64),
        ValueType::F64 => cursor.numbers(count, f64::from_le_bytes, what).map(Array::F64),
        ValueType::Bool => {
            let bytes = cursor.take(count.into(), what)?;
            bytes.iter().map(|&byte| to_bool(key, byte)).collect::<Result<_>>().map(Array::Bool)
        }
        ValueType::String => {
            cursor.check(count as u128 * 8, what)?; // each string's length
            let mut texts = Vec::with_capacity(count as usize);
            for _ in 0..count {
                texts.push(cursor.string(what)?);
            }
            Ok(Array::String(texts))
        }
        ValueType::Array => {
            cursor.check(count as u128 * 12, what)?; // each array's type and count
            let mut arrays = Vec::new();
            for _ in 0..count {
                arrays.push(read_array(cursor, key, depth + 1)?);
            }
            Ok(Array::Array(arrays))
        }
    }
}

fn to_bool(key: &str, byte: u8) -> Result<bool> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        found => Err(ErrorKind::BadBool { key: key.into(), found }),
    }
}

/// The alignment that a value of [`ALIGNMENT_KEY`] asks for.
pub(super) fn alignment(value: Option<&Value>) -> Result<usize> {
    let Some(value) = value else { return Ok(DEFAULT_ALIGNMENT) };
    match u32::from_value(value) {
        Some(alignment) if alignment.is_power_of_two() => Ok(alignment as usize),
        Some(found) => Err(ErrorKind::Alignment { found }),
        None => Err(ErrorKind::WrongType {
            key: ALIGNMENT_KEY.into(),
            wanted: u32::WANTED,
            found: value.to_string(),
        }),
    }
}

/// Reads the tensor infos; their offsets stay relative to the data until [`place_tensors`].
fn read_tensor_infos(cursor: &mut Cursor<'_>, count: u64) -> Result<Tensors> {
    /// A name's length, the number of dimensions, the type, the offset.
    const SMALLEST_ENTRY: usize = 8 + 4 + 4 + 8;
    cursor.check(count as u128 * SMALLEST_ENTRY as u128, &format_args!("a list of {count} tensors"))?;
    let mut tensors = Tensors::new();
    for index in 0..count {
        let name = cursor.string(&format_args!("the name of tensor {index}"))?;
        let info = read_tensor_info(cursor, &name)?;
        match tensors.entry(name) {
            Entry::Vacant(entry) => entry.insert(info),
            Entry::Occupied(entry) => return Err(ErrorKind::DuplicateTensor { name: entry.key().clone() }),
        };
    }
    Ok(tensors)
}

fn read_tensor_info(cursor: &mut Cursor<'_>, name: &str) -> Result<TensorInfo> {
    let what = &format_args!("the description of tensor {}", Quoted(name));
    let n_dims = cursor.u32(what)?;
    if n_dims as usize > MAX_DIMS {
        return Err(ErrorKind::TooManyDims { name: name.into(), found: n_dims });
    }
    let dims = cursor.numbers(n_dims.into(), u64::from_le_bytes, what)?;
    let type_id = cursor.u32(what)?;
    let relative_offset = cursor.u64(what)?;

    let ggml_type = GgmlType::from_id(type_id)
        .ok_or_else(|| ErrorKind::TensorType { name: name.into(), found: type_id })?;
    let (shape, n_bytes) = check_shape(name, ggml_type, &dims)?;
    let offset = usize::try_from(relative_offset).map_err(|_| ErrorKind::OutsideFile {
        name: name.into(),
        n_bytes,
        offset: relative_offset.into(),
        file_len: cursor.bytes.len(),
    })?;
    Ok(TensorInfo { name: name.into(), shape, ggml_type, offset, n_bytes })
}

/// The shape and the bytes it takes, if every dimension and the whole make sense.
pub(super) fn check_shape(name: &str, ggml_type: GgmlType, dims: &[u64]) -> Result<(Vec<usize>, usize)> {
    if dims.len() > MAX_DIMS {
        return Err(ErrorKind::TooManyDims { name: name.into(), found: dims.len() as u32 });
    }
    let bad_shape = || ErrorKind::BadShape { name: name.into(), found: dims.to_vec() };
    let shape: Vec<usize> =
        dims.iter().map(|&dim| dim.try_into().map_err(|_| bad_shape())).collect::<Result<_>>()?;
    if shape.contains(&0) {
        return Err(bad_shape());
    }
    let row_len = shape.first().copied().unwrap_or(1);
    if !row_len.is_multiple_of(ggml_type.block_len()) {
        return Err(ErrorKind::RowLength { name: name.into(), ggml_type, found: row_len });
    }
    let n_bytes = ggml_type.n_bytes(&shape).ok_or_else(bad_shape)?;
    Ok((shape, n_bytes))
}

/// Makes the tensors' offsets absolute and checks that each has its own bytes of the file.
fn place_tensors(tensors: &mut Tensors, data_offset: usize, alignment: usize, file_len: usize) -> Result<()> {
    for info in tensors.values_mut() {
        if !info.offset.is_multiple_of(alignment) {
            return Err(ErrorKind::Misaligned {
                name: info.name.clone(),
                alignment,
                found: info.offset as u64,
            });
        }
        let end = data_offset.checked_add(info.offset).and_then(|start| start.checked_add(info.n_bytes));
        if end.is_none_or(|end| end > file_len) {
            return Err(ErrorKind::OutsideFile {
                name: info.name.clone(),
                n_bytes: info.n_bytes,
                offset: data_offset as u128 + info.offset as u128,
                file_len,
            });
        }
        info.offset += data_offset;
    }
    let mut by_offset: Vec<&TensorInfo> = tensors.values().collect();
    by_offset.sort_unstable_by_key(|info| info.offset);
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].n_bytes > pair[1].offset {
            return Err(ErrorKind::Overlap { name: pair[1].name.clone(), other: pair[0].name.clone() });
        }
    }
    Ok(())
}

/// The unread rest of the header. Nothing is sliced or allocated before [`check`](Self::check) has seen its size.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// Whether `needed` more bytes are there; 128 bits hold any count times any element size.
    fn check(&self, needed: u128, what: &dyn Display) -> Result<()> {
        let found = self.bytes.len() - self.at;
        if needed <= found as u128 {
            return Ok(());
        }
        Err(ErrorKind::Truncated { what: what.to_string(), offset: self.at, needed, found })
    }

    fn take(&mut self, len: u128, what: &dyn Display) -> Result<&'a [u8]> {
        self.check(len, what)?;
        let taken = &self.bytes[self.at..][..len as usize];
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u128, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &dyn Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &dyn Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        decode: fn([u8; N]) -> T,
        what: &dyn Display,
    ) -> Result<Vec<T>> {
        let (items, _) = self.take(count as u128 * N as u128, what)?.as_chunks();
        Ok(items.iter().map(|&item| decode(item)).collect())
    }

    fn string(&mut self, what: &dyn Display) -> Result<String> {
        let len = self.u64(what)?;
        let start = self.at;
        let bytes = self.take(len.into(), what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(e) => {
                let bad = e.valid_up_to();
                Err(ErrorKind::BadUtf8 { what: what.to_string(), byte: bytes[bad], offset: start + bad })
            }
        }
    }
}
