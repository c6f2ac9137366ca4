//! How the blocks of a cluster put their parts together: they send them to its first block. Others know nothing of each other ([`Apart`]).

use super::MAX_HEADS;
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use cuda_std::cluster::{Arrivals, sync_cluster};
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use cuda_std::dynamic_shared;
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use cuda_std::float::{exp2, max, mul_add};
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use cuda_std::shared::DynamicShared;
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
use cuda_std::thread::thread_idx_x;

/// Most blocks of a cluster: as many as there may be on any GPU that has them.
#[cfg(not(target_arch = "nvptx64"))]
pub const MAX_CLUSTER: usize = 8;

/// Words of shared memory that a launch of clusters needs for mail, with `heads` query heads to a block.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn mail_words(cluster: usize, heads: usize, head_dim: usize) -> usize {
    Arrivals::WORDS as usize + (cluster - 1) * (Mail::SUMS as usize + heads * head_dim)
}

/// How a row of the grid shares a context.
pub(super) trait Row: Copy {
    /// Whether its blocks are a cluster.
    const IN_CLUSTER: bool;

    /// For blocks of `n_values` values of heads.
    fn new(n_values: u32) -> Self;

    /// Before anything is sent: this is block `block`, and its first one gets what `n` others send of `n_heads` heads. All threads of the row
    /// make this call.
    fn begin(self, block: u32, n: u32, n_heads: u32);

    /// Sends four values from value `quad` of the heads on, and with a head's first ones its largest score and sum, as block `block`, which
    /// is not the first.
    ///
    /// # Safety
    /// The cluster's first block expects it.
    unsafe fn send(self, block: u32, quad: u32, head: Option<u32>, values: [f32; 4], sums: [f32; 2]);

    /// Four values of head `head`, given the first block's own part of them, and those of the `n` other blocks, which it waits for.
    fn combine(self, n: u32, quad: u32, head: u32, own: [f32; 4], sums: [f32; 2]) -> [f32; 4];
}

/// Blocks that know nothing of each other until the last one comes.
#[derive(Clone, Copy)]
pub(super) struct Apart;

impl Row for Apart {
    const IN_CLUSTER: bool = false;

    #[inline(always)]
    fn new(_n_values: u32) -> Self {
        Self
    }

    #[inline(always)]
    fn begin(self, _block: u32, _n: u32, _n_heads: u32) {}

    #[inline(always)]
    unsafe fn send(self, _block: u32, _quad: u32, _head: Option<u32>, _values: [f32; 4], _sums: [f32; 2]) {}

    #[inline(always)]
    fn combine(self, _n: u32, _quad: u32, _head: u32, own: [f32; 4], _sums: [f32; 2]) -> [f32; 4] {
        own
    }
}

/// What the first block of a cluster gets from the others: of each the heads' values, and their largest scores and sums of weights.
#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
#[derive(Clone, Copy)]
pub(super) struct Mail {
    memory: DynamicShared<u32>,
    /// Values of the block's heads.
    n_values: u32,
}

#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
impl Mail {
    /// Words for scores and sums.
    const SUMS: u32 = 2 * MAX_HEADS as u32;

    #[inline(always)]
    fn arrivals(self) -> Arrivals {
        Arrivals::at(self.memory, 0)
    }

    /// Where what block `block` sends lies: sums, then values.
    #[inline(always)]
    fn of_block(self, block: u32) -> u32 {
        Arrivals::WORDS + (block - 1) * (Self::SUMS + self.n_values)
    }
}

#[cfg(any(cuda_sm_90a, not(target_arch = "nvptx64")))]
impl Row for Mail {
    const IN_CLUSTER: bool = true;

    #[inline(always)]
    fn new(n_values: u32) -> Self {
        Self { memory: dynamic_shared!(ATTENTION_MAIL: [u32]), n_values }
    }

    #[inline(always)]
    fn begin(self, block: u32, n: u32, n_heads: u32) {
        if n > 0 {
            if block == 0 && thread_idx_x() == 0 {
                self.arrivals().set_up();
                self.arrivals().expect(n * 4 * (self.n_values + 2 * n_heads));
            }
            // From here on others may send.
            sync_cluster();
        }
    }

    #[inline(always)]
    unsafe fn send(self, block: u32, quad: u32, head: Option<u32>, values: [f32; 4], sums: [f32; 2]) {
        let at = self.of_block(block);
        // SAFETY: the caller's promise.
        unsafe {
            self.arrivals().send_4(0, at + Self::SUMS + quad, values);
            if let Some(head) = head {
                self.arrivals().send_2(0, at + 2 * head, sums);
            }
        }
    }

    #[inline(always)]
    fn combine(self, n: u32, quad: u32, head: u32, own: [f32; 4], [own_max, own_sum]: [f32; 2]) -> [f32; 4] {
        if n == 0 {
            return own;
        }
        self.arrivals().wait(0);
        let sums = |block: u32| {
            let both = self.memory.view::<u64>().get((self.of_block(block) + 2 * head) as usize / 2);
            [f32::from_bits(both as u32), f32::from_bits((both >> 32) as u32)]
        };
        let mut largest = own_max;
        let mut block = 1;
        while block <= n {
            largest = max(largest, sums(block)[0]);
            block += 1;
        }
        let mut total = own_sum * exp2(own_max - largest);
        let [mut v0, mut v1, mut v2, mut v3] = own.map(|value| value * total);
        let mut block = 1;
        while block <= n {
            let [of_block, sum] = sums(block);
            let share = sum * exp2(of_block - largest);
            let [w0, w1, w2, w3] =
                self.memory.get4((self.of_block(block) + Self::SUMS + quad) as usize).map(f32::from_bits);
            total += share;
            [v0, v1, v2, v3] = [
                mul_add(share, w0, v0),
                mul_add(share, w1, v1),
                mul_add(share, w2, v2),
                mul_add(share, w3, v3),
            ];
            block += 1;
        }
        let per_total = 1.0 / total;
        [v0, v1, v2, v3].map(|value| value * per_total)
    }
}
