//! Shows what is in a GGUF file: as tables for people, as JSON for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::gguf::{Array, GgmlType, Gguf, Shown, Value};

/// Elements of an array that the table shows.
const SHOWN_ITEMS: usize = 4;
/// Characters of a string that the table shows, alone and within an array.
const SHOWN_CHARS: usize = 60;
const SHOWN_ITEM_CHARS: usize = 16;

/// Writes all metadata and tensors of `gguf` to `out`, as tables or as one JSON object.
pub fn print(gguf: &Gguf, json: bool, out: &mut impl Write) -> io::Result<()> {
    if json { print_json(gguf, out) } else { print_tables(gguf, out) }
}

fn print_tables(gguf: &Gguf, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "{}: GGUF version {}", gguf.file().display(), gguf.version())?;

    let mut metadata = table(["key", "type", "value"], &[]);
    for (key, value) in gguf.metadata() {
        metadata.add_row([Shown::new(key).to_string(), type_name(value), short_value(value)]);
    }
    print_table(&format!("metadata ({} keys)", gguf.metadata().len()), &metadata, out)?;

    let mut tensors = table(["name", "shape", "type", "bytes", "offset"], &[1, 3, 4]);
    for tensor in gguf.tensors() {
        let info = tensor.info;
        tensors.add_row([
            Shown::new(&info.name).to_string(),
            info.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
            info.ggml_type.to_string(),
            info.n_bytes.to_string(),
            info.offset.to_string(),
        ]);
    }
    print_table(&format!("tensors ({})", gguf.tensors().len()), &tensors, out)?;

    let summary = Summary::of(gguf);
    let mut by_type = table(["type", "tensors", "parameters", "bytes"], &[1, 2, 3]);
    for (name, total) in
        summary.types.iter().map(|(name, total)| (*name, total)).chain([("all", &summary.all)])
    {
        by_type.add_row([
            name.to_owned(),
            total.tensors.to_string(),
            total.parameters.to_string(),
            total.bytes.to_string(),
        ]);
    }
    print_table("summary", &by_type, out)?;
    let bits = summary.all.bytes as f64 * 8.0 / summary.all.parameters.max(1) as f64;
    writeln!(
        out,
        "\n{} parameters in {}B, {bits:.2} bits each; the file has {} bytes",
        three_digits(summary.all.parameters),
        three_digits(summary.all.bytes),
        gguf.file_len()
    )
}

/// `135 M`, `1.54 G`: rounded to three digits, with the decimal prefix.
fn three_digits(number: usize) -> String {
    let (mut rounded, mut prefix) = (number as f64, "");
    for larger in ["k", "M", "G", "T"] {
        if rounded >= 999.5 {
            (rounded, prefix) = (rounded / 1000.0, larger);
        }
    }
    let decimals = match rounded {
        _ if prefix.is_empty() => 0,
        ..9.995 => 2,
        ..99.95 => 1,
        _ => 0,
    };
    format!("{rounded:.decimals$} {prefix}")
}

fn table<const N: usize>(header: [&str; N], right_aligned: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING).set_header(header);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right_aligned.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn print_table(title: &str, table: &Table, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "\n{title}")?;
    for line in table.lines() {
        writeln!(out, "  {}", line.trim_end())?;
    }
    Ok(())
}

fn type_name(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("{}[{}]", array.element_type().name(), array.len()),
        other => other.value_type().name().to_owned(),
    }
}

fn short_value(value: &Value) -> String {
    match value {
        Value::String(text) => Shown::cut(text, SHOWN_CHARS).to_string(),
        Value::Array(array) => short_array(array),
        other => plain_number(other),
    }
}

fn short_array(array: &Array) -> String {
    let mut text = String::from("[");
    for (index, item) in array.iter().take(SHOWN_ITEMS).enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        let item = match &item {
            Value::String(text) => format!("\"{}\"", Shown::cut(text, SHOWN_ITEM_CHARS)),
            Value::Array(inner) => format!("{}[{}]", inner.element_type().name(), inner.len()),
            other => plain_number(other),
        };
        let _ = write!(text, "{separator}{item}"); // writing to a String cannot fail
    }
    text.push_str(if array.len() > SHOWN_ITEMS { ", …]" } else { "]" });
    text
}

fn plain_number(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::F32(x) => x.to_string(),
        Value::F64(x) => x.to_string(),
        other => other.as_integer().map(|n| n.to_string()).unwrap_or_default(),
    }
}

#[derive(Serialize)]
struct Summary {
    #[serde(flatten)]
    all: Total,
    types: BTreeMap<&'static str, Total>,
}

#[derive(Serialize, Default)]
struct Total {
    tensors: usize,
    parameters: usize,
    bytes: usize,
}

impl Summary {
    fn of(gguf: &Gguf) -> Self {
        let mut summary = Self { all: Total::default(), types: BTreeMap::new() };
        for tensor in gguf.tensors() {
            let of_type = summary.types.entry(tensor.info.ggml_type.name()).or_default();
            for total in [of_type, &mut summary.all] {
                total.tensors += 1;
                total.parameters += tensor.info.n_elements();
                total.bytes += tensor.info.n_bytes;
            }
        }
        summary
    }
}

fn print_json(gguf: &Gguf, out: &mut impl Write) -> io::Result<()> {
    #[derive(Serialize)]
    struct Document<'a> {
        file: String,
        file_bytes: usize,
        version: u32,
        alignment: usize,
        data_offset: usize,
        #[serde(serialize_with = "metadata_object")]
        metadata: &'a Gguf,
        tensors: Vec<TensorRow<'a>>,
        summary: Summary,
    }
    #[derive(Serialize)]
    struct TensorRow<'a> {
        name: &'a str,
        shape: &'a [usize],
        #[serde(rename = "type", serialize_with = "type_as_name")]
        ggml_type: GgmlType,
        bytes: usize,
        offset: usize,
    }
    let document = Document {
        file: gguf.file().display().to_string(),
        file_bytes: gguf.file_len(),
        version: gguf.version(),
        alignment: gguf.alignment(),
        data_offset: gguf.data_offset(),
        metadata: gguf,
        tensors: gguf
            .tensors()
            .map(|tensor| TensorRow {
                name: &tensor.info.name,
                shape: &tensor.info.shape,
                ggml_type: tensor.info.ggml_type,
                bytes: tensor.info.n_bytes,
                offset: tensor.info.offset,
            })
            .collect(),
        summary: Summary::of(gguf),
    };
    serde_json::to_writer_pretty(&mut *out, &document)?;
    writeln!(out)
}

fn metadata_object<S: Serializer>(gguf: &&Gguf, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(gguf.metadata().len()))?;
    for (key, value) in gguf.metadata() {
        map.serialize_entry(key, value)?;
    }
    map.end()
}

fn type_as_name<S: Serializer>(ggml_type: &GgmlType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(ggml_type.name())
}
