//! Device memory with a type and a length.

use super::cpu::CpuMemory;
use super::cuda::CudaMemory;
use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Owned memory of either device.
pub(super) enum Memory {
    Cuda(CudaMemory),
    Cpu(CpuMemory),
}

impl Memory {
    fn address(&self) -> *mut u8 {
        match self {
            Memory::Cuda(memory) => memory.address(),
            Memory::Cpu(memory) => memory.address(),
        }
    }
}

/// `len` values of `T` in the memory of a device, freed when the last handle to them goes.
pub struct Buffer<T> {
    memory: Arc<Memory>,
    /// In values, from the start of the memory.
    offset: usize,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    pub(super) fn new(memory: Memory, len: usize) -> Self {
        Self { memory: Arc::new(memory), offset: 0, len, values: PhantomData }
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// A handle to a range of the same memory.
    ///
    /// # Panics
    /// When the range is not inside the buffer.
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "part {range:?} of a buffer of {} values",
            self.len
        );
        Self {
            memory: Arc::clone(&self.memory),
            offset: self.offset + range.start,
            len: range.len(),
            values: PhantomData,
        }
    }

    /// The device address, to pass to a kernel that reads.
    pub fn as_ptr(&self) -> *const T {
        self.memory.address().cast::<T>().wrapping_add(self.offset)
    }

    /// The device address, to pass to a kernel that writes.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.as_ptr().cast_mut()
    }
}

impl<T: Pod> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{}>({} values at {:p})", std::any::type_name::<T>(), self.len, self.as_ptr())
    }
}
