//! Matrix products for a few tokens on Q8_1 activations: against a twin with the same integers and, more loosely, against f64
//! on the unquantized vectors.

use super::formats::{dequantize, random_blocks};
use super::gemm::{in_q8_1, packed, products};
use super::gemv::{normalised, widen};
use super::{Guarded, Random, assert_close, devices, nmse};
use gpu_kernels::formats::Format;
use gpu_kernels::gemv::few::FEW_TOKENS;
use host::device::Device;
use host::ops::{self, ManyOutput, Matrix, Norm, Panels};

const FORMATS: [Format; 4] = [Format::Q8_0, Format::Q4_1, Format::Q4_K, Format::Q6_K];

/// Rows and columns: single, odd, more rows than a block takes, the inner dimensions of real models, part of a tile.
const SHAPES: [(usize, usize); 9] =
    [(1, 256), (7, 768), (33, 1536), (130, 512), (3, 4096), (17, 8960), (5, 576), (19, 32), (518, 1056)];

struct Case {
    n_rows: usize,
    n_cols: usize,
    n_tokens: usize,
    matrix: Matrix,
    /// `[n_rows, n_cols]`
    weights: Vec<f64>,
    /// `[n_tokens, n_cols]`
    x: Vec<f32>,
    what: String,
}

impl Case {
    /// Values of `y` from one token to the next.
    fn stride(&self) -> usize {
        self.n_rows.next_multiple_of(4)
    }

    fn packed(&self, device: &Device, norm: Option<Norm>) -> Panels {
        let readers: &[&Matrix] = &[&self.matrix];
        assert!(ops::has_few_products(device, readers), "{}", self.what);
        packed(device, &self.x, [self.n_tokens, self.n_cols], norm, false, Some(readers))
    }
}

/// Every format, shape and number of tokens on every device.
fn for_each_case(test: impl Fn(&Device, Case)) {
    for device in devices() {
        for format in FORMATS {
            for (n_rows, n_cols) in SHAPES {
                if n_cols % format.block_len() != 0 {
                    continue;
                }
                for n_tokens in 1..=FEW_TOKENS {
                    let mut random = Random::new((n_rows * 10_007 + n_cols + n_tokens) as u64);
                    let blocks = random_blocks(format, n_rows, n_cols, &mut random);
                    let matrix = Matrix::upload(device, format, n_rows, n_cols, &blocks).unwrap();
                    let weights = dequantize(format, &blocks);
                    let x = random.vector(n_tokens * n_cols);
                    let name = format.name();
                    let what =
                        format!("{name} {n_rows} x {n_cols}, {n_tokens} tokens, {}", device.describe());
                    test(device, Case { n_rows, n_cols, n_tokens, matrix, weights, x, what });
                }
            }
        }
    }
}

#[test]
fn products_for_a_few_tokens_match_their_integer_twin() {
    for_each_case(|device, case| {
        let (stride, n_cols) = (case.stride(), case.n_cols);
        let mut panels = case.packed(device, None);
        let mut y = Guarded::holding(device, &vec![0.0; case.n_tokens * stride]);
        ops::gemm(device, &case.matrix, &mut panels, ManyOutput::Set(&mut y.buffer)).unwrap();
        let y = y.finish(device, &case.what);
        let (twin, size) = products(&case.weights, &in_q8_1(device, &case.x, n_cols), n_cols, stride);
        assert_close(&y, &twin, 2e-6, size, &case.what);
        let (exact, _) = products(&case.weights, &widen(&case.x), n_cols, stride);
        let error = nmse(&y, &exact);
        // A handful of rows can cancel to almost nothing; the bound is on matrices with some.
        assert!(case.n_rows < 5 || error <= 5e-4, "{}: NMSE {error:e} against f64", case.what);
    });
}

#[test]
fn products_for_a_few_tokens_are_added() {
    for_each_case(|device, case| {
        let (stride, n_cols) = (case.stride(), case.n_cols);
        let residual = Random::new(case.n_rows as u64).vector(case.n_tokens * stride);
        let mut panels = case.packed(device, None);
        let mut y = Guarded::holding(device, &residual);
        ops::gemm(device, &case.matrix, &mut panels, ManyOutput::Add(&mut y.buffer)).unwrap();
        let y = y.finish(device, &case.what);
        let (twin, size) = products(&case.weights, &in_q8_1(device, &case.x, n_cols), n_cols, stride);
        // What fills a row up stays as it was.
        let expected: Vec<f64> = twin.iter().zip(widen(&residual)).map(|(y, r)| y + r).collect();
        assert_close(&y, &expected, 2e-6, size + 1.0, &case.what);
    });
}

#[test]
fn vectors_of_a_few_tokens_are_normalised_first() {
    for_each_case(|device, case| {
        let (stride, n_cols) = (case.stride(), case.n_cols);
        let gamma = Random::new(n_cols as u64).vector(n_cols);
        let g = device.alloc_from(&gamma).unwrap();
        let norm = Some(Norm { gamma: &g, eps: 1e-5 });
        let normed: Vec<f64> =
            case.x.chunks_exact(n_cols).flat_map(|x| normalised(x, &gamma, 1e-5)).collect();
        let mut panels = case.packed(device, norm);
        let mut y = Guarded::holding(device, &vec![0.0; case.n_tokens * stride]);
        ops::gemm(device, &case.matrix, &mut panels, ManyOutput::Set(&mut y.buffer)).unwrap();
        let y = y.finish(device, &case.what);
        let narrow: Vec<f32> = normed.iter().map(|&v| v as f32).collect();
        let (twin, size) = products(&case.weights, &in_q8_1(device, &narrow, n_cols), n_cols, stride);
        // A value in the middle between two integers may go to the other one, which a largest one of 3 makes 3 / 127 off.
        assert_close(&y, &twin, 1e-4, size, &case.what);
        let error = nmse(&y, &products(&case.weights, &normed, n_cols, stride).0);
        assert!(case.n_rows < 5 || error <= 5e-4, "{}: NMSE {error:e} against f64", case.what);
    });
}

#[test]
fn few_tokens_are_taken_where_all_matrices_have_the_kernels() {
    let device = &devices()[0];
    let matrix = |format: Format, n_cols: usize| {
        Matrix::upload(device, format, 4, n_cols, &vec![0; 4 * format.row_bytes(n_cols)]).unwrap()
    };
    let [q8_0, q4_k, q6_k, f16] =
        [Format::Q8_0, Format::Q4_K, Format::Q6_K, Format::F16].map(|format| matrix(format, 256));
    let has = |readers: &[&Matrix]| ops::has_few_products(device, readers);
    assert!(has(&[&q8_0]) && has(&[&q8_0, &q8_0, &q8_0]) && has(&[&q4_k, &q6_k, &q4_k]));
    assert!(!has(&[&f16]) && !has(&[&q4_k, &q8_0]) && !has(&[&q4_k, &q4_k, &f16]));
    // A quad that does not fit shared memory.
    assert!(!has(&[&matrix(Format::Q8_0, 57_344)]));
}

#[test]
fn few_products_that_do_not_fit_are_refused() {
    let device = &devices()[0];
    let matrix =
        |format: Format| Matrix::upload(device, format, 4, 256, &vec![0; 4 * format.row_bytes(256)]).unwrap();
    let (q8_0, f16) = (matrix(Format::Q8_0), matrix(Format::F16));
    let message = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    let x = [0.0; 3 * 256];
    let mut y = device.alloc_from(&[0.0f32; 12]).unwrap();
    let mut panels = packed(device, &x, [3, 256], None, false, Some(&[&q8_0]));
    let refused = ops::gemm(device, &f16, &mut panels, ManyOutput::Set(&mut y));
    assert!(message(refused).contains("other matrices than F16"));

    let values = device.alloc_from(&x).unwrap();
    let mut small = Panels::alloc(device, 1, 256, false).unwrap();
    let refused = ops::pack_panels(device, &values, 3, 256, None, &[&q8_0], &mut small);
    assert!(message(refused).contains("no room for 3 vectors of 256 values in Q8_1"));
    let refused = ops::pack_panels(device, &values, 3, 128, None, &[&q8_0], &mut small);
    assert!(message(refused).contains("a matrix of 4 x 256 is to read vectors of 128 values"));
    let refused = ops::pack_panels(device, &values, 3, 256, None, &[], &mut small);
    assert!(message(refused).contains("no matrix reads the vectors"));
}
