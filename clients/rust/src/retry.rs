//! Whether and when to try again: pure, but for the draw of a random number.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

/// Longer than this, no retry waits.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_secs(60);
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(8);

pub(crate) fn is_retried(status: u16) -> bool {
    matches!(status, 408 | 409 | 429 | 500 | 502 | 503 | 504)
}

/// Retries that a client may still make, in tenths, so that an outage is not multiplied.
#[derive(Debug)]
pub(crate) struct Budget(Mutex<u32>);

const RETRY: u32 = 10;
const FULL: u32 = 10 * RETRY;

impl Budget {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(FULL))
    }

    /// For each request.
    pub(crate) fn deposit(&self) {
        let mut left = self.left();
        *left = FULL.min(*left + 1);
    }

    /// Whether there is a retry left, which this takes.
    pub(crate) fn withdraw(&self) -> bool {
        let mut left = self.left();
        match left.checked_sub(RETRY) {
            Some(rest) => {
                *left = rest;
                true
            }
            None => false,
        }
    }

    fn left(&self) -> std::sync::MutexGuard<'_, u32> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The wait before the retry after `retries` others; `random` is in 0..1.
pub(crate) fn backoff(retries: u32, random: f64) -> Duration {
    let whole = FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(retries)).min(LONGEST_BACKOFF);
    whole.mul_f64(1.0 - random / 2.0)
}

/// In 0..1. The standard library seeds each `RandomState` differently, which is random enough to spread retries.
pub(crate) fn random() -> f64 {
    let drawn = RandomState::new().build_hasher().finish() >> 11;
    drawn as f64 / (1_u64 << 53) as f64
}

/// What `Retry-After` asks for: seconds, or an HTTP date. `None` if it is neither.
pub(crate) fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let until = httpdate::parse_http_date(value).ok()?;
    Some(until.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_begins_with_ten_and_grows_by_a_tenth_a_request() {
        let budget = Budget::new();
        budget.deposit(); // it is full
        assert_eq!((0..20).filter(|_| budget.withdraw()).count(), 10);
        for _ in 0..9 {
            budget.deposit();
        }
        assert!(!budget.withdraw());
        budget.deposit();
        assert!(budget.withdraw());
        assert!(!budget.withdraw());
    }

    #[test]
    fn the_backoff_doubles_up_to_eight_seconds_less_a_random_half() {
        let seconds = |retries, random| backoff(retries, random).as_secs_f64();
        assert_eq!([0, 1, 2, 4, 5, 1000].map(|n| seconds(n, 0.0)), [0.5, 1.0, 2.0, 8.0, 8.0, 8.0]);
        assert_eq!(seconds(0, 1.0), 0.25);
        assert_eq!(seconds(4, 0.5), 6.0);
    }

    #[test]
    fn random_numbers_differ_and_are_in_range() {
        let drawn: Vec<f64> = (0..1000).map(|_| random()).collect();
        assert!(drawn.iter().all(|number| (0.0..1.0).contains(number)));
        let mean = drawn.iter().sum::<f64>() / 1000.0;
        assert!((0.4..0.6).contains(&mean), "{mean}");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let after = |value| retry_after(value, now).map(|wait| wait.as_secs_f64());
        assert_eq!(after("7"), Some(7.0));
        assert_eq!(after(" 0 "), Some(0.0));
        assert_eq!(after("0.5"), Some(0.5));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:47 GMT"), Some(10.0));
        assert_eq!(after("Sunday, 06-Nov-94 08:49:47 GMT"), Some(10.0));
        assert_eq!(after("Sun Nov  6 08:49:47 1994"), Some(10.0));
        assert_eq!(after("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0.0)); // it is over
        for nonsense in ["", "-1", "soon", "NaN", "inf", "1e300", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(after(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn statuses_of_the_contract_are_retried() {
        let retried: Vec<u16> = (100..600).filter(|&status| is_retried(status)).collect();
        assert_eq!(retried, [408, 409, 429, 500, 502, 503, 504]);
    }
}
