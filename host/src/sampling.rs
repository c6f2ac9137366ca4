//! How the next token is chosen from logits; `gpu_kernels::sample` does it.

use anyhow::{Result, ensure};
use gpu_kernels::sample::SamplingParameters;

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
    /// Whether the most likely token is always the one taken.
    pub fn is_greedy(&self) -> bool {
        self.temp == 0.0 || self.top_k == 1 || self.top_p == 0.0
    }

    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// When the temperature is not a number from 0 up, or top-p not one from 0 to 1.
    pub fn check(&self) -> Result<()> {
        let Self { temp, top_p, .. } = *self;
        ensure!(temp.is_finite() && temp >= 0.0, "temperature: needed 0 or more, found {temp}");
        ensure!((0.0..=1.0).contains(&top_p), "top-p: needed a number from 0 to 1, found {top_p}");
        Ok(())
    }

    /// The options as the kernel wants them.
    pub fn parameters(&self) -> SamplingParameters {
        // The inverse of a temperature close to 0 is beyond f32, but must be finite.
        let inverse_temp = if self.is_greedy() { 0.0 } else { self.temp.recip().min(f32::MAX) };
        SamplingParameters {
            seed: self.seed,
            inverse_temp,
            top_k: self.top_k.try_into().unwrap_or(u32::MAX),
            top_p: self.top_p,
            padding: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temp: f32, top_k: usize, top_p: f32) -> SamplingOptions {
        SamplingOptions { temp, top_k, top_p, seed: 7 }
    }

    #[test]
    fn greedy_options_have_no_temperature() {
        for greedy in
            [SamplingOptions::default(), options(0.0, 9, 0.5), options(2.0, 1, 1.0), options(2.0, 0, 0.0)]
        {
            assert!(greedy.is_greedy());
            assert_eq!(greedy.parameters().inverse_temp, 0.0);
        }
    }

    #[test]
    fn the_inverse_temperature_is_finite_and_above_0() {
        for (temp, inverse) in [(0.5, 2.0), (4.0, 0.25), (1e-45, f32::MAX)] {
            assert_eq!(options(temp, 0, 1.0).parameters().inverse_temp, inverse);
        }
        assert!(options(f32::MAX, 0, 1.0).parameters().inverse_temp > 0.0);
    }

    #[test]
    fn parameters_keep_the_rest() {
        let parameters = options(0.5, 40, 0.9).parameters();
        assert_eq!((parameters.seed, parameters.top_k, parameters.top_p), (7, 40, 0.9));
        assert_eq!(options(0.5, 1 << 40, 0.9).parameters().top_k, u32::MAX);
    }

    #[test]
    fn senseless_options_are_refused() {
        for (temp, top_p) in
            [(-1.0, 1.0), (f32::NAN, 1.0), (f32::INFINITY, 1.0), (1.0, 1.1), (1.0, -0.1), (1.0, f32::NAN)]
        {
            assert!(options(temp, 0, top_p).check().is_err(), "{temp} {top_p}");
        }
        options(1.0, 0, 0.9).check().unwrap();
    }
}
