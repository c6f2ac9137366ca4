//! GGUF files: reading what is there, and refusing what is damaged, in one line and without much memory.

use std::path::PathBuf;

use host::gguf::writer::GgufWriter;
use host::gguf::{Array, GgmlType, Gguf, Value};
use proptest::prelude::*;

use crate::tiny_model::TinyModel;

/// A file with every kind of value, and tensors of several types whose data ends exactly where the file does.
fn sample() -> GgufWriter<'static> {
    let mut writer = GgufWriter::new();
    writer
        .metadata("general.architecture", "llama")
        .metadata("u8", 200u8)
        .metadata("i8", -100i8)
        .metadata("u16", 60_000u16)
        .metadata("i16", -30_000i16)
        .metadata("u32", 4_000_000_000u32)
        .metadata("i32", -2_000_000_000i32)
        .metadata("f32", 0.5f32)
        .metadata("bool", true)
        .metadata("string", "naïve ✓")
        .metadata("u64", u64::MAX)
        .metadata("i64", i64::MIN)
        .metadata("f64", 1e300f64)
        .metadata("numbers", vec![1i32, -2, 3])
        .metadata("flags", vec![true, false])
        .metadata("texts", vec![String::from("a"), String::new(), String::from("ccc")])
        .metadata("nested", Array::Array(vec![Array::U8(vec![1, 2]), Array::String(vec!["x".into()])]))
        .metadata("empty", Vec::<f32>::new())
        .tensor("norm", &[8], GgmlType::F32, bytes(32))
        .tensor("matrix", &[64, 3], GgmlType::Q8_0, bytes(2 * 34 * 3))
        .tensor("scalar", &[], GgmlType::F16, bytes(2))
        .tensor("blocks", &[256, 1, 2], GgmlType::Q4_K, bytes(2 * 144));
    writer
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

/// The one line a user sees.
#[track_caller]
fn refusal(bytes: &[u8]) -> String {
    let line = Gguf::from_bytes(bytes.to_vec()).expect_err("the file is broken").to_string();
    assert!(line.starts_with("(memory): ") && !line.contains('\n') && line.len() < 400, "{line}");
    line
}

#[track_caller]
fn assert_refused(bytes: &[u8], message: &str) {
    let line = refusal(bytes);
    assert!(line.contains(message), "{line}\ndoes not contain\n{message}");
}

/// Writes GGUF byte by byte, so that nothing keeps it from being wrong.
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_metadata: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_metadata)
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    fn u32(self, n: u32) -> Self {
        self.raw(&n.to_le_bytes())
    }
    fn u64(self, n: u64) -> Self {
        self.raw(&n.to_le_bytes())
    }
    fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).raw(text.as_bytes())
    }
    fn tensor(self, name: &str, dims: &[u64], ggml_type: u32, offset: u64) -> Self {
        let named = self.string(name).u32(dims.len() as u32);
        dims.iter().fold(named, |raw, &dim| raw.u64(dim)).u32(ggml_type).u64(offset)
    }
}

#[test]
fn values_match_what_was_written() {
    let gguf = Gguf::from_bytes(sample().to_bytes().unwrap()).unwrap();
    let keys: Vec<_> = gguf.metadata().map(|(key, _)| key).collect();
    assert_eq!(keys[..3], ["general.architecture", "u8", "i8"]);
    assert_eq!(gguf.require::<u32>("u8").unwrap(), 200);
    assert_eq!(gguf.require::<i32>("i8").unwrap(), -100);
    assert_eq!(gguf.require::<usize>("u16").unwrap(), 60_000);
    assert_eq!(gguf.require::<i64>("i16").unwrap(), -30_000);
    assert_eq!(gguf.require::<u32>("u32").unwrap(), 4_000_000_000);
    assert_eq!(gguf.require::<i32>("i32").unwrap(), -2_000_000_000);
    assert_eq!(gguf.require::<f32>("f32").unwrap(), 0.5);
    assert!(gguf.require::<bool>("bool").unwrap());
    assert_eq!(gguf.require::<&str>("string").unwrap(), "naïve ✓");
    assert_eq!(gguf.require::<u64>("u64").unwrap(), u64::MAX);
    assert_eq!(gguf.require::<i64>("i64").unwrap(), i64::MIN);
    assert_eq!(gguf.require::<f64>("f64").unwrap(), 1e300);
    assert_eq!(gguf.require::<Vec<i32>>("numbers").unwrap(), [1, -2, 3]);
    assert_eq!(gguf.value("flags"), Some(&Value::from(vec![true, false])));
    assert_eq!(gguf.require::<&[String]>("texts").unwrap(), ["a", "", "ccc"]);
    let nested = Array::Array(vec![Array::U8(vec![1, 2]), Array::String(vec!["x".into()])]);
    assert_eq!(gguf.require::<&Array>("nested").unwrap(), &nested);
    assert_eq!(gguf.require::<Vec<f32>>("empty").unwrap(), [0f32; 0]);
    assert_eq!(gguf.get::<u32>("absent").unwrap(), None);
}

#[test]
fn tensors_match_what_was_written() {
    let gguf = Gguf::from_bytes(sample().to_bytes().unwrap()).unwrap();
    let names: Vec<_> = gguf.tensors().map(|tensor| tensor.info.name.as_str()).collect();
    assert_eq!(names, ["norm", "matrix", "scalar", "blocks"]);
    let matrix = gguf.tensor("matrix").unwrap();
    assert_eq!((matrix.info.shape.as_slice(), matrix.info.ggml_type), (&[64, 3][..], GgmlType::Q8_0));
    assert_eq!(matrix.info.n_elements(), 192);
    for tensor in gguf.tensors() {
        assert_eq!(tensor.data, bytes(tensor.info.n_bytes));
        assert_eq!(tensor.info.offset % gguf.alignment(), 0);
    }
    let e = gguf.tensor("absent").unwrap_err();
    assert_eq!(e.to_string(), "(memory): tensor \"absent\" is missing");
}

#[test]
fn mapped_file_matches_bytes_in_memory() {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("mapped.gguf");
    sample().write_file(&path).unwrap();
    let (mapped, owned) =
        (Gguf::open(&path).unwrap(), Gguf::from_bytes(sample().to_bytes().unwrap()).unwrap());
    assert!(mapped.metadata().eq(owned.metadata()));
    for (left, right) in mapped.tensors().zip(owned.tensors()) {
        assert_eq!((left.info, left.data), (right.info, right.data));
    }
}

#[test]
fn version_2_reads_as_version_3() {
    let mut bytes = sample().to_bytes().unwrap();
    bytes[4] = 2;
    let gguf = Gguf::from_bytes(bytes).unwrap();
    assert_eq!((gguf.version(), gguf.tensors().len()), (2, 4));
}

#[test]
fn alignment_comes_from_the_file() {
    let mut writer = sample();
    writer.metadata("general.alignment", 1024u32);
    let gguf = Gguf::from_bytes(writer.to_bytes().unwrap()).unwrap();
    assert_eq!(gguf.alignment(), 1024);
    assert!(gguf.tensors().all(|tensor| tensor.info.offset.is_multiple_of(1024)));
    for found in [0u32, 24] {
        let bytes = Raw::new(0, 1).string("general.alignment").u32(4).u32(found).0;
        assert_refused(&bytes, &format!("key \"general.alignment\": needed a power of two, found {found}"));
        assert!(writer.metadata("general.alignment", found).to_bytes().is_err());
    }
    let bytes = Raw::new(0, 1).string("general.alignment").u32(8).string("big").0;
    assert_refused(&bytes, "key \"general.alignment\": needed u32, found string \"big\"");
}

#[test]
fn type_mismatch_names_key_wanted_and_found() {
    let gguf = Gguf::from_bytes(sample().to_bytes().unwrap()).unwrap();
    let line = gguf.get::<u32>("i8").unwrap_err().to_string();
    assert_eq!(line, "(memory): key \"i8\": needed u32, found i8 -100");
    let line = gguf.get::<f32>("f64").unwrap_err().to_string();
    assert!(line.starts_with("(memory): key \"f64\": needed f32, found f64 1000"), "{line}");
    let line = gguf.get::<&[String]>("numbers").unwrap_err().to_string();
    assert_eq!(line, "(memory): key \"numbers\": needed array of strings, found array of 3 i32");
    let line = gguf.get::<Vec<u32>>("numbers").unwrap_err().to_string();
    assert_eq!(line, "(memory): key \"numbers\": needed array of u32, found array of 3 i32");
    let line = gguf.require::<bool>("absent").unwrap_err().to_string();
    assert_eq!(line, "(memory): key \"absent\" is missing: needed bool");
}

#[test]
fn file_problems_name_the_file() {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let absent = folder.join("absent.gguf");
    let line = Gguf::open(&absent).unwrap_err().to_string();
    assert!(line.starts_with(&format!("{}: No such file", absent.display())), "{line}");
    let line = Gguf::open(&folder).unwrap_err().to_string();
    assert!(line.contains("is a directory"), "{line}");
    let empty = folder.join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    let line = Gguf::open(&empty).unwrap_err().to_string();
    assert!(line.ends_with("the magic number needs 4 bytes at offset 0, found 0"), "{line}");
}

#[test]
fn other_files_and_versions_are_refused() {
    assert_refused(
        b"\x7fELF\x02\x01\x01\0",
        "not a GGUF file: needed the magic bytes \"GGUF\", found \\x7fELF",
    );
    assert_refused(b"GGUF\x01\0\0\0", "unsupported GGUF version: needed 2 or 3, found 1");
    assert_refused(b"GGUF\x04\0\0\0", "unsupported GGUF version: needed 2 or 3, found 4");
    assert_refused(b"GGUF\0\0\0\x03", "big-endian GGUF file (version 3): needed a little-endian one");
}

#[test]
fn truncation_at_every_byte_is_refused() {
    let whole = sample().to_bytes().unwrap();
    let end =
        Gguf::from_bytes(whole.clone()).unwrap().tensors().map(|t| t.info.offset + t.info.n_bytes).max();
    assert_eq!(end, Some(whole.len()), "the sample ends with data, not padding");
    for len in 0..whole.len() {
        let line = refusal(&whole[..len]);
        assert!(line.contains("found"), "{line}");
    }
    assert_refused(
        &whole[..whole.len() - 1],
        &format!("tensor \"blocks\": needed 288 bytes at offset {}", whole.len() - 288),
    );
}

#[test]
fn counts_beyond_the_file_are_refused() {
    let huge = u64::MAX;
    assert_refused(&Raw::new(0, huge).0, &format!("a list of {huge} metadata keys needs"));
    assert_refused(&Raw::new(huge, 0).0, &format!("a list of {huge} tensors needs"));
    assert_refused(
        &Raw::new(0, 1).u64(huge).u64(0).0,
        &format!("the name of metadata key 0 needs {huge} bytes"),
    );
    let key = || Raw::new(0, 1).string("some.key");
    assert_refused(
        &key().u32(8).u64(huge).0,
        &format!("value of key \"some.key\" needs {huge} bytes at offset 52"),
    );
    for (element, size) in [(0, 1), (2, 2), (4, 4), (10, 8), (7, 1), (8, 8), (9, 12)] {
        let bytes = key().u32(9).u32(element).u64(huge).0;
        let needed = u128::from(huge) * size;
        assert_refused(
            &bytes,
            &format!("the array of key \"some.key\" needs {needed} bytes at offset 56, found 0"),
        );
    }
}

#[test]
fn broken_metadata_names_the_key() {
    let key = || Raw::new(0, 1).string("some.key");
    assert_refused(&key().u32(13).u64(0).0, "key \"some.key\": needed a value type from 0 to 12, found 13");
    assert_refused(
        &key().u32(9).u32(99).u64(0).0,
        "key \"some.key\": needed a value type from 0 to 12, found 99",
    );
    assert_refused(&key().u32(7).raw(&[2]).0, "key \"some.key\": needed a bool (0 or 1), found 2");
    assert_refused(&key().u32(9).u32(7).u64(2).raw(&[1, 9]).0, "needed a bool (0 or 1), found 9");
    let text = key().u32(8).u64(3).raw(b"a\xff!").0;
    assert_refused(
        &text,
        "the value of key \"some.key\": needed UTF-8 text, found the byte 0xff at offset 53",
    );
    let name = Raw::new(0, 1).u64(1).raw(b"\xc3").u32(0).raw(&[0]).0;
    assert_refused(&name, "the name of metadata key 0: needed UTF-8 text, found the byte 0xc3");
    let twice = Raw::new(0, 2).string("k").u32(4).u32(1).string("k").u32(4).u32(1).0;
    assert_refused(&twice, "key \"k\": needed once, found twice");
    let rude = Raw::new(0, 1).string(&"\u{1b}[2J\n".repeat(100)).u32(13).u64(0).0;
    assert_refused(&rude, r"\u{1b}[2J\n");
}

#[test]
fn arrays_of_arrays_have_a_limit() {
    let nested = |depth: usize| {
        let start = Raw::new(0, 1).string("bomb").u32(9);
        (1..depth).fold(start, |raw, _| raw.u32(9).u64(1)).u32(0).u64(1).raw(&[7]).0
    };
    assert!(Gguf::from_bytes(nested(4)).is_ok());
    assert_refused(&nested(5), "key \"bomb\": needed arrays nested at most 4 deep, found more");
    assert_refused(&nested(100_000), "key \"bomb\": needed arrays nested at most 4 deep, found more");
}

#[test]
fn broken_tensors_are_named() {
    /// A file with one tensor `t` and 1,024 bytes of data.
    #[track_caller]
    fn check(dims: &[u64], ggml_type: u32, offset: u64, message: &str) {
        let bytes = Raw::new(1, 0).tensor("t", dims, ggml_type, offset).raw(&[0; 1024]).0;
        assert_refused(&bytes, &format!("tensor \"t\": {message}"));
    }
    check(&[1; 5], 0, 0, "needed at most 4 dimensions, found 5");
    check(&[4, 0], 0, 0, "needed dimensions from 1 up whose product fits, found [4, 0]");
    check(&[1 << 32, 1 << 32], 0, 0, "needed dimensions from 1 up whose product fits, found [4294967296, 42");
    check(&[1 << 62], 0, 0, "needed dimensions from 1 up whose product fits, found [4611686018427387904]");
    check(&[4], 4, 0, "needed a known tensor type, found number 4");
    check(&[4], u32::MAX, 0, "needed a known tensor type, found number 4294967295");
    check(&[288, 2], 12, 0, "Q4_K needs rows of a multiple of 256, found 288");
    check(&[4], 0, 16, "needed an offset that is a multiple of 32, found 16");
    check(&[4], 0, 2048, "needed 16 bytes at offset 2112, found a file of 1081 bytes");
    check(&[4], 0, u64::MAX - 31, "needed 16 bytes at offset");
    check(&[1 << 40], 0, 0, "needed 4398046511104 bytes at offset 64, found a file of 1081 bytes");
    let twice = Raw::new(2, 0).tensor("t", &[1], 0, 0).tensor("t", &[1], 0, 32).raw(&[0; 256]).0;
    assert_refused(&twice, "tensor \"t\": needed once, found twice");
    let shared = Raw::new(2, 0).tensor("a", &[16], 0, 0).tensor("b", &[1], 0, 32).raw(&[0; 256]).0;
    assert_refused(&shared, "tensor \"b\": needed data of its own, found that it overlaps \"a\"");
}

#[test]
fn writer_refuses_what_the_reader_would() {
    #[track_caller]
    fn check(writer: &GgufWriter<'_>, message: &str) {
        let line = writer.to_bytes().unwrap_err().to_string();
        assert!(line.contains(message), "{line}");
    }
    let mut writer = GgufWriter::new();
    check(writer.clone().tensor("t", &[32], GgmlType::Q8_0, bytes(33)), "needed 34 bytes of data, found 33");
    check(
        writer.clone().tensor("t", &[33], GgmlType::Q8_0, bytes(34)),
        "needs rows of a multiple of 32, found 33",
    );
    check(
        writer.clone().tensor("t", &[1; 5], GgmlType::F32, bytes(4)),
        "needed at most 4 dimensions, found 5",
    );
    writer.tensor("t", &[1], GgmlType::F32, bytes(4)).tensor("t", &[1], GgmlType::F32, bytes(4));
    check(&writer, "needed once, found twice");
}

#[test]
fn ggml_types_are_found_by_id_and_whole_blocks() {
    for &ggml_type in GgmlType::ALL {
        assert_eq!(GgmlType::from_id(ggml_type.id()), Some(ggml_type));
        let block_len = ggml_type.block_len();
        assert_eq!(ggml_type.n_bytes(&[block_len * 2, 3]), Some(6 * ggml_type.block_bytes()));
        assert_eq!(ggml_type.n_bytes(&[block_len * 2 + 1, 32]).is_none(), block_len > 1);
    }
    assert_eq!((GgmlType::Q4_K.name(), GgmlType::Q4_K.id()), ("Q4_K", 12));
}

#[test]
fn files_of_the_smallest_entries_stay_small_in_memory() {
    let n = 10_000;
    let keys = (0..n).fold(Raw::new(0, n), |raw, i| raw.string(&format!("{i}")).u32(0).raw(&[0])).0;
    let texts = (0..n).fold(Raw::new(0, 1).string("k").u32(9).u32(8).u64(n), |raw, _| raw.u64(0)).0;
    let arrays = (0..n).fold(Raw::new(0, 1).string("k").u32(9).u32(9).u64(n), |raw, _| raw.u32(0).u64(0)).0;
    let tensors = (0..n).fold(Raw::new(n, 0), |raw, i| raw.tensor(&format!("{i}"), &[1], 0, 32 * i));
    let tensors = tensors.raw(&vec![0; 32 * n as usize + 32]).0;
    for (what, bytes) in [("keys", keys), ("texts", texts), ("arrays", arrays), ("tensors", tensors)] {
        let size = bytes.len() as u64;
        let used = allocation_counter::measure(|| drop(Gguf::from_bytes(bytes).unwrap()));
        let ratio = used.bytes_max as f64 / size as f64;
        println!("{what}: {ratio:.1} times the file's {size} bytes");
        assert!((0.5..12.0).contains(&ratio), "{what}: {ratio}");
    }
}

/// Reads damaged bytes: any answer will do, but no panic and no memory beyond a small multiple of the file.
fn read_damaged(bytes: Vec<u8>) -> Result<(), TestCaseError> {
    let limit = 24 * bytes.len() as u64 + 4096;
    let mut outcome = None;
    let used = allocation_counter::measure(|| outcome = Some(Gguf::from_bytes(bytes)));
    prop_assert!(used.bytes_max <= limit, "{} bytes allocated, needed at most {limit}", used.bytes_max);
    match outcome.unwrap() {
        Ok(gguf) => {
            for tensor in gguf.tensors() {
                prop_assert_eq!(tensor.data.len(), tensor.info.n_bytes);
            }
            // What reads it must stand whatever it says.
            let _ = host::config::Config::from_gguf(&gguf).and_then(|config| config.check_tensors(&gguf));
            host::inspect::print(&gguf, false, &mut std::io::sink()).unwrap();
            host::inspect::print(&gguf, true, &mut std::io::sink()).unwrap();
        }
        Err(e) => prop_assert!(!e.to_string().contains('\n')),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = sample().to_bytes().unwrap();
        for (index, byte) in flips {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        read_damaged(bytes)?;
    }

    #[test]
    fn flipped_model_headers_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let whole = model_bytes();
        let mut bytes = whole.0.clone();
        for (index, byte) in flips {
            let index = index.index(whole.1);
            bytes[index] = byte;
        }
        read_damaged(bytes)?;
    }

    #[test]
    fn overwritten_numbers_never_panic(
        index in any::<prop::sample::Index>(),
        number in prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 63), 0u64..100_000],
        len in any::<prop::sample::Index>(),
    ) {
        let mut bytes = sample().to_bytes().unwrap();
        let index = index.index(bytes.len() - 8);
        bytes[index..index + 8].copy_from_slice(&number.to_le_bytes());
        bytes.truncate(bytes.len() - len.index(64));
        read_damaged(bytes)?;
    }

    #[test]
    fn arbitrary_bytes_after_a_good_start_never_panic(tail in prop::collection::vec(any::<u8>(), 0..512)) {
        read_damaged(Raw::new(1, 3).string("a").u32(9).u32(8).raw(&tail).0)?;
    }
}

/// A whole model, and how many of its bytes are header.
fn model_bytes() -> &'static (Vec<u8>, usize) {
    static MODEL: std::sync::LazyLock<(Vec<u8>, usize)> = std::sync::LazyLock::new(|| {
        let bytes = TinyModel::qwen2().to_bytes();
        let header_len = Gguf::from_bytes(bytes.clone()).unwrap().data_offset();
        (bytes, header_len)
    });
    &MODEL
}
