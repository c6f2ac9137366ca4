//! What `#[kernel]` makes of a function, and how arguments arrive.

use crate::{launch, try_launch};
use cuda_std::kernel;
use cuda_std::launch::{Kernel, KernelArg, KernelArgs};
use cuda_std::thread::index_1d;

/// Several values that travel as one argument.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scale {
    factor: f32,
    offset: u64,
}

// SAFETY: repr(C), of values that are laid out alike everywhere.
unsafe impl KernelArg for Scale {}

/// A slice, a reference, a struct and plain values.
#[kernel]
pub unsafe fn all_kinds(
    x: &[f32],
    bias: &f32,
    y: *mut f32,
    scale: Scale,
    mut negate: u32,
    add: i32,
    last: usize,
) {
    let i = index_1d() as usize;
    negate &= 1;
    if i < x.len().min(last) {
        let value = scale.factor * x[i] + bias + scale.offset as f32 + add as f32;
        // SAFETY: the output is as long as the slice.
        unsafe { *y.add(i) = if negate == 1 { -value } else { value } };
    }
}

#[test]
fn arguments_of_every_kind_arrive() {
    let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
    let (bias, mut y) = (0.5, vec![0.0; 100]);
    let scale = Scale { factor: 2.0, offset: 10 };
    launch(&ALL_KINDS, 4, 32, (x.as_ptr(), x.len(), &raw const bias, y.as_mut_ptr(), scale, 3, -1, 99));
    for (i, &y) in y.iter().enumerate() {
        assert_eq!(y, if i < 99 { -(2.0 * i as f32 + 9.5) } else { 0.0 });
    }
    let info = ALL_KINDS.info();
    assert_eq!(info.name, "all_kinds");
    assert_eq!(info.param_names, ["x", "x_len", "bias", "y", "scale", "negate", "add", "last"]);
    assert_eq!(format!("{ALL_KINDS:?}"), "all_kinds(x, x_len, bias, y, scale, negate, add, last)");
}

macro_rules! define {
    ($(($name:ident, $value:literal))*) => {$(
        mod $name {
            use super::*;

            /// Writes the module's value.
            #[kernel(suffix = $name)]
            pub unsafe fn write(out: *mut Value) {
                // SAFETY: one element.
                unsafe { *out = $value };
            }
        }
    )*};
}
type Value = u32;
define!((f32, 1)(q4_k, 2));

#[test]
fn a_macro_defines_one_kernel_per_module() {
    for (kernel, name, value) in [(&f32::WRITE, "write_f32", 1), (&q4_k::WRITE, "write_q4_k", 2)] {
        let kernel: &'static Kernel<(*mut u32,)> = kernel;
        let mut out = 0;
        launch(kernel, 1, 1, (&raw mut out,));
        assert_eq!((kernel.info().name, out), (name, value));
    }
}

#[test]
fn kernels_are_numbered_densely() {
    let ids = [ALL_KINDS.info().id(), f32::WRITE.info().id(), q4_k::WRITE.info().id(), SIXTEEN.info().id()];
    assert_eq!(
        ids,
        [ALL_KINDS.info().id(), f32::WRITE.info().id(), q4_k::WRITE.info().id(), SIXTEEN.info().id()]
    );
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), 4);
    assert!(sorted[3] < 4, "{ids:?}");
}

/// As many arguments as a launch takes.
#[kernel]
pub unsafe fn sixteen(
    out: *mut u64,
    a: u32,
    b: u32,
    c: u32,
    d: u32,
    e: u32,
    f: u32,
    g: u64,
    h: u8,
    i: u16,
    j: u32,
    k: u32,
    l: u32,
    m: u32,
    n: u32,
    o: u32,
) {
    let sum = a + b + c + d + e + f + u32::from(h) + u32::from(i) + j + k + l + m + n + o;
    // SAFETY: one element.
    unsafe { *out = g + u64::from(sum) };
}

#[test]
fn sixteen_arguments_arrive_in_order() {
    let mut out = 0u64;
    let args = (&raw mut out, 1, 2, 3, 4, 5, 6, 1u64 << 40, 8, 9, 10, 11, 12, 13, 14, 15);
    args.with_pointers(|pointers| assert_eq!(pointers.len(), 16));
    try_launch(&SIXTEEN, [1; 3], [1; 3], 0, args).unwrap();
    assert_eq!(out, (1 << 40) + 1 + 2 + 3 + 4 + 5 + 6 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15);
}
