//! Where kernels run: an NVIDIA GPU through `cust`, or the CPU through `cuda_std`'s emulator.
//!
//! Both run the same kernels with the same grids and the same arguments. Work is issued in order on one stream;
//! only [`Device::download`] and [`Device::synchronize`] wait for it.

mod buffer;
mod cpu;
mod cuda;
mod ptx;

pub use buffer::{Buffer, HostBuffer};
pub use ptx::{PtxImage, ptx_image_for, ptx_images};

use anyhow::{Context as _, Result, ensure};
use buffer::Memory;
use bytemuck::Pod;
use cpu::CpuDevice;
use cuda::{CudaDevice, CudaGraph};
use cuda_std::launch::{Kernel, KernelArgs, LaunchConfig};
use std::sync::Arc;
use std::time::Instant;

/// Which device to open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU where there is one, the CPU otherwise.
    #[default]
    Auto,
    /// The GPU, or an error.
    Cuda,
    /// The CPU.
    Cpu,
}

/// A device that kernels run on. Clones are handles to the same one.
#[derive(Clone)]
pub struct Device(Kind);

/// A sequence of launches with their arguments, recorded by [`Device::record`]: a CUDA graph.
pub struct Recording(CudaGraph);

/// A point in the work that was issued, to be timed from or to ([`Device::mark`]).
pub struct Mark(MarkKind);

enum MarkKind {
    Cuda(cust::event::Event),
    /// Work is done when it has been issued.
    Cpu(Instant),
}

#[derive(Clone)]
enum Kind {
    Cuda(Arc<CudaDevice>),
    Cpu(Arc<CpuDevice>),
}

impl Device {
    /// Opens a device: the first GPU, or the CPU.
    ///
    /// # Errors
    /// With [`DeviceChoice::Cuda`] when there is no usable GPU: the message says what is missing. With
    /// [`DeviceChoice::Auto`] that same reason becomes part of [`describe`](Self::describe).
    pub fn open(choice: DeviceChoice) -> Result<Self> {
        let cuda = || CudaDevice::open().map(|device| Self(Kind::Cuda(Arc::new(device))));
        let cpu = |reason| Self(Kind::Cpu(Arc::new(CpuDevice::new(reason))));
        match choice {
            DeviceChoice::Cuda => cuda(),
            DeviceChoice::Cpu => Ok(cpu(None)),
            DeviceChoice::Auto => Ok(cuda().unwrap_or_else(|error| cpu(Some(format!("{error:#}"))))),
        }
    }

    /// One line about the device; for the CPU also why no GPU is used, where one was wanted.
    pub fn describe(&self) -> String {
        match &self.0 {
            Kind::Cuda(device) => device.describe(),
            Kind::Cpu(device) => device.describe(),
        }
    }

    /// Whether kernels run on a GPU.
    pub fn is_cuda(&self) -> bool {
        matches!(self.0, Kind::Cuda(_))
    }

    /// Multiprocessors of the GPU, or cores of the CPU.
    pub fn multiprocessors(&self) -> u32 {
        match &self.0 {
            Kind::Cuda(device) => device.multiprocessors(),
            Kind::Cpu(device) => device.cores(),
        }
    }

    /// Whether kernels that are made for it start while the one before runs, as they do from compute capability 9.0 on.
    pub fn overlaps_kernels(&self) -> bool {
        match &self.0 {
            Kind::Cuda(device) => device.overlaps_kernels(),
            Kind::Cpu(_) => false,
        }
    }

    /// Whether there is room for a cluster of such a launch: on GPUs only of compute capability 9.0, for which alone such kernels
    /// are compiled.
    ///
    /// # Errors
    /// When the kernel does not load.
    pub fn has_room_for_cluster<A>(&self, kernel: &Kernel<A>, config: LaunchConfig) -> Result<bool> {
        match &self.0 {
            Kind::Cuda(device) => device.has_room_for_cluster(kernel.info(), config),
            Kind::Cpu(_) => Ok(config.dynamic_shared_bytes <= self.shared_bytes()),
        }
    }

    /// Bytes of shared memory that a block can have.
    pub fn shared_bytes(&self) -> u32 {
        match &self.0 {
            Kind::Cuda(device) => device.shared_bytes(),
            Kind::Cpu(_) => cuda_std::emulator::SHARED_BYTES as u32,
        }
    }

    /// Room for `len` values, not written yet.
    ///
    /// # Errors
    /// When the memory is not there: the message says how much was needed and how much was free.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>());
        let bytes =
            bytes.ok_or_else(|| anyhow::anyhow!("a buffer of {len} values is too large to address"))?;
        // Kernels read 16 bytes at a time, also where the last ones are not all wanted: those are 0.
        let padded = bytes.next_multiple_of(16);
        let memory = match &self.0 {
            Kind::Cuda(device) => Memory::Cuda(device.alloc(padded)?),
            Kind::Cpu(device) => Memory::Cpu(device.alloc(padded)?),
        };
        if bytes < padded {
            let end = memory.address().wrapping_add(bytes);
            match &self.0 {
                Kind::Cuda(device) => device.zero(end, padded - bytes)?,
                Kind::Cpu(device) => device.zero(end, padded - bytes)?,
            }
        }
        Ok(Buffer::new(memory, len))
    }

    /// Room for `len` values, all bytes 0.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn alloc_zeroed<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let mut buffer: Buffer<T> = self.alloc(len)?;
        let (start, bytes) = (buffer.as_mut_ptr().cast(), buffer.n_bytes());
        match &self.0 {
            Kind::Cuda(device) => device.zero(start, bytes)?,
            Kind::Cpu(device) => device.zero(start, bytes)?,
        }
        Ok(buffer)
    }

    /// A buffer that holds `values`.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn alloc_from<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(values.len())?;
        self.upload(&mut buffer, values)?;
        Ok(buffer)
    }

    /// Copies `values` into the buffer, after all work issued so far and before all that follows.
    ///
    /// # Errors
    /// When the lengths differ, or the copy fails.
    pub fn upload<T: Pod>(&self, buffer: &mut Buffer<T>, values: &[T]) -> Result<()> {
        ensure!(
            buffer.len() == values.len(),
            "an upload of {} values into a buffer of {}",
            values.len(),
            buffer.len()
        );
        let bytes: &[u8] = bytemuck::cast_slice(values);
        match &self.0 {
            Kind::Cuda(device) => device.upload(buffer.as_mut_ptr().cast(), bytes),
            Kind::Cpu(device) => device.upload(buffer.as_mut_ptr().cast(), bytes),
        }
    }

    /// Waits for all work issued so far and copies the buffer into `values`.
    ///
    /// # Errors
    /// When the lengths differ, the copy fails, or a kernel before it failed.
    pub fn download<T: Pod>(&self, buffer: &Buffer<T>, values: &mut [T]) -> Result<()> {
        ensure!(
            buffer.len() == values.len(),
            "a download of {} values from a buffer of {}",
            values.len(),
            buffer.len()
        );
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        match &self.0 {
            Kind::Cuda(device) => device.download(buffer.as_ptr().cast(), bytes),
            Kind::Cpu(device) => device.download(buffer.as_ptr().cast(), bytes),
        }
    }

    /// [`download`](Self::download) into a new vector.
    ///
    /// # Errors
    /// As [`download`](Self::download).
    pub fn to_vec<T: Pod>(&self, buffer: &Buffer<T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); buffer.len()];
        self.download(buffer, &mut values)?;
        Ok(values)
    }

    /// Room for `len` values in memory that kernels write to and the host reads, all bytes 0.
    ///
    /// # Errors
    /// When the memory is not there.
    pub fn alloc_host<T: Pod>(&self, len: usize) -> Result<HostBuffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).context("a buffer too large to address")?;
        let memory = match &self.0 {
            Kind::Cuda(device) => Memory::Host(device.alloc_host(bytes)?),
            Kind::Cpu(device) => {
                let memory = device.alloc(bytes)?;
                device.zero(memory.address(), bytes)?;
                Memory::Cpu(memory)
            }
        };
        Ok(HostBuffer::new(memory, len))
    }

    /// Waits until a kernel that was issued has written something else than `pending` as value `index` of the buffer, and for nothing
    /// after it.
    ///
    /// # Errors
    /// When a kernel failed, or all have ended and none has written the value.
    ///
    /// # Panics
    /// When there is no such value.
    pub fn wait_for<T: Pod + PartialEq>(
        &self,
        buffer: &HostBuffer<T>,
        index: usize,
        pending: T,
    ) -> Result<T> {
        /// Looks at the value between two at the device: as many take some tens of microseconds.
        const LOOKS: usize = 1000;
        loop {
            // Whoever has ended by now has written before the looks that follow.
            let has_ended = match &self.0 {
                Kind::Cuda(device) => device.has_ended()?,
                Kind::Cpu(_) => true,
            };
            for _ in 0..LOOKS {
                let value = buffer.get(index);
                if value != pending {
                    return Ok(value);
                }
                std::hint::spin_loop();
            }
            ensure!(!has_ended, "no kernel has written value {index} that was waited for");
        }
    }

    /// Marks the time at which what was issued so far has ended, without waiting for it: a CUDA event. What is issued
    /// next starts after the mark.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn mark(&self) -> Result<Mark> {
        match &self.0 {
            Kind::Cuda(device) => Ok(Mark(MarkKind::Cuda(device.mark()?))),
            Kind::Cpu(_) => Ok(Mark(MarkKind::Cpu(Instant::now()))),
        }
    }

    /// Waits for `end` and says how long after `start` it was, in microseconds.
    ///
    /// # Errors
    /// When a kernel before it failed.
    ///
    /// # Panics
    /// When a mark is of another kind of device.
    pub fn microseconds_between(&self, start: &Mark, end: &Mark) -> Result<f64> {
        match (&self.0, &start.0, &end.0) {
            (Kind::Cuda(device), MarkKind::Cuda(start), MarkKind::Cuda(end)) => {
                device.microseconds_between(start, end)
            }
            (Kind::Cpu(_), MarkKind::Cpu(start), MarkKind::Cpu(end)) => {
                Ok(end.duration_since(*start).as_secs_f64() * 1e6)
            }
            _ => panic!("a mark of another device"),
        }
    }

    /// Waits for all work issued so far.
    ///
    /// # Errors
    /// When a kernel before it failed.
    pub fn synchronize(&self) -> Result<()> {
        match &self.0 {
            Kind::Cuda(device) => device.synchronize(),
            Kind::Cpu(_) => Ok(()),
        }
    }

    /// Records what `issue` launches, to be issued again as a whole by [`replay`](Self::replay); nothing runs now.
    ///
    /// Every kernel must have been launched once before. `None` on the CPU, where a launch costs little.
    ///
    /// # Safety
    /// The buffers that the launches use must outlive the recording.
    ///
    /// # Errors
    /// Those of `issue`; also when the driver refuses to record, because `issue` waits for the device, say.
    pub unsafe fn record<E: From<anyhow::Error>>(
        &self,
        issue: impl FnOnce() -> Result<(), E>,
    ) -> Result<Option<Recording>, E> {
        match &self.0 {
            Kind::Cuda(device) => Ok(Some(Recording(device.record(issue)?))),
            Kind::Cpu(_) => Ok(None),
        }
    }

    /// Leaves what this thread launches from now on out of the recording under way, or takes it in again.
    ///
    /// # Panics
    /// When nothing is being recorded.
    pub fn leave_out(&self, leave_out: bool) {
        match &self.0 {
            Kind::Cuda(device) => device.leave_out(leave_out),
            Kind::Cpu(_) => panic!("the CPU records nothing"),
        }
    }

    /// Issues recorded launches.
    ///
    /// # Errors
    /// When the device refuses them.
    pub fn replay(&self, recording: &Recording) -> Result<()> {
        match &self.0 {
            Kind::Cuda(device) => device.replay(&recording.0),
            Kind::Cpu(_) => unreachable!("the CPU records nothing"),
        }
    }

    /// Issues a kernel. On a GPU this returns at once, and a failure inside it shows at the next wait.
    ///
    /// # Safety
    /// The arguments must keep the contract in the kernel's documentation; every pointer must come from a buffer
    /// of this device.
    ///
    /// # Errors
    /// When the device refuses the launch; on the CPU also when the kernel panics.
    pub unsafe fn launch<A: KernelArgs>(
        &self,
        kernel: &Kernel<A>,
        config: LaunchConfig,
        args: A,
    ) -> Result<()> {
        args.with_pointers(|pointers| match &self.0 {
            // SAFETY: the pointers are to arguments of the types that the kernel declares, by the type `A`; what
            // they hold is the caller's promise.
            Kind::Cuda(device) => unsafe { device.launch(kernel.info(), config, pointers) },
            // SAFETY: as above.
            Kind::Cpu(device) => unsafe { device.launch(kernel.info(), config, pointers) },
        })
    }
}
