//! Shared memory: fast memory that the threads of a block have in common.
//!
//! [`shared_array!`](crate::shared_array) declares an array of fixed size, [`dynamic_shared!`](crate::dynamic_shared)
//! takes the bytes that the launch asked for. Both give a handle that is copied around like a pointer. What an element
//! holds before the block has written it is unspecified; the emulator fills the memory with 0xFF bytes (NaN in every
//! float type) at the start of each block.
//!
//! Indices are checked in debug builds, and always on the emulator.

use crate::codegen::Settle;
#[cfg(target_arch = "nvptx64")]
use crate::codegen::settled;
use core::marker::PhantomData;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::with_thread;

/// Where an array starts: in the shared window on a GPU, in the block's memory on the emulator.
#[cfg(target_arch = "nvptx64")]
type Address = u32;
#[cfg(not(target_arch = "nvptx64"))]
type Address = *mut u8;

/// What shared memory can hold: plain values of 1, 2, 4 or 8 bytes.
///
/// # Safety
/// Every bit pattern is a value of the type, and it has no padding.
pub unsafe trait SharedValue: Copy + 'static {
    /// Reads an element.
    ///
    /// # Safety
    /// `address` is that of an element in this block's shared memory.
    #[doc(hidden)]
    unsafe fn load(address: Address) -> Self;

    /// Writes an element.
    ///
    /// # Safety
    /// As [`load`](Self::load).
    #[doc(hidden)]
    unsafe fn store(address: Address, value: Self);
}

/// A [`SharedValue`] of four bytes, four of which are read or written at once.
///
/// # Safety
/// As [`SharedValue`]; the size is 4.
pub unsafe trait SharedWord: SharedValue {
    /// Reads four elements.
    ///
    /// # Safety
    /// As [`SharedValue::load`], for four elements whose address is a multiple of 16.
    #[doc(hidden)]
    unsafe fn load4(address: Address) -> [Self; 4];

    /// Writes four elements.
    ///
    /// # Safety
    /// As [`load4`](Self::load4).
    #[doc(hidden)]
    unsafe fn store4(address: Address, values: [Self; 4]);
}

macro_rules! shared_values {
    ($($ty:ty, $class:ident, $suffix:literal;)*) => {$(
        // SAFETY: plain integers and floats.
        unsafe impl SharedValue for $ty {
            #[inline(always)]
            unsafe fn load(address: Address) -> Self {
                cfg_select! {
                    target_arch = "nvptx64" => {
                        let value;
                        // SAFETY: the caller vouches for the address.
                        unsafe {
                            core::arch::asm!(
                                concat!("ld.shared.", $suffix, " {value}, [{address}];"),
                                value = out($class) value,
                                address = in(reg32) address,
                                options(pure, readonly, nostack, preserves_flags),
                            );
                        }
                        value
                    }
                    // SAFETY: the caller vouches for the address.
                    _ => unsafe { address.cast::<Self>().read() },
                }
            }

            #[inline(always)]
            unsafe fn store(address: Address, value: Self) {
                cfg_select! {
                    // SAFETY: the caller vouches for the address.
                    target_arch = "nvptx64" => unsafe {
                        core::arch::asm!(
                            concat!("st.shared.", $suffix, " [{address}], {value};"),
                            value = in($class) value,
                            address = in(reg32) address,
                            options(nostack, preserves_flags),
                        )
                    },
                    // SAFETY: the caller vouches for the address.
                    _ => unsafe { address.cast::<Self>().write(value) },
                }
            }
        }
    )*};
}

shared_values! {
    u8, reg16, "u8";
    i8, reg16, "s8";
    u16, reg16, "u16";
    i16, reg16, "s16";
    u32, reg32, "u32";
    i32, reg32, "s32";
    f32, reg32, "f32";
    u64, reg64, "u64";
    i64, reg64, "s64";
    f64, reg64, "f64";
}

macro_rules! shared_words {
    ($($ty:ty, $suffix:literal;)*) => {$(
        // SAFETY: four bytes each.
        unsafe impl SharedWord for $ty {
            #[inline(always)]
            unsafe fn load4(address: Address) -> [Self; 4] {
                cfg_select! {
                    target_arch = "nvptx64" => {
                        let (a, b, c, d);
                        // SAFETY: the caller vouches for the address.
                        unsafe {
                            core::arch::asm!(
                                concat!("ld.shared.v4.", $suffix, " {{{a}, {b}, {c}, {d}}}, [{address}];"),
                                a = out(reg32) a,
                                b = out(reg32) b,
                                c = out(reg32) c,
                                d = out(reg32) d,
                                address = in(reg32) address,
                                options(pure, readonly, nostack, preserves_flags),
                            );
                        }
                        [a, b, c, d]
                    }
                    // SAFETY: the caller vouches for the address.
                    _ => unsafe { address.cast::<[Self; 4]>().read() },
                }
            }

            #[inline(always)]
            unsafe fn store4(address: Address, values: [Self; 4]) {
                cfg_select! {
                    // SAFETY: the caller vouches for the address.
                    target_arch = "nvptx64" => unsafe {
                        core::arch::asm!(
                            concat!("st.shared.v4.", $suffix, " [{address}], {{{a}, {b}, {c}, {d}}};"),
                            a = in(reg32) values[0],
                            b = in(reg32) values[1],
                            c = in(reg32) values[2],
                            d = in(reg32) values[3],
                            address = in(reg32) address,
                            options(nostack, preserves_flags),
                        )
                    },
                    // SAFETY: the caller vouches for the address.
                    _ => unsafe { address.cast::<[Self; 4]>().write(values) },
                }
            }
        }
    )*};
}

shared_words! {
    u32, "u32";
    i32, "s32";
    f32, "f32";
}

#[inline(always)]
fn element<T>(start: Address, index: usize) -> Address {
    cfg_select! {
        target_arch = "nvptx64" => start + index as u32 * size_of::<T>() as u32,
        // In bounds, as the caller has checked; wrapping only says so without `unsafe`.
        _ => start.wrapping_add(index * size_of::<T>()),
    }
}

/// Whether `count` elements from `index` on lie among `len`: a panic that says so otherwise.
#[inline(always)]
#[track_caller]
fn check(index: usize, count: usize, len: usize) {
    if cfg!(any(not(target_arch = "nvptx64"), debug_assertions)) {
        assert!(
            index < len && count <= len - index,
            "index out of bounds: the shared array has {len} elements, the access is to {count} at {index}"
        );
        assert!(
            index.is_multiple_of(count),
            "misaligned: an access to {count} elements of a shared array at {index}"
        );
    }
}

/// The accesses of both kinds of handle, which differ only in where the length comes from.
macro_rules! accesses {
    () => {
        /// Element `index`.
        #[inline(always)]
        #[track_caller]
        pub fn get(self, index: usize) -> T {
            check(index, 1, self.len());
            // SAFETY: the element is inside the array.
            unsafe { T::load(element::<T>(self.address(), index)) }
        }

        /// Sets element `index`.
        #[inline(always)]
        #[track_caller]
        pub fn set(self, index: usize, value: T) {
            check(index, 1, self.len());
            // SAFETY: the element is inside the array.
            unsafe { T::store(element::<T>(self.address(), index), value) }
        }

        /// Elements `index` to `index + 3`, in one access; `index` is a multiple of 4.
        #[inline(always)]
        #[track_caller]
        pub fn get4(self, index: usize) -> [T; 4]
        where
            T: SharedWord,
        {
            check(index, 4, self.len());
            // SAFETY: the elements are inside the array, which starts at a multiple of 16.
            unsafe { T::load4(element::<T>(self.address(), index)) }
        }

        /// Sets elements `index` to `index + 3`, in one access; `index` is a multiple of 4.
        #[inline(always)]
        #[track_caller]
        pub fn set4(self, index: usize, values: [T; 4])
        where
            T: SharedWord,
        {
            check(index, 4, self.len());
            // SAFETY: the elements are inside the array, which starts at a multiple of 16.
            unsafe { T::store4(element::<T>(self.address(), index), values) }
        }

        /// Whether there are no elements.
        #[inline(always)]
        pub fn is_empty(self) -> bool {
            self.len() == 0
        }
    };
}

/// A handle to a shared array of `N` elements, from [`shared_array!`](crate::shared_array).
#[derive(Debug)]
pub struct Shared<T, const N: usize> {
    address: Address,
    values: PhantomData<*mut T>,
}

impl<T, const N: usize> Clone for Shared<T, N> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const N: usize> Copy for Shared<T, N> {}

impl<T: SharedValue, const N: usize> Shared<T, N> {
    /// The array at an address.
    ///
    /// # Safety
    /// `N` elements lie there, in this block's shared memory, at a multiple of 16.
    #[doc(hidden)]
    #[inline(always)]
    pub unsafe fn at(address: Address) -> Self {
        Self { address, values: PhantomData }
    }

    /// The number of elements.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty, reason = "among the accesses below")]
    pub const fn len(self) -> usize {
        N
    }

    #[inline(always)]
    fn address(self) -> Address {
        self.address
    }

    accesses!();
}

impl<const N: usize> Shared<u32, N> {
    /// Adds to element `index`, wrapping around, in one step that no other thread's comes between; returns the value
    /// before.
    #[inline(always)]
    #[track_caller]
    pub fn atomic_add(self, index: usize, value: u32) -> u32 {
        check(index, 1, N);
        let address = element::<u32>(self.address, index);
        cfg_select! {
            target_arch = "nvptx64" => {
                let old;
                // SAFETY: the element is inside the array.
                unsafe {
                    core::arch::asm!(
                        "atom.relaxed.cta.shared.add.u32 {old}, [{address}], {value};",
                        old = out(reg32) old,
                        address = in(reg32) address,
                        value = in(reg32) value,
                        options(nostack, preserves_flags),
                    );
                }
                old
            }
            // The threads of a block take turns, and never in the middle of this.
            // SAFETY: the element is inside the array.
            _ => unsafe {
                let old = u32::load(address);
                u32::store(address, old.wrapping_add(value));
                old
            },
        }
    }
}

/// A handle to the dynamic shared memory of the launch, from [`dynamic_shared!`](crate::dynamic_shared).
#[derive(Debug)]
pub struct DynamicShared<T> {
    address: Address,
    len: usize,
    values: PhantomData<*mut T>,
}

impl<T> Clone for DynamicShared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DynamicShared<T> {}

impl<T> Settle for DynamicShared<T> {
    #[inline(always)]
    fn settle(self) -> Self {
        cfg_select! {
            target_arch = "nvptx64" => Self { address: settled(self.address), ..self },
            _ => self,
        }
    }
}

impl<T: SharedValue> DynamicShared<T> {
    /// The launch's dynamic shared memory as an array.
    #[cfg(not(target_arch = "nvptx64"))]
    #[doc(hidden)]
    #[inline(always)]
    pub fn of_launch() -> Self {
        let (address, bytes) = with_thread(|thread| thread.dynamic_shared());
        Self { address, len: bytes as usize / size_of::<T>(), values: PhantomData }
    }

    /// An array of `bytes` bytes at an address.
    ///
    /// # Safety
    /// They lie there, in this block's shared memory, at a multiple of 16.
    #[cfg(target_arch = "nvptx64")]
    #[doc(hidden)]
    #[inline(always)]
    pub unsafe fn at(address: Address, bytes: u32) -> Self {
        Self { address, len: bytes as usize / size_of::<T>(), values: PhantomData }
    }

    /// The number of elements: the launch's bytes by the size of an element.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty, reason = "among the accesses below")]
    pub fn len(self) -> usize {
        self.len
    }

    #[inline(always)]
    fn address(self) -> Address {
        self.address
    }

    /// The same memory as an array of other values.
    #[inline(always)]
    pub fn view<U: SharedValue>(self) -> DynamicShared<U> {
        DynamicShared {
            address: self.address,
            len: self.len * size_of::<T>() / size_of::<U>(),
            values: PhantomData,
        }
    }

    /// The element at byte `byte`, a multiple of its size: of an address in bytes that is a sum, its parts stay apart, where an
    /// index would have to be made of the sum.
    #[inline(always)]
    #[track_caller]
    pub fn get_at(self, byte: u32) -> T {
        self.check_at(byte, 1);
        // SAFETY: the element is inside the array.
        unsafe { T::load(element::<u8>(self.address(), byte as usize)) }
    }

    /// Likewise four elements, at a multiple of their size, in one access.
    #[inline(always)]
    #[track_caller]
    pub fn get4_at(self, byte: u32) -> [T; 4]
    where
        T: SharedWord,
    {
        self.check_at(byte, 4);
        // SAFETY: the elements are inside the array, which starts at a multiple of 16.
        unsafe { T::load4(element::<u8>(self.address(), byte as usize)) }
    }

    #[inline(always)]
    #[track_caller]
    fn check_at(self, byte: u32, count: usize) {
        if cfg!(any(not(target_arch = "nvptx64"), debug_assertions)) {
            let (index, rest) = (byte as usize / size_of::<T>(), byte as usize % size_of::<T>());
            assert!(rest == 0, "misaligned: an access to values of {} bytes at byte {byte}", size_of::<T>());
            check(index, count, self.len());
        }
    }

    /// Copies `bytes` bytes to element `index` and on.
    ///
    /// # Safety
    /// `from` is to as many readable bytes.
    #[cfg(not(target_arch = "nvptx64"))]
    #[track_caller]
    pub(crate) unsafe fn copy_from(self, index: usize, from: *const u8, bytes: usize) {
        let (first, len) = (index * size_of::<T>(), self.len * size_of::<T>());
        assert!(
            first <= len && bytes <= len - first,
            "index out of bounds: the shared memory has {len} bytes, the copy is of {bytes} to {first}"
        );
        // SAFETY: the caller vouches for the source; the destination is inside this block's memory.
        unsafe { self.address.wrapping_add(first).copy_from_nonoverlapping(from, bytes) };
    }

    /// The same memory of block `rank` of the cluster.
    #[cfg(not(target_arch = "nvptx64"))]
    #[track_caller]
    pub(crate) fn of_block(self, rank: u32) -> Self {
        Self { address: with_thread(|thread| thread.dynamic_shared_of(rank)), ..self }
    }

    /// Where element `index` lies in the shared window.
    #[cfg(target_arch = "nvptx64")]
    #[inline(always)]
    pub(crate) fn address_of(self, index: usize) -> Address {
        element::<T>(self.address, index)
    }

    accesses!();
}

/// What a [`shared_array!`](crate::shared_array) is known by on the emulator.
#[cfg(not(target_arch = "nvptx64"))]
#[doc(hidden)]
#[derive(Debug)]
pub struct SharedArray<T, const N: usize> {
    id: crate::launch::Id,
    name: &'static str,
    values: PhantomData<fn() -> T>,
}

#[cfg(not(target_arch = "nvptx64"))]
impl<T: SharedValue, const N: usize> SharedArray<T, N> {
    #[doc(hidden)]
    pub const fn new(name: &'static str) -> Self {
        Self { id: crate::launch::Id::new(), name, values: PhantomData }
    }

    /// The running block's array.
    #[doc(hidden)]
    #[inline]
    pub fn of_block(&'static self) -> Shared<T, N> {
        static ARRAYS: crate::launch::IdSource = crate::launch::IdSource::new();
        let id = self.id.get(&ARRAYS);
        let address = with_thread(|thread| thread.static_shared(id, self.name, N * size_of::<T>()));
        Shared { address, values: PhantomData }
    }
}

/// Declares a shared array and gives the handle to it, a [`Shared`](crate::shared::Shared).
///
/// ```ignore
/// let tile = shared_array!(AXPY_TILE: [f32; 256]);
/// tile.set(thread_idx_x() as usize, 0.0);
/// ```
///
/// The name is the array's symbol in the PTX, so it must be unique in the crate, and the declaration must not be in
/// code that a macro repeats. The length may be computed from constants of the module, not of the function. All
/// threads that run the declaration get the same array.
#[cfg(target_arch = "nvptx64")]
#[macro_export]
macro_rules! shared_array {
    ($name:ident : [$T:ty ; $n:expr]) => {{
        mod declaration {
            #[allow(unused_imports)]
            use super::*;
            ::core::arch::global_asm!(
                concat!(".shared .align 16 .b8 ", stringify!($name), "[{bytes}];"),
                bytes = const { $n * ::core::mem::size_of::<$T>() },
            );
        }
        let address: u32;
        // SAFETY: the array was declared above, at a multiple of 16.
        unsafe {
            ::core::arch::asm!(
                concat!("mov.u32 {address}, ", stringify!($name), ";"),
                address = out(reg32) address,
                options(pure, nomem, nostack, preserves_flags),
            );
            $crate::shared::Shared::<$T, { $n }>::at(address)
        }
    }};
}

/// Declares a shared array and gives the handle to it, a [`Shared`](crate::shared::Shared).
///
/// ```
/// # use cuda_std::{kernel, shared_array, thread::thread_idx_x};
/// # #[kernel] pub unsafe fn axpy() {
/// let tile = shared_array!(AXPY_TILE: [f32; 256]);
/// tile.set(thread_idx_x() as usize, 0.0);
/// # }
/// ```
///
/// The name is the array's symbol in the PTX, so it must be unique in the crate, and the declaration must not be in
/// code that a macro repeats. The length may be computed from constants of the module, not of the function. All
/// threads that run the declaration get the same array.
#[cfg(not(target_arch = "nvptx64"))]
#[macro_export]
macro_rules! shared_array {
    ($name:ident : [$T:ty ; $n:expr]) => {{
        mod declaration {
            #[allow(unused_imports)]
            use super::*;
            pub(super) static $name: $crate::shared::SharedArray<$T, { $n }> =
                $crate::shared::SharedArray::new(stringify!($name));
        }
        declaration::$name.of_block()
    }};
}

/// The dynamic shared memory of the launch as an array, a [`DynamicShared`](crate::shared::DynamicShared).
///
/// ```ignore
/// let memory = dynamic_shared!(AXPY_MEMORY: [u32]);
/// ```
///
/// There is one such memory per block: every use is a view of the same bytes. The name is a symbol in the PTX, as for
/// [`shared_array!`].
#[cfg(target_arch = "nvptx64")]
#[macro_export]
macro_rules! dynamic_shared {
    ($name:ident : [$T:ty]) => {{
        mod declaration {
            ::core::arch::global_asm!(concat!(".extern .shared .align 16 .b8 ", stringify!($name), "[];"));
        }
        let (address, bytes): (u32, u32);
        // SAFETY: reads an address and a special register; the memory was declared above, at a multiple of 16.
        unsafe {
            ::core::arch::asm!(
                concat!("mov.u32 {address}, ", stringify!($name), ";"),
                "mov.u32 {bytes}, %dynamic_smem_size;",
                address = out(reg32) address,
                bytes = out(reg32) bytes,
                options(pure, nomem, nostack, preserves_flags),
            );
            $crate::shared::DynamicShared::<$T>::at(address, bytes)
        }
    }};
}

/// The dynamic shared memory of the launch as an array, a [`DynamicShared`](crate::shared::DynamicShared).
///
/// ```
/// # use cuda_std::{kernel, dynamic_shared};
/// # #[kernel] pub unsafe fn axpy() {
/// let memory = dynamic_shared!(AXPY_MEMORY: [u32]);
/// # }
/// ```
///
/// There is one such memory per block: every use is a view of the same bytes. The name is a symbol in the PTX, as for
/// [`shared_array!`].
#[cfg(not(target_arch = "nvptx64"))]
#[macro_export]
macro_rules! dynamic_shared {
    ($name:ident : [$T:ty]) => {
        $crate::shared::DynamicShared::<$T>::of_launch()
    };
}
