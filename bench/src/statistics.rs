//! Percentiles of durations.

use std::time::Duration;

use serde::Serialize;

/// What a list of durations comes down to, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) min_ms: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p95_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

impl Spread {
    /// Of at least one duration.
    pub(crate) fn of(samples: &[Duration]) -> Self {
        let mut sorted: Vec<f64> = samples.iter().map(|sample| sample.as_secs_f64() * 1000.0).collect();
        sorted.sort_by(f64::total_cmp);
        Self {
            count: sorted.len(),
            min_ms: nearest_rank(&sorted, 0.0),
            p50_ms: nearest_rank(&sorted, 50.0),
            p95_ms: nearest_rank(&sorted, 95.0),
            p99_ms: nearest_rank(&sorted, 99.0),
            max_ms: nearest_rank(&sorted, 100.0),
        }
    }
}

/// The smallest value that at least `percent` of all values do not exceed.
fn nearest_rank(sorted: &[f64], percent: f64) -> f64 {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        let spread = Spread::of(&samples);
        assert_eq!((spread.min_ms, spread.p50_ms, spread.p95_ms), (1.0, 50.0, 95.0));
        assert_eq!((spread.p99_ms, spread.max_ms, spread.count), (99.0, 100.0, 100));
        let one = Spread::of(&[Duration::from_millis(7)]);
        assert_eq!((one.min_ms, one.p50_ms, one.p99_ms), (7.0, 7.0, 7.0));
    }
}
