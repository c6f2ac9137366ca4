//! Choosing a token, against a choice worked out in f64.

use super::formats::random_blocks;
use super::{Random, devices};
use gpu_kernels::formats::Format;
use gpu_kernels::sample::{CHUNK, MAX_GROUPS, MAX_VOCAB, NO_TOKEN, SamplingParameters, WARPS};
use gpu_kernels::step::Step;
use host::device::{Buffer, Device};
use host::ops::{self, Input, Matrix, Next, Norm, Operand, SampleWorkspace};
use host::sampling::SamplingOptions;

/// A device that chooses from the same logits again and again, dealt out in several ways.
struct Chooser<'d> {
    device: &'d Device,
    n_vocab: usize,
    logits: Buffer<f32>,
    parameters: Buffer<SamplingParameters>,
    workspaces: Vec<SampleWorkspace>,
    step: Buffer<Step>,
    chosen: Buffer<u32>,
}

impl<'d> Chooser<'d> {
    fn new(device: &'d Device, logits: &[f32], options: SamplingOptions) -> Self {
        options.check().unwrap();
        // What follows the vocabulary is never read: it would always be chosen.
        let mut all = logits.to_vec();
        all.extend([f32::INFINITY; 40]);
        let with_groups = |n| SampleWorkspace::with_groups(device, n).unwrap();
        Self {
            device,
            n_vocab: logits.len(),
            logits: device.alloc_from(&all).unwrap(),
            parameters: device.alloc_from(&[options.parameters()]).unwrap(),
            workspaces: vec![
                SampleWorkspace::alloc(device).unwrap(),
                with_groups(MAX_GROUPS),
                with_groups(7),
            ],
            step: device.alloc_from(&[Step::default()]).unwrap(),
            chosen: device.alloc_from(&[0u32, 12_345]).unwrap(),
        }
    }

    /// The choice at this position, after checking the step that it leaves, and that it is the same however the logits
    /// are dealt out.
    fn at(&mut self, position: u32) -> u32 {
        let found: Vec<u32> = (0..self.workspaces.len()).map(|i| self.at_with(position, i)).collect();
        assert!(found.iter().all(|&token| token == found[0]), "{found:?} at position {position}");
        found[0]
    }

    /// The choice with one of the workspaces.
    fn at_with(&mut self, position: u32, workspace: usize) -> u32 {
        self.device.upload(&mut self.step, &[Step { token: 77, position }]).unwrap();
        self.launch(workspace);
        let found = self.device.to_vec(&self.chosen).unwrap();
        assert_eq!(found[1], 12_345, "written beyond the chosen token");
        let token = if found[0] == NO_TOKEN { 0 } else { found[0] };
        assert_eq!(self.device.to_vec(&self.step).unwrap(), [Step { token, position: position + 1 }]);
        found[0]
    }

    fn launch(&mut self, workspace: usize) {
        let Self { device, n_vocab, logits, parameters, workspaces, step, chosen } = self;
        let workspace = &mut workspaces[workspace];
        ops::sample(device, logits, *n_vocab, parameters, workspace, None, step, chosen, 1).unwrap();
    }

    fn counts(&mut self, n: u32) -> Vec<usize> {
        let mut counts = vec![0; self.n_vocab];
        for position in 0..n {
            counts[self.at(position) as usize] += 1;
        }
        counts
    }
}

/// The tokens that may be chosen, the most likely first, with their probabilities up to a common factor.
fn kept(logits: &[f32], options: SamplingOptions) -> Vec<(u32, f64)> {
    let usable = (0..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
    let mut tokens: Vec<(u32, f64)> = usable.map(|(id, &logit)| (id, f64::from(logit))).collect();
    // Stable: equals stay in the order of their ids.
    tokens.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap());
    let Some(&(_, top)) = tokens.first() else { return tokens };
    if options.is_greedy() || top == f64::INFINITY {
        tokens.truncate(1);
        return vec![(tokens[0].0, 1.0)];
    }
    tokens.iter_mut().for_each(|token| token.1 = ((token.1 - top) / f64::from(options.temp)).exp());
    if options.top_k > 0 {
        tokens.truncate(options.top_k);
    }
    if options.top_p < 1.0 {
        let wanted = f64::from(options.top_p) * tokens.iter().map(|token| token.1).sum::<f64>();
        let mut sum = 0.0;
        let n = tokens.iter().take_while(|token| {
            let missing = sum < wanted;
            sum += token.1;
            missing
        });
        let n = n.count().max(1);
        tokens.truncate(n);
    }
    tokens
}

/// How far a choice may be from where f64 has it, in parts of the sum of all probabilities.
const TOLERANCE: f64 = 2e-5;

/// Whether the choices at some positions are those that the kernel's description says.
fn check(
    device: &Device,
    logits: &[f32],
    options: SamplingOptions,
    positions: impl IntoIterator<Item = u32>,
) {
    let mut kept = kept(logits, options);
    kept.sort_by_key(|&(id, _)| (id % 1024, id));
    let total: f64 = kept.iter().map(|token| token.1).sum();
    let mut chooser = Chooser::new(device, logits, options);
    for position in positions {
        let chosen = chooser.at(position);
        let what =
            || format!("{} tokens, {options:?}, position {position}, {}", logits.len(), device.describe());
        let Some(place) = kept.iter().position(|&(id, _)| id == chosen) else {
            panic!("{}: token {chosen}, which is not among the {} kept", what(), kept.len());
        };
        let before = kept[..place].iter().map(|token| token.1).sum::<f64>() / total;
        let through = before + kept[place].1 / total;
        let steps = u64::from(position).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let wanted = Random::new(options.seed.wrapping_add(steps)).bits() as f64 / 2f64.powi(64);
        assert!(
            before - TOLERANCE <= wanted && wanted <= through + TOLERANCE,
            "{}: token {chosen}, which is from {before} to {through}; wanted is what is at {wanted}",
            what()
        );
    }
}

fn options(temp: f32, top_k: usize, top_p: f32) -> SamplingOptions {
    SamplingOptions { temp, top_k, top_p, seed: 7 }
}

/// The logarithms of probabilities 0.1, 0.4, 0.2 and 0.3.
fn four() -> Vec<f32> {
    [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec()
}

/// Logits as of a language model: a bell, of which some are raised. NaN and -inf are among them.
fn like_a_model(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    let mut logits: Vec<f32> = (0..n).map(|_| (0..6).map(|_| 1.7 * random.symmetric()).sum()).collect();
    for _ in 0..n / 500 {
        logits[(random.bits() % n as u64) as usize] += 6.0;
    }
    for (unusable, every) in [(f32::NAN, 97), (f32::NEG_INFINITY, 89), (-f32::NAN, 83)] {
        logits.iter_mut().skip(5).step_by(every).for_each(|logit| *logit = unusable);
    }
    logits
}

/// Whether each token was chosen as often as its probability says, within four standard deviations.
fn assert_shares(counts: &[usize], wanted: &[f64], what: &str) {
    let n: usize = counts.iter().sum();
    for (id, (&count, &share)) in counts.iter().zip(wanted).enumerate() {
        let deviation = (share * (1.0 - share) * n as f64).sqrt();
        let off = (count as f64 - share * n as f64).abs();
        assert!(off <= 4.0 * deviation, "{what}: token {id}: {count} of {n}, wanted {share}");
    }
}

#[test]
fn shares_match_the_softmax() {
    let some = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
    let all = [0.1, 0.4, 0.2, 0.3];
    // At half the temperature shares go with the square: 1, 16, 4, 9 of 30.
    let sharp = [1.0, 16.0, 4.0, 9.0].map(|share| share / 30.0);
    let cases = [
        (options(1.0, 0, 1.0), all),
        (options(0.5, 0, 1.0), sharp),
        (options(1.0, 2, 1.0), some),
        (options(1.0, 4, 1.0), all),
        (options(1.0, 900, 1.0), all),
        (options(1.0, 0, 0.5), some),
        (options(1.0, 0, 0.39), [0.0, 1.0, 0.0, 0.0]),
        (options(1.0, 0, 0.9999), all),
        // Of 0.4 and 0.3 the first is more than half.
        (options(1.0, 2, 0.5), [0.0, 1.0, 0.0, 0.0]),
        (options(1.0, 3, 0.5), some),
    ];
    for device in devices() {
        for (options, wanted) in cases {
            let counts = Chooser::new(device, &four(), options).counts(2000);
            assert_shares(&counts, &wanted, &format!("{options:?}, {}", device.describe()));
        }
    }
}

#[test]
fn choices_match_f64() {
    for device in devices() {
        for n in [1, 2, 31, 1000, 1024, 1025, 9000, 49_152] {
            let logits = like_a_model(n, n as u64);
            for (top_k, top_p) in [(0, 1.0), (1, 1.0), (2, 1.0), (40, 1.0), (40, 0.9), (0, 0.8), (0, 0.95)] {
                for temp in [0.0, 0.7, 1.3] {
                    check(device, &logits, options(temp, top_k, top_p), (0..4).chain([4095, 131_071]));
                }
            }
        }
    }
}

#[test]
fn choices_in_a_large_vocabulary_match_f64() {
    let logits = like_a_model(151_936, 1);
    for device in devices() {
        for (top_k, top_p) in [(0, 1.0), (40, 0.95), (0, 0.9), (0, 0.999), (20_000, 1.0), (20_000, 0.9)] {
            check(device, &logits, options(0.8, top_k, top_p), 0..3);
        }
    }
}

#[test]
fn top_k_of_any_size_keeps_the_k_most_likely() {
    let logits = like_a_model(5000, 3);
    for device in devices() {
        // Nearly the same probability for each, so that those at the edge are chosen too.
        for top_k in [2, 3, 5, 100, 300, 352, 353, 1000, 4000, 4999, 5000, usize::MAX] {
            check(device, &logits, options(1e6, top_k, 1.0), 0..20);
        }
        let mut counts = Chooser::new(device, &logits, options(1e6, 5, 1.0)).counts(100);
        counts.retain(|&count| count > 0);
        assert_eq!(counts.len(), 5);
    }
}

#[test]
fn equal_logits_are_kept_in_the_order_of_their_ids() {
    for device in devices() {
        // Top-k ends before, among and after five equals.
        let mut logits = vec![-4.0; 3000];
        logits[2222] = 5.0;
        for id in [3, 1027, 1026, 2051, 2999] {
            logits[id] = 3.0;
        }
        logits[7] = f32::NAN;
        for top_k in 1..=8 {
            check(device, &logits, options(1e6, top_k, 1.0), 0..10);
        }
        let mut counts = Chooser::new(device, &logits, options(1e6, 3, 1.0)).counts(60);
        let chosen: Vec<usize> = (0..3000).filter(|&id| std::mem::take(&mut counts[id]) > 0).collect();
        assert_eq!(chosen, [3, 1026, 2222]);

        // All are equal, a zero of either sign too.
        for n in [8, 1000, 5000] {
            for value in [0.0, -2.5] {
                let mut logits = vec![value; n];
                if value == 0.0 {
                    logits.iter_mut().step_by(3).for_each(|logit| *logit = -0.0);
                }
                for (top_k, top_p) in [(3, 1.0), (n / 2, 1.0), (n - 1, 0.5), (0, 0.25), (0, 0.5), (0, 0.75)] {
                    check(device, &logits, options(1.0, top_k, top_p), 0..6);
                }
            }
        }
    }
}

#[test]
fn tokens_that_meet_in_one_thread_are_all_kept() {
    // Every 1024th token is the same thread's.
    let mut logits = like_a_model(30_000, 5);
    for (i, id) in (9..30_000).step_by(1024).enumerate() {
        logits[id] = 20.0 - (i % 7) as f32 * 0.1;
    }
    for device in devices() {
        for (top_k, top_p) in [(4, 1.0), (6, 1.0), (12, 1.0), (12, 0.6), (0, 0.5), (29, 1.0), (40, 0.99)] {
            check(device, &logits, options(1.0, top_k, top_p), 0..12);
        }
    }
}

#[test]
fn tokens_that_are_not_kept_are_not_chosen_in_place_of_one_of_their_column() {
    // Column 5 has a token that is kept, and an earlier one that is little less likely.
    let mut logits = vec![-4.0; 3000];
    for (id, logit) in [(5 + 1024, 3.9), (7, 3.8), (5, 3.7), (9, 3.6)] {
        logits[id] = logit;
    }
    for device in devices() {
        for (top_k, top_p) in [(2, 1.0), (2, 0.99), (0, 0.5)] {
            check(device, &logits, options(1.0, top_k, top_p), 0..20);
        }
    }
}

#[test]
fn greedy_choices_match_argmax() {
    let mut cases =
        vec![four(), vec![1.0, 3.0, 3.0, 2.0], vec![-0.0, 0.0], vec![f32::NAN, -5.0, f32::NAN, -4.0]];
    cases.extend([32, 1023, 1025, 49_152, 151_936].map(|n| like_a_model(n, n as u64)));
    for device in devices() {
        for logits in &cases {
            let mut index = device.alloc_from(&[0]).unwrap();
            ops::argmax(device, &device.alloc_from(logits).unwrap(), &mut index).unwrap();
            let expected = device.to_vec(&index).unwrap()[0];
            let choose = |options| Chooser::new(device, logits, options).at(3);
            let what = format!("{} logits, {}", logits.len(), device.describe());
            for options in [SamplingOptions::default(), options(2.0, 1, 1.0), options(2.0, 0, 0.0)] {
                assert_eq!(choose(options), expected, "{options:?}, {what}");
            }
            // The inverse of this temperature is beyond f32. Of equals any may be chosen.
            let found = choose(options(1e-45, 0, 1.0));
            assert_eq!(logits[found as usize], logits[expected as usize], "{what}");
        }
    }
}

#[test]
fn unusable_logits_are_never_chosen() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let mixed = [nan, 1.0, -inf, 1.0, -nan];
    for device in devices() {
        for options in
            [options(0.0, 0, 1.0), options(1.0, 0, 1.0), options(1.0, 3, 0.9), options(1.0, 400, 0.9)]
        {
            let choose = |logits: &[f32]| Chooser::new(device, logits, options).at(5);
            let counts = Chooser::new(device, &mixed, options).counts(50);
            assert_eq!(counts[1] + counts[3], 50);
            assert_eq!(choose(&[0.0, inf, nan, inf]), 1);
            assert_eq!(choose(&[f32::MIN, -inf]), 0);
            assert_eq!(choose(&[f32::MAX, f32::MIN, nan]), 0);
            for unusable in [vec![nan, -inf], vec![-inf], vec![nan; 2000]] {
                assert_eq!(choose(&unusable), NO_TOKEN);
            }
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_tokens() {
    let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    for device in devices() {
        let draw = |seed, top_k| {
            let options = SamplingOptions { temp: 0.8, top_k, top_p: 0.9, seed };
            let mut chooser = Chooser::new(device, &logits, options);
            (0..20).map(|position| chooser.at(position)).collect::<Vec<_>>()
        };
        let tokens = draw(1, 40);
        assert_eq!(tokens, draw(1, 40));
        assert_ne!(tokens, draw(2, 40));
        assert!(tokens[1..].iter().any(|&token| token != tokens[0]), "the position changes nothing");
        // A seed must keep its meaning from release to release.
        assert_eq!(draw(42, 0)[..4], [736, 156, 275, 341]);
    }
}

#[test]
fn a_choice_is_made_the_next_step() {
    for device in devices() {
        let mut chooser = Chooser::new(device, &four(), options(0.0, 0, 1.0));
        device.upload(&mut chooser.step, &[Step { token: 3, position: 10 }]).unwrap();
        for position in 11..14 {
            chooser.launch(0);
            assert_eq!(device.to_vec(&chooser.step).unwrap(), [Step { token: 1, position }]);
        }
    }
}

#[test]
fn senseless_vocabularies_are_refused() {
    let device = &devices()[0];
    let mut chooser = Chooser::new(device, &four(), options(1.0, 0, 1.0));
    for (n_vocab, part) in [
        (0, "0 tokens"),
        (MAX_VOCAB + 1, "1048577 tokens"),
        (45, "buffer logits has 44 values, 45 are needed"),
    ] {
        let Chooser { device, logits, parameters, workspaces, step, chosen, .. } = &mut chooser;
        let workspace = &mut workspaces[0];
        let error =
            ops::sample(device, logits, n_vocab, parameters, workspace, None, step, chosen, 1).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn vocabularies_of_any_length_match_f64() {
    let of_block = WARPS * CHUNK;
    for device in devices() {
        for n in [3, 127, 128, 129, 130, of_block - 1, of_block + 2, 3 * of_block + 5, 8 * of_block + 131] {
            let logits = like_a_model(n, 60 + n as u64);
            for (top_k, top_p) in [(0, 1.0), (3, 1.0), (40, 0.95), (150, 0.9), (200, 1.0), (0, 0.6)] {
                check(device, &logits, options(1.1, top_k, top_p), 0..3);
            }
        }
    }
}

#[test]
fn the_largest_vocabulary_matches_f64() {
    let logits = like_a_model(MAX_VOCAB - 3, 12);
    for device in devices() {
        for options in [options(0.0, 0, 1.0), options(0.8, 40, 0.95), options(0.8, 0, 1.0)] {
            check(device, &logits, options, 0..1);
        }
    }
}

#[test]
fn tokens_that_meet_in_one_group_are_all_kept() {
    // As many as a group has, more and fewer than are compared with each other.
    for n_large in [50, 127, 200, 1000] {
        let mut logits = like_a_model(40_000, 8);
        for (i, logit) in logits[20_000..20_000 + n_large].iter_mut().enumerate() {
            *logit = 30.0 - (i % 11) as f32 * 0.3;
        }
        for device in devices() {
            for (top_k, top_p) in
                [(1, 0.5), (5, 1.0), (40, 0.95), (120, 1.0), (192, 0.8), (193, 0.8), (0, 0.9)]
            {
                check(device, &logits, options(2.0, top_k, top_p), 0..4);
            }
        }
    }
}

#[test]
fn tokens_of_nearly_the_same_likelihood_are_told_apart() {
    // All within what the distances to the largest tell apart, or so far below it that none is told from another.
    for (top, spread) in [(0.0, 0.01), (0.0, 1e-6), (200.0, 1.0), (f32::MAX, 1.0)] {
        let mut random = Random::new(77);
        let mut logits: Vec<f32> = (0..6000).map(|_| spread * random.symmetric()).collect();
        logits[4321] = top + 2.0 * spread;
        for device in devices() {
            for (top_k, top_p) in [(2, 1.0), (40, 0.95), (300, 1.0), (0, 0.7)] {
                check(device, &logits, options(1.0, top_k, top_p), 0..6);
            }
        }
    }
}

#[test]
fn a_workspace_serves_any_vocabulary() {
    for device in devices() {
        let mut workspace = SampleWorkspace::alloc(device).unwrap();
        for n in [49_152, 5, 3000, 128, 49_152] {
            for options in [options(0.0, 0, 1.0), options(0.9, 40, 0.95), options(0.9, 0, 0.9)] {
                let mut chooser = Chooser::new(device, &like_a_model(n, 5), options);
                let expected = chooser.at(9);
                chooser.workspaces.push(workspace);
                for position in [9, 9, 9] {
                    assert_eq!(chooser.at_with(position, 3), expected, "{n} tokens, {options:?}");
                }
                workspace = chooser.workspaces.pop().unwrap();
            }
        }
    }
}

/// A product leaves the largest ranks of its blocks' rows: the choice by these is the same as by ranks of groups.
#[test]
fn choices_by_the_ranks_that_a_product_leaves_are_the_same() {
    const N_COLS: usize = 64;
    for device in devices() {
        for (format, is_exact) in [(Format::F32, true), (Format::Q8_0, false), (Format::Q8_0, true)] {
            for n_vocab in [1, 3, 4, 37, 130, 1025, 20_000] {
                let mut random = Random::new(n_vocab as u64);
                let mut blocks = random_blocks(format, n_vocab, N_COLS, &mut random);
                if format == Format::F32 {
                    // Not numbers, among them the first and the last one where there are others.
                    for row in [0, n_vocab / 2, n_vocab - 1].into_iter().filter(|_| n_vocab > 3) {
                        blocks[4 * N_COLS * row..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
                    }
                }
                let matrix = Matrix::upload(device, format, n_vocab, N_COLS, &blocks).unwrap();
                let x = device.alloc_from(&random.vector(N_COLS)).unwrap();
                let gamma = device.alloc_from(&[1.0f32; N_COLS]).unwrap();
                let mut operand = Operand::alloc(device, N_COLS, is_exact).unwrap();
                ops::make_operand(device, &x, Next { operand: &mut operand, gamma: Some(&gamma) }).unwrap();
                let norm = Norm { gamma: &gamma, eps: 1e-6 };
                let options =
                    [options(0.0, 0, 1.0), options(0.7, 1, 1.0), options(2.0, 40, 0.9), options(1.0, 0, 0.8)];
                for options in options {
                    let mut chooser = Chooser::new(device, &vec![0.0; n_vocab], options);
                    for position in 0..3 {
                        let Chooser { logits, parameters, workspaces, step, chosen, .. } = &mut chooser;
                        let input =
                            if is_exact { Input::F32(&x, Some(&operand)) } else { Input::Operand(&operand) };
                        let workspace = &mut workspaces[0];
                        let ranks =
                            ops::gemv_logits(device, &matrix, input, norm, false, logits, Some(workspace))
                                .unwrap();
                        assert!(ranks.is_some(), "{n_vocab} tokens");
                        device.upload(step, &[Step { token: 0, position }]).unwrap();
                        ops::sample(device, logits, n_vocab, parameters, workspace, ranks, step, chosen, 1)
                            .unwrap();
                        let found = device.to_vec(chosen).unwrap()[0];
                        let what =
                            format!("{n_vocab} tokens in {format:?}, {options:?}, {}", device.describe());
                        assert_eq!(found, chooser.at(position), "{what}");
                    }
                }
            }
        }
    }
}

/// Where a product has more blocks than there may be groups, nobody but the choice ranks them.
#[test]
fn a_product_of_too_many_blocks_leaves_no_ranks() {
    // A block has at most 32 quads.
    const N_VOCAB: usize = 128 * MAX_GROUPS + 1;
    let mut random = Random::new(5);
    let blocks = random_blocks(Format::Q8_0, N_VOCAB, 32, &mut random);
    for device in devices() {
        let matrix = Matrix::upload(device, Format::Q8_0, N_VOCAB, 32, &blocks).unwrap();
        let x = device.alloc_from(&random.vector(32)).unwrap();
        let gamma = device.alloc_from(&[1.0f32; 32]).unwrap();
        let mut operand = Operand::alloc(device, 32, false).unwrap();
        ops::make_operand(device, &x, Next { operand: &mut operand, gamma: Some(&gamma) }).unwrap();
        let (norm, input) = (Norm { gamma: &gamma, eps: 1e-6 }, Input::Operand(&operand));
        let mut chooser = Chooser::new(device, &vec![0.0; N_VOCAB], options(0.0, 0, 1.0));
        let (logits, workspace) = (&mut chooser.logits, &mut chooser.workspaces[0]);
        let ranks = ops::gemv_logits(device, &matrix, input, norm, false, logits, Some(workspace)).unwrap();
        assert!(ranks.is_none());
        let found = device.to_vec(&chooser.logits).unwrap();
        let best = kept(&found[..N_VOCAB], options(0.0, 0, 1.0))[0].0;
        assert_eq!(chooser.at(0), best, "{}", device.describe());
    }
}

#[test]
fn senseless_numbers_of_groups_are_refused() {
    for n in [0, MAX_GROUPS + 1] {
        let error = SampleWorkspace::with_groups(&devices()[0], n).unwrap_err().to_string();
        assert!(error.contains(&format!("found {n}")), "{error}");
    }
}
