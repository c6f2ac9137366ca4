//! Tensor cores: products of small matrices of 16-bit floating-point numbers, with sums in f32.
//!
//! The elements of the first matrix and of the result are spread over the lanes of a warp, as PTX's `m16n8k16` has them:
//! with `group = lane / 4` and `member = lane % 4`, a lane holds of the first matrix, 16 rows by 16 columns, four words of
//! two neighbouring columns each: row `group`, columns `2 * member` and on; row `group + 8`, the same columns; row `group`,
//! columns `2 * member + 8` and on; row `group + 8`, the same columns. Of the result it holds, for every eight columns,
//! row `group`, columns `2 * member` and `2 * member + 1`, and the same of row `group + 8`. So a result, rounded, is a first
//! matrix again. The second matrix lies in shared memory, a [`Panel`] or a [`TransposedPanel`], or is spread over the lanes too
//! ([`multiply_add_in_registers`]).

use crate::shared::DynamicShared;

/// Inner dimension of a [`Panel`]: 128 bytes of each of its rows.
pub const PANEL_DEPTH: usize = 64;
/// Inner dimension of one instruction.
pub const STEP_DEPTH: usize = 16;
/// Instructions that go through a panel.
pub const PANEL_STEPS: usize = PANEL_DEPTH / STEP_DEPTH;
/// Words of a panel's row.
pub const PANEL_ROW_WORDS: usize = PANEL_DEPTH / 2;
/// Panels start at multiples of so many words in the window of shared memory.
pub const PANEL_ALIGNMENT: u32 = 256;

/// Where piece `piece` of 16 bytes stands in row `row` of a panel: pieces are exchanged so that eight rows' pieces of one
/// number lie in different banks, which is also what the tensor cores of compute capability 9.0 call a swizzle of 128
/// bytes.
#[inline(always)]
pub const fn swizzled(row: usize, piece: usize) -> usize {
    piece ^ (row % 8)
}

/// The 16-bit numbers of a product's operands.
pub trait Half: Copy + 'static {
    /// Whether they are IEEE's, with 11 bits of precision, or bfloat16, with 8 and the range of f32.
    const IS_IEEE: bool;
}

/// IEEE half precision.
#[derive(Clone, Copy, Debug)]
pub struct F16;
/// The upper half of an f32.
#[derive(Clone, Copy, Debug)]
pub struct Bf16;

impl Half for F16 {
    const IS_IEEE: bool = true;
}

impl Half for Bf16 {
    const IS_IEEE: bool = false;
}

/// The second matrix of a product, by its columns: a row of [`PANEL_DEPTH`] values for each column of the result, their
/// pieces of 16 bytes at their [`swizzled`] places.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    memory: DynamicShared<u32>,
    start: u32,
}

impl Panel {
    /// The panel at word `start`, a multiple of [`PANEL_ALIGNMENT`] after [`aligned_start`].
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32) -> Self {
        Self { memory, start }
    }
}

/// The second matrix of a product, by its rows: [`PANEL_DEPTH`] of them, each of the values of as many columns of the result,
/// their pieces of 16 bytes at their [`swizzled`] places.
#[derive(Clone, Copy, Debug)]
pub struct TransposedPanel {
    memory: DynamicShared<u32>,
    start: u32,
}

impl TransposedPanel {
    /// The panel at word `start`, a multiple of [`PANEL_ALIGNMENT`] after [`aligned_start`].
    #[inline(always)]
    pub fn new(memory: DynamicShared<u32>, start: u32) -> Self {
        Self { memory, start }
    }
}

/// The first word of the memory at which a panel can start, less than [`PANEL_ALIGNMENT`].
#[inline(always)]
pub fn aligned_start(memory: DynamicShared<u32>) -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => (memory.address_of(0).wrapping_neg() & (4 * PANEL_ALIGNMENT - 1)) / 4,
        _ => {
            let _ = memory;
            0
        }
    }
}

/// `sums += a * b` of a warp's 16 rows and the panel's rows, twice as many as `sums` has elements; `a` is one step of 16
/// columns after the other. Of the result only the first `wanted` columns are wanted: the others may be anything, which saves
/// the emulator their time.
///
/// All lanes of the warp take part, and from compute capability 9.0 on the other warps of its four as well (counted from
/// a multiple of four), with the same panel: there it is `wgmma`, before that `mma.sync`. `SUMS` is 8, 32, 64 or 128.
#[inline(always)]
pub fn multiply_add<T: Half, const SUMS: usize>(
    sums: &mut [f32; SUMS],
    a: [[u32; 4]; PANEL_STEPS],
    b: Panel,
    wanted: u32,
) {
    const { assert!(SUMS == 8 || SUMS == 32 || SUMS == 64 || SUMS == 128) };
    cfg_select! {
        all(target_arch = "nvptx64", cuda_sm_90a) => {
            let _ = wanted;
            // SAFETY: the tensor cores read the panel, and nothing else; the result is there when they are waited for.
            unsafe { warpgroup::multiply_add::<T, SUMS>(sums, a, b) }
        }
        target_arch = "nvptx64" => {
            let _ = wanted;
            warp::multiply_add::<T, SUMS>(sums, a, b);
        }
        _ => emulated::multiply_add::<T, SUMS>(sums, a, b, wanted),
    }
}

/// As [`multiply_add`] with a panel of [`PANEL_DEPTH`] columns that has them side by side.
#[inline(always)]
pub fn multiply_add_transposed<T: Half>(
    sums: &mut [f32; PANEL_DEPTH / 2],
    a: [[u32; 4]; PANEL_STEPS],
    b: TransposedPanel,
) {
    cfg_select! {
        all(target_arch = "nvptx64", cuda_sm_90a) => {
            // SAFETY: as above.
            unsafe { warpgroup::multiply_add_transposed::<T>(sums, a, b) }
        }
        target_arch = "nvptx64" => warp::multiply_add_transposed::<T>(sums, a, b),
        _ => emulated::multiply_add_transposed::<T>(sums, a, b),
    }
}

/// `sums + a * b`, of 16 rows and eight columns, with both matrices in registers: `b`, 16 rows by eight columns, in words of two neighbouring
/// rows of column `group`, rows `2 * member` and on, and `2 * member + 8` and on. All lanes of the warp take part.
#[inline(always)]
#[track_caller]
pub fn multiply_add_in_registers<T: Half>(a: [u32; 4], b: [u32; 2], sums: [f32; 4]) -> [f32; 4] {
    cfg_select! {
        target_arch = "nvptx64" => registers::multiply_add_16::<T>(a, b, sums),
        _ => emulated::multiply_add_in_registers::<T>(a, b, sums),
    }
}

/// Makes what this thread has written to shared memory, itself or by copies that it has waited for, visible to the tensor
/// cores: to be said before the barrier after which they read it. Copies of [`crate::pipeline`] need it not.
#[inline(always)]
pub fn publish() {
    // SAFETY: orders accesses to memory, and does nothing else.
    #[cfg(all(target_arch = "nvptx64", cuda_sm_90a))]
    unsafe {
        core::arch::asm!("fence.proxy.async.shared::cta;", options(nostack, preserves_flags));
    }
}

#[cfg(all(target_arch = "nvptx64", cuda_sm_90a))]
mod warpgroup {
    use super::{Half, PANEL_DEPTH, PANEL_STEPS, Panel, TransposedPanel};

    /// The instructions for one number of columns, all steps in one: between them the sums are in flight, and nothing may
    /// move them.
    macro_rules! instructions {
        ($sums:ident, $a:ident, $b:ident, $further:literal, $types:literal, $transposed:literal, $columns:literal, $first:literal $($i:literal)*) => {
            core::arch::asm!(
                "{{ .reg .pred accumulates; setp.eq.u32 accumulates, 0, 0;",
                "wgmma.fence.sync.aligned;",
                instructions!(@step $types, $transposed, $columns, "a0", "b0", $first $($i)*),
                instructions!(@step $types, $transposed, $columns, "a1", "b1", $first $($i)*),
                instructions!(@step $types, $transposed, $columns, "a2", "b2", $first $($i)*),
                instructions!(@step $types, $transposed, $columns, "a3", "b3", $first $($i)*),
                "wgmma.commit_group.sync.aligned;",
                "wgmma.wait_group.sync.aligned 0; }}",
                inout(reg32) $sums[$first],
                $(inout(reg32) $sums[$i],)*
                a00 = in(reg32) $a[0][0], a01 = in(reg32) $a[0][1], a02 = in(reg32) $a[0][2], a03 = in(reg32) $a[0][3],
                a10 = in(reg32) $a[1][0], a11 = in(reg32) $a[1][1], a12 = in(reg32) $a[1][2], a13 = in(reg32) $a[1][3],
                a20 = in(reg32) $a[2][0], a21 = in(reg32) $a[2][1], a22 = in(reg32) $a[2][2], a23 = in(reg32) $a[2][3],
                a30 = in(reg32) $a[3][0], a31 = in(reg32) $a[3][1], a32 = in(reg32) $a[3][2], a33 = in(reg32) $a[3][3],
                b0 = in(reg64) $b, b1 = in(reg64) $b + $further, b2 = in(reg64) $b + 2 * $further, b3 = in(reg64) $b + 3 * $further,
                options(nostack, preserves_flags),
            )
        };
        (@step $types:literal, $transposed:literal, $columns:literal, $a:literal, $b:literal, $first:literal $($i:literal)*) => {
            concat!(
                "wgmma.mma_async.sync.aligned.m64n", $columns, "k16.f32.", $types, " {{",
                "{", $first, "}", $(", {", $i, "}",)*
                "}}, {{{", $a, "0}, {", $a, "1}, {", $a, "2}, {", $a, "3}}}, {", $b, "}, accumulates, 1, 1, ", $transposed, ";",
            )
        };
    }

    /// A matrix descriptor: the address, the distance of groups of eight rows, and a swizzle of 128 bytes. All in units of
    /// 16 bytes.
    #[inline(always)]
    fn descriptor(address: u32) -> u64 {
        u64::from(address >> 4) | 1 << 16 | (1024 >> 4) << 32 | 1 << 62
    }

    /// # Safety
    /// Four warps call it together, with the same panel.
    #[inline(always)]
    pub(super) unsafe fn multiply_add<T: Half, const SUMS: usize>(
        sums: &mut [f32; SUMS],
        a: [[u32; 4]; PANEL_STEPS],
        b: Panel,
    ) {
        // A step is 32 bytes further on.
        let b = descriptor(b.memory.address_of(b.start as usize));
        // SAFETY: the caller's promise.
        unsafe {
            match (SUMS, T::IS_IEEE) {
                (8, false) => instructions!(
                    sums, a, b, 2, "bf16.bf16", "0", 16,
                    0 1 2 3 4 5 6 7
                ),
                (32, true) => instructions!(
                    sums, a, b, 2, "f16.f16", "0", 64,
                    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
                ),
                (32, false) => instructions!(
                    sums, a, b, 2, "bf16.bf16", "0", 64,
                    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
                ),
                (64, false) => instructions!(
                    sums, a, b, 2, "bf16.bf16", "0", 128,
                    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33
                    34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63
                ),
                (128, false) => instructions!(
                    sums, a, b, 2, "bf16.bf16", "0", 256,
                    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33
                    34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 61 62 63 64
                    65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82 83 84 85 86 87 88 89 90 91 92 93 94 95
                    96 97 98 99 100 101 102 103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119
                    120 121 122 123 124 125 126 127
                ),
                _ => const { assert!(!T::IS_IEEE || SUMS == 32, "no kernel needs these yet") },
            }
        }
    }

    /// # Safety
    /// As [`multiply_add`].
    #[inline(always)]
    pub(super) unsafe fn multiply_add_transposed<T: Half>(
        sums: &mut [f32; PANEL_DEPTH / 2],
        a: [[u32; 4]; PANEL_STEPS],
        b: TransposedPanel,
    ) {
        const { assert!(T::IS_IEEE, "no kernel needs others yet") };
        // A step is sixteen rows further on.
        let b = descriptor(b.memory.address_of(b.start as usize));
        // SAFETY: the caller's promise.
        unsafe {
            instructions!(
                sums, a, b, 128, "f16.f16", "1", 64,
                0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31
            );
        }
    }
}

#[cfg(all(target_arch = "nvptx64", not(cuda_sm_90a)))]
mod warp {
    use super::registers::multiply_add_16;
    use super::{Half, PANEL_DEPTH, PANEL_ROW_WORDS, PANEL_STEPS, Panel, TransposedPanel, swizzled};
    use crate::warp::lane_id;

    #[inline(always)]
    pub(super) fn multiply_add<T: Half, const SUMS: usize>(
        sums: &mut [f32; SUMS],
        a: [[u32; 4]; PANEL_STEPS],
        b: Panel,
    ) {
        let lane = lane_id() as usize;
        // Of two groups of eight rows, both pieces of a step each: a lane gives the address of one row's piece.
        let row = lane / 16 * 8 + lane % 8;
        let piece = lane / 8 % 2;
        let mut step = 0;
        while step < PANEL_STEPS {
            let place = row * PANEL_ROW_WORDS + swizzled(row, 2 * step + piece) * 4;
            let address = b.memory.address_of(b.start as usize + place);
            let mut pair = 0;
            while pair < SUMS / 8 {
                // SAFETY: the rows are in the panel.
                let b = unsafe { load_matrices(address + (pair * 16 * PANEL_ROW_WORDS * 4) as u32) };
                multiply_add_pair::<T, SUMS>(sums, 8 * pair, a[step], b);
                pair += 1;
            }
            step += 1;
        }
    }

    #[inline(always)]
    pub(super) fn multiply_add_transposed<T: Half>(
        sums: &mut [f32; PANEL_DEPTH / 2],
        a: [[u32; 4]; PANEL_STEPS],
        b: TransposedPanel,
    ) {
        let lane = lane_id() as usize;
        // Of two pieces, both groups of eight rows each, turned round on their way.
        let row = lane % 16;
        let mut step = 0;
        while step < PANEL_STEPS {
            let mut pair = 0;
            while pair < PANEL_DEPTH / 16 {
                let piece = swizzled(row, 2 * pair + lane / 16);
                let place = (16 * step + row) * PANEL_ROW_WORDS + piece * 4;
                // SAFETY: the rows are in the panel.
                let b = unsafe { load_transposed(b.memory.address_of(b.start as usize + place)) };
                multiply_add_pair::<T, { PANEL_DEPTH / 2 }>(sums, 8 * pair, a[step], b);
                pair += 1;
            }
            step += 1;
        }
    }

    /// The step's product with sixteen columns, whose sums start at `at`.
    #[inline(always)]
    fn multiply_add_pair<T: Half, const SUMS: usize>(
        sums: &mut [f32; SUMS],
        at: usize,
        a: [u32; 4],
        [b0, b1, b2, b3]: [u32; 4],
    ) {
        let first = [sums[at], sums[at + 1], sums[at + 2], sums[at + 3]];
        let second = [sums[at + 4], sums[at + 5], sums[at + 6], sums[at + 7]];
        [sums[at], sums[at + 1], sums[at + 2], sums[at + 3]] = multiply_add_16::<T>(a, [b0, b1], first);
        [sums[at + 4], sums[at + 5], sums[at + 6], sums[at + 7]] = multiply_add_16::<T>(a, [b2, b3], second);
    }

    macro_rules! load {
        ($name:ident, $instruction:literal, $doc:literal) => {
            #[doc = $doc]
            ///
            /// # Safety
            /// The address is that of 16 bytes of shared memory.
            #[inline(always)]
            unsafe fn $name(address: u32) -> [u32; 4] {
                let (a, b, c, d);
                // SAFETY: the caller vouches for the address; all lanes are here.
                unsafe {
                    core::arch::asm!(
                        concat!($instruction, " {{{a}, {b}, {c}, {d}}}, [{address}];"),
                        a = out(reg32) a,
                        b = out(reg32) b,
                        c = out(reg32) c,
                        d = out(reg32) d,
                        address = in(reg32) address,
                        options(readonly, nostack, preserves_flags),
                    );
                }
                [a, b, c, d]
            }
        };
    }
    load!(
        load_matrices,
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "Four matrices of eight rows of 16 bytes, whose addresses lanes 0 to 7, 8 to 15 ... give."
    );
    load!(load_transposed, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "The same, transposed.");
}

#[cfg(target_arch = "nvptx64")]
mod registers {
    use super::Half;

    macro_rules! multiply_add_16 {
        ($types:literal, $a:ident, $b:ident, $c:ident) => {{
            let (d0, d1, d2, d3);
            // SAFETY: arithmetic alone; all lanes are here.
            unsafe {
                core::arch::asm!(
                    concat!(
                        "mma.sync.aligned.m16n8k16.row.col.f32.", $types, ".f32 {{{d0}, {d1}, {d2}, {d3}}}, \
                            {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {{{c0}, {c1}, {c2}, {c3}}};",
                    ),
                    d0 = out(reg32) d0, d1 = out(reg32) d1, d2 = out(reg32) d2, d3 = out(reg32) d3,
                    a0 = in(reg32) $a[0], a1 = in(reg32) $a[1], a2 = in(reg32) $a[2], a3 = in(reg32) $a[3],
                    b0 = in(reg32) $b[0], b1 = in(reg32) $b[1],
                    c0 = in(reg32) $c[0], c1 = in(reg32) $c[1], c2 = in(reg32) $c[2], c3 = in(reg32) $c[3],
                    options(nomem, nostack, preserves_flags),
                );
            }
            [d0, d1, d2, d3]
        }};
    }

    #[inline(always)]
    pub(super) fn multiply_add_16<T: Half>(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
        if T::IS_IEEE { multiply_add_16!("f16.f16", a, b, c) } else { multiply_add_16!("bf16.bf16", a, b, c) }
    }
}

#[cfg(not(target_arch = "nvptx64"))]
mod emulated {
    use super::{Half, PANEL_DEPTH, PANEL_ROW_WORDS, PANEL_STEPS, Panel, TransposedPanel, swizzled};
    use crate::emulator::{Collective, Lanes, collective};
    use crate::float::{bf16x2_to_f32, f16_to_f32};
    use crate::warp::FULL_MASK;
    use std::marker::PhantomData;

    /// What a lane brings: where its sums are, and its part of the first matrix.
    struct Operand<P> {
        sums: *mut f32,
        a: [[u32; 4]; PANEL_STEPS],
        panel: P,
        wanted: u32,
    }

    impl<P: Copy> Clone for Operand<P> {
        fn clone(&self) -> Self {
            *self
        }
    }

    impl<P: Copy> Copy for Operand<P> {}

    pub(super) fn multiply_add<T: Half, const SUMS: usize>(
        sums: &mut [f32; SUMS],
        a: [[u32; 4]; PANEL_STEPS],
        panel: Panel,
        wanted: u32,
    ) {
        let wanted = wanted.min(2 * SUMS as u32);
        collective::<Product<T, Panel>>(FULL_MASK, 0, Operand { sums: sums.as_mut_ptr(), a, panel, wanted });
    }

    pub(super) fn multiply_add_transposed<T: Half>(
        sums: &mut [f32; PANEL_DEPTH / 2],
        a: [[u32; 4]; PANEL_STEPS],
        panel: TransposedPanel,
    ) {
        let operand = Operand { sums: sums.as_mut_ptr(), a, panel, wanted: PANEL_DEPTH as u32 };
        collective::<Product<T, TransposedPanel>>(FULL_MASK, 0, operand);
    }

    /// What a lane brings of matrices that are in registers, and what it gets.
    #[derive(Clone, Copy)]
    struct InRegisters {
        a: [u32; 4],
        b: [u32; 2],
        sums: [f32; 4],
    }

    #[track_caller]
    pub(super) fn multiply_add_in_registers<T: Half>(a: [u32; 4], b: [u32; 2], sums: [f32; 4]) -> [f32; 4] {
        collective::<SmallProduct<T>>(FULL_MASK, 0, InRegisters { a, b, sums }).sums
    }

    struct SmallProduct<T>(PhantomData<T>);

    impl<T: Half> Collective for SmallProduct<T> {
        type Operand = InRegisters;
        const NAME: &'static str = "a product on tensor cores of matrices in registers";

        fn compute(lanes: &Lanes<InRegisters>, _: u32) {
            // Rows and columns of a lane that has returned stay unspecified.
            let (mut a, mut b) = ([[f32::NAN; 16]; 16], [[f32::NAN; 16]; 8]);
            for lane in 0..32 {
                let Some(given) = lanes.get(lane) else { continue };
                let (group, member) = (lane / 4, lane % 4);
                for (i, word) in given.a.into_iter().enumerate() {
                    let (row, column) = (group + i % 2 * 8, 2 * member + i / 2 * 8);
                    [a[row][column], a[row][column + 1]] = widen::<T>(word);
                }
                for (i, word) in given.b.into_iter().enumerate() {
                    let row = 2 * member + 8 * i;
                    [b[group][row], b[group][row + 1]] = widen::<T>(word);
                }
            }
            lanes.set_each(|lane| {
                let mut own = lanes.get(lane).unwrap_or(InRegisters { a: [0; 4], b: [0; 2], sums: [0.0; 4] });
                for (i, sum) in own.sums.iter_mut().enumerate() {
                    let (row, column) = (lane / 4 + i / 2 * 8, 2 * (lane % 4) + i % 2);
                    *sum += a[row].iter().zip(b[column]).map(|(a, b)| a * b).sum::<f32>();
                }
                own
            });
        }
    }

    fn widen<T: Half>(word: u32) -> [f32; 2] {
        if T::IS_IEEE {
            [f16_to_f32(word as u16), f16_to_f32((word >> 16) as u16)]
        } else {
            bf16x2_to_f32(word)
        }
    }

    /// A second matrix.
    trait Columns: Copy {
        /// Columns `column` and `column + 1`, an even number, each from the first row to the last.
        fn pair<T: Half>(self, column: usize) -> [[f32; PANEL_DEPTH]; 2];
    }

    impl Columns for Panel {
        fn pair<T: Half>(self, column: usize) -> [[f32; PANEL_DEPTH]; 2] {
            [column, column + 1].map(|column| {
                let mut values = [0.0; PANEL_DEPTH];
                let start = self.start as usize + column * PANEL_ROW_WORDS;
                for piece in 0..PANEL_DEPTH / 8 {
                    let words = self.memory.get4(start + 4 * swizzled(column, piece));
                    for (i, word) in words.into_iter().enumerate() {
                        [values[8 * piece + 2 * i], values[8 * piece + 2 * i + 1]] = widen::<T>(word);
                    }
                }
                values
            })
        }
    }

    impl Columns for TransposedPanel {
        fn pair<T: Half>(self, column: usize) -> [[f32; PANEL_DEPTH]; 2] {
            let word = |row: usize| {
                let place = row * PANEL_ROW_WORDS + 4 * swizzled(row, column / 8) + column % 8 / 2;
                widen::<T>(self.memory.get(self.start as usize + place))
            };
            let rows: [[f32; 2]; PANEL_DEPTH] = std::array::from_fn(word);
            [rows.map(|[first, _]| first), rows.map(|[_, second]| second)]
        }
    }

    struct Product<T, P>(PhantomData<(T, P)>);

    impl<T: Half, P: Columns> Collective for Product<T, P> {
        type Operand = Operand<P>;
        const NAME: &'static str = "a product on tensor cores";

        fn compute(lanes: &Lanes<Operand<P>>, _: u32) {
            let operands: [Option<Operand<P>>; 32] = std::array::from_fn(|lane| lanes.get(lane));
            // The rows of a column side by side: they are what is worked on at once.
            let mut a = [[f32::NAN; 16]; PANEL_DEPTH];
            for (lane, operand) in operands.iter().enumerate() {
                // Rows of a lane that has returned stay unspecified.
                let Some(operand) = operand else { continue };
                let (group, member) = (lane / 4, lane % 4);
                for (step, words) in operand.a.iter().enumerate() {
                    for (i, &word) in words.iter().enumerate() {
                        let (row, column) = (group + i % 2 * 8, 16 * step + 2 * member + i / 2 * 8);
                        [a[column][row], a[column + 1][row]] = widen::<T>(word);
                    }
                }
            }
            let Some(&Operand { panel, wanted, .. }) = operands.iter().flatten().next() else { return };
            for pair in 0..wanted.div_ceil(2) as usize {
                let (member, place) = (pair % 4, pair / 4 * 4);
                for (i, b) in panel.pair::<T>(2 * pair).into_iter().enumerate() {
                    let mut sums = [0.0f32; 16];
                    for (a, b) in a.iter().zip(b) {
                        for (sum, a) in sums.iter_mut().zip(a) {
                            *sum += a * b;
                        }
                    }
                    for (row, sum) in sums.into_iter().enumerate() {
                        if let Some(to) = &operands[row % 8 * 4 + member] {
                            // SAFETY: the lane waits, with its sums on its stack; there are two for every column.
                            unsafe { *to.sums.add(place + row / 8 * 2 + i) += sum };
                        }
                    }
                }
            }
        }
    }
}
