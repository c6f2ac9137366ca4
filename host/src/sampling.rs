//! Choosing the next token from logits.

use std::cmp::Ordering;

use anyhow::{Context, Result, ensure};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How to choose. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most likely token.
    pub temp: f32,
    /// Keeps this many of the most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities add up to this; 1 keeps all, 0 only the first.
    pub top_p: f32,
    /// Where the random numbers start: the same seed gives the same choices.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self { temp: 0.0, top_k: 0, top_p: 1.0, seed: 0 }
    }
}

impl SamplingOptions {
    /// Whether the most likely token is always the one taken, so that logits need not leave the device.
    pub fn is_greedy(&self) -> bool {
        self.temp == 0.0 || self.top_k == 1 || self.top_p == 0.0
    }
}

/// Chooses tokens. Temperature comes first, then top-k, then top-p.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    rng: ChaCha8Rng,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// The probability, up to a common factor.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its seed's random numbers.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        let SamplingOptions { temp, top_p, seed, .. } = options;
        ensure!(temp.is_finite() && temp >= 0.0, "temperature: needed 0 or more, found {temp}");
        ensure!((0.0..=1.0).contains(&top_p), "top-p: needed a number from 0 to 1, found {top_p}");
        Ok(Self { options, rng: ChaCha8Rng::seed_from_u64(seed), candidates: Vec::new() })
    }

    /// What this sampler was made with.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// The next token. Logits that are NaN are never chosen; if all are NaN or -inf, that is an error.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let best = argmax(logits).context("the model gave no usable logits: all are NaN or -inf")?;
        let top = logits[best as usize];
        if self.options.is_greedy() || top == f32::INFINITY {
            return Ok(best);
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        let usable = (0..).zip(logits).filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        candidates.extend(usable.map(|(id, &logit)| {
            let weight = (f64::from(logit - top) / f64::from(self.options.temp)).exp();
            Candidate { id, logit, weight }
        }));
        keep_top_k(candidates, self.options.top_k);
        keep_top_p(candidates, self.options.top_p);

        let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
        let mut left = uniform(&mut self.rng) * total;
        for candidate in &*candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Ok(candidate.id);
            }
        }
        Ok(best) // the sum was rounded up: nothing is left over but an error of the last digit
    }
}

/// The largest logit's index, the first of equals; none where all are NaN or -inf.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = None;
    let mut top = f32::NEG_INFINITY;
    for (id, &logit) in (0..).zip(logits) {
        if logit > top {
            (best, top) = (Some(id), logit);
        }
    }
    best
}

/// The most likely first, equals in the order of their ids.
fn by_likelihood(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, by_likelihood);
        candidates.truncate(k);
        candidates.sort_unstable_by(by_likelihood); // the order must not depend on how the selection went
    }
}

fn keep_top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    candidates.sort_unstable_by(by_likelihood);
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    let mut sum = 0.0;
    let below = candidates.iter().take_while(|candidate| {
        let wanted = sum < f64::from(p) * total;
        sum += candidate.weight;
        wanted
    });
    let n = below.count().max(1);
    candidates.truncate(n);
}

/// Uniform in [0, 1), of 53 random bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SamplingOptions, logits: &[f32], n: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..n {
            counts[sampler.sample(logits).unwrap() as usize] += 1;
        }
        counts
    }

    fn options(temp: f32, top_k: usize, top_p: f32) -> SamplingOptions {
        SamplingOptions { temp, top_k, top_p, seed: 7 }
    }

    /// log(p) of 0.1, 0.4, 0.2, 0.3.
    fn logits() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec()
    }

    fn assert_shares(counts: &[usize], wanted: &[f64]) {
        let n: usize = counts.iter().sum();
        for (id, (&count, &share)) in counts.iter().zip(wanted).enumerate() {
            let deviation = (share * (1.0 - share) * n as f64).sqrt();
            let off = (count as f64 - share * n as f64).abs();
            assert!(off <= 4.0 * deviation, "token {id}: {count} of {n}, wanted {share}");
        }
    }

    #[test]
    fn shares_match_the_softmax() {
        assert_shares(&counts(options(1.0, 0, 1.0), &logits(), 40_000), &[0.1, 0.4, 0.2, 0.3]);
    }

    #[test]
    fn temperature_sharpens() {
        // at half the temperature shares go with the square: 1, 16, 4, 9 of 30
        let wanted = [1.0, 16.0, 4.0, 9.0].map(|share| share / 30.0);
        assert_shares(&counts(options(0.5, 0, 1.0), &logits(), 40_000), &wanted);
    }

    #[test]
    fn top_k_keeps_the_k_most_likely() {
        assert_shares(&counts(options(1.0, 2, 1.0), &logits(), 20_000), &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        assert_shares(&counts(options(1.0, 4, 1.0), &logits(), 20_000), &[0.1, 0.4, 0.2, 0.3]);
        assert_shares(&counts(options(1.0, 900, 1.0), &logits(), 20_000), &[0.1, 0.4, 0.2, 0.3]);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_p() {
        let some = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
        assert_shares(&counts(options(1.0, 0, 0.5), &logits(), 20_000), &some);
        assert_eq!(counts(options(1.0, 0, 0.39), &logits(), 100), [0, 100, 0, 0]);
        assert_shares(&counts(options(1.0, 0, 0.9999), &logits(), 20_000), &[0.1, 0.4, 0.2, 0.3]);
    }

    #[test]
    fn greedy_matches_argmax() {
        for greedy in
            [SamplingOptions::default(), options(0.0, 9, 0.5), options(2.0, 1, 1.0), options(2.0, 0, 0.0)]
        {
            assert!(greedy.is_greedy());
            assert_eq!(counts(greedy, &logits(), 10), [0, 10, 0, 0]);
        }
        assert_eq!(counts(options(1e-30, 0, 1.0), &logits(), 10), [0, 10, 0, 0]);
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
    }

    #[test]
    fn the_same_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
        let draw = |seed, top_k| {
            let mut sampler = Sampler::new(SamplingOptions { temp: 0.8, top_k, top_p: 0.9, seed }).unwrap();
            (0..20).map(|_| sampler.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 40), draw(1, 40));
        assert_ne!(draw(1, 40), draw(2, 40));
        // a seed must keep its meaning from release to release
        assert_eq!(draw(42, 0)[..4], [681, 611, 600, 936]);
    }

    #[test]
    fn unusable_logits_are_never_chosen() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let mixed = [nan, 1.0, -inf, 1.0, nan];
        for options in [options(0.0, 0, 1.0), options(1.0, 0, 1.0), options(1.0, 3, 0.9)] {
            let counts = counts(options, &mixed, 200);
            assert_eq!(counts[1] + counts[3], 200);
            let mut sampler = Sampler::new(options).unwrap();
            assert_eq!(sampler.sample(&[0.0, inf, nan]).unwrap(), 1);
            assert!(sampler.sample(&[nan, -inf]).is_err());
            assert!(sampler.sample(&[]).is_err());
        }
    }

    #[test]
    fn senseless_options_are_refused() {
        for (temp, top_p) in
            [(-1.0, 1.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, 1.1), (1.0, -0.1), (1.0, f32::NAN)]
        {
            assert!(Sampler::new(options(temp, 0, top_p)).is_err(), "{temp} {top_p}");
        }
    }
}
