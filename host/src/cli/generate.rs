//! The generation loop: prompt in, streamed text out.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use host::model::{Model, Session};
use host::tokenizer::{Tokenizer, Utf8Stream};

use super::args::SamplingArgs;
use super::status;

/// A model, its tokenizer, and the tokens that are in the KV cache.
pub(super) struct Generator<'m> {
    session: Session<'m>,
    n_ctx: usize,
    /// Prompt tokens that run between two looks at Ctrl-C.
    n_batch: usize,
    tokenizer: &'m Tokenizer,
    cached: Vec<u32>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The model said so.
    End,
    /// As many tokens as were asked for.
    Limit,
    /// The context is full.
    Context,
    /// The user said so.
    Interrupted,
}

/// What was generated, and how long it took.
pub(super) struct Generated {
    pub(super) text: String,
    pub(super) stop: Stop,
    /// Prompt tokens that were run, and reused from the cache.
    n_prompt: usize,
    n_reused: usize,
    prompt_time: Duration,
    /// Decode steps: runs of a single token that was generated.
    n_decoded: usize,
    decode_time: Duration,
}

impl<'m> Generator<'m> {
    pub(super) fn new(model: &'m Model, tokenizer: &'m Tokenizer, sampling: &SamplingArgs) -> Result<Self> {
        let options = sampling.options(random_seed()?);
        if !options.is_greedy() && sampling.seed.is_none() {
            status!("seed {}", options.seed);
        }
        let mut session = model.session()?;
        session.set_sampling(&options)?;
        Ok(Self { session, n_ctx: model.n_ctx(), n_batch: model.n_batch(), tokenizer, cached: Vec::new() })
    }

    /// Generates at most `limit` tokens after `prompt` and writes their text as it comes.
    ///
    /// What the KV cache has in common with the prompt is not run again. `interrupted` is asked now and then whether
    /// to stop.
    pub(super) fn run(
        &mut self,
        prompt: &[u32],
        limit: Option<usize>,
        interrupted: impl Fn() -> bool,
        out: &mut impl Write,
    ) -> Result<Generated> {
        ensure!(
            prompt.len() <= self.n_ctx,
            "the prompt is too long: it has {} tokens, the context has room for {} (--ctx)",
            prompt.len(),
            self.n_ctx
        );
        let start = Instant::now();
        let n_reused = reusable(&self.cached, prompt);
        let mut generated = Generated {
            text: String::new(),
            stop: Stop::Limit,
            n_prompt: prompt.len() - n_reused,
            n_reused,
            prompt_time: Duration::ZERO,
            n_decoded: 0,
            decode_time: Duration::ZERO,
        };
        self.cached.truncate(n_reused);
        self.session.truncate(n_reused);
        for piece in prompt[n_reused..].chunks(self.n_batch) {
            if interrupted() {
                generated.stop = Stop::Interrupted;
                return Ok(generated);
            }
            self.feed(piece)?;
        }
        if limit == Some(0) {
            generated.prompt_time = start.elapsed();
            return Ok(generated);
        }

        let mut utf8 = Utf8Stream::new();
        // The last token that is wanted is not fed.
        let end = limit.map_or(self.n_ctx, |limit| self.n_ctx.min(prompt.len() + (limit - 1)));
        self.session.choose()?;
        self.session.run_ahead(self.cached.len(), end)?;
        let mut token = self.session.next_chosen()?; // waits for the prompt
        generated.prompt_time = start.elapsed();
        let start = Instant::now();
        let mut n_generated = 0;
        generated.stop = loop {
            if self.tokenizer.is_end(token) {
                break Stop::End;
            }
            n_generated += 1;
            if !self.tokenizer.is_control(token) {
                generated.emit(&utf8.push(self.tokenizer.decode_bytes(token)), out)?;
            }
            if limit == Some(n_generated) {
                break Stop::Limit;
            }
            if self.cached.len() >= self.n_ctx {
                break Stop::Context;
            }
            if interrupted() {
                break Stop::Interrupted;
            }
            // The device stays ahead: while it works on the tokens after this one, this one is shown.
            self.cached.push(token);
            self.session.run_ahead(self.cached.len(), end)?;
            token = self.session.next_chosen()?;
            generated.n_decoded += 1;
        };
        // What the device has done beyond the end is not part of the conversation.
        self.session.truncate(self.cached.len());
        generated.decode_time = start.elapsed();
        generated.emit(&utf8.finish(), out)?;
        Ok(generated)
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        let fed = self.session.feed(tokens);
        self.cached.extend_from_slice(tokens);
        self.cached.truncate(self.session.position());
        fed
    }
}

impl Generated {
    fn emit(&mut self, text: &str, out: &mut impl Write) -> Result<()> {
        self.text += text;
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// Says on stderr how fast it went, and why it ended where the user could not know.
    pub(super) fn report(&self) {
        match self.stop {
            Stop::Context => status!("the context is full: generation stopped (--ctx sets its size)"),
            Stop::Limit => status!("the limit of new tokens is reached: generation stopped (-n sets it)"),
            Stop::End | Stop::Interrupted => {}
        }
        let reused = match self.n_reused {
            0 => String::new(),
            n => format!(" ({n} more were cached)"),
        };
        status!(
            "prefill {} tokens{reused}, {}; decode {} tokens, {}",
            self.n_prompt,
            rate(self.n_prompt, self.prompt_time),
            self.n_decoded,
            rate(self.n_decoded, self.decode_time)
        );
    }
}

fn rate(tokens: usize, time: Duration) -> String {
    if tokens == 0 || time.is_zero() {
        return "- tok/s".to_owned();
    }
    format!("{:.2} tok/s", tokens as f64 / time.as_secs_f64())
}

/// How much of the cache serves the prompt: what both begin with, short of the prompt's last token, which must run to
/// give logits.
fn reusable(cached: &[u32], prompt: &[u32]) -> usize {
    let common = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    common.min(prompt.len().saturating_sub(1))
}

fn random_seed() -> Result<u64> {
    use rand_chacha::rand_core::{OsRng, TryRngCore};
    Ok(OsRng.try_next_u64()? >> 32) // short enough to be typed again
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuse_ends_where_cache_and_prompt_part() {
        assert_eq!(reusable(&[], &[1, 2]), 0);
        assert_eq!(reusable(&[1, 2, 9], &[1, 2, 3, 4]), 2);
        assert_eq!(reusable(&[1, 2, 3, 4, 5], &[1, 2, 3]), 2);
        assert_eq!(reusable(&[1, 2, 3], &[1, 2, 3]), 2);
        assert_eq!(reusable(&[1], &[]), 0);
    }

    #[test]
    fn rates_never_divide_by_zero() {
        assert_eq!(rate(0, Duration::ZERO), "- tok/s");
        assert_eq!(rate(10, Duration::from_millis(500)), "20.00 tok/s");
    }
}
