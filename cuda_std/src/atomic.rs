//! Atomics on device memory, in the scope of the whole GPU.
//!
//! Read-modify-write operations are relaxed and return the value before; order is made by [`thread_fence`], or by a
//! pair of [`store_release_u32`] and [`load_acquire_u32`].

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::with_thread;
#[cfg(not(target_arch = "nvptx64"))]
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

macro_rules! atomics {
    ($($name:ident, $ty:ty, $instruction:literal, $class:ident, $cpu:expr, $doc:literal;)*) => {$(
        #[doc = $doc]
        ///
        /// # Safety
        /// `pointer` is to device memory, aligned to the size of the value.
        #[inline(always)]
        pub unsafe fn $name(pointer: *mut $ty, value: $ty) -> $ty {
            cfg_select! {
                target_arch = "nvptx64" => {
                    let old;
                    // SAFETY: the caller vouches for the memory.
                    unsafe {
                        core::arch::asm!(
                            concat!("atom.relaxed.gpu.global.", $instruction, " {old}, [{pointer}], {value};"),
                            old = out($class) old,
                            pointer = in(reg64) pointer,
                            value = in($class) value,
                            options(nostack, preserves_flags),
                        );
                    }
                    old
                }
                // SAFETY: the caller vouches for the memory.
                _ => unsafe { $cpu(pointer, value) },
            }
        }
    )*};
}

atomics! {
    atomic_add_u32, u32, "add.u32", reg32,
        |p, v| AtomicU32::from_ptr(p).fetch_add(v, Ordering::Relaxed),
        "Adds to `*pointer`, wrapping around; returns the value before.";
    atomic_add_u64, u64, "add.u64", reg64,
        |p, v| AtomicU64::from_ptr(p).fetch_add(v, Ordering::Relaxed),
        "Adds to `*pointer`, wrapping around; returns the value before.";
    atomic_add_f32, f32, "add.f32", reg32, add_f32,
        "Adds to `*pointer`; returns the value before. The order in which threads add is not fixed.";
    atomic_max_u32, u32, "max.u32", reg32,
        |p, v| AtomicU32::from_ptr(p).fetch_max(v, Ordering::Relaxed),
        "Makes `*pointer` the larger of itself and `value`; returns the value before.";
    atomic_max_u64, u64, "max.u64", reg64,
        |p, v| AtomicU64::from_ptr(p).fetch_max(v, Ordering::Relaxed),
        "Makes `*pointer` the larger of itself and `value`; returns the value before.";
    atomic_min_u32, u32, "min.u32", reg32,
        |p, v| AtomicU32::from_ptr(p).fetch_min(v, Ordering::Relaxed),
        "Makes `*pointer` the smaller of itself and `value`; returns the value before.";
    atomic_min_u64, u64, "min.u64", reg64,
        |p, v| AtomicU64::from_ptr(p).fetch_min(v, Ordering::Relaxed),
        "Makes `*pointer` the smaller of itself and `value`; returns the value before.";
    atomic_exchange_u32, u32, "exch.b32", reg32, exchange_u32,
        "Sets `*pointer`; returns the value before.";
}

#[cfg(not(target_arch = "nvptx64"))]
unsafe fn add_f32(pointer: *mut f32, value: f32) -> f32 {
    // SAFETY: the caller vouches for the memory.
    let bits = unsafe { AtomicU32::from_ptr(pointer.cast()) };
    let add = |old| Some((f32::from_bits(old) + value).to_bits());
    match bits.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
        Ok(old) | Err(old) => f32::from_bits(old),
    }
}

#[cfg(not(target_arch = "nvptx64"))]
unsafe fn exchange_u32(pointer: *mut u32, value: u32) -> u32 {
    // SAFETY: the caller vouches for the memory.
    let old = unsafe { AtomicU32::from_ptr(pointer) }.swap(value, Ordering::Relaxed);
    if old == value {
        // Nothing changed: this may be a loop that waits for a lock.
        with_thread(|thread| thread.spin());
    }
    old
}

/// Sets `*pointer` to `value` where it equals `expected`; returns the value before.
///
/// # Safety
/// `pointer` is to device memory, aligned to four bytes.
#[inline(always)]
pub unsafe fn atomic_cas_u32(pointer: *mut u32, expected: u32, value: u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let old;
            // SAFETY: the caller vouches for the memory.
            unsafe {
                core::arch::asm!(
                    "atom.relaxed.gpu.global.cas.b32 {old}, [{pointer}], {expected}, {value};",
                    old = out(reg32) old,
                    pointer = in(reg64) pointer,
                    expected = in(reg32) expected,
                    value = in(reg32) value,
                    options(nostack, preserves_flags),
                );
            }
            old
        }
        _ => {
            // SAFETY: the caller vouches for the memory.
            let memory = unsafe { AtomicU32::from_ptr(pointer) };
            match memory.compare_exchange(expected, value, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(old) => old,
                Err(old) => {
                    // This may be a loop that waits for another thread.
                    with_thread(|thread| thread.spin());
                    old
                }
            }
        }
    }
}

/// Reads `*pointer`; what the thread that stored the value with [`store_release_u32`] wrote before is then visible.
///
/// # Safety
/// `pointer` is to device memory, aligned to four bytes.
#[inline(always)]
pub unsafe fn load_acquire_u32(pointer: *const u32) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let value;
            // SAFETY: the caller vouches for the memory.
            unsafe {
                core::arch::asm!(
                    "ld.acquire.gpu.global.u32 {value}, [{pointer}];",
                    value = out(reg32) value,
                    pointer = in(reg64) pointer,
                    options(nostack, preserves_flags),
                );
            }
            value
        }
        _ => {
            // This may be a loop that waits for another thread, which must get to run.
            with_thread(|thread| thread.spin());
            // SAFETY: the caller vouches for the memory.
            unsafe { AtomicU32::from_ptr(pointer.cast_mut()) }.load(Ordering::Acquire)
        }
    }
}

/// Sets `*pointer` to `value`, after everything that the thread wrote before.
///
/// # Safety
/// `pointer` is to device memory, aligned to four bytes.
#[inline(always)]
pub unsafe fn store_release_u32(pointer: *mut u32, value: u32) {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: the caller vouches for the memory.
            unsafe {
                core::arch::asm!(
                    "st.release.gpu.global.u32 [{pointer}], {value};",
                    pointer = in(reg64) pointer,
                    value = in(reg32) value,
                    options(nostack, preserves_flags),
                );
            }
        }
        // SAFETY: the caller vouches for the memory.
        _ => unsafe { AtomicU32::from_ptr(pointer) }.store(value, Ordering::Release),
    }
}

/// Sets `*pointer` to `value`, in memory that the host watches meanwhile: it sees the whole value soon, and nothing of what else the
/// thread has written until the kernel has ended.
///
/// # Safety
/// `pointer` is to device memory or to the host's that kernels write to, aligned to four bytes.
#[inline(always)]
pub unsafe fn store_for_host_u32(pointer: *mut u32, value: u32) {
    cfg_select! {
        target_arch = "nvptx64" => {
            // SAFETY: the caller vouches for the memory.
            unsafe {
                core::arch::asm!(
                    "st.relaxed.sys.global.u32 [{pointer}], {value};",
                    pointer = in(reg64) pointer,
                    value = in(reg32) value,
                    options(nostack, preserves_flags),
                );
            }
        }
        // SAFETY: the caller vouches for the memory.
        _ => unsafe { AtomicU32::from_ptr(pointer) }.store(value, Ordering::Relaxed),
    }
}

/// Orders this thread's memory accesses before the fence and those after it, for all threads of the GPU.
#[inline(always)]
pub fn thread_fence() {
    cfg_select! {
        // SAFETY: orders memory accesses and does nothing else.
        target_arch = "nvptx64" => unsafe {
            core::arch::asm!("fence.acq_rel.gpu;", options(nostack, preserves_flags))
        },
        _ => fence(Ordering::AcqRel),
    }
}
