//! Matrix-vector products: the exact path against f64, the Q8_1 path against a twin with the same integers and,
//! more loosely, against f64 on the unquantized vector.

use super::formats::{dequantize, random_blocks};
use super::{Guarded, Random, assert_close, devices, nearest, nmse};
use gpu_kernels::formats::Format;
use gpu_kernels::operand::SCALE;
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::rows::{Order, RowOrder};
use gpu_kernels::step::Step;
use half::f16;
use host::device::{Buffer, Device};
use host::ops::{
    self, Input, KvLayer, Matrix, Next, Norm, Operand, Output, Packer, Q8_1Vector, QkvWeights, Rope,
};

/// Rows and columns in blocks: single, odd, more rows than a block takes, a wide one, and SmolLM2's 576 where it fits.
fn shapes(format: Format) -> Vec<(usize, usize)> {
    let block = format.block_len();
    let mut shapes = vec![(1, 256), (7, 768), (33, 1536), (130, 512), (3, 4096), (17, 8960), (2, 57344)];
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
pub(super) fn product(weights: &[f64], x: &[f64]) -> (Vec<f64>, f64) {
    let rows = weights.chunks_exact(x.len());
    let y = rows.clone().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
    let size = rows.map(|row| row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum()).fold(0.0, f64::max);
    (y, size)
}

pub(super) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

#[test]
fn gemv_f32_matches_f64() {
    for_each_case(|device, case| {
        let x = device.alloc_from(&case.x).unwrap();
        let mut y = Guarded::new(device, case.n_rows);
        ops::gemv(device, &case.matrix, Input::F32(&x, None), None, Output::Set(&mut y.buffer)).unwrap();
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
        ops::gemv(device, &case.matrix, Input::Q8_1(&q8), None, Output::Set(&mut y.buffer)).unwrap();
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
        ops::gemv(device, &case.matrix, Input::F32(&x, None), None, output).unwrap();
        let expected: Vec<f64> = plain.iter().zip(&bias).map(|(y, &b)| y + f64::from(b)).collect();
        assert_close(&y.finish(device, &case.what), &expected, 2e-6, size + 1.0, &case.what);

        let mut y = Guarded::holding(device, &residual);
        let gamma = random.vector(case.n_rows);
        let g = device.alloc_from(&gamma).unwrap();
        let mut left = Operand::alloc(device, case.n_rows, false).unwrap();
        let next = Next { operand: &mut left, gamma: Some(&g) };
        let output = Output::Add(&mut y.buffer, Some(next));
        ops::gemv(device, &case.matrix, Input::F32(&x, None), None, output).unwrap();
        let expected: Vec<f64> = plain.iter().zip(&residual).map(|(y, &r)| y + f64::from(r)).collect();
        let y = y.finish(device, &case.what);
        assert_close(&y, &expected, 2e-6, size + 1.0, &case.what);

        // And what the next product reads: the sum times gamma, and the sum of its squares.
        let scaled: Vec<f32> = y.iter().zip(&gamma).map(|(y, g)| y * g).collect();
        assert_eq!(left.to_f32(device).unwrap(), nearest(&scaled), "{}", case.what);
        let squares: f64 = widen(&y).iter().map(|y| y * y).sum();
        let found = left.sum_of_squares(device).unwrap();
        assert!((found - squares).abs() <= 1e-6 * squares, "{}: {found}, not {squares}", case.what);
    });
}

/// `x * gamma / sqrt(mean(x^2) + eps)`.
pub(super) fn normalised(x: &[f32], gamma: &[f32], eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(gamma).map(|(&x, &g)| f64::from(x) * f64::from(g) * factor).collect()
}

/// What products read of `x`, to be normalised with `gamma` where there is one.
pub(super) fn operand(
    device: &Device,
    x: &Buffer<f32>,
    gamma: Option<&Buffer<f32>>,
    is_exact: bool,
) -> Operand {
    let mut operand = Operand::alloc(device, x.len(), is_exact).unwrap();
    ops::make_operand(device, x, Next { operand: &mut operand, gamma }).unwrap();
    operand
}

/// The vector that an operand and Q8_1 make of `x`, block by block: an f16 is what the values are multiplied with, or, where they are
/// small, `1 / 32768` of it.
fn rounded(x: &[f32]) -> Vec<f64> {
    let x = nearest(x);
    let round = |block: &[f32]| -> Vec<f64> {
        let amax = block.iter().fold(0.0f64, |max, &v| max.max(f64::from(v.abs() * SCALE)));
        let raise = if amax < 2.0 { 32_768.0 } else { 1.0 };
        let factor = if amax > 0.0 {
            f16::from_f64(127.0 / (amax * raise)).to_f64() * raise * f64::from(SCALE)
        } else {
            0.0
        };
        let round = |v: f64| (v * factor).round_ties_even() / factor;
        block.iter().map(|&v| if factor == 0.0 { 0.0 } else { round(f64::from(v)) }).collect()
    };
    x.chunks(32).flat_map(round).collect()
}

#[test]
fn gemv_normalises_and_quantizes_its_input() {
    for_each_case(|device, case| {
        let mut random = Random::new(case.n_rows as u64 + 5);
        let gamma = random.vector(case.n_cols);
        let x = device.alloc_from(&case.x).unwrap();
        // A part of a buffer: what lies beyond it is no factor.
        let beyond: Vec<f32> = gamma.iter().copied().chain([f32::NAN; 8]).collect();
        let g = device.alloc_from(&beyond).unwrap().part(0..case.n_cols);
        let eps = 1e-5;
        let run = |input, norm| {
            let mut y = Guarded::new(device, case.n_rows);
            ops::gemv(device, &case.matrix, input, norm, Output::Set(&mut y.buffer)).unwrap();
            y.finish(device, &case.what)
        };
        let norm = Some(Norm { gamma: &g, eps });
        let exact = normalised(&case.x, &gamma, eps);
        let (expected, size) = product(&case.weights, &exact);
        let squares = operand(device, &x, Some(&g), true);
        assert_close(&run(Input::F32(&x, Some(&squares)), norm), &expected, 3e-6, size, &case.what);

        let plain = operand(device, &x, None, false);
        let (expected, size) = product(&case.weights, &rounded(&case.x));
        assert_close(&run(Input::Operand(&plain), None), &expected, 3e-6, size, &case.what);

        // The kernel quantizes x * gamma, rounded to f16, and applies the norm's factor to the products.
        let scaled: Vec<f32> = case.x.iter().zip(&gamma).map(|(x, g)| x * g).collect();
        let factor = exact.iter().map(|v| v * v).sum::<f64>().sqrt()
            / scaled.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let twin: Vec<f64> = rounded(&scaled).into_iter().map(|v| v * factor).collect();
        let (expected, size) = product(&case.weights, &twin);
        let scaled = operand(device, &x, Some(&g), false);
        assert_close(&run(Input::Operand(&scaled), norm), &expected, 3e-6, size, &case.what);
    });
}

#[test]
fn gemv_swiglu_matches_f64() {
    for_each_case(|device, case| {
        let n_ff = case.n_rows.next_multiple_of(2);
        let mut random = Random::new(case.n_cols as u64 + 1);
        let blocks = random_blocks(case.format, 2 * n_ff, case.n_cols, &mut random);
        let weights = dequantize(case.format, &blocks);
        let (gate_weights, up_weights) = weights.split_at(n_ff * case.n_cols);
        let order = RowOrder { order: Order::Halves as u32, group: n_ff as u32, n_rot: 0 };
        let halves: Vec<&[u8]> = blocks.chunks(blocks.len() / 2).collect();
        let matrix = Packer::new(device).matrix(case.format, 2 * n_ff, case.n_cols, order, &halves).unwrap();
        let x = device.alloc_from(&case.x).unwrap();

        let packed = operand(device, &x, None, false);
        let inputs = [(Input::F32(&x, None), widen(&case.x)), (Input::Operand(&packed), rounded(&case.x))];
        for (input, x) in inputs {
            let mut y = Guarded::new(device, n_ff);
            let mut left = Operand::alloc(device, n_ff, false).unwrap();
            let next = Next { operand: &mut left, gamma: None };
            ops::gemv_swiglu(device, &matrix, input, None, &mut y.buffer, Some(next)).unwrap();
            let y = y.finish(device, &case.what);
            assert_eq!(left.to_f32(device).unwrap(), nearest(&y), "{}", case.what);
            let (gate_y, gate_size) = product(gate_weights, &x);
            let (up_y, up_size) = product(up_weights, &x);
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
fn rows_come_back_in_their_order() {
    // Whatever the order in which rows are packed, a plain product gives them in the file's.
    for device in devices() {
        let mut random = Random::new(3);
        let (n_rows, n_cols) = (96, 64);
        let blocks = random_blocks(Format::Q8_0, n_rows, n_cols, &mut random);
        let values = random.vector(n_cols);
        let x = device.alloc_from(&values).unwrap();
        let (expected, size) = product(&dequantize(Format::Q8_0, &blocks), &widen(&values));
        for order in [
            RowOrder { order: Order::Halves as u32, group: 48, n_rot: 0 },
            RowOrder { order: Order::RotatedPairs as u32, group: 32, n_rot: 32 },
            RowOrder { order: Order::RotatedPairs as u32, group: 24, n_rot: 6 },
        ] {
            let matrix = Packer::new(device).matrix(Format::Q8_0, n_rows, n_cols, order, &[&blocks]).unwrap();
            let mut y = Guarded::new(device, n_rows);
            ops::gemv(device, &matrix, Input::F32(&x, None), None, Output::Set(&mut y.buffer)).unwrap();
            assert_close(&y.finish(device, "rows"), &expected, 2e-6, size, &format!("{order:?}"));
        }
        let order = RowOrder { order: Order::Halves as u32, group: 40, n_rot: 0 };
        let refused = Packer::new(device).matrix(Format::Q8_0, n_rows, n_cols, order, &[&blocks]);
        assert!(refused.unwrap_err().to_string().contains("96 rows are not two halves of 40"));
    }
}

#[test]
fn gemv_qkv_matches_f64() {
    for device in devices() {
        // Both layouts, partial rotation, mixed formats, with and without bias and norm.
        for (i, (layout, head_dim, n_rot, n_head, n_head_kv, n_cols)) in [
            (RopeLayout::Interleaved, 64, 64, 3, 1, 256),
            (RopeLayout::HalfSplit, 32, 32, 4, 2, 512),
            (RopeLayout::HalfSplit, 128, 96, 6, 2, 1536),
            (RopeLayout::Interleaved, 96, 32, 2, 2, 4096),
        ]
        .into_iter()
        .enumerate()
        {
            let mut random = Random::new(i as u64);
            let (n_q, n_kv, n_ctx, position) = (n_head * head_dim, n_head_kv * head_dim, 5, 3);
            let formats = [Format::Q4_K, Format::Q8_0, Format::Q6_K];
            let blocks = [0, 1, 2]
                .map(|i| random_blocks(formats[i], if i == 0 { n_q } else { n_kv }, n_cols, &mut random));
            let pairs = ops::pair_order(layout, head_dim, n_rot);
            let orders = [pairs, pairs, RowOrder::NATURAL];
            let mut packer = Packer::new(device);
            let matrices = [0, 1, 2].map(|i| {
                let n_rows = if i == 0 { n_q } else { n_kv };
                packer.matrix(formats[i], n_rows, n_cols, orders[i], &[&blocks[i]]).unwrap()
            });
            let biases = [n_q, n_kv, n_kv].map(|n| random.vector(n));
            let bias_buffers = [0, 1, 2].map(|i| device.alloc_from(&biases[i]).unwrap());
            let with_bias = i % 2 == 1;
            let (values, gamma) = (random.vector(n_cols), random.vector(n_cols));
            let (x, g) = (device.alloc_from(&values).unwrap(), device.alloc_from(&gamma).unwrap());

            let frequencies: Vec<f64> =
                (0..n_rot / 2).map(|pair| 10_000f64.powf(-2.0 * pair as f64 / n_rot as f64)).collect();
            let rope = Rope { frequencies: device.alloc_from(&frequencies).unwrap(), layout, magnitude: 1.0 };
            let angles: Vec<f64> = frequencies.iter().map(|f| f * f64::from(position)).collect();
            let rotation: Vec<[f32; 2]> = angles.iter().map(|a| [a.cos() as f32, a.sin() as f32]).collect();
            let rotation = device.alloc_from(&rotation).unwrap();
            let step = device.alloc_from(&[Step { token: 0, position }]).unwrap();
            let mut cache = KvLayer::alloc(device, n_head_kv, n_ctx, head_dim).unwrap();
            let poison = vec![f16::NAN; n_kv * n_ctx];
            device.upload(&mut cache.k, &poison).unwrap();
            device.upload(&mut cache.v, &poison).unwrap();
            let mut q = Guarded::new(device, n_q);
            let weights = QkvWeights {
                matrices: [&matrices[0], &matrices[1], &matrices[2]],
                biases: [0, 1, 2].map(|i| with_bias.then_some(&bias_buffers[i])),
            };
            let norm = Some(Norm { gamma: &g, eps: 1e-5 });
            let what = format!("{layout:?}, {n_head}:{n_head_kv} heads of {head_dim}, {}", device.describe());
            let squares = operand(device, &x, Some(&g), true);
            let input = Input::F32(&x, Some(&squares));
            ops::gemv_qkv(device, weights, input, norm, &rope, &rotation, &step, &mut q.buffer, &mut cache)
                .unwrap();

            let normed = normalised(&values, &gamma, 1e-5);
            let make = |i: usize| {
                let (mut y, size) = product(&dequantize(formats[i], &blocks[i]), &normed);
                if with_bias {
                    y.iter_mut().zip(&biases[i]).for_each(|(y, &b)| *y += f64::from(b));
                }
                (y, size + 1.0)
            };
            let rotate = |mut y: Vec<f64>| {
                for head in y.chunks_exact_mut(head_dim) {
                    for (pair, angle) in angles.iter().enumerate() {
                        let (a, b) = match layout {
                            RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                            RopeLayout::HalfSplit => (pair, pair + n_rot / 2),
                        };
                        let (sin, cos) = angle.sin_cos();
                        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                    }
                }
                y
            };
            let (expected, size) = make(0);
            assert_close(&q.finish(device, &what), &rotate(expected), 4e-6, size, &what);
            for (found, (expected, size)) in [
                (device.to_vec(&cache.k).unwrap(), {
                    let (y, size) = make(1);
                    (rotate(y), size)
                }),
                (device.to_vec(&cache.v).unwrap(), make(2)),
            ] {
                for (at, value) in found.into_iter().enumerate() {
                    let (head, p, d) = (at / head_dim / n_ctx, at / head_dim % n_ctx, at % head_dim);
                    if p != position as usize {
                        assert!(value.is_nan(), "{what}: position {p} was written");
                        continue;
                    }
                    let wanted = expected[head * head_dim + d];
                    // Half a step of f16, and the product's own rounding.
                    let tolerance = wanted.abs() / 2048.0 + 1e-7 + 4e-6 * size;
                    let error = (value.to_f64() - wanted).abs();
                    assert!(error <= tolerance, "{what}: head {head}, {d}: {value}, not {wanted}");
                }
            }
        }
    }
}

#[test]
fn many_rows_exceed_any_grid() {
    // So many rows that every block takes several quads, and the last one is not whole.
    for device in devices() {
        let n_rows = device.multiprocessors() as usize * 4 * 40 + 5;
        let mut random = Random::new(77);
        let blocks = random_blocks(Format::Q8_0, n_rows, 64, &mut random);
        let matrix = Matrix::upload(device, Format::Q8_0, n_rows, 64, &blocks).unwrap();
        let values = random.vector(64);
        let x = device.alloc_from(&values).unwrap();
        let mut y = Guarded::new(device, n_rows);
        ops::gemv(device, &matrix, Input::F32(&x, None), None, Output::Set(&mut y.buffer)).unwrap();
        let (expected, size) = product(&dequantize(Format::Q8_0, &blocks), &widen(&values));
        assert_close(&y.finish(device, "rows"), &expected, 2e-6, size, "rows");
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let device = &devices()[0];
    let matrix = Matrix::upload(device, Format::F32, 4, 32, &[0; 512]).unwrap();
    let (short, x) = (device.alloc_from(&[0.0f32; 31]).unwrap(), device.alloc_from(&[0.0f32; 32]).unwrap());
    let mut y3 = device.alloc_from(&[0.0f32; 3]).unwrap();
    let message = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    assert!(
        message(ops::gemv(device, &matrix, Input::F32(&short, None), None, Output::Set(&mut y3)))
            .contains("31 values")
    );
    assert!(
        message(ops::gemv(device, &matrix, Input::F32(&x, None), None, Output::Set(&mut y3)))
            .contains("4 are needed")
    );
    assert!(
        message(ops::gemv_swiglu(device, &matrix, Input::F32(&x, None), None, &mut y3, None))
            .contains("one matrix in halves")
    );
    let norm = Some(Norm { gamma: &short, eps: 0.0 });
    let refused = ops::gemv(device, &matrix, Input::F32(&x, None), norm, Output::Set(&mut y3));
    assert!(message(refused).contains("gamma has 31 values"));
}
