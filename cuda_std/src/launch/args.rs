//! The arguments of a launch.

use std::ffi::c_void;

/// A value that a kernel takes as an argument.
///
/// # Safety
/// The type must have the same layout in the kernel's PTX and on the host: implement it for `#[repr(C)]` structs of
/// such types.
pub unsafe trait KernelArg: Copy {}

macro_rules! kernel_args_of {
    ($($ty:ty),*) => {
        // SAFETY: laid out alike on both sides.
        $(unsafe impl KernelArg for $ty {})*
    };
}
kernel_args_of!(u8, i8, u16, i16, u32, i32, u64, i64, usize, isize, f32, f64);

// SAFETY: device addresses have 64 bits, as has every host that CUDA supports.
unsafe impl<T> KernelArg for *const T {}
// SAFETY: as above.
unsafe impl<T> KernelArg for *mut T {}

/// The arguments of a kernel: a tuple of up to 16 [`KernelArg`]s.
///
/// # Safety
/// `with_pointers` must pass one pointer per argument, in order.
pub unsafe trait KernelArgs: Copy {
    /// Calls `f` with a pointer to each argument: what `cuLaunchKernel` and the emulator take.
    fn with_pointers<R>(self, f: impl FnOnce(&[*mut c_void]) -> R) -> R;
}

// SAFETY: no arguments, no pointers.
unsafe impl KernelArgs for () {
    fn with_pointers<R>(self, f: impl FnOnce(&[*mut c_void]) -> R) -> R {
        f(&[])
    }
}

macro_rules! kernel_args_for_tuples {
    ($($name:ident)*) => { kernel_args_for_tuples!(@ [] $($name)*); };
    (@ [$($done:ident)*]) => {};
    (@ [$($done:ident)*] $next:ident $($rest:ident)*) => {
        // SAFETY: one pointer to each element, in order.
        unsafe impl<$($done: KernelArg,)* $next: KernelArg> KernelArgs for ($($done,)* $next,) {
            #[allow(non_snake_case, reason = "variables named after their types")]
            fn with_pointers<R>(self, f: impl FnOnce(&[*mut c_void]) -> R) -> R {
                let ($(mut $done,)* mut $next,) = self;
                f(&[$((&raw mut $done).cast(),)* (&raw mut $next).cast()])
            }
        }
        kernel_args_for_tuples!(@ [$($done)* $next] $($rest)*);
    };
}
kernel_args_for_tuples!(A B C D E F G H I J K L M N O P);
