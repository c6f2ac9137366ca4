//! Loads from device memory that say how the data is used. On the CPU they are plain reads.
//!
//! A *streamed* load (`ld_stream_*`) is for data that no kernel writes while this one runs and that is read once,
//! such as weights: it goes past the L1 cache. A *global* load (`ld_global_*`) is coherent: for what an earlier
//! kernel or, after a barrier, another thread wrote.

macro_rules! loads {
    ($($name:ident, $ty:ty, $instruction:literal, [$($register:ident),*], $class:ident, $doc:literal;)*) => {$(
        #[doc = $doc]
        ///
        /// # Safety
        /// `pointer` is to readable device memory, aligned to the size of the value.
        #[inline(always)]
        pub unsafe fn $name(pointer: *const $ty) -> $ty {
            cfg_select! {
                target_arch = "nvptx64" => {
                    $(let $register;)*
                    // SAFETY: the caller vouches for the memory.
                    unsafe {
                        core::arch::asm!(
                            $instruction,
                            $($register = out($class) $register,)*
                            pointer = in(reg64) pointer,
                            options(pure, readonly, nostack, preserves_flags),
                        );
                    }
                    loads!(@value $($register)*)
                }
                _ => {
                    debug_assert!(pointer.addr().is_multiple_of(size_of::<$ty>()), "misaligned load");
                    // SAFETY: the caller vouches for the memory.
                    unsafe { pointer.read() }
                }
            }
        }
    )*};
    (@value $register:ident) => { $register };
    (@value $($register:ident)*) => { [$($register),*] };
}

loads! {
    ld_stream_u32x4, [u32; 4],
        "ld.global.nc.L1::no_allocate.v4.u32 {{{a}, {b}, {c}, {d}}}, [{pointer}];", [a, b, c, d], reg32,
        "Streams 16 bytes.";
    ld_stream_u32x2, [u32; 2],
        "ld.global.nc.L1::no_allocate.v2.u32 {{{a}, {b}}}, [{pointer}];", [a, b], reg32,
        "Streams 8 bytes.";
    ld_stream_u32, u32, "ld.global.nc.L1::no_allocate.u32 {a}, [{pointer}];", [a], reg32, "Streams 4 bytes.";
    ld_stream_u16, u16, "ld.global.nc.L1::no_allocate.u16 {a}, [{pointer}];", [a], reg16, "Streams 2 bytes.";
    ld_global_u32x4, [u32; 4],
        "ld.global.v4.u32 {{{a}, {b}, {c}, {d}}}, [{pointer}];", [a, b, c, d], reg32,
        "Reads 16 bytes, coherently.";
    ld_global_u32x2, [u32; 2],
        "ld.global.v2.u32 {{{a}, {b}}}, [{pointer}];", [a, b], reg32,
        "Reads 8 bytes, coherently.";
    ld_global_u32, u32, "ld.global.u32 {a}, [{pointer}];", [a], reg32, "Reads 4 bytes, coherently.";
    ld_global_u16, u16, "ld.global.u16 {a}, [{pointer}];", [a], reg16, "Reads 2 bytes, coherently.";
}

/// Asks the L2 cache for `bytes` bytes, a multiple of 16, without waiting for them. Does nothing before compute
/// capability 9.0.
///
/// Nothing is read or written: the memory may be another kernel's at the time. `from` is a multiple of 16.
#[inline(always)]
pub fn prefetch_l2(from: *const u8, bytes: u32) {
    cfg_select! {
        all(target_arch = "nvptx64", cuda_sm_90) => {
            // SAFETY: a hint.
            unsafe {
                core::arch::asm!(
                    "cp.async.bulk.prefetch.L2.global [{from}], {bytes};",
                    from = in(reg64) from,
                    bytes = in(reg32) bytes,
                    options(nostack, preserves_flags),
                );
            }
        }
        _ => {
            let _ = (from, bytes);
        }
    }
}

/// Writes 16 bytes.
///
/// # Safety
/// `pointer` is to writable device memory, at a multiple of 16.
#[inline(always)]
pub unsafe fn st_global_u32x4(pointer: *mut [u32; 4], value: [u32; 4]) {
    cfg_select! {
        target_arch = "nvptx64" => {
            let [a, b, c, d] = value;
            // SAFETY: the caller vouches for the memory.
            unsafe {
                core::arch::asm!(
                    "st.global.v4.u32 [{pointer}], {{{a}, {b}, {c}, {d}}};",
                    pointer = in(reg64) pointer,
                    a = in(reg32) a,
                    b = in(reg32) b,
                    c = in(reg32) c,
                    d = in(reg32) d,
                    options(nostack, preserves_flags),
                );
            }
        }
        _ => {
            debug_assert!(pointer.addr().is_multiple_of(size_of::<[u32; 4]>()), "misaligned store");
            // SAFETY: the caller vouches for the memory.
            unsafe { pointer.write(value) }
        }
    }
}
