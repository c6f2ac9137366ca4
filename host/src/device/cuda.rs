//! An NVIDIA GPU as a device: `cust` loads the PTX and launches on one stream.

use super::ptx::{PtxImage, ptx_image_for, ptx_images};
use anyhow::{Context as _, Result, bail, ensure};
use cuda_driver::{
    CLUSTER_DIMENSION, LaunchAttribute, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, PROGRAMMATIC_STREAM_SERIALIZATION,
};
use cuda_std::launch::{KernelInfo, LaunchConfig};
use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::{CudaError, CudaResult};
use cust::event::{Event, EventFlags};
use cust::function::Function;
use cust::memory::{DevicePointer, cuda_free, cuda_malloc, mem_get_info};
use cust::module::Module;
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex};

thread_local! {
    /// What records this thread's launches.
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// Where launches go while they are recorded.
struct Recorder {
    stream: Stream,
    /// Whether launches are left out.
    leaves_out: bool,
}

pub(super) struct CudaDevice {
    context: Arc<Context>,
    stream: Stream,
    image: &'static PtxImage,
    /// The kernels' functions, by [`KernelInfo::id`]; each is loaded when it is first launched.
    functions: Mutex<Vec<Option<Function<'static>>>>,
    name: String,
    version: u32,
    multiprocessors: u32,
    /// Shared memory that a block can have.
    shared_bytes: u32,
}

// SAFETY: function handles belong to modules that are never unloaded, and the driver may be called from any
// thread that has made the context current, which `enter` does.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; the table of functions is behind a mutex.
unsafe impl Sync for CudaDevice {}

impl CudaDevice {
    pub(super) fn open() -> Result<Self> {
        if let Some(error) = cuda_driver::load_error() {
            bail!("the NVIDIA driver's library cannot be opened: {error}");
        }
        cust::init(cust::CudaFlags::empty()).context("the NVIDIA driver does not start")?;
        let device = Device::get_device(0).context("the NVIDIA driver finds no GPU")?;
        let name = device.name()?;
        let attribute = |attribute| device.get_attribute(attribute).map(|value| value as u32);
        let version = 10 * attribute(DeviceAttribute::ComputeCapabilityMajor)?
            + attribute(DeviceAttribute::ComputeCapabilityMinor)?;
        let image = ptx_image_for(version).with_context(|| {
            let oldest = ptx_images()[0].version;
            format!(
                "{name} has compute capability {}.{}, and Warpline needs {}.{} or later",
                version / 10,
                version % 10,
                oldest / 10,
                oldest % 10
            )
        })?;
        let multiprocessors = attribute(DeviceAttribute::MultiprocessorCount)?;
        let mut shared_bytes = 0;
        // SAFETY: reads a number of the device that was opened above.
        check(unsafe {
            let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            sys::cuDeviceGetAttribute(&mut shared_bytes, attribute, device.as_raw())
        })?;
        let context = Arc::new(Context::new(device).with_context(|| format!("{name} cannot be used"))?);
        Ok(Self {
            context,
            stream: Stream::new(StreamFlags::DEFAULT, None)?,
            image,
            functions: Mutex::new(Vec::new()),
            name,
            version,
            multiprocessors,
            shared_bytes: shared_bytes as u32,
        })
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "{} (compute capability {}.{}, kernels for {})",
            self.name,
            self.version / 10,
            self.version % 10,
            self.image.arch
        )
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    pub(super) fn overlaps_kernels(&self) -> bool {
        self.image.version >= 90
    }

    pub(super) fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    pub(super) fn zero(&self, start: *mut u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the memory is a buffer of this length.
        check(unsafe { sys::cuMemsetD8Async(start as u64, 0, bytes, self.stream.as_inner()) })
            .context("cannot clear memory on the GPU")
    }

    /// Makes the GPU's context current in this thread.
    fn enter(&self) -> CudaResult<()> {
        CurrentContext::set_current(&*self.context)
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<CudaMemory> {
        self.enter()?;
        // SAFETY: bytes need no initial value to be valid.
        match unsafe { cuda_malloc::<u8>(bytes.max(1)) } {
            Ok(start) => Ok(CudaMemory { start, context: Arc::clone(&self.context) }),
            Err(CudaError::OutOfMemory) => {
                let (free, total) = mem_get_info()?;
                let mb = |bytes: usize| bytes as f64 / 1e6;
                bail!(
                    "{} is out of memory: {:.1} MB needed for a buffer, {:.1} MB of {:.1} MB free",
                    self.name,
                    mb(bytes),
                    mb(free),
                    mb(total)
                )
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot allocate {bytes} bytes on {}", self.name))
            }
        }
    }

    /// Zeroed memory of the host that kernels reach at the address at which the host does.
    pub(super) fn alloc_host(&self, bytes: usize) -> Result<HostMemory> {
        self.enter()?;
        let mut start = ptr::null_mut();
        // SAFETY: sets the pointer.
        check(unsafe { sys::cuMemAllocHost_v2(&mut start, bytes.max(1)) }).with_context(|| {
            format!("cannot allocate {bytes} bytes of memory that {} can write to", self.name)
        })?;
        let start = start.cast::<u8>();
        // SAFETY: as many bytes were just allocated.
        unsafe { start.write_bytes(0, bytes) };
        Ok(HostMemory { start, context: Arc::clone(&self.context) })
    }

    /// Whether everything that was issued so far has ended.
    pub(super) fn has_ended(&self) -> Result<bool> {
        self.enter()?;
        // SAFETY: looks at the stream.
        match unsafe { sys::cuStreamQuery(self.stream.as_inner()) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check(code).map(|()| true).context("a kernel failed on the GPU"),
        }
    }

    /// An event after everything that was issued so far, which knows its time.
    pub(super) fn mark(&self) -> Result<Event> {
        self.enter()?;
        let event = Event::new(EventFlags::DEFAULT)?;
        event.record(&self.stream)?;
        Ok(event)
    }

    pub(super) fn microseconds_between(&self, start: &Event, end: &Event) -> Result<f64> {
        self.enter()?;
        end.synchronize().context("a kernel failed on the GPU")?;
        Ok(f64::from(end.elapsed_time_f32(start)?) * 1e3)
    }

    pub(super) fn upload(&self, to: *mut u8, bytes: &[u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `to` is a buffer of this length. From pageable memory the driver takes the bytes before it
        // returns, so the slice need not outlive the call.
        let code = unsafe {
            sys::cuMemcpyHtoDAsync_v2(to as u64, bytes.as_ptr().cast(), bytes.len(), self.stream.as_inner())
        };
        check(code).context("a copy to the GPU failed")
    }

    pub(super) fn download(&self, from: *const u8, bytes: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: `from` is a buffer of this length, and the slice outlives the copy: it is waited for.
        let code = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                bytes.as_mut_ptr().cast(),
                from as u64,
                bytes.len(),
                self.stream.as_inner(),
            )
        };
        check(code).context("a copy from the GPU failed")?;
        self.synchronize()
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        self.stream.synchronize().context("a kernel failed on the GPU")
    }

    /// # Safety
    /// The pointers are to arguments that keep the kernel's contract.
    pub(super) unsafe fn launch(
        &self,
        kernel: &KernelInfo,
        config: LaunchConfig,
        pointers: &[*mut c_void],
    ) -> Result<()> {
        self.enter()?;
        let function = self.loaded(kernel)?;
        let attributes = self.attributes(kernel, config);
        // SAFETY: the caller's promise; the pointers are to the values that the kernel's parameters take.
        let code = RECORDER.with_borrow(|recorder| unsafe {
            if recorder.as_ref().is_some_and(|recorder| recorder.leaves_out) {
                return sys::CUresult::CUDA_SUCCESS;
            }
            let stream = recorder.as_ref().map_or(&self.stream, |recorder| &recorder.stream);
            let config = driver_config(config, stream, &attributes);
            cuda_driver::cuLaunchKernelEx(&config, function, pointers.as_ptr().cast_mut(), ptr::null_mut())
        });
        check(code).with_context(|| {
            format!("cannot launch {} on grid {:?}, block {:?}", kernel.name, config.grid, config.block)
        })
    }

    /// Whether the GPU has room for a cluster of such a launch: never where its image has not the kernel.
    pub(super) fn has_room_for_cluster(&self, kernel: &KernelInfo, config: LaunchConfig) -> Result<bool> {
        let has_kernel = self.image.kernels().any(|name| name == kernel.name);
        if !has_kernel || config.dynamic_shared_bytes > self.shared_bytes {
            return Ok(false);
        }
        self.enter()?;
        let function = self.loaded(kernel)?;
        let attributes = self.attributes(kernel, config);
        let config = driver_config(config, &self.stream, &attributes);
        let mut clusters = 0;
        // SAFETY: reads a number; the function was loaded.
        check(unsafe { cuda_driver::cuOccupancyMaxActiveClusters(&mut clusters, function, &config) })
            .with_context(|| format!("cannot tell how many clusters of {} fit {}", kernel.name, self.name))?;
        Ok(clusters > 0)
    }

    fn attributes(&self, kernel: &KernelInfo, config: LaunchConfig) -> Vec<LaunchAttribute> {
        // A GPU that cannot overlap kernels takes the attribute as well, but its kernels do not wait by themselves.
        let overlaps = kernel.overlapping && self.overlaps_kernels();
        let overlap = overlaps.then(|| LaunchAttribute::words(PROGRAMMATIC_STREAM_SERIALIZATION, [1]));
        let cluster =
            (config.cluster > 1).then(|| LaunchAttribute::words(CLUSTER_DIMENSION, [config.cluster, 1, 1]));
        overlap.into_iter().chain(cluster).collect()
    }

    /// A kernel's function, loaded when it is first asked for.
    fn loaded(&self, kernel: &KernelInfo) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().expect("no thread panics while it holds the table");
        let id = kernel.id();
        if functions.len() <= id {
            functions.resize_with(id + 1, || None);
        }
        let function = match &functions[id] {
            Some(function) => function,
            none => {
                debug_assert!(none.is_none());
                functions[id].insert(self.function(kernel)?)
            }
        };
        Ok(function.to_raw())
    }

    /// Loads a kernel, with as much shared memory as a launch may ask for.
    fn function(&self, kernel: &KernelInfo) -> Result<Function<'static>> {
        use sys::CUfunction_attribute::*;
        let module = Module::from_ptx(self.image.module(kernel.name)?, &[]).with_context(|| {
            let arch = self.image.arch;
            format!("the driver does not accept the kernel {} ({arch}) for {}", kernel.name, self.name)
        })?;
        // It may be launched until the process ends; the driver frees the module with the context.
        let module: &'static Module = Box::leak(Box::new(module));
        let function = module.get_function(kernel.name)?;
        let mut fixed = 0;
        // SAFETY: the function was just looked up.
        unsafe {
            check(sys::cuFuncGetAttribute(
                &mut fixed,
                CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                function.to_raw(),
            ))?;
            let dynamic = self.shared_bytes as i32 - fixed;
            let attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(sys::cuFuncSetAttribute(function.to_raw(), attribute, dynamic))?;
            // All kernels want the same split between shared memory and L1 cache: a multiprocessor cannot change it
            // while a block is on it, and the next kernel's blocks are to start beside this one's.
            let attribute = CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            check(sys::cuFuncSetAttribute(function.to_raw(), attribute, 100))?;
            if self.image.arch == "sm_90a" {
                let attribute = NON_PORTABLE_CLUSTER_SIZE_ALLOWED;
                check(cuda_driver::cuFuncSetAttribute(function.to_raw(), attribute, 1))?;
            }
        }
        Ok(function)
    }
}

impl CudaDevice {
    /// Records what `issue` launches instead of running it. Every kernel must have been launched before: the driver
    /// may load one at its first use, which it does not do while it records.
    pub(super) fn record<E: From<anyhow::Error>>(
        &self,
        issue: impl FnOnce() -> Result<(), E>,
    ) -> Result<CudaGraph, E> {
        self.enter().map_err(anyhow::Error::from)?;
        // A stream of its own: what other threads issue meanwhile is not recorded.
        let recorder = Stream::new(StreamFlags::DEFAULT, None).map_err(anyhow::Error::from)?;
        let stream = recorder.as_inner();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream was just made and is not recording.
        check(unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })
            .context("the driver does not record launches")?;
        let before = RECORDER.replace(Some(Recorder { stream: recorder, leaves_out: false }));
        let issued = issue();
        let _recorder = RECORDER.replace(before);
        let mut graph = ptr::null_mut();
        // SAFETY: ends the recording begun above, whatever came of it.
        let ended = check(unsafe { sys::cuStreamEndCapture(stream, &mut graph) });
        issued?;
        ended.context("the launches cannot be recorded")?;
        let mut executable = ptr::null_mut();
        // SAFETY: the graph was just recorded; it is not needed any more once there is an executable one.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0);
            sys::cuGraphDestroy(graph);
            made
        };
        check(made).context("the recorded launches cannot be made ready")?;
        Ok(CudaGraph { executable, context: Arc::clone(&self.context) })
    }

    pub(super) fn leave_out(&self, leave_out: bool) {
        RECORDER.with_borrow_mut(|recorder| {
            recorder.as_mut().expect("launches are being recorded").leaves_out = leave_out;
        });
    }

    /// Issues what was recorded, as one launch.
    pub(super) fn replay(&self, graph: &CudaGraph) -> Result<()> {
        self.enter()?;
        // SAFETY: the graph is of this context; its kernels' buffers are the promise of whoever recorded it.
        check(unsafe { sys::cuGraphLaunch(graph.executable, self.stream.as_inner()) })
            .context("cannot launch the recorded kernels")
    }
}

/// Recorded launches.
pub(super) struct CudaGraph {
    executable: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a handle that any thread may pass to the driver with the context current.
unsafe impl Send for CudaGraph {}
// SAFETY: as above; the driver takes its own lock.
unsafe impl Sync for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // As with memory: an error means that the context and the graph are gone already.
        let _ = CurrentContext::set_current(&*self.context);
        // SAFETY: instantiated above, destroyed once; the driver waits for replays under way.
        let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}

/// A launch as the driver takes it.
fn driver_config(
    config: LaunchConfig,
    stream: &Stream,
    attributes: &[LaunchAttribute],
) -> cuda_driver::LaunchConfig {
    cuda_driver::LaunchConfig {
        grid: config.grid,
        block: config.block,
        shared_mem_bytes: config.dynamic_shared_bytes,
        stream: stream.as_inner(),
        attrs: attributes.as_ptr(),
        num_attrs: attributes.len() as u32,
    }
}

/// A driver call's code as a result.
fn check(code: sys::CUresult) -> Result<()> {
    ensure!(code == sys::CUresult::CUDA_SUCCESS, "the driver says {code:?}");
    Ok(())
}

/// Memory of the host that kernels can write to.
pub(super) struct HostMemory {
    start: *mut u8,
    context: Arc<Context>,
}

// SAFETY: plain memory, owned; freeing makes the context current first.
unsafe impl Send for HostMemory {}
// SAFETY: what kernels write is read volatile, by whoever has waited for them.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub(super) fn address(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // As with memory on the GPU.
        let _ = CurrentContext::set_current(&*self.context);
        // SAFETY: allocated by `cuMemAllocHost`, freed once; kernels that use it have ended or will not start.
        let _ = unsafe { sys::cuMemFreeHost(self.start.cast()) };
    }
}

/// Memory on the GPU.
pub(super) struct CudaMemory {
    start: DevicePointer<u8>,
    context: Arc<Context>,
}

// SAFETY: an address of the GPU's, which any thread may pass to the driver; freeing makes the context current first.
unsafe impl Send for CudaMemory {}
// SAFETY: as above; nothing is read or written through a shared reference.
unsafe impl Sync for CudaMemory {}

impl CudaMemory {
    pub(super) fn address(&self) -> *mut u8 {
        self.start.as_raw() as *mut u8
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // Freeing waits for kernels that still use the memory. An error here means that the context is gone
        // already, and the memory with it.
        let _ = CurrentContext::set_current(&*self.context);
        // SAFETY: allocated by `cuda_malloc`, freed once.
        let _ = unsafe { cuda_free(self.start) };
    }
}
