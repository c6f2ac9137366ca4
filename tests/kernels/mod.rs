//! Every kernel against a reference in f64, on every device there is.
//!
//! `WARPLINE_TEST_DEVICE=cpu` or `cuda` restricts the devices and, for `cuda`, insists on one; otherwise the CPU
//! always runs and the GPU where there is one. A new kernel's test goes into the file of its subject.

mod attention;
mod elementwise;
mod few;
pub mod formats;
mod gemm;
mod gemv;
mod prefill_attention;
mod random;
mod read;
mod sample;

use gpu_kernels::operand::SCALE;
use half::f16;
use host::device::{Buffer, Device, DeviceChoice};
use std::sync::OnceLock;

/// The devices to test on.
pub fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let open =
            |choice| Device::open(choice).unwrap_or_else(|error| panic!("no device to test on: {error:#}"));
        match std::env::var("WARPLINE_TEST_DEVICE").as_deref() {
            Ok("cpu") => vec![open(DeviceChoice::Cpu)],
            Ok("cuda") => vec![open(DeviceChoice::Cuda)],
            Ok(other) => panic!("WARPLINE_TEST_DEVICE is {other}, not cpu or cuda"),
            Err(_) => [open(DeviceChoice::Cpu)].into_iter().chain(Device::open(DeviceChoice::Cuda)).collect(),
        }
    })
}

/// A generator of test inputs; failures print the seed.
pub struct Random {
    pub seed: u64,
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { seed, state: seed }
    }

    /// 64 random bits (SplitMix64).
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly in -1 to 1.
    pub fn symmetric(&mut self) -> f32 {
        ((self.bits() >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    pub fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.symmetric()).collect()
    }
}

/// An output buffer with a guard behind it, both filled with NaN.
pub struct Guarded {
    pub buffer: Buffer<f32>,
    len: usize,
}

const GUARD: usize = 96;

impl Guarded {
    pub fn new(device: &Device, len: usize) -> Self {
        Self::holding(device, &vec![f32::NAN; len])
    }

    /// With these values in front of the guard.
    pub fn holding(device: &Device, values: &[f32]) -> Self {
        let mut all = values.to_vec();
        all.resize(values.len() + GUARD, f32::NAN);
        Self { buffer: device.alloc_from(&all).unwrap(), len: values.len() }
    }

    /// The output, after checking that all of it is finite and that the guard is untouched.
    pub fn finish(self, device: &Device, what: &str) -> Vec<f32> {
        let mut all = device.to_vec(&self.buffer).unwrap();
        let guard = all.split_off(self.len);
        assert!(guard.iter().all(|v| v.is_nan()), "{what}: written beyond the output");
        if let Some(i) = all.iter().position(|v| !v.is_finite()) {
            panic!("{what}: element {i} of {} is {}", all.len(), all[i]);
        }
        all
    }
}

/// What an operand has of each value: the nearest f16 of its part.
pub fn nearest(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| f16::from_f32(value * SCALE).to_f32() / SCALE).collect()
}

/// `sum (a - b)^2 / sum b^2`.
pub fn nmse(values: &[f32], reference: &[f64]) -> f64 {
    assert_eq!(values.len(), reference.len());
    let error: f64 = values.iter().zip(reference).map(|(&a, &b)| (f64::from(a) - b).powi(2)).sum();
    let norm: f64 = reference.iter().map(|b| b * b).sum();
    if norm == 0.0 { error } else { error / norm }
}

/// Every element within `relative` of the reference, or within `relative * scale` where that is more.
pub fn assert_close(values: &[f32], reference: &[f64], relative: f64, scale: f64, what: &str) {
    assert_eq!(values.len(), reference.len(), "{what}");
    for (i, (&value, &wanted)) in values.iter().zip(reference).enumerate() {
        let tolerance = relative * wanted.abs().max(scale);
        let error = (f64::from(value) - wanted).abs();
        assert!(
            error <= tolerance,
            "{what}: element {i} is {value}, not {wanted} (off by {error:e}, {tolerance:e} allowed)"
        );
    }
}
