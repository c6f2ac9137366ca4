//! Shuffles: each lane reads another lane's value.

use super::check_width;

#[cfg(not(target_arch = "nvptx64"))]
use super::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{Collective, Lanes, collective, with_thread};

/// A value of 32 bits that can be shuffled.
pub trait Shuffle: Copy {
    /// The value's bits.
    fn to_bits(self) -> u32;
    /// The value with these bits.
    fn from_bits(bits: u32) -> Self;
}

impl Shuffle for u32 {
    #[inline(always)]
    fn to_bits(self) -> u32 {
        self
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits
    }
}

impl Shuffle for i32 {
    #[inline(always)]
    fn to_bits(self) -> u32 {
        self as u32
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        bits as i32
    }
}

impl Shuffle for f32 {
    #[inline(always)]
    fn to_bits(self) -> u32 {
        self.to_bits()
    }

    #[inline(always)]
    fn from_bits(bits: u32) -> Self {
        f32::from_bits(bits)
    }
}

/// The value of the lane whose number differs by exclusive or with `lane`; a lane whose partner lies in a later group
/// gets its own.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_xor<T: Shuffle>(mask: u32, value: T, lane: u32, width: u32) -> T {
    check_width(width);
    cfg_select! {
        // SAFETY: a shuffle touches no memory.
        target_arch = "nvptx64" => T::from_bits(unsafe {
            device::xor(mask, value.to_bits(), lane, device::groups(width) | 0x1f)
        }),
        _ => shuffle(mask, value, |own| {
            let source = own ^ lane;
            if source <= own | (width - 1) { source } else { own }
        }),
    }
}

/// [`warp_shuffle_xor`] over the whole warp, of several values at once.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_xor_n<T: Shuffle, const N: usize>(mask: u32, values: [T; N], lane: u32) -> [T; N] {
    cfg_select! {
        target_arch = "nvptx64" => {
            let mut values = values;
            let mut i = 0;
            while i < N {
                values[i] = warp_shuffle_xor(mask, values[i], lane, 32);
                i += 1;
            }
            values
        }
        _ => shuffle_n(mask, values, |own| own ^ lane & (WARP_SIZE - 1)),
    }
}

/// The value of lane `lane % width` of the group.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_idx<T: Shuffle>(mask: u32, value: T, lane: u32, width: u32) -> T {
    check_width(width);
    cfg_select! {
        // SAFETY: a shuffle touches no memory.
        target_arch = "nvptx64" => T::from_bits(unsafe {
            device::idx(mask, value.to_bits(), lane, device::groups(width) | 0x1f)
        }),
        _ => shuffle(mask, value, |own| own & !(width - 1) | lane & (width - 1)),
    }
}

/// The value of the lane `lane` places further on; the last lanes of the group get their own.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_down<T: Shuffle>(mask: u32, value: T, lane: u32, width: u32) -> T {
    check_width(width);
    cfg_select! {
        // SAFETY: a shuffle touches no memory.
        target_arch = "nvptx64" => T::from_bits(unsafe {
            device::down(mask, value.to_bits(), lane, device::groups(width) | 0x1f)
        }),
        _ => shuffle(mask, value, |own| {
            let source = own + (lane & (WARP_SIZE - 1));
            if source <= own | (width - 1) { source } else { own }
        }),
    }
}

/// The value of the lane `lane` places before; the first lanes of the group get their own.
#[inline(always)]
#[track_caller]
pub fn warp_shuffle_up<T: Shuffle>(mask: u32, value: T, lane: u32, width: u32) -> T {
    check_width(width);
    cfg_select! {
        // SAFETY: a shuffle touches no memory.
        target_arch = "nvptx64" => T::from_bits(unsafe {
            device::up(mask, value.to_bits(), lane, device::groups(width))
        }),
        _ => shuffle(mask, value, |own| {
            let first = own & !(width - 1);
            own.checked_sub(lane & (WARP_SIZE - 1)).filter(|&source| source >= first).unwrap_or(own)
        }),
    }
}

#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn shuffle<T: Shuffle>(mask: u32, value: T, source: impl Fn(u32) -> u32) -> T {
    let [value] = shuffle_n(mask, [value], source);
    value
}

/// Several values of the lane that `source` gives for each.
#[cfg(not(target_arch = "nvptx64"))]
#[inline(always)]
fn shuffle_n<T: Shuffle, const N: usize>(mask: u32, values: [T; N], source: impl Fn(u32) -> u32) -> [T; N] {
    let source = with_thread(|thread| source(thread.lane()));
    let operand = Operand { values: values.map(T::to_bits), source };
    collective::<Exchange<N>>(mask, 0, operand).values.map(T::from_bits)
}

#[cfg(not(target_arch = "nvptx64"))]
#[derive(Clone, Copy)]
struct Operand<const N: usize> {
    values: [u32; N],
    source: u32,
}

#[cfg(not(target_arch = "nvptx64"))]
struct Exchange<const N: usize>;

#[cfg(not(target_arch = "nvptx64"))]
impl<const N: usize> Collective for Exchange<N> {
    type Operand = Operand<N>;
    const NAME: &'static str = "a warp shuffle";

    fn compute(lanes: &Lanes<Self::Operand>, _parameter: u32) {
        let absent = Operand { values: [u32::MAX; N], source: 0 };
        let given: [Self::Operand; 32] = std::array::from_fn(|lane| lanes.get(lane).unwrap_or(absent));
        lanes.set_each(|lane| Operand { values: given[given[lane].source as usize].values, ..given[lane] });
    }
}

#[cfg(target_arch = "nvptx64")]
mod device {
    use crate::warp::WARP_SIZE;

    unsafe extern "unadjusted" {
        #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
        pub(super) fn xor(mask: u32, value: u32, lane: u32, control: u32) -> u32;
        #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
        pub(super) fn idx(mask: u32, value: u32, lane: u32, control: u32) -> u32;
        #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
        pub(super) fn down(mask: u32, value: u32, lane: u32, control: u32) -> u32;
        #[link_name = "llvm.nvvm.shfl.sync.up.i32"]
        pub(super) fn up(mask: u32, value: u32, lane: u32, control: u32) -> u32;
    }

    /// The bits of a shuffle's control word that keep the lane's group.
    #[inline(always)]
    pub(super) fn groups(width: u32) -> u32 {
        (WARP_SIZE - width) << 8
    }
}
