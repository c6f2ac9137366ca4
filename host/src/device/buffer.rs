//! Device memory with a type and a length.

use super::cpu::CpuMemory;
use super::cuda::{CudaMemory, HostMemory};
use bytemuck::Pod;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Owned memory of either device.
pub(super) enum Memory {
    Cuda(CudaMemory),
    /// The host's, which the GPU writes to.
    Host(HostMemory),
    Cpu(CpuMemory),
}

impl Memory {
    pub(super) fn address(&self) -> *mut u8 {
        match self {
            Memory::Cuda(memory) => memory.address(),
            Memory::Host(memory) => memory.address(),
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

/// Values in memory that kernels write to and the host reads as it is.
pub struct HostBuffer<T>(Buffer<T>);

impl<T: Pod> HostBuffer<T> {
    pub(super) fn new(memory: Memory, len: usize) -> Self {
        Self(Buffer::new(memory, len))
    }

    /// Value `index`. What a kernel writes is there some time before the kernel has ended ([`Device::wait_for`](super::Device::wait_for)).
    ///
    /// # Panics
    /// When there is no such value.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.0.len, "value {index} of a buffer of {}", self.0.len);
        // SAFETY: inside the memory, which the host can read; volatile, since a GPU may have written meanwhile.
        unsafe { self.0.as_ptr().add(index).read_volatile() }
    }

    /// Sets value `index`, which no kernel under way writes.
    ///
    /// # Panics
    /// When there is no such value.
    pub fn set(&mut self, index: usize, value: T) {
        assert!(index < self.0.len, "value {index} of a buffer of {}", self.0.len);
        // SAFETY: inside the memory, which the host can write; volatile, since a GPU will look at it.
        unsafe { self.0.as_mut_ptr().add(index).write_volatile(value) };
    }

    /// The buffer as kernels take it.
    pub fn as_buffer(&mut self) -> &mut Buffer<T> {
        &mut self.0
    }
}

impl<T: Pod> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{}>({} values at {:p})", std::any::type_name::<T>(), self.len, self.as_ptr())
    }
}
