//! Reductions: every lane gets the sum or the maximum over its group.
//!
//! On a GPU they are butterflies: exchanges with the lanes at distances `width / 2`, `width / 4`, ..., 1.

use super::check_width;

#[cfg(target_arch = "nvptx64")]
use super::{Shuffle, warp_shuffle_xor};
#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{Collective, Lanes, collective};

/// A value that a warp can reduce.
#[cfg(target_arch = "nvptx64")]
pub trait Reduce: Copy + Shuffle {
    /// The sum, wrapping around for integers.
    fn reduce_add(self, other: Self) -> Self;
    /// The larger one; a NaN loses against a number.
    fn reduce_max(self, other: Self) -> Self;
}

/// A value that a warp can reduce.
#[cfg(not(target_arch = "nvptx64"))]
pub trait Reduce: Copy + 'static {
    /// All bits ones.
    #[doc(hidden)]
    const POISON: Self;
    #[doc(hidden)]
    const ADD: &'static str;
    #[doc(hidden)]
    const MAX: &'static str;
    /// The sum, wrapping around for integers.
    fn reduce_add(self, other: Self) -> Self;
    /// The larger one; a NaN loses against a number.
    fn reduce_max(self, other: Self) -> Self;
}

macro_rules! reduce {
    ($($ty:ident, $poison:expr, $add:expr;)*) => {$(
        impl Reduce for $ty {
            #[cfg(not(target_arch = "nvptx64"))]
            const POISON: Self = $poison;
            #[cfg(not(target_arch = "nvptx64"))]
            const ADD: &'static str = concat!("warp_reduce_add of ", stringify!($ty));
            #[cfg(not(target_arch = "nvptx64"))]
            const MAX: &'static str = concat!("warp_reduce_max of ", stringify!($ty));

            #[inline(always)]
            fn reduce_add(self, other: Self) -> Self {
                $add(self, other)
            }

            #[inline(always)]
            fn reduce_max(self, other: Self) -> Self {
                reduce!(@max $ty, self, other)
            }
        }
    )*};
    (@max f32, $a:expr, $b:expr) => { crate::float::max($a, $b) };
    (@max $ty:ident, $a:expr, $b:expr) => { core::cmp::Ord::max($a, $b) };
}

reduce! {
    f32, f32::from_bits(u32::MAX), |a, b| a + b;
    i32, -1, i32::wrapping_add;
    u32, u32::MAX, u32::wrapping_add;
}

/// The sum of `value` over the lane's group.
#[inline(always)]
#[track_caller]
pub fn warp_reduce_add<T: Reduce>(mask: u32, value: T, width: u32) -> T {
    check_width(width);
    cfg_select! {
        target_arch = "nvptx64" => butterfly(mask, value, width, T::reduce_add),
        _ => collective::<Sum<T>>(mask, width, value),
    }
}

/// The largest `value` in the lane's group; NaNs lose against numbers.
#[inline(always)]
#[track_caller]
pub fn warp_reduce_max<T: Reduce>(mask: u32, value: T, width: u32) -> T {
    check_width(width);
    cfg_select! {
        target_arch = "nvptx64" => butterfly(mask, value, width, T::reduce_max),
        _ => collective::<Maximum<T>>(mask, width, value),
    }
}

/// The largest `value` in the whole warp, in one instruction.
#[inline(always)]
#[track_caller]
pub fn warp_max_u32(value: u32) -> u32 {
    cfg_select! {
        // SAFETY: a reduction touches no memory.
        target_arch = "nvptx64" => unsafe { device::max(value, super::FULL_MASK) },
        _ => collective::<Maximum<u32>>(super::FULL_MASK, super::WARP_SIZE, value),
    }
}

/// The sum of `value` over the whole warp, wrapping around, in one instruction.
#[inline(always)]
#[track_caller]
pub fn warp_sum_u32(value: u32) -> u32 {
    cfg_select! {
        // SAFETY: a reduction touches no memory.
        target_arch = "nvptx64" => unsafe { device::sum(value, super::FULL_MASK) },
        _ => collective::<Sum<u32>>(super::FULL_MASK, super::WARP_SIZE, value),
    }
}

#[cfg(target_arch = "nvptx64")]
mod device {
    unsafe extern "unadjusted" {
        #[link_name = "llvm.nvvm.redux.sync.add"]
        pub(super) fn sum(value: u32, mask: u32) -> u32;
        #[link_name = "llvm.nvvm.redux.sync.umax"]
        pub(super) fn max(value: u32, mask: u32) -> u32;
    }
}

/// [`warp_reduce_add`] of several values at once.
#[inline(always)]
#[track_caller]
pub fn warp_reduce_add_n<const N: usize>(mask: u32, values: [f32; N], width: u32) -> [f32; N] {
    check_width(width);
    cfg_select! {
        target_arch = "nvptx64" => {
            let mut values = values;
            let mut distance = width / 2;
            while distance > 0 {
                let mut i = 0;
                while i < N {
                    values[i] += warp_shuffle_xor(mask, values[i], distance, width);
                    i += 1;
                }
                distance /= 2;
            }
            values
        }
        _ => collective::<Sums<N>>(mask, width, values),
    }
}

/// Four sums over the whole warp, or over each half of it: of each 16 lanes the first four get the sum of the first values, the
/// next four that of the second ones, and so on. Takes a third of the exchanges that [`warp_reduce_add_n`] takes, as many for
/// halves, and the compiler need not know which it is.
#[inline(always)]
#[track_caller]
pub fn warp_reduce_add_4(values: [f32; 4], of_halves: bool) -> f32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            use super::{FULL_MASK, lane_id};
            let from = |value: f32, distance: u32| warp_shuffle_xor(FULL_MASK, value, distance, 32);
            let [v0, v1, v2, v3] = values;
            // Eight lanes give away the two values that they will not sum up, then four lanes one.
            let upper = lane_id() & 8 != 0;
            let (keep0, give0) = if upper { (v2, v0) } else { (v0, v2) };
            let (keep1, give1) = if upper { (v3, v1) } else { (v1, v3) };
            let (a, b) = (keep0 + from(give0, 8), keep1 + from(give1, 8));
            let (keep, give) = if lane_id() & 4 != 0 { (b, a) } else { (a, b) };
            let sum = keep + from(give, 4);
            let sum = sum + from(sum, 2);
            let sum = sum + from(sum, 1);
            let other_half = from(sum, 16);
            if of_halves { sum } else { sum + other_half }
        }
        _ => collective::<FourSums>(super::FULL_MASK, if of_halves { 16 } else { 32 }, values)[0],
    }
}

#[cfg(target_arch = "nvptx64")]
#[inline(always)]
fn butterfly<T: Shuffle>(mask: u32, mut value: T, width: u32, combine: impl Fn(T, T) -> T) -> T {
    let mut distance = width / 2;
    while distance > 0 {
        value = combine(value, warp_shuffle_xor(mask, value, distance, width));
        distance /= 2;
    }
    value
}

#[cfg(not(target_arch = "nvptx64"))]
mod emulated {
    use super::*;
    use std::marker::PhantomData;

    pub(super) struct Sum<T>(PhantomData<T>);
    pub(super) struct Maximum<T>(PhantomData<T>);
    pub(super) struct Sums<const N: usize>;

    impl<T: Reduce> Collective for Sum<T> {
        type Operand = T;
        const NAME: &'static str = T::ADD;

        fn compute(lanes: &Lanes<T>, width: u32) {
            let mut values = gather(lanes);
            fold(&mut values, width, T::reduce_add);
            scatter(lanes, &values, width);
        }
    }

    impl<T: Reduce> Collective for Maximum<T> {
        type Operand = T;
        const NAME: &'static str = T::MAX;

        fn compute(lanes: &Lanes<T>, width: u32) {
            let mut values = gather(lanes);
            fold(&mut values, width, T::reduce_max);
            scatter(lanes, &values, width);
        }
    }

    impl<const N: usize> Collective for Sums<N> {
        type Operand = [f32; N];
        const NAME: &'static str = "warp_reduce_add_n";

        fn compute(lanes: &Lanes<[f32; N]>, width: u32) {
            let mut values: [[f32; N]; 32] =
                std::array::from_fn(|lane| lanes.get(lane).unwrap_or([f32::POISON; N]));
            fold(&mut values, width, |mut a, b| {
                for i in 0..N {
                    a[i] += b[i];
                }
                a
            });
            scatter(lanes, &values, width);
        }
    }

    pub(super) struct FourSums;

    impl Collective for FourSums {
        type Operand = [f32; 4];
        const NAME: &'static str = "warp_reduce_add_4";

        fn compute(lanes: &Lanes<[f32; 4]>, width: u32) {
            let mut values: [[f32; 4]; 32] =
                std::array::from_fn(|lane| lanes.get(lane).unwrap_or([f32::POISON; 4]));
            fold(&mut values, width, |mut a, b| {
                for i in 0..4 {
                    a[i] += b[i];
                }
                a
            });
            let width = width as usize;
            lanes.set_each(|lane| [values[lane / width * width][lane % 16 / 4]; 4]);
        }
    }

    fn gather<T: Reduce>(lanes: &Lanes<T>) -> [T; 32] {
        std::array::from_fn(|lane| lanes.get(lane).unwrap_or(T::POISON))
    }

    /// The butterfly. After the exchange at a distance, two lanes that far apart hold the same value, since the
    /// operations are commutative: so only the lower half of each group is worked out.
    fn fold<T: Copy>(values: &mut [T; 32], width: u32, combine: impl Fn(T, T) -> T) {
        let width = width as usize;
        let mut distance = width / 2;
        while distance > 0 {
            for group in values.chunks_exact_mut(width) {
                let (low, high) = group.split_at_mut(distance);
                for (a, b) in low.iter_mut().zip(high) {
                    *a = combine(*a, *b);
                }
            }
            distance /= 2;
        }
    }

    fn scatter<T: Copy>(lanes: &Lanes<T>, values: &[T; 32], width: u32) {
        lanes.set_each(|lane| values[lane & !(width as usize - 1)]);
    }
}
#[cfg(not(target_arch = "nvptx64"))]
use emulated::{FourSums, Maximum, Sum, Sums};
