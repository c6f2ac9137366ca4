//! The kernel that only reads: every word once, none beyond.

use super::{Random, devices};
use host::ops;

#[test]
fn the_sums_are_those_of_all_words() {
    for device in devices() {
        // Fewer than threads, not a multiple of them, several rounds of eight.
        for n in [1usize, 255, 2048, 2049, 8 * 512, 41_003] {
            let mut random = Random::new(n as u64);
            let words: Vec<[u32; 4]> = (0..n + 9)
                .map(|_| {
                    let (a, b) = (random.bits(), random.bits());
                    [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
                })
                .collect();
            let expected = words[..n].as_flattened().iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
            // What lies behind must not be counted.
            let data = device.alloc_from(&words).unwrap().part(0..n);
            let mut sums = device.alloc_from(&[7u32; 512]).unwrap();
            ops::read(device, &data, &mut sums).unwrap();
            let sums = device.to_vec(&sums).unwrap();
            let found = sums.iter().fold(0u32, |sum, &word| sum.wrapping_add(word));
            assert_eq!(found, expected, "n {n}, {}", device.describe());
        }
    }
}

#[test]
fn half_a_block_of_sums_is_refused() {
    let device = &devices()[0];
    let data = device.alloc_from(&[[1u32; 4]]).unwrap();
    for (len, expected) in [(0, "read: 0 sums"), (128, "read: 128 sums are not whole blocks of 256 threads")]
    {
        let mut sums = device.alloc_zeroed(len).unwrap();
        let error = ops::read(device, &data, &mut sums).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut sums = device.alloc_zeroed(256).unwrap();
    let nothing = data.part(0..0);
    let error = ops::read(device, &nothing, &mut sums).unwrap_err().to_string();
    assert!(error.contains("data has 0 values, 1 are needed"), "{error}");
}
