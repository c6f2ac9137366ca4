//! How well a model predicts a text it is given.

use crate::model::Session;
use anyhow::{Result, ensure};
use serde::Serialize;

/// What a model makes of a sequence of tokens, position by position.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Evaluation {
    /// `-ln p(ids[i + 1] | ids[..=i])`, for all positions but the last.
    pub nll: Vec<f64>,
    /// The most likely token after `ids[..=i]`, for all positions.
    pub argmax: Vec<u32>,
}

/// Evaluates `ids` from where the session stands, as many at once as the model's `n_batch` says. `progress` is called with
/// the number of positions done.
///
/// # Errors
/// When there are no ids, an id is not in the vocabulary, the context has no room, or the device fails.
pub fn evaluate(session: &mut Session, ids: &[u32], mut progress: impl FnMut(usize)) -> Result<Evaluation> {
    ensure!(!ids.is_empty(), "there are no token ids to evaluate");
    let mut evaluation = Evaluation::default();
    session.feed_watched(ids, |i, logits| {
        evaluation.argmax.push(argmax(logits));
        if let Some(&next) = ids.get(i + 1) {
            evaluation.nll.push(nll(logits, next));
        }
        progress(i + 1);
        Ok(())
    })?;
    Ok(evaluation)
}

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> u32 {
    let largest = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(largest).unwrap_or(0) as u32
}

/// `-ln softmax(logits)[token]`, in f64.
fn nll(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

#[cfg(test)]
mod tests {
    use super::nll;

    #[test]
    fn nll_of_equal_logits_is_the_log_of_their_number() {
        assert!((nll(&[5.0; 8], 3) - 8f64.ln()).abs() < 1e-12);
        assert!(nll(&[0.0, 1000.0], 0) > 999.0);
        assert_eq!(nll(&[0.0, 1000.0], 1), 0.0);
    }
}
