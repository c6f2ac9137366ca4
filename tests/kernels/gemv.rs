//! Matrix-vector products: the exact path against f64, the Q8_1 path against a twin with the same integers and,
//! more loosely, against f64 on the unquantized vector.

use super::formats::{dequantize, random_blocks};
use super::{Guarded, Random, assert_close, devices, nmse};
use gpu_kernels::formats::Format;
use host::device::Device;
use host::ops::{self, Input, Matrix, Output, Q8_1Vector};

/// Rows and columns in blocks: single, odd, more rows than a block takes, a wide one, and SmolLM2's 576 where it fits.
fn shapes(format: Format) -> Vec<(usize, usize)> {
    let block = format.block_len();
    let mut shapes = vec![(1, 256), (7, 768), (33, 1536), (130, 512), (3, 4096), (17, 8960)];
    if 576 % block == 0 {
        shapes.extend([(5, 576), (65, 1536), (19, 32)]);
    }
    if block == 1 {
        shapes.extend([(3, 1), (4, 33), (9, 100)]);
    }
    shapes
}

struct Case {
    format: Format,
    n_rows: usize,
    n_cols: usize,
    matrix: Matrix,
    /// `[n_rows, n_cols]`
    weights: Vec<f64>,
    x: Vec<f32>,
    what: String,
}

/// Every format and shape on every device.
fn for_each_case(test: impl Fn(&Device, Case)) {
    for device in devices() {
        for &format in Format::ALL {
            for (n_rows, n_cols) in shapes(format) {
                let mut random = Random::new((n_rows * 10_007 + n_cols) as u64);
                let blocks = random_blocks(format, n_rows, n_cols, &mut random);
                let what = format!(
                    "{} {n_rows} x {n_cols}, seed {}, {}",
                    format.name(),
                    random.seed,
                    device.describe()
                );
                test(
                    device,
                    Case {
                        format,
                        n_rows,
                        n_cols,
                        matrix: Matrix::upload(device, format, n_rows, n_cols, &blocks).unwrap(),
                        weights: dequantize(format, &blocks),
                        x: random.vector(n_cols),
                        what,
                    },
                );
            }
        }
    }
}

/// `W x` and `|W| |x|`: the product, and the size of what was added up, which rounding errors are relative to.
fn product(weights: &[f64], x: &[f64]) -> (Vec<f64>, f64) {
    let rows = weights.chunks_exact(x.len());
    let y = rows.clone().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
    let size = rows.map(|row| row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum()).fold(0.0, f64::max);
    (y, size)
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

#[test]
fn gemv_f32_matches_f64() {
    for_each_case(|device, case| {
        let x = device.alloc_from(&case.x).unwrap();
        let mut y = Guarded::new(device, case.n_rows);
        ops::gemv(device, &case.matrix, Input::F32(&x), Output::Set(&mut y.buffer)).unwrap();
        let (expected, size) = product(&case.weights, &widen(&case.x));
        assert_close(&y.finish(device, &case.what), &expected, 2e-6, size, &case.what);
    });
}

#[test]
fn gemv_q8_1_matches_its_integer_twin() {
    for_each_case(|device, case| {
        let x = device.alloc_from(&case.x).unwrap();
        let mut q8 = Q8_1Vector::alloc(device, case.n_cols).unwrap();
        ops::quantize_q8_1(device, &x, &mut q8).unwrap();
        let mut y = Guarded::new(device, case.n_rows);
        ops::gemv(device, &case.matrix, Input::Q8_1(&q8), Output::Set(&mut y.buffer)).unwrap();
        let y = y.finish(device, &case.what);

        // The same integers and factors, in f64: only the kernel's own rounding is left.
        let quants: Vec<i8> = bytemuck::cast_slice(&device.to_vec(&q8.quants).unwrap()).to_vec();
        let scales = device.to_vec(&q8.scales).unwrap();
        let twin: Vec<f64> =
            (0..case.n_cols).map(|i| f64::from(scales[i / 32].d) * f64::from(quants[i])).collect();
        let (expected, size) = product(&case.weights, &twin);
        assert_close(&y, &expected, 2e-6, size, &case.what);

        let (exact, _) = product(&case.weights, &widen(&case.x));
        let error = nmse(&y, &exact);
        // A handful of rows can cancel to almost nothing; the bound is on matrices with some.
        assert!(case.n_rows < 5 || error <= 5e-4, "{}: NMSE {error:e} against f64", case.what);
    });
}

#[test]
fn bias_and_residual_are_added() {
    for_each_case(|device, case| {
        let mut random = Random::new(case.n_rows as u64);
        let (bias, residual) = (random.vector(case.n_rows), random.vector(case.n_rows));
        let (plain, size) = product(&case.weights, &widen(&case.x));
        let x = device.alloc_from(&case.x).unwrap();

        let bias_buffer = device.alloc_from(&bias).unwrap();
        let mut y = Guarded::new(device, case.n_rows);
        let output = Output::SetBiased(&mut y.buffer, &bias_buffer);
        ops::gemv(device, &case.matrix, Input::F32(&x), output).unwrap();
        let expected: Vec<f64> = plain.iter().zip(&bias).map(|(y, &b)| y + f64::from(b)).collect();
        assert_close(&y.finish(device, &case.what), &expected, 2e-6, size + 1.0, &case.what);

        let mut y = Guarded::holding(device, &residual);
        ops::gemv(device, &case.matrix, Input::F32(&x), Output::Add(&mut y.buffer)).unwrap();
        let expected: Vec<f64> = plain.iter().zip(&residual).map(|(y, &r)| y + f64::from(r)).collect();
        assert_close(&y.finish(device, &case.what), &expected, 2e-6, size + 1.0, &case.what);
    });
}

#[test]
fn gemv_swiglu_matches_f64() {
    for_each_case(|device, case| {
        let mut random = Random::new(case.n_cols as u64 + 1);
        let up_blocks = random_blocks(case.format, case.n_rows, case.n_cols, &mut random);
        let up_weights = dequantize(case.format, &up_blocks);
        let up = Matrix::upload(device, case.format, case.n_rows, case.n_cols, &up_blocks).unwrap();
        let x = device.alloc_from(&case.x).unwrap();
        let mut q8 = Q8_1Vector::alloc(device, case.n_cols).unwrap();
        ops::quantize_q8_1(device, &x, &mut q8).unwrap();
        let quants: Vec<i8> = bytemuck::cast_slice(&device.to_vec(&q8.quants).unwrap()).to_vec();
        let scales = device.to_vec(&q8.scales).unwrap();
        let twin: Vec<f64> =
            (0..case.n_cols).map(|i| f64::from(scales[i / 32].d) * f64::from(quants[i])).collect();

        for (input, x) in [(Input::F32(&x), widen(&case.x)), (Input::Q8_1(&q8), twin)] {
            let mut y = Guarded::new(device, case.n_rows);
            ops::gemv_swiglu(device, &case.matrix, &up, input, &mut y.buffer).unwrap();
            let y = y.finish(device, &case.what);
            let (gate_y, gate_size) = product(&case.weights, &x);
            let (up_y, up_size) = product(&up_weights, &x);
            for (i, value) in y.into_iter().enumerate() {
                let (g, u) = (gate_y[i], up_y[i]);
                let expected = g / (1.0 + (-g).exp()) * u;
                // Each factor is off by rounding relative to what it adds up; silu's slope is at most 1.1.
                let tolerance =
                    2e-6 * (1.1 * gate_size * u.abs() + up_size * g.abs() + 1.0) + 2e-6 * expected.abs();
                let error = (f64::from(value) - expected).abs();
                assert!(
                    error <= tolerance,
                    "{}: row {i} is {value}, not {expected} ({error:e} > {tolerance:e})",
                    case.what
                );
            }
        }
    });
}

#[test]
fn many_rows_exceed_any_grid() {
    // More rows than the largest grid takes at once, so that blocks go round.
    for device in devices() {
        let n_rows = device.saturating_blocks() as usize * gpu_kernels::gemv::ROWS_PER_BLOCK + 5;
        let mut random = Random::new(77);
        let blocks = random_blocks(Format::Q8_0, n_rows, 64, &mut random);
        let matrix = Matrix::upload(device, Format::Q8_0, n_rows, 64, &blocks).unwrap();
        let values = random.vector(64);
        let x = device.alloc_from(&values).unwrap();
        let mut y = Guarded::new(device, n_rows);
        ops::gemv(device, &matrix, Input::F32(&x), Output::Set(&mut y.buffer)).unwrap();
        let (expected, size) = product(&dequantize(Format::Q8_0, &blocks), &widen(&values));
        assert_close(&y.finish(device, "rows"), &expected, 2e-6, size, "rows");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let device = &devices()[0];
    let matrix = Matrix::upload(device, Format::F32, 4, 32, &[0; 512]).unwrap();
    let other = Matrix::upload(device, Format::F32, 4, 33, &[0; 528]).unwrap();
    let (short, x) = (device.alloc_from(&[0.0f32; 31]).unwrap(), device.alloc_from(&[0.0f32; 32]).unwrap());
    let mut y3 = device.alloc_from(&[0.0f32; 3]).unwrap();
    let message = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    assert!(
        message(ops::gemv(device, &matrix, Input::F32(&short), Output::Set(&mut y3))).contains("31 values")
    );
    assert!(
        message(ops::gemv(device, &matrix, Input::F32(&x), Output::Set(&mut y3))).contains("4 are needed")
    );
    assert!(message(ops::gemv_swiglu(device, &matrix, &other, Input::F32(&x), &mut y3)).contains("up is"));
}
