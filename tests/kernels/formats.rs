//! Weight formats against the `gguf` package (fixtures in tests/formats), and the helpers that make test matrices.

use super::{Guarded, Random, assert_close, devices};
use gpu_kernels::formats::Format;
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::step::Step;
use half::f16;
use host::device::{Buffer, Device};
use host::ops::{self, Matrix, Rope};

/// What tests/formats/make.py wrote: 3 rows of 512 weights.
const ROWS: usize = 3;
const COLS: usize = 512;

macro_rules! fixture {
    ($name:literal) => {
        (
            include_bytes!(concat!("../formats/", $name, ".blocks")).as_slice(),
            include_bytes!(concat!("../formats/", $name, ".f32")).as_slice(),
        )
    };
}

fn fixture(format: Format) -> (Vec<u8>, Vec<f32>) {
    let (blocks, floats) = match format {
        Format::F32 => fixture!("F32"),
        Format::F16 => fixture!("F16"),
        Format::Q8_0 => fixture!("Q8_0"),
        Format::Q4_1 => fixture!("Q4_1"),
        Format::Q4_K => fixture!("Q4_K"),
        Format::Q6_K => fixture!("Q6_K"),
    };
    (blocks.to_vec(), floats.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

/// Random blocks: every bit random, but for scales that are finite and small.
pub fn random_blocks(format: Format, n_rows: usize, n_cols: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..n_rows * format.row_bytes(n_cols)).map(|_| random.bits() as u8).collect();
    let scales: &[usize] = match format {
        Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q4_K => &[0, 2],
        Format::Q6_K => &[208],
        Format::F16 => &[0],
        Format::F32 => &[],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        for &at in scales {
            let range = if format == Format::F16 { 1.0 } else { 0.01 };
            block[at..at + 2].copy_from_slice(&f16::from_f32(range * random.symmetric()).to_le_bytes());
        }
        if format == Format::F32 {
            block.copy_from_slice(&random.symmetric().to_le_bytes());
        }
    }
    bytes
}

/// The weights of whole rows in f64, by the formula of each format, byte by byte.
pub fn dequantize(format: Format, bytes: &[u8]) -> Vec<f64> {
    let half = |b: &[u8], at: usize| f64::from(f16::from_le_bytes([b[at], b[at + 1]]));
    bytes
        .chunks_exact(format.block_bytes())
        .flat_map(|b| match format {
            Format::F32 => vec![f64::from(f32::from_le_bytes(b.try_into().unwrap()))],
            Format::F16 => vec![half(b, 0)],
            Format::Q8_0 => b[2..].iter().map(|&q| half(b, 0) * f64::from(q as i8)).collect(),
            Format::Q4_1 => {
                let weight = |q: u8| half(b, 0) * f64::from(q) + half(b, 2);
                let low = b[4..].iter().map(|q| weight(q & 15));
                low.chain(b[4..].iter().map(|q| weight(q >> 4))).collect()
            }
            Format::Q4_K => (0..256)
                .map(|i| {
                    let (s, j) = (&b[4..16], i / 32);
                    let (scale, min) = match j {
                        0..4 => (s[j] & 63, s[j + 4] & 63),
                        _ => (s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4),
                    };
                    let byte = b[16 + j / 2 * 32 + i % 32];
                    let q = if j % 2 == 0 { byte & 15 } else { byte >> 4 };
                    half(b, 0) * f64::from(scale) * f64::from(q) - half(b, 2) * f64::from(min)
                })
                .collect(),
            Format::Q6_K => (0..256)
                .map(|i| {
                    let (n, part, l) = (i / 128, i % 128 / 32, i % 32);
                    let low = b[64 * n + 32 * (part % 2) + l];
                    let low = if part < 2 { low & 15 } else { low >> 4 };
                    let high = b[128 + 32 * n + l] >> (2 * part) & 3;
                    let scale = b[192 + i / 16] as i8;
                    half(b, 208) * f64::from(scale) * (f64::from(low | high << 4) - 32.0)
                })
                .collect(),
        })
        .collect()
}

/// The embedding alone: nothing is rotated.
fn embed(device: &Device, matrix: &Matrix, step: &Buffer<Step>, out: &mut Buffer<f32>) {
    let rope =
        Rope { frequencies: device.alloc(0).unwrap(), layout: RopeLayout::Interleaved, magnitude: 1.0 };
    ops::embed(device, matrix, step, 1, &rope, out, &mut device.alloc(0).unwrap(), None, false).unwrap();
}

#[test]
fn references_match_the_gguf_package() {
    for &format in Format::ALL {
        let (blocks, expected) = fixture(format);
        assert_eq!(blocks.len(), ROWS * format.row_bytes(COLS));
        let weights: Vec<f32> = dequantize(format, &blocks).iter().map(|&w| w as f32).collect();
        let expected: Vec<f64> = expected.iter().map(|&w| w.into()).collect();
        assert_close(&weights, &expected, 1e-6, 0.02, format.name());
    }
}

#[test]
fn embedding_rows_match_the_gguf_package() {
    for device in devices() {
        for &format in Format::ALL {
            let (blocks, expected) = fixture(format);
            let matrix = Matrix::upload(device, format, ROWS, COLS, &blocks).unwrap();
            for row in 0..ROWS {
                let step = device.alloc_from(&[Step { token: row as u32, position: 7 }]).unwrap();
                let mut out = Guarded::new(device, COLS);
                embed(device, &matrix, &step, &mut out.buffer);
                let what = format!("{} row {row} on {}", format.name(), device.describe());
                let expected: Vec<f64> = expected[row * COLS..][..COLS].iter().map(|&w| w.into()).collect();
                assert_close(&out.finish(device, &what), &expected, 1e-6, 0.02, &what);
            }
        }
    }
}

/// Rows that end in half a tile, so that two quads may be a strip, of which the last one lacks the second.
#[test]
fn rows_of_both_quads_of_a_strip_embed() {
    for device in devices() {
        for &format in Format::ALL {
            let (n_rows, n_cols) = (19, 1536);
            let blocks = random_blocks(format, n_rows, n_cols, &mut Random::new(n_cols as u64));
            let matrix = Matrix::upload(device, format, n_rows, n_cols, &blocks).unwrap();
            let weights = dequantize(format, &blocks);
            for row in 0..n_rows {
                let step = device.alloc_from(&[Step { token: row as u32, position: 0 }]).unwrap();
                let mut out = Guarded::new(device, n_cols);
                embed(device, &matrix, &step, &mut out.buffer);
                let what = format!("{} row {row} on {}", format.name(), device.describe());
                let expected = &weights[row * n_cols..][..n_cols];
                let size = expected.iter().fold(0.0, |size: f64, weight| size.max(weight.abs()));
                assert_close(&out.finish(device, &what), expected, 1e-6, size, &what);
            }
        }
    }
}

#[test]
fn float_rows_of_any_length_embed() {
    for device in devices() {
        for format in [Format::F32, Format::F16] {
            for n_cols in [1, 31, 33, 100] {
                let mut random = Random::new(n_cols as u64);
                let blocks = random_blocks(format, 2, n_cols, &mut random);
                let matrix = Matrix::upload(device, format, 2, n_cols, &blocks).unwrap();
                let step = device.alloc_from(&[Step { token: 1, position: 0 }]).unwrap();
                let mut out = Guarded::new(device, n_cols);
                embed(device, &matrix, &step, &mut out.buffer);
                let expected = &dequantize(format, &blocks)[n_cols..];
                assert_close(&out.finish(device, "embed"), expected, 0.0, 0.0, format.name());
            }
        }
    }
}

#[test]
fn a_matrix_that_does_not_fit_its_format_is_refused() {
    let device = &devices()[0];
    let message = |format, n_rows, n_cols, len| {
        format!("{:#}", Matrix::upload(device, format, n_rows, n_cols, &vec![0; len]).unwrap_err())
    };
    assert!(message(Format::Q4_K, 1, 288, 162).contains("multiple of 256"));
    assert!(message(Format::Q4_K, 2, 256, 144).contains("need 288 bytes, found 144"));
    assert!(message(Format::F32, usize::MAX / 2, 32, 0).contains("too large"));
    assert!(message(Format::F32, 0, 32, 0).contains("empty"));
}
