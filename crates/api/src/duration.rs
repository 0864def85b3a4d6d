//! Durations as the REST API writes them: Go's grammar (`1h30m`, `250ms`, `0`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

const NANOS_PER_MICRO: u128 = 1_000;
const NANOS_PER_MILLI: u128 = 1_000_000;
const NANOS_PER_SECOND: u128 = 1_000_000_000;
const NANOS_PER_MINUTE: u128 = 60 * NANOS_PER_SECOND;
const NANOS_PER_HOUR: u128 = 60 * NANOS_PER_MINUTE;

/// A span of time that is never negative, read and written as Go text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "30m0s")]
pub struct Duration(std::time::Duration);

/// Why a piece of text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDurationError {
    #[error("`{0}` is not a duration; write for example 30s, 5m or 1h30m")]
    Malformed(String),
    #[error("`{0}` has no unit; write for example {0}s")]
    MissingUnit(String),
    #[error("`{0}` is negative")]
    Negative(String),
    #[error("`{0}` is longer than 292 years")]
    TooLong(String),
}

impl Duration {
    pub const ZERO: Self = Self(std::time::Duration::ZERO);

    pub const fn from_secs(secs: u64) -> Self {
        Self(std::time::Duration::from_secs(secs))
    }

    pub const fn get(self) -> std::time::Duration {
        self.0
    }

    pub const fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

/// Reads an optional duration: blank text means that none is given, as for
/// every optional text that published clients send.
pub(crate) fn blank_is_none<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    let given = text.as_deref().map(str::trim).filter(|text| !text.is_empty());
    given.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

impl From<std::time::Duration> for Duration {
    fn from(value: std::time::Duration) -> Self {
        Self(value)
    }
}

impl From<Duration> for std::time::Duration {
    fn from(value: Duration) -> Self {
        value.0
    }
}

impl TryFrom<String> for Duration {
    type Error = ParseDurationError;

    fn try_from(text: String) -> Result<Self, ParseDurationError> {
        text.parse()
    }
}

impl From<Duration> for String {
    fn from(value: Duration) -> Self {
        value.to_string()
    }
}

impl FromStr for Duration {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, ParseDurationError> {
        let malformed = || ParseDurationError::Malformed(text.to_owned());
        let (negative, mut rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if rest == "0" {
            return Ok(Self::ZERO);
        }
        if rest.is_empty() {
            return Err(malformed());
        }
        let mut nanos: u128 = 0;
        while !rest.is_empty() {
            let number_len = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let (number, tail) = rest.split_at(number_len);
            let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(unit_len);
            if unit.is_empty() && !number.is_empty() {
                return Err(ParseDurationError::MissingUnit(text.to_owned()));
            }
            let unit_nanos = unit_nanos(unit).ok_or_else(malformed)?;
            let part = scaled(number, unit_nanos).ok_or_else(malformed)?;
            nanos = nanos.saturating_add(part);
            rest = tail;
        }
        let nanos = i64::try_from(nanos).map_err(|_| ParseDurationError::TooLong(text.to_owned()))?;
        if negative && nanos > 0 {
            return Err(ParseDurationError::Negative(text.to_owned()));
        }
        Ok(Self(std::time::Duration::from_nanos(nanos.unsigned_abs())))
    }
}

fn unit_nanos(unit: &str) -> Option<u128> {
    Some(match unit {
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => NANOS_PER_MICRO,
        "ms" => NANOS_PER_MILLI,
        "s" => NANOS_PER_SECOND,
        "m" => NANOS_PER_MINUTE,
        "h" => NANOS_PER_HOUR,
        _ => return None,
    })
}

/// `number` (digits with at most one point) times `unit_nanos`, cut to whole
/// nanoseconds. Values beyond `u128` saturate and are refused by the caller.
fn scaled(number: &str, unit_nanos: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().unwrap_or(u128::from(u64::MAX)) };
    // Eighteen digits are finer than a nanosecond of an hour.
    let fraction = &fraction[..fraction.len().min(18)];
    let numerator: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let denominator = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    Some(whole.saturating_mul(unit_nanos).saturating_add(numerator * unit_nanos / denominator))
}

impl fmt::Display for Duration {
    /// Go's canonical form: `0s`, `1.5ms`, `2m0.5s`, `24h0m0s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        match nanos {
            0 => return f.write_str("0s"),
            n if n < NANOS_PER_MICRO => return write!(f, "{n}ns"),
            n if n < NANOS_PER_MILLI => return write_decimal(f, n, NANOS_PER_MICRO, "\u{b5}s"),
            n if n < NANOS_PER_SECOND => return write_decimal(f, n, NANOS_PER_MILLI, "ms"),
            _ => {}
        }
        let (hours, rest) = (nanos / NANOS_PER_HOUR, nanos % NANOS_PER_HOUR);
        let (minutes, rest) = (rest / NANOS_PER_MINUTE, rest % NANOS_PER_MINUTE);
        if hours > 0 {
            write!(f, "{hours}h{minutes}m")?;
        } else if minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write_decimal(f, rest, NANOS_PER_SECOND, "s")
    }
}

fn write_decimal(f: &mut fmt::Formatter<'_>, nanos: u128, unit_nanos: u128, unit: &str) -> fmt::Result {
    let (whole, fraction) = (nanos / unit_nanos, nanos % unit_nanos);
    if fraction == 0 {
        return write!(f, "{whole}{unit}");
    }
    let digits = unit_nanos.ilog10() as usize;
    let fraction = format!("{fraction:0digits$}");
    write!(f, "{whole}.{}{unit}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(input: &str, expect: &str) {
        assert_eq!(input.parse::<Duration>().map(|d| d.to_string()).as_deref(), Ok(expect), "{input}");
    }

    #[test]
    fn text_is_read_and_written_as_go_does() {
        check("0", "0s");
        check("30s", "30s");
        check("+5m", "5m0s");
        check("1.5h", "1h30m0s");
        check("1h30m", "1h30m0s");
        check("24h", "24h0m0s");
        check("1500ms", "1.5s");
        check("127.123456ms", "127.123456ms");
        check("7us", "7\u{b5}s");
        check("7\u{3bc}s", "7\u{b5}s");
        check("9ns", "9ns");
        check(".5s", "500ms");
        check("2m500ms", "2m0.5s");
        check("-0s", "0s");
    }

    #[test]
    fn text_that_is_not_a_duration_says_what_to_write() {
        let error = |text: &str| text.parse::<Duration>().unwrap_err().to_string();
        assert!(error("30").contains("30s"));
        assert!(error("-1s").contains("negative"));
        assert!(error("999999999999h").contains("292 years"));
        for text in ["", "s", ".s", "1x", "1..5s", "one hour", "1s5"] {
            assert!(text.parse::<Duration>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn blank_text_is_no_duration_where_one_is_optional() {
        let read = |text: &str| serde_json::from_str::<crate::ExecRequest>(text).map(|request| request.timeout);
        assert_eq!(read(r#"{"timeout":" "}"#).unwrap(), None);
        assert_eq!(read(r#"{"timeout":null}"#).unwrap(), None);
        assert_eq!(read("{}").unwrap(), None);
        assert_eq!(read(r#"{"timeout":"5s"}"#).unwrap(), Some(Duration::from_secs(5)));
        assert!(read(r#"{"timeout":"5"}"#).is_err());
        assert!(read(r#"{"timeout":5}"#).is_err());
    }
}
