//! Clusters: blocks that run together and write to each other's shared memory.

use crate::try_launch_in_clusters;
use cuda_std::cluster::{Arrivals, block_rank, sync_cluster};
use cuda_std::emulator::LaunchError;
use cuda_std::thread::*;
use cuda_std::{dynamic_shared, kernel};

/// Words of a block's mail in a round: from each block of the cluster four values, and twice two.
const WORDS_OF_BLOCK: u32 = 8;

/// In each round every block sends every other one what it made of all it got in the round before; at the end each leaves what it
/// has. Most rounds are expected after the first of their mail has come.
#[kernel]
pub unsafe fn gossip(n_rounds: u32, n_blocks: u32, out: *mut f32) {
    let memory = dynamic_shared!(GOSSIP: [u32]);
    let arrivals = Arrivals::at(memory, 0);
    let n_words = n_blocks * WORDS_OF_BLOCK;
    let (rank, thread) = (block_rank(), thread_idx_x());
    if thread == 0 {
        arrivals.set_up();
        arrivals.expect(4 * n_words);
    }
    sync_cluster();
    let mut value = (block_idx_x() + 1) as f32;
    for round in 0..n_rounds {
        // All of the block have read what came last: who gets mail of this round from all knows that they have read the one before.
        sync_threads();
        let start = Arrivals::WORDS + round % 2 * n_words;
        if thread < n_blocks {
            let to = start + rank * WORDS_OF_BLOCK;
            // SAFETY: the cluster has the block; nobody reads the words in this round.
            unsafe {
                arrivals.send_4(thread, to, [value, 2.0 * value, 3.0 * value, 4.0 * value]);
                arrivals.send_2(thread, to + 4, [5.0 * value, 6.0 * value]);
                arrivals.send_2(thread, to + 6, [7.0 * value, 8.0 * value]);
            }
        }
        arrivals.wait(round);
        if thread == 0 && round + 1 < n_rounds {
            arrivals.expect(4 * n_words);
        }
        let mut sum = 0.0;
        for word in 0..n_words {
            sum += memory.view::<f32>().get((start + word) as usize);
        }
        value = sum / (36.0 * n_blocks as f32) + rank as f32;
    }
    if thread == 0 {
        // SAFETY: one element per block.
        unsafe { *out.add(block_idx_x() as usize) = value };
    }
}

#[test]
fn blocks_of_a_cluster_get_what_the_others_send() {
    for (n_clusters, cluster) in [(1, 1), (1, 16), (5, 8), (40, 2)] {
        let n_rounds = 5;
        let n_blocks = n_clusters * cluster;
        let mut out = vec![0.0f32; n_blocks as usize];
        let bytes = 4 * (Arrivals::WORDS + 2 * cluster * WORDS_OF_BLOCK);
        let arguments = (n_rounds, cluster, out.as_mut_ptr());
        try_launch_in_clusters(&GOSSIP, n_blocks, 32, bytes, cluster, arguments).unwrap();
        for (number, blocks) in out.chunks(cluster as usize).enumerate() {
            let first = number as f32 * cluster as f32;
            let mut values: Vec<f32> = (0..cluster).map(|rank| first + 1.0 + rank as f32).collect();
            for _ in 0..n_rounds {
                let mean = values.iter().sum::<f32>() / cluster as f32;
                values = (0..cluster).map(|rank| mean + rank as f32).collect();
            }
            for (found, wanted) in blocks.iter().zip(&values) {
                assert!(
                    (found - wanted).abs() < 1e-3 * wanted,
                    "{cluster} blocks: {blocks:?}, not {values:?}"
                );
            }
        }
    }
}

/// Fetches a block's bytes from device memory, twice.
#[kernel]
pub unsafe fn fetches(from: *const u32, out: *mut u32) {
    let memory = dynamic_shared!(FETCHES: [u32]);
    let (arrivals, thread) = (Arrivals::at(memory, 0), thread_idx_x());
    if thread == 0 {
        arrivals.set_up();
    }
    sync_cluster();
    for round in 0..2 {
        let first = (2 * block_idx_x() + round) * 8;
        if thread == 0 {
            arrivals.expect(32);
            // SAFETY: the test's vector has as many words.
            unsafe {
                arrivals.fetch(Arrivals::WORDS, from.add(first as usize).cast(), 16);
                arrivals.fetch(Arrivals::WORDS + 4, from.add(first as usize + 4).cast(), 16);
            }
        }
        arrivals.wait(round);
        if thread < 8 {
            let word = memory.get((Arrivals::WORDS + thread) as usize);
            // SAFETY: one element per thread and round.
            unsafe { *out.add((first + thread) as usize) = word };
        }
        sync_threads();
    }
}

#[test]
fn what_is_fetched_arrives() {
    let from: Vec<u32> = (0..64).map(|i| i * i).collect();
    let mut out = vec![0u32; from.len()];
    let bytes = 4 * (Arrivals::WORDS + 8);
    try_launch_in_clusters(&FETCHES, 4, 32, bytes, 4, (from.as_ptr(), out.as_mut_ptr())).unwrap();
    assert_eq!(out, from);
}

/// One block panics while the others wait for it.
#[kernel]
pub unsafe fn leaves_others_waiting(place: u32) {
    sync_cluster();
    assert!(block_idx_x() != place || thread_idx_x() != 3, "on purpose");
    sync_cluster();
}

#[test]
fn a_panic_ends_the_whole_cluster_and_names_its_block() {
    for place in [0, 5, 7] {
        let error = try_launch_in_clusters(&LEAVES_OTHERS_WAITING, 8, 40, 0, 4, (place,)).unwrap_err();
        let text = error.to_string();
        let LaunchError::Panic { block, thread, message, .. } = error else { panic!("{text}") };
        assert_eq!((block, thread), ([place, 0, 0], [3, 0, 0]), "{text}");
        assert!(message.contains("on purpose"), "{message}");
    }
    try_launch_in_clusters(&LEAVES_OTHERS_WAITING, 8, 40, 0, 4, (8,)).unwrap();
}

#[test]
fn clusters_that_a_gpu_refuses_are_refused() {
    for (n_blocks, cluster) in [(8, 0), (8, 3), (17, 17), (4, 8)] {
        let error =
            try_launch_in_clusters(&LEAVES_OTHERS_WAITING, n_blocks, 32, 0, cluster, (99,)).unwrap_err();
        let LaunchError::Refused { reason, .. } = error else { panic!("{error}") };
        assert!(reason.contains(&format!("clusters are {cluster} blocks")), "{reason}");
    }
}
