//! Norm, operands, quantization, rotation, SwiGLU, residual and argmax.

use super::{Guarded, Random, assert_close, devices, nearest};
use gpu_kernels::formats::Format;
use gpu_kernels::rope::RopeLayout;
use gpu_kernels::step::Step;
use host::ops::{self, Matrix, Next, Operand, Q8_1Vector, Rope};

const LENGTHS: [usize; 9] = [1, 31, 32, 100, 255, 576, 1536, 4096, 8963];

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

#[test]
fn rms_norm_matches_f64() {
    for device in devices() {
        for n in LENGTHS {
            for magnitude in [1.0, 1e-4, 300.0] {
                let mut random = Random::new(n as u64);
                let x: Vec<f32> = random.vector(n).into_iter().map(|v| v * magnitude).collect();
                let gamma = random.vector(n);
                let eps = 1e-5f32;
                let mean = widen(&x).iter().map(|v| v * v).sum::<f64>() / n as f64;
                let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                let expected: Vec<f64> =
                    x.iter().zip(&gamma).map(|(&x, &g)| f64::from(x) * scale * f64::from(g)).collect();

                let what = format!("n {n}, magnitude {magnitude}, {}", device.describe());
                let (input, gamma) = (device.alloc_from(&x).unwrap(), device.alloc_from(&gamma).unwrap());
                let mut y = Guarded::new(device, n);
                ops::rms_norm(device, &input, &gamma, eps, &mut y.buffer).unwrap();
                assert_close(&y.finish(device, &what), &expected, 2e-6, 0.0, &what);
            }
        }
    }
}

#[test]
fn quantize_matches_its_twin_exactly() {
    for device in devices() {
        for n in LENGTHS {
            let mut random = Random::new(n as u64 + 5);
            let mut x = random.vector(n);
            // A block of zeros, and one with a single large value.
            x[n / 2..].iter_mut().take(40).for_each(|v| *v = 0.0);
            x[0] = -1000.0;
            let input = device.alloc_from(&x).unwrap();
            let mut q8 = Q8_1Vector::alloc(device, n).unwrap();
            ops::quantize_q8_1(device, &input, &mut q8).unwrap();
            let quants: Vec<i8> = bytemuck::cast_slice(&device.to_vec(&q8.quants).unwrap()).to_vec();
            let scales = device.to_vec(&q8.scales).unwrap();

            for (b, block) in x.chunks(32).enumerate() {
                let amax = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let d = amax * (1.0 / 127.0);
                let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
                let what = format!("n {n}, block {b}, {}", device.describe());
                // A GPU's quotient may be off in the last places: of two integers nearly as near either will do.
                let found = &quants[32 * b..][..32];
                for (v, &q) in block.iter().zip(found) {
                    let wanted = f64::from(*v) * f64::from(inverse);
                    assert!(
                        (wanted - f64::from(q)).abs() <= 0.5 + 1e-4,
                        "{what}: {v} became {q}, not {wanted}"
                    );
                }
                let mut expected = found[..block.len()].to_vec();
                expected.resize(32, 0);
                assert_eq!(found, expected, "{what}");
                assert_eq!(scales[b].sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>(), "{what}");
                assert_eq!(scales[b].d, d, "{what}");
                for (v, q) in block.iter().zip(expected) {
                    assert!((v - d * f32::from(q)).abs() <= 0.5001 * d, "{what}: {v} became {q} * {d}");
                }
            }
        }
    }
}

#[test]
fn rope_matches_f64() {
    for device in devices() {
        for layout in [RopeLayout::Interleaved, RopeLayout::HalfSplit] {
            for (n_head, head_dim, n_rot) in
                [(1, 32, 32), (9, 64, 64), (3, 96, 64), (12, 128, 128), (2, 256, 2)]
            {
                for position in [0u32, 1, 17, 4095, 131_071] {
                    let mut random = Random::new(u64::from(position) + head_dim as u64);
                    let x = random.vector(n_head * head_dim);
                    let frequencies: Vec<f64> =
                        (0..n_rot / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / n_rot as f64)).collect();
                    let mut expected = widen(&x);
                    let magnitude = if n_rot == head_dim { 1.0 } else { 1.125 };
                    for head in expected.chunks_exact_mut(head_dim) {
                        for (i, frequency) in frequencies.iter().enumerate() {
                            let (a, b) = match layout {
                                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                                RopeLayout::HalfSplit => (i, i + n_rot / 2),
                            };
                            let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                            let (sin, cos) = (magnitude * sin, magnitude * cos);
                            (head[a], head[b]) =
                                (head[a] * cos - head[b] * sin, head[a] * sin + head[b] * cos);
                        }
                    }
                    let rope = Rope {
                        frequencies: device.alloc_from(&frequencies).unwrap(),
                        layout,
                        magnitude: magnitude as f32,
                    };
                    let step = device.alloc_from(&[Step { token: 0, position }]).unwrap();
                    let mut y = Guarded::holding(device, &x);
                    ops::rope(device, &mut y.buffer, &rope, &step, n_head, head_dim).unwrap();
                    let what = format!("{layout:?} {n_head} x {head_dim}, {n_rot} at {position}");
                    assert_close(&y.finish(device, &what), &expected, 4e-7, 1.0, &what);
                }
            }
        }
    }
}

#[test]
fn embed_leaves_the_angles_of_the_position() {
    for device in devices() {
        let matrix = Matrix::upload(device, Format::F32, 1, 32, &[0; 128]).unwrap();
        let frequencies = [1.0, 0.37, 1e-5];
        for (position, magnitude) in [(0u32, 1.0), (4095, 1.0), (131_071, 1.125)] {
            let rope = Rope {
                frequencies: device.alloc_from(&frequencies).unwrap(),
                layout: RopeLayout::HalfSplit,
                magnitude: magnitude as f32,
            };
            // Of two tokens at once.
            let steps = [position, position / 3].map(|position| Step { token: 0, position });
            let buffer = device.alloc_from(&steps).unwrap();
            let mut out = device.alloc::<f32>(64).unwrap();
            let mut rotation = device.alloc::<[f32; 2]>(6).unwrap();
            ops::embed(device, &matrix, &buffer, 2, &rope, &mut out, &mut rotation, None, false).unwrap();
            let found: Vec<f32> = device.to_vec(&rotation).unwrap().into_iter().flatten().collect();
            let angles = steps.iter().flat_map(|step| {
                frequencies.map(|frequency| (f64::from(step.position) * frequency).sin_cos())
            });
            let expected: Vec<f64> =
                angles.flat_map(|(sin, cos)| [magnitude * cos, magnitude * sin]).collect();
            assert_close(&found, &expected, 4e-7, 1.0, &format!("position {position}"));
        }
    }
}

#[test]
fn operands_are_rounded_and_scaled() {
    for device in devices() {
        for n in LENGTHS {
            let mut random = Random::new(n as u64 + 3);
            let (x, gamma) = (random.vector(n), random.vector(n));
            let squares: f64 = widen(&x).iter().map(|x| x * x).sum();
            let scaled: Vec<f32> = x.iter().zip(&gamma).map(|(x, g)| x * g).collect();
            let g = device.alloc_from(&gamma).unwrap();
            let what = format!("n {n}, {}", device.describe());
            let check = |operand: &Operand| {
                assert_eq!(operand.to_f32(device).unwrap(), nearest(&scaled), "{what}");
                let found = operand.sum_of_squares(device).unwrap();
                assert!((found - squares).abs() <= 1e-6 * squares, "{what}: {found}, not {squares}");
            };

            let values = device.alloc_from(&x).unwrap();
            let mut operand = Operand::alloc(device, n, false).unwrap();
            ops::make_operand(device, &values, Next { operand: &mut operand, gamma: Some(&g) }).unwrap();
            check(&operand);
            ops::make_operand(device, &values, Next { operand: &mut operand, gamma: None }).unwrap();
            assert_eq!(operand.to_f32(device).unwrap(), nearest(&x), "{what}");

            // An embedding leaves the same; it is the second row of the matrix here.
            let rows: Vec<f32> = gamma.iter().chain(&x).copied().collect();
            let bytes: &[u8] = bytemuck::cast_slice(&rows);
            let matrix = Matrix::upload(device, Format::F32, 2, n, bytes).unwrap();
            let step = device.alloc_from(&[Step { token: 1, position: 0 }]).unwrap();
            let frequencies = device.alloc_from(&[1.0]).unwrap();
            let rope = Rope { frequencies, layout: RopeLayout::HalfSplit, magnitude: 1.0 };
            let mut out = Guarded::new(device, n);
            let mut rotation = device.alloc::<[f32; 2]>(1).unwrap();
            let mut operand = Operand::alloc(device, n, false).unwrap();
            let next = Some(Next { operand: &mut operand, gamma: Some(&g) });
            ops::embed(device, &matrix, &step, 1, &rope, &mut out.buffer, &mut rotation, next, false)
                .unwrap();
            assert_eq!(out.finish(device, &what), x, "{what}");
            check(&operand);
        }
    }
}

#[test]
fn swiglu_and_residual_match_f64() {
    for device in devices() {
        for n in LENGTHS {
            let mut random = Random::new(n as u64 + 9);
            let a: Vec<f32> = random.vector(n).into_iter().map(|v| 30.0 * v).collect();
            let b = random.vector(n);
            let up = device.alloc_from(&b).unwrap();

            let mut gate = Guarded::holding(device, &a);
            ops::swiglu(device, &mut gate.buffer, &up).unwrap();
            let silu = |g: f64| g / (1.0 + (-g).exp());
            let expected: Vec<f64> = a.iter().zip(&b).map(|(&g, &u)| silu(g.into()) * f64::from(u)).collect();
            assert_close(&gate.finish(device, "swiglu"), &expected, 2e-6, 1e-9, "swiglu");

            let mut x = Guarded::holding(device, &a);
            ops::residual_add(device, &mut x.buffer, &up).unwrap();
            let expected: Vec<f64> = a.iter().zip(&b).map(|(&x, &y)| f64::from(x + y)).collect();
            assert_close(&x.finish(device, "residual"), &expected, 0.0, 0.0, "residual");
        }
    }
}

#[test]
fn argmax_takes_the_first_of_the_largest() {
    let mut random = Random::new(3);
    let mut cases: Vec<(Vec<f32>, u32)> = vec![
        (vec![-1.0], 0),
        (vec![1.0, 3.0, 3.0, 2.0], 1),
        (vec![f32::NEG_INFINITY; 40], 0),
        (vec![f32::NAN, -5.0, f32::NAN, -4.0], 3),
        (vec![0.0, f32::INFINITY, f32::NAN], 1),
    ];
    for n in [32, 1023, 1024, 1025, 49_152, 151_936] {
        let mut x = random.vector(n);
        let at = (random.bits() % n as u64) as usize;
        x[at] = 2.0;
        x[at..].iter_mut().skip(1).step_by(7).for_each(|v| *v = 2.0);
        cases.push((x, at as u32));
    }
    for device in devices() {
        for (x, expected) in &cases {
            let input = device.alloc_from(x).unwrap();
            let mut index = device.alloc_from(&[u32::MAX, 12_345]).unwrap();
            ops::argmax(device, &input, &mut index).unwrap();
            assert_eq!(
                device.to_vec(&index).unwrap(),
                [*expected, 12_345],
                "n {}, {}",
                x.len(),
                device.describe()
            );
        }
    }
}

#[test]
fn short_buffers_are_refused() {
    let device = &devices()[0];
    let (a, b) = (device.alloc_from(&[0.0f32; 8]).unwrap(), device.alloc_from(&[0.0f32; 7]).unwrap());
    let mut out = device.alloc_from(&[0.0f32; 7]).unwrap();
    let error = ops::rms_norm(device, &b, &a, 1e-5, &mut out).unwrap_err().to_string();
    assert!(error.contains("buffer x has 7 values, 8 are needed"), "{error}");
    let error = ops::residual_add(device, &mut out, &a).unwrap_err().to_string();
    assert!(error.contains("7 values, 8 are needed"), "{error}");
    let mut q8 = Q8_1Vector::alloc(device, 9).unwrap();
    assert!(ops::quantize_q8_1(device, &a, &mut q8).is_err());
}
