//! The `#[kernel]` attribute of `cuda_std`, which re-exports it.

mod kernel;

use proc_macro::TokenStream;

/// Makes a function a GPU kernel.
///
/// ```ignore
/// use cuda_std::kernel;
///
/// /// `y[i] += a * x[i]`.
/// #[kernel]
/// pub unsafe fn axpy(x: &[f32], y: *mut f32, a: f32) {
///     let i = cuda_std::thread::index_1d() as usize;
///     if i < x.len() {
///         unsafe { *y.add(i) += a * x[i] };
///     }
/// }
/// ```
///
/// For `nvptx64` the function becomes a PTX entry point named after it. Elsewhere it stays a plain function, and a
/// `static` of type `cuda_std::launch::Kernel` stands beside it under the function's name in upper case (`AXPY`):
/// what a launch takes, for the emulator and for a GPU alike.
///
/// - Parameters are values that implement `cuda_std::launch::KernelArg`. A `&[T]` is two arguments, a pointer and
///   a length of type `usize`; any other `&T` is a pointer.
/// - The function is `unsafe`, returns nothing, and has no generics: generic code goes into a function that the
///   kernel calls.
/// - `#[kernel(suffix = q4_k)]` names the kernel `axpy_q4_k` in the PTX, for kernels that a macro defines once per
///   module.
/// - `#[kernel(overlapping)]` says that the kernel waits for the one before it by itself
///   (`cuda_std::grid::wait_for_previous`), so that a launch may start it early.
/// - `#[kernel(launch_bounds(256, 2))]` promises at most 256 threads in a block and asks that two blocks fit on a
///   multiprocessor: the driver's compiler then gives a thread no more registers than that allows.
#[proc_macro_attribute]
pub fn kernel(attribute: TokenStream, item: TokenStream) -> TokenStream {
    kernel::expand(attribute.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
