//! Matrix products for many tokens: the fast path against a twin with the same rounded numbers, the exact path against f64.
//! Those for a few tokens in Q8_1 are in [`super::few`], and as cases here where the output is what counts.

use super::formats::{dequantize, random_blocks};
use super::gemv::{normalised, product, widen};
use super::{Guarded, Random, assert_close, devices, nmse};
use gpu_kernels::formats::Format;
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::rows::{Order, RowOrder};
use gpu_kernels::step::Step;
use half::{bf16, f16};
use host::device::Device;
use host::ops::{self, KvLayer, ManyOutput, Matrix, Norm, Packer, Panels, Q8_1Vector, QkvWeights, Rope};

/// Rows, columns and tokens: odd ones, all tilings, rows beyond a block, the inner dimensions of real models.
const SHAPES: [(usize, usize, usize); 13] = [
    (1, 256, 1),
    (7, 768, 7),
    (33, 1536, 16),
    (130, 512, 33),
    (260, 256, 65),
    (12, 4096, 129),
    (5, 8960, 3),
    (4, 14336, 9),
    (140, 256, 511),
    (128, 512, 512),
    (132, 256, 513),
    (64, 576, 70),
    (19, 32, 5),
];

/// Vectors in panels, or in Q8_1 where `readers` take them so; `None` are matrices that do not.
pub(super) fn packed(
    device: &Device,
    x: &[f32],
    [n_tokens, n_cols]: [usize; 2],
    norm: Option<Norm>,
    is_exact: bool,
    readers: Option<&[&Matrix]>,
) -> Panels {
    let mut panels = Panels::alloc(device, n_tokens, n_cols, is_exact).unwrap();
    // Rows are filled up to a multiple of four values, which are nobody's.
    let mut rows = Vec::new();
    for x in x.chunks_exact(n_cols) {
        rows.extend_from_slice(x);
        rows.resize(rows.len().next_multiple_of(4), f32::NAN);
    }
    let x = device.alloc_from(&rows).unwrap();
    let other = Matrix::upload(device, Format::F32, 1, n_cols, &vec![0; 4 * n_cols]).unwrap();
    ops::pack_panels(device, &x, n_tokens, n_cols, norm, readers.unwrap_or(&[&other]), &mut panels).unwrap();
    panels
}

/// What Q8_1 makes of each vector: the device's integers and factors, in f64.
pub(super) fn in_q8_1(device: &Device, x: &[f32], n_cols: usize) -> Vec<f64> {
    let of_token = |x: &[f32]| {
        let mut q8 = Q8_1Vector::alloc(device, n_cols).unwrap();
        ops::quantize_q8_1(device, &device.alloc_from(x).unwrap(), &mut q8).unwrap();
        let quants: Vec<i8> = bytemuck::cast_slice(&device.to_vec(&q8.quants).unwrap()).to_vec();
        let scales = device.to_vec(&q8.scales).unwrap();
        (0..n_cols).map(|i| f64::from(scales[i / 32].d) * f64::from(quants[i])).collect::<Vec<_>>()
    };
    x.chunks_exact(n_cols).flat_map(of_token).collect()
}

fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&v| bf16::from_f32(v as f32).to_f64()).collect()
}

/// `[n_tokens, stride]`, zeros beyond the rows, and the largest sum of magnitudes.
pub(super) fn products(weights: &[f64], x: &[f64], n_cols: usize, stride: usize) -> (Vec<f64>, f64) {
    let mut size = 0.0f64;
    let mut all = Vec::new();
    for x in x.chunks_exact(n_cols) {
        let (mut y, token_size) = product(weights, x);
        y.resize(stride, 0.0);
        all.extend(y);
        size = size.max(token_size);
    }
    (all, size)
}

#[test]
fn gemm_matches_f64() {
    for device in devices() {
        for &format in Format::ALL {
            for (n_rows, n_cols, n_tokens) in SHAPES {
                if n_cols % format.block_len() != 0 {
                    continue;
                }
                let mut random = Random::new((n_rows * 10_007 + n_cols + n_tokens) as u64);
                let blocks = random_blocks(format, n_rows, n_cols, &mut random);
                let matrix = Matrix::upload(device, format, n_rows, n_cols, &blocks).unwrap();
                let weights = dequantize(format, &blocks);
                let x = random.vector(n_tokens * n_cols);
                let stride = n_rows.next_multiple_of(4);
                let what = format!(
                    "{} {n_rows} x {n_cols}, {n_tokens} tokens, {}",
                    format.name(),
                    device.describe()
                );
                let (exact, size) = products(&weights, &widen(&x), n_cols, stride);
                let (twin, _) = products(&rounded(&weights), &rounded(&widen(&x)), n_cols, stride);
                // Two numbers of eight bits each hold 16 of a value. On the fast path a weight that is in the middle between
                // two of eight bits may go to the other one.
                for (is_exact, expected, tolerance) in [(false, &twin, 2e-5), (true, &exact, 8e-6)] {
                    let mut panels = packed(device, &x, [n_tokens, n_cols], None, is_exact, None);
                    let mut y = Guarded::holding(device, &vec![0.0; n_tokens * stride]);
                    // Twice with the same scratch: a launch leaves it as it was.
                    for _ in 0..2 {
                        ops::gemm(device, &matrix, &mut panels, ManyOutput::Set(&mut y.buffer)).unwrap();
                    }
                    let y = y.finish(device, &what);
                    assert_close(&y, expected, tolerance, size, &format!("{what}, exact: {is_exact}"));
                    let error = nmse(&y, &exact);
                    assert!(n_rows * n_tokens < 50 || error <= 1e-4, "{what}: NMSE {error:e} against f64");
                }
            }
        }
    }
}

#[test]
fn products_are_added_to_what_is_there() {
    for device in devices() {
        let (n_rows, n_cols, n_tokens) = (136, 256, 19);
        let mut random = Random::new(2);
        let blocks = random_blocks(Format::Q4_K, n_rows, n_cols, &mut random);
        let matrix = Matrix::upload(device, Format::Q4_K, n_rows, n_cols, &blocks).unwrap();
        let (x, residual) = (random.vector(n_tokens * n_cols), random.vector(n_tokens * n_rows));
        let (mut expected, size) = products(&dequantize(Format::Q4_K, &blocks), &widen(&x), n_cols, n_rows);
        expected.iter_mut().zip(&residual).for_each(|(y, &r)| *y += f64::from(r));
        let mut panels = packed(device, &x, [n_tokens, n_cols], None, true, None);
        let mut y = Guarded::holding(device, &residual);
        ops::gemm(device, &matrix, &mut panels, ManyOutput::Add(&mut y.buffer)).unwrap();
        assert_close(&y.finish(device, "add"), &expected, 8e-6, size, "add");
    }
}

#[test]
fn vectors_are_normalised_on_their_way_into_panels() {
    for device in devices() {
        for n_cols in [3, 4, 75, 100, 576, 1536, 5120] {
            let (n_rows, n_tokens) = (9, 13);
            let mut random = Random::new(n_cols as u64);
            let blocks = random_blocks(Format::F32, n_rows, n_cols, &mut random);
            let matrix = Matrix::upload(device, Format::F32, n_rows, n_cols, &blocks).unwrap();
            let (x, gamma) = (random.vector(n_tokens * n_cols), random.vector(n_cols));
            let g = device.alloc_from(&gamma).unwrap();
            let norm = Some(Norm { gamma: &g, eps: 1e-5 });
            let normed: Vec<f64> = x.chunks_exact(n_cols).flat_map(|x| normalised(x, &gamma, 1e-5)).collect();
            let stride = n_rows.next_multiple_of(4);
            let (expected, size) = products(&dequantize(Format::F32, &blocks), &normed, n_cols, stride);
            let mut panels = packed(device, &x, [n_tokens, n_cols], norm, true, None);
            let mut y = Guarded::holding(device, &vec![0.0; n_tokens * stride]);
            ops::gemm(device, &matrix, &mut panels, ManyOutput::Set(&mut y.buffer)).unwrap();
            let what = format!("{n_cols} columns, {}", device.describe());
            assert_close(&y.finish(device, &what), &expected, 1e-5, size, &what);
        }
    }
}

#[test]
fn gate_and_up_become_one_product() {
    for device in devices() {
        for (format, is_exact, n_ff, n_cols, n_tokens) in [
            (Format::Q6_K, true, 2, 256, 1),
            (Format::Q6_K, true, 70, 512, 21),
            (Format::Q6_K, true, 192, 256, 130),
            (Format::Q8_0, false, 2, 96, 1),
            (Format::Q4_1, false, 70, 1056, 2),
            (Format::Q4_K, false, 166, 1536, 3),
            (Format::Q6_K, false, 38, 2304, 4),
        ] {
            let mut random = Random::new(n_ff as u64);
            let blocks = random_blocks(format, 2 * n_ff, n_cols, &mut random);
            let order = RowOrder { order: Order::Halves as u32, group: n_ff as u32, n_rot: 0 };
            let matrix = Packer::new(device).matrix(format, 2 * n_ff, n_cols, order, &[&blocks]).unwrap();
            let x = random.vector(n_tokens * n_cols);
            let read = if is_exact { widen(&x) } else { in_q8_1(device, &x, n_cols) };
            let (both, size) = products(&dequantize(format, &blocks), &read, n_cols, 2 * n_ff);
            let stride = n_ff.next_multiple_of(4);
            let mut panels = packed(device, &x, [n_tokens, n_cols], None, is_exact, Some(&[&matrix]));
            let mut y = Guarded::holding(device, &vec![0.0; n_tokens * stride]);
            ops::gemm(device, &matrix, &mut panels, ManyOutput::Swiglu(&mut y.buffer)).unwrap();
            let y = y.finish(device, "swiglu");
            for (token, both) in both.chunks_exact(2 * n_ff).enumerate() {
                for i in 0..n_ff {
                    let (g, u) = (both[i], both[n_ff + i]);
                    let expected = g / (1.0 + (-g).exp()) * u;
                    let tolerance = 8e-6 * (size * (1.1 * u.abs() + g.abs()) + 1.0);
                    let error = (f64::from(y[token * stride + i]) - expected).abs();
                    assert!(
                        error <= tolerance,
                        "token {token}, row {i}: off by {error:e}, not {tolerance:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn queries_keys_and_values_of_many_tokens_match_f64() {
    for device in devices() {
        const MIXED: [Format; 3] = [Format::Q4_K, Format::Q8_0, Format::Q6_K];
        const Q4_K_M: [Format; 3] = [Format::Q4_K, Format::Q4_K, Format::Q6_K];
        for (i, (formats, is_exact, layout, head_dim, n_rot, n_head, n_head_kv, n_cols, n_tokens)) in [
            (MIXED, true, RopeLayout::Interleaved, 64, 64, 3, 1, 256, 5),
            (MIXED, true, RopeLayout::HalfSplit, 32, 32, 4, 2, 512, 70),
            (MIXED, true, RopeLayout::HalfSplit, 128, 96, 6, 2, 1536, 3),
            (MIXED, true, RopeLayout::Interleaved, 96, 32, 2, 2, 768, 33),
            (Q4_K_M, false, RopeLayout::Interleaved, 64, 64, 3, 1, 256, 4),
            (Q4_K_M, false, RopeLayout::HalfSplit, 128, 96, 6, 2, 1536, 3),
            ([Format::Q8_0; 3], false, RopeLayout::Interleaved, 96, 32, 2, 2, 96, 2),
            ([Format::Q4_1; 3], false, RopeLayout::HalfSplit, 32, 32, 4, 2, 1056, 4),
            ([Format::Q4_K; 3], false, RopeLayout::HalfSplit, 64, 64, 6, 2, 512, 1),
            ([Format::Q6_K; 3], false, RopeLayout::HalfSplit, 32, 16, 5, 1, 768, 3),
        ]
        .into_iter()
        .enumerate()
        {
            let mut random = Random::new(i as u64);
            let (n_q, n_kv) = (n_head * head_dim, n_head_kv * head_dim);
            let (first, n_ctx) = (3usize, n_tokens + 5);
            let rows = [n_q, n_kv, n_kv];
            let blocks = [0, 1, 2].map(|i| random_blocks(formats[i], rows[i], n_cols, &mut random));
            let pairs = ops::pair_order(layout, head_dim, n_rot);
            let orders = [pairs, pairs, RowOrder::NATURAL];
            let mut packer = Packer::new(device);
            let matrices = [0, 1, 2]
                .map(|i| packer.matrix(formats[i], rows[i], n_cols, orders[i], &[&blocks[i]]).unwrap());
            let biases = rows.map(|n| random.vector(n));
            let bias_buffers = [0, 1, 2].map(|i| device.alloc_from(&biases[i]).unwrap());
            let with_bias = i % 2 == 1;
            let x = random.vector(n_tokens * n_cols);

            let frequencies: Vec<f64> =
                (0..n_rot / 2).map(|pair| 10_000f64.powf(-2.0 * pair as f64 / n_rot as f64)).collect();
            let rope = Rope { frequencies: device.alloc_from(&frequencies).unwrap(), layout, magnitude: 1.0 };
            let angle = |token: usize, pair: usize| frequencies[pair] * (first + token) as f64;
            let rotation: Vec<[f32; 2]> = (0..n_tokens * n_rot / 2)
                .map(|i| angle(i / (n_rot / 2), i % (n_rot / 2)).sin_cos())
                .map(|(sin, cos)| [cos as f32, sin as f32])
                .collect();
            let rotation = device.alloc_from(&rotation).unwrap();
            let steps: Vec<Step> =
                (0..n_tokens).map(|token| Step { token: 0, position: (first + token) as u32 }).collect();
            let steps = device.alloc_from(&steps).unwrap();
            let mut cache = KvLayer::alloc(device, n_head_kv, n_ctx, head_dim).unwrap();
            let poison = vec![f16::NAN; n_kv * n_ctx];
            device.upload(&mut cache.k, &poison).unwrap();
            device.upload(&mut cache.v, &poison).unwrap();
            let mut q = Guarded::new(device, n_tokens * n_q);
            let weights = QkvWeights {
                matrices: [&matrices[0], &matrices[1], &matrices[2]],
                biases: [0, 1, 2].map(|i| with_bias.then_some(&bias_buffers[i])),
            };
            let what = format!(
                "{layout:?}, {n_head}:{n_head_kv} heads of {head_dim}, {formats:?}, {}",
                device.describe()
            );
            let mut panels = packed(device, &x, [n_tokens, n_cols], None, is_exact, Some(&weights.matrices));
            ops::gemm_qkv(device, weights, &mut panels, &rope, &rotation, &steps, &mut q.buffer, &mut cache)
                .unwrap();

            let read = if is_exact { widen(&x) } else { in_q8_1(device, &x, n_cols) };
            let make = |i: usize| {
                let (mut y, size) = products(&dequantize(formats[i], &blocks[i]), &read, n_cols, rows[i]);
                if with_bias {
                    y.iter_mut().zip(biases[i].iter().cycle()).for_each(|(y, &b)| *y += f64::from(b));
                }
                (y, size + 1.0)
            };
            let rotate = |(mut y, size): (Vec<f64>, f64), n: usize| {
                for (token, y) in y.chunks_exact_mut(n).enumerate() {
                    for head in y.chunks_exact_mut(head_dim) {
                        for pair in 0..n_rot / 2 {
                            let (a, b) = match layout {
                                RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                                RopeLayout::HalfSplit => (pair, pair + n_rot / 2),
                            };
                            let (sin, cos) = angle(token, pair).sin_cos();
                            (head[a], head[b]) =
                                (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                        }
                    }
                }
                (y, size)
            };
            let (expected, size) = rotate(make(0), n_q);
            assert_close(&q.finish(device, &what), &expected, 1.2e-5, size, &what);
            for (found, (expected, size)) in [
                (device.to_vec(&cache.k).unwrap(), rotate(make(1), n_kv)),
                (device.to_vec(&cache.v).unwrap(), make(2)),
            ] {
                for (at, value) in found.into_iter().enumerate() {
                    let (head, p, d) = (at / head_dim / n_ctx, at / head_dim % n_ctx, at % head_dim);
                    if !(first..first + n_tokens).contains(&p) {
                        assert!(value.is_nan(), "{what}: position {p} was written");
                        continue;
                    }
                    let wanted = expected[(p - first) * n_kv + head * head_dim + d];
                    // Half a step of f16, and the product's own rounding.
                    let tolerance = wanted.abs() / 2048.0 + 1e-7 + 1.2e-5 * size;
                    let error = (value.to_f64() - wanted).abs();
                    assert!(
                        error <= tolerance,
                        "{what}: position {p}, head {head}, {d}: {value}, not {wanted}"
                    );
                }
            }
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    let device = &devices()[0];
    let matrix = Matrix::upload(device, Format::F32, 4, 32, &[0; 512]).unwrap();
    let message = |result: anyhow::Result<()>| format!("{:#}", result.unwrap_err());
    let mut y = device.alloc_from(&[0.0f32; 8]).unwrap();
    let mut empty = Panels::alloc(device, 2, 32, false).unwrap();
    let refused = ops::gemm(device, &matrix, &mut empty, ManyOutput::Set(&mut y));
    assert!(message(refused).contains("nothing was packed"));
    let mut wide = packed(device, &[0.0; 72], [2, 36], None, false, None);
    let refused = ops::gemm(device, &matrix, &mut wide, ManyOutput::Set(&mut y));
    assert!(message(refused).contains("the vectors have 36 values"));
    let mut panels = packed(device, &[0.0; 96], [3, 32], None, false, None);
    assert!(
        message(ops::gemm(device, &matrix, &mut panels, ManyOutput::Set(&mut y))).contains("12 are needed")
    );
    let refused = ops::gemm(device, &matrix, &mut panels, ManyOutput::Swiglu(&mut y));
    assert!(message(refused).contains("one matrix in halves"));
    let x = device.alloc_from(&[0.0f32; 96]).unwrap();
    let mut small = Panels::alloc(device, 1, 32, false).unwrap();
    let refused = ops::pack_panels(device, &x, 9, 11, None, &[&matrix], &mut small);
    assert!(message(refused).contains("108 are needed"));
    let refused = ops::pack_panels(device, &x, 9, 8, None, &[&matrix], &mut small);
    assert!(message(refused).contains("are needed"));
}
