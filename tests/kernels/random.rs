//! Random weights and caches: as large as a model's, and the same every time.

use super::{Random, devices, nmse};
use gpu_kernels::formats::Format;
use gpu_kernels::rows::RowOrder;
use host::device::Device;
use host::ops::{self, Input, Matrix, Output, Packer};

const N_ROWS: usize = 512;
const N_COLS: usize = 2048;

fn random(device: &Device, format: Format, seed: u32) -> Matrix {
    Packer::new(device).random_matrix(format, N_ROWS, N_COLS, RowOrder::NATURAL, seed).unwrap()
}

/// `W x` of a vector of -1 and 1, which go with the weights' signs and blocks in no way.
fn product(device: &Device, matrix: &Matrix) -> Vec<f64> {
    let mut signs = Random::new(7);
    let x: Vec<f32> = (0..N_COLS).map(|_| if signs.bits() >> 63 == 0 { -1.0 } else { 1.0 }).collect();
    let mut y = device.alloc(N_ROWS).unwrap();
    let x = device.alloc_from(&x).unwrap();
    ops::gemv(device, matrix, Input::F32(&x, None), None, Output::Set(&mut y)).unwrap();
    device.to_vec(&y).unwrap().into_iter().map(f64::from).collect()
}

#[test]
fn random_weights_keep_the_size_of_a_vector() {
    for device in devices() {
        for format in [Format::Q8_0, Format::Q4_1, Format::Q4_K, Format::Q6_K] {
            let y = product(device, &random(device, format, 1));
            let mean = y.iter().sum::<f64>() / N_ROWS as f64;
            let variance = y.iter().map(|y| y * y).sum::<f64>() / N_ROWS as f64;
            // Of 512 numbers of mean 0 and variance 1 the mean is off by 0.044, the variance by 0.063; more where the
            // weights of a block have a scale and a minimum in common.
            let what =
                format!("{} on {}: mean {mean}, variance {variance}", format.name(), device.describe());
            assert!(mean.abs() < 0.25 && (0.7..1.4).contains(&variance), "{what}");
            let again = product(device, &random(device, format, 1));
            assert_eq!(y, again, "{what}: the same seed gives the same weights");
            let other: Vec<f32> =
                product(device, &random(device, format, 2)).iter().map(|&y| y as f32).collect();
            assert!(nmse(&other, &y) > 0.5, "{what}: another seed gives other weights");
        }
    }
}

#[test]
fn floats_are_not_made_of_random_bits() {
    let device = &devices()[0];
    let error = Packer::new(device).random_matrix(Format::F16, 4, 32, RowOrder::NATURAL, 0).unwrap_err();
    assert!(error.to_string().contains("no weights in F16"), "{error}");
}
