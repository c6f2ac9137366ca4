//! What a launch consists of: a kernel, a grid, arguments. The [`emulator`](crate::emulator) and the CUDA driver take
//! the same ones.

mod args;
mod id;

pub use args::{KernelArg, KernelArgs};
pub use id::{Id, IdSource};

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

/// Numbers kernels; see [`KernelInfo::id`].
static KERNELS: IdSource = IdSource::new();

/// A kernel that takes arguments of the types in tuple `A`: what `#[kernel]` defines beside the function.
pub struct Kernel<A> {
    info: KernelInfo,
    arguments: PhantomData<fn(A)>,
}

impl<A> Kernel<A> {
    /// The kernel that `entry` runs.
    ///
    /// # Safety
    /// `entry` must read one argument through each pointer, of the types in `A`, and `param_names` must be as many. An
    /// `overlapping` kernel must call [`wait_for_previous`](crate::grid::wait_for_previous) in every thread.
    pub const unsafe fn new(
        name: &'static str,
        param_names: &'static [&'static str],
        overlapping: bool,
        entry: unsafe fn(*const *mut c_void),
    ) -> Self {
        Self {
            info: KernelInfo { name, param_names, overlapping, entry, id: Id::new() },
            arguments: PhantomData,
        }
    }

    /// The kernel without the types of its arguments.
    pub const fn info(&self) -> &KernelInfo {
        &self.info
    }
}

impl<A> fmt::Debug for Kernel<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.info.fmt(f)
    }
}

/// A kernel.
pub struct KernelInfo {
    /// Its symbol in the PTX.
    pub name: &'static str,
    /// What a launch passes, in order; a slice is `name` and `name_len`.
    pub param_names: &'static [&'static str],
    /// Whether it may start while the kernel before it still runs, because it waits itself ([`crate::grid`]).
    pub overlapping: bool,
    /// Runs one thread on the emulator, given a pointer to each argument.
    pub entry: unsafe fn(*const *mut c_void),
    id: Id,
}

impl KernelInfo {
    /// The kernel's number: kernels are numbered from 0 in the order in which this is first called, so that a table by
    /// kernel can be a vector.
    pub fn id(&self) -> usize {
        self.id.get(&KERNELS)
    }
}

impl fmt::Debug for KernelInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name, self.param_names.join(", "))
    }
}

/// How many threads a launch starts, and the shared memory they get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of [`dynamic_shared!`](crate::dynamic_shared) memory per block.
    pub dynamic_shared_bytes: u32,
    /// Neighbouring blocks in x that make a [cluster](crate::cluster); 1 where there are none.
    pub cluster: u32,
}
