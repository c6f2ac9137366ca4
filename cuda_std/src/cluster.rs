//! Clusters: neighbouring blocks that run at the same time and write to each other's shared memory.
//!
//! A launch says how many blocks make one (`LaunchConfig::cluster`); GPUs have them from compute capability 9.0 on. What one
//! block makes and others need goes straight into their shared memory, and an [`Arrivals`] there says when all of it has come:
//! one way, where a meeting of the cluster ([`sync_cluster`]) is there and back (docs/performance.md, version 10).

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::with_thread;
#[cfg(target_arch = "nvptx64")]
use crate::pipeline::{barrier, bulk};
use crate::shared::DynamicShared;

/// The block's number in its cluster.
#[inline(always)]
pub fn block_rank() -> u32 {
    cfg_select! {
        target_arch = "nvptx64" => {
            let rank;
            // SAFETY: reads a special register.
            unsafe {
                core::arch::asm!(
                    "mov.u32 {rank}, %cluster_ctarank;",
                    rank = out(reg32) rank,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            rank
        }
        _ => with_thread(|thread| thread.cluster_rank()),
    }
}

/// Waits until all threads of the cluster that have not returned are here. What they wrote to any block's shared memory before
/// is then visible to all of them.
#[inline(always)]
pub fn sync_cluster() {
    cfg_select! {
        // SAFETY: waits. Not `nomem`: no access to memory may be moved across.
        target_arch = "nvptx64" => unsafe {
            core::arch::asm!(
                "barrier.cluster.arrive.release;",
                "barrier.cluster.wait.acquire;",
                options(nostack, preserves_flags),
            );
        },
        _ => with_thread(|thread| thread.sync_cluster()),
    }
}

/// What arrives in a block's shared memory, round after round: from other blocks of the cluster, or from device memory.
///
/// In each round one thread says once how many bytes will come ([`expect`](Self::expect)), before or after they do; any thread
/// may [`wait`](Self::wait) until they are there. Nothing of a round may come before the one ahead of it is complete.
#[derive(Clone, Copy, Debug)]
pub struct Arrivals {
    memory: DynamicShared<u32>,
    /// The word at which what counts them lies.
    at: u32,
}

impl Arrivals {
    /// Words of shared memory, a multiple of 4.
    pub const WORDS: u32 = 4;

    /// What word `at` and the [`WORDS`](Self::WORDS) from there on count, a multiple of 4; the same in all blocks of the cluster.
    #[inline(always)]
    pub fn at(memory: DynamicShared<u32>, at: u32) -> Self {
        Self { memory, at }
    }
}

#[cfg(target_arch = "nvptx64")]
impl Arrivals {
    /// Begins to count. One thread says so, before the cluster meets; nothing arrives before that.
    #[inline(always)]
    pub fn set_up(self) {
        // SAFETY: nobody uses the barrier before the cluster has met.
        unsafe {
            barrier::init(self.barrier(), 1);
            core::arch::asm!("fence.mbarrier_init.release.cluster;", options(nostack, preserves_flags));
        }
    }

    /// The next round is of `bytes` bytes.
    #[inline(always)]
    pub fn expect(self, bytes: u32) {
        // SAFETY: the barrier is the block's.
        unsafe { bulk::expect(self.barrier(), bytes) };
    }

    /// Waits until all bytes of round `round`, counted from 0, are there; it is the one that was expected last, or the one before.
    #[inline(always)]
    pub fn wait(self, round: u32) {
        // SAFETY: the barrier is the block's.
        unsafe { barrier::wait(self.barrier(), round & 1) };
    }

    /// Starts copying `bytes` bytes, a multiple of 16, from device memory to word `to`, a multiple of 4. What is copied is not
    /// expected to be read again.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until they have arrived;
    /// nobody reads or writes the words meanwhile.
    #[inline(always)]
    pub unsafe fn fetch(self, to: u32, from: *const u8, bytes: u32) {
        // SAFETY: the caller's promise; the barrier is the block's.
        unsafe { bulk::copy_once(self.memory.address_of(to as usize), from, bytes, self.barrier()) };
    }

    #[inline(always)]
    fn barrier(self) -> u32 {
        self.memory.address_of(self.at as usize)
    }
}

macro_rules! sends {
    ($($(#[$doc:meta])* $name:ident, $n:literal, $suffix:literal, $values:literal, [$($i:literal $v:ident),*];)*) => {
        #[cfg(target_arch = "nvptx64")]
        impl Arrivals {$(
            $(#[$doc])*
            ///
            /// # Safety
            /// The cluster has the block, and nobody reads or writes the words until the round is complete.
            #[inline(always)]
            pub unsafe fn $name(self, block: u32, to: u32, values: [f32; $n]) {
                // SAFETY: the caller's promise; the barrier lies at the same place in every block.
                unsafe {
                    core::arch::asm!(
                        "{{ .reg .b32 to, barrier;",
                        "mapa.shared::cluster.u32 to, {own}, {block};",
                        "mapa.shared::cluster.u32 barrier, {own_barrier}, {block};",
                        concat!("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes", $suffix, " [to], ", $values, ", [barrier]; }}"),
                        own = in(reg32) self.memory.address_of(to as usize),
                        own_barrier = in(reg32) self.barrier(),
                        block = in(reg32) block,
                        $($v = in(reg32) values[$i],)*
                        options(nostack, preserves_flags),
                    );
                }
            }
        )*}

        #[cfg(not(target_arch = "nvptx64"))]
        impl Arrivals {$(
            $(#[$doc])*
            ///
            /// # Safety
            /// The cluster has the block, and nobody reads or writes the words until the round is complete.
            pub unsafe fn $name(self, block: u32, to: u32, values: [f32; $n]) {
                assert!(to.is_multiple_of($n), "misaligned: {} values sent to word {to}", $n);
                let there = self.of_block(block);
                for (i, value) in values.into_iter().enumerate() {
                    there.memory.set(to as usize + i, value.to_bits());
                }
                there.arrive(4 * $n);
            }
        )*}
    };
}
sends! {
    /// Sends two values to word `to`, even, of block `block`, which counts them.
    send_2, 2, ".v2.b32", "{{{v0}, {v1}}}", [0 v0, 1 v1];
    /// Sends four values to word `to`, a multiple of 4, of block `block`, which counts them.
    send_4, 4, ".v4.b32", "{{{v0}, {v1}, {v2}, {v3}}}", [0 v0, 1 v1, 2 v2, 3 v3];
}

/// Here it is counted how many bytes have arrived, how many were expected and in how many rounds, and how many rounds are complete.
#[cfg(not(target_arch = "nvptx64"))]
impl Arrivals {
    const ARRIVED: u32 = 0;
    const EXPECTED: u32 = 1;
    const ROUNDS: u32 = 2;
    const COMPLETE: u32 = 3;

    /// Begins to count. One thread says so, before the cluster meets; nothing arrives before that.
    pub fn set_up(self) {
        self.memory.set4(self.at as usize, [0; 4]);
    }

    /// The next round is of `bytes` bytes.
    pub fn expect(self, bytes: u32) {
        assert_eq!(
            self.get(Self::ROUNDS),
            self.get(Self::COMPLETE),
            "a round is expected while one is not complete"
        );
        self.add(Self::EXPECTED, bytes);
        self.add(Self::ROUNDS, 1);
        self.arrive(0);
    }

    /// Waits until all bytes of round `round`, counted from 0, are there; it is the one that was expected last, or the one before.
    pub fn wait(self, round: u32) {
        while self.get(Self::COMPLETE) <= round {
            with_thread(|thread| thread.spin());
        }
    }

    /// Starts copying `bytes` bytes, a multiple of 16, from device memory to word `to`, a multiple of 4. What is copied is not
    /// expected to be read again.
    ///
    /// # Safety
    /// `from` is to as many bytes of readable device memory, at a multiple of 16, which nothing writes until they have arrived;
    /// nobody reads or writes the words meanwhile.
    pub unsafe fn fetch(self, to: u32, from: *const u8, bytes: u32) {
        assert!(to.is_multiple_of(4) && bytes.is_multiple_of(16), "a copy of {bytes} bytes to word {to}");
        // SAFETY: the caller vouches for the source.
        unsafe { self.memory.copy_from(to as usize, from, bytes as usize) };
        self.arrive(bytes);
    }

    /// The same in another block of the cluster.
    #[track_caller]
    fn of_block(self, block: u32) -> Self {
        Self { memory: self.memory.of_block(block), at: self.at }
    }

    fn arrive(self, bytes: u32) {
        self.add(Self::ARRIVED, bytes);
        if self.get(Self::ARRIVED) == self.get(Self::EXPECTED) {
            self.memory.set((self.at + Self::COMPLETE) as usize, self.get(Self::ROUNDS));
        }
    }

    fn get(self, what: u32) -> u32 {
        self.memory.get((self.at + what) as usize)
    }

    fn add(self, what: u32, more: u32) {
        self.memory.set((self.at + what) as usize, self.get(what).wrapping_add(more));
    }
}
