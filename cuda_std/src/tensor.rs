//! Tensor cores: products of small matrices whose elements are spread over a warp.
//!
//! A lane's place in a fragment is counted as PTX does: `group = lane / 4` and `member = lane % 4`. All lanes of the warp
//! take part in every call.

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::{Collective, Lanes, collective};
#[cfg(target_arch = "nvptx64")]
use crate::warp::lane_id;

/// Units in a call.
pub const UNITS: usize = 8;

/// Sixteen rows of bytes times a vector, in eight units of 32 columns that are summed up apart from each other.
///
/// - `rows[u]`: of unit `u`, four words of four bytes: of row `group` columns `8 * member` and on, of row `group + 8` the
///   same, and of both rows columns `8 * member + 4` and on
/// - `x`: of unit `group` of the vector, signed bytes: columns `8 * member` and on, and `8 * member + 4` and on
/// - gives the sums of row `group` for units `2 * member` and `2 * member + 1`, then those of row `group + 8`
///
/// On a GPU (from compute capability 8.0 on) this is eight products of 16 x 32 by 32 x 8 which share one result: the
/// second matrix of unit `u` has the vector in column `u` and zeros elsewhere. So every element of the result counts,
/// and each lane holds as much of the vector as it needs for all rows. (`mma.m16n8k32` counts the columns otherwise, the
/// same way for both operands: the order in which they are added up does not matter.)
#[inline(always)]
pub fn mma_units<B: Byte>(rows: [[u32; 4]; UNITS], x: [u32; 2]) -> [i32; 4] {
    cfg_select! {
        target_arch = "nvptx64" => {
            let group = lane_id() as usize / 4;
            let mut sums = [0; 4];
            let mut unit = 0;
            while unit < UNITS {
                let column = if group == unit { x } else { [0; 2] };
                sums = B::mma_k32(rows[unit], column, sums);
                unit += 1;
            }
            sums
        }
        _ => collective::<Units<B>>(crate::warp::FULL_MASK, 0, Operand { rows, x, sums: [[0; 4]; 2] }).sums[0],
    }
}

/// As [`mma_units`], with a sum for each half of a unit: first those of the first halves, then those of the second.
#[inline(always)]
pub fn mma_half_units<B: Byte>(rows: [[u32; 4]; UNITS], x: [u32; 2]) -> [[i32; 4]; 2] {
    cfg_select! {
        target_arch = "nvptx64" => {
            let lane = lane_id() as usize;
            // The first half is that of two members of each group.
            let (group, is_first) = (lane / 4, lane % 4 < 2);
            let (mut first, mut second) = ([0; 4], [0; 4]);
            let mut unit = 0;
            while unit < UNITS {
                let column = |is_mine: bool| if is_mine && group == unit { x } else { [0; 2] };
                first = B::mma_k32(rows[unit], column(is_first), first);
                second = B::mma_k32(rows[unit], column(!is_first), second);
                unit += 1;
            }
            [first, second]
        }
        _ => collective::<HalfUnits<B>>(crate::warp::FULL_MASK, 0, Operand { rows, x, sums: [[0; 4]; 2] }).sums,
    }
}

/// Whether the rows' bytes have a sign.
pub trait Byte: Copy + 'static {
    /// The value of a byte.
    #[cfg(not(target_arch = "nvptx64"))]
    #[doc(hidden)]
    fn widen(byte: u8) -> i16;

    #[cfg(target_arch = "nvptx64")]
    #[doc(hidden)]
    fn mma_k32(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4];
}

macro_rules! byte {
    ($Type:ident, $name:literal) => {
        impl Byte for $Type {
            #[cfg(not(target_arch = "nvptx64"))]
            #[inline(always)]
            fn widen(byte: u8) -> i16 {
                i16::from(byte as $Type)
            }

            #[cfg(target_arch = "nvptx64")]
            #[inline(always)]
            fn mma_k32(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
                let (d0, d1, d2, d3);
                // SAFETY: arithmetic alone; all lanes are here.
                unsafe {
                    core::arch::asm!(
                        concat!(
                            "mma.sync.aligned.m16n8k32.row.col.s32.", $name, ".s8.s32 ",
                            "{{{d0}, {d1}, {d2}, {d3}}}, {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, \
                             {{{c0}, {c1}, {c2}, {c3}}};",
                        ),
                        d0 = out(reg32) d0, d1 = out(reg32) d1, d2 = out(reg32) d2, d3 = out(reg32) d3,
                        a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                        b0 = in(reg32) b[0], b1 = in(reg32) b[1],
                        c0 = in(reg32) c[0], c1 = in(reg32) c[1], c2 = in(reg32) c[2], c3 = in(reg32) c[3],
                        options(nomem, nostack, preserves_flags),
                    );
                }
                [d0, d1, d2, d3]
            }
        }
    };
}

byte!(u8, "u8");
byte!(i8, "s8");

#[cfg(not(target_arch = "nvptx64"))]
mod emulated {
    use super::*;
    use std::marker::PhantomData;

    #[derive(Clone, Copy)]
    pub(super) struct Operand {
        pub(super) rows: [[u32; 4]; UNITS],
        pub(super) x: [u32; 2],
        pub(super) sums: [[i32; 4]; 2],
    }

    pub(super) struct Units<B>(PhantomData<B>);
    pub(super) struct HalfUnits<B>(PhantomData<B>);

    impl<B: Byte> Collective for Units<B> {
        type Operand = Operand;
        const NAME: &'static str = "mma_units";

        fn compute(lanes: &Lanes<Operand>, _: u32) {
            multiply::<B>(lanes, |[low, high]| [low + high, 0]);
        }
    }

    impl<B: Byte> Collective for HalfUnits<B> {
        type Operand = Operand;
        const NAME: &'static str = "mma_half_units";

        fn compute(lanes: &Lanes<Operand>, _: u32) {
            multiply::<B>(lanes, |halves| halves);
        }
    }

    /// Columns in a unit.
    const COLUMNS: usize = 32;

    /// All sums, of both halves of each unit as `finish` puts them together.
    fn multiply<B: Byte>(lanes: &Lanes<Operand>, finish: impl Fn([i32; 2]) -> [i32; 2]) {
        const MISSING: Operand = Operand { rows: [[u32::MAX; 4]; UNITS], x: [u32::MAX; 2], sums: [[-1; 4]; 2] };
        let operands: [Operand; 32] = std::array::from_fn(|lane| lanes.get(lane).unwrap_or(MISSING));
        // The sums of a row and a unit, by half.
        let mut sums = [[[0; 2]; UNITS]; 16];
        for unit in 0..UNITS {
            let mut x = [0i16; COLUMNS];
            for word in 0..8 {
                let bytes = operands[4 * unit + word / 2].x[word % 2].to_le_bytes();
                x[4 * word..][..4].copy_from_slice(&bytes.map(|byte| i16::from(byte as i8)));
            }
            for row in 0..16 {
                let mut a = [0i16; COLUMNS];
                for word in 0..8 {
                    let operand = &operands[row % 8 * 4 + word / 2];
                    let bytes = operand.rows[unit][word % 2 * 2 + row / 8].to_le_bytes();
                    a[4 * word..][..4].copy_from_slice(&bytes.map(B::widen));
                }
                let dot = |half: usize| -> i32 {
                    let columns = half * COLUMNS / 2..(half + 1) * COLUMNS / 2;
                    a[columns.clone()].iter().zip(&x[columns]).map(|(&a, &x)| i32::from(a) * i32::from(x)).sum()
                };
                sums[row][unit] = finish([dot(0), dot(1)]);
            }
        }
        lanes.set_each(|lane| {
            let (group, member) = (lane / 4, lane % 4);
            let at = |half: usize, i: usize| sums[group + i / 2 * 8][2 * member + i % 2][half];
            let of_half = |half: usize| [at(half, 0), at(half, 1), at(half, 2), at(half, 3)];
            Operand { sums: [of_half(0), of_half(1)], ..MISSING }
        });
    }
}
#[cfg(not(target_arch = "nvptx64"))]
use emulated::{HalfUnits, Operand, Units};
