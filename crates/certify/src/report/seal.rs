//! The hash of a report: it shows that nothing was changed by accident or in
//! passing. It is no signature: whoever changes a report can make another hash.
//!
//! What is filled in by hand (three lines of the sign-off) is left out of it, so
//! that a signed report still verifies.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use stacyvm_api::Timestamp;

use super::Report;
use super::signoff::BY_HAND;

/// Begins the line, or is the key, of the hash.
pub(super) const KEY: &str = "report_hash";
const ALGORITHM: &str = "sha256:";

/// In place of a hash while it is made.
const BLANK: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// Clocks of two machines may differ by this much.
const CLOCK_SKEW: Duration = Duration::from_mins(5);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VerifyError {
    #[error("it is no report of `stacyvm certify`: {0}")]
    NotAReport(&'static str),
    #[error("it was changed: it says {stated}, and is {actual}")]
    Changed { stated: String, actual: String },
    #[error("it is of {generated_at}, which is longer ago than {max_age}")]
    TooOld { generated_at: String, max_age: stacyvm_api::Duration },
    #[error("it is of {0}, which is still to come")]
    FromTheFuture(String),
    #[error("the attachment {0} is missing beside the report")]
    AttachmentMissing(String),
    #[error("the attachment {0} was changed")]
    AttachmentChanged(String),
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// The text with its hash in the place of [`blank`].
pub(super) fn seal_text(text: &str) -> String {
    let hash = format!("{ALGORITHM}{}", sha256(normal_text(text).as_bytes()));
    text.replacen(BLANK, &hash, 1)
}

pub(super) fn blank() -> &'static str {
    BLANK
}

/// The JSON of a report, with its hash.
pub(super) fn seal_json(report: &Report) -> Value {
    let mut value = serde_json::to_value(report).unwrap_or_default();
    let hash = format!("{ALGORITHM}{}", sha256(normal_json(&value).as_bytes()));
    value[KEY] = Value::String(hash);
    value
}

/// A text without what is filled in by hand, and without its hash.
fn normal_text(text: &str) -> String {
    let by_hand = |line: &str| {
        let line = line.trim_start_matches(['-', '*', ' ']);
        BY_HAND.into_iter().find(|label| line.strip_prefix(label).is_some_and(|rest| rest.starts_with(':')))
    };
    let mut normal = String::with_capacity(text.len());
    for line in text.lines() {
        if line.starts_with(KEY) {
            continue;
        }
        normal.push_str(by_hand(line).unwrap_or(line.trim_end()));
        normal.push('\n');
    }
    normal
}

/// The same of JSON, with keys in order, however it was laid out.
fn normal_json(value: &Value) -> String {
    fn write(value: &Value, into: &mut String) {
        match value {
            Value::Object(map) => {
                let mut keys: Vec<&String> = map.keys().collect();
                keys.sort();
                into.push('{');
                for key in keys {
                    into.push_str(&Value::String(key.clone()).to_string());
                    into.push(':');
                    write(&map[key], into);
                    into.push(',');
                }
                into.push('}');
            }
            Value::Array(items) => {
                into.push('[');
                for item in items {
                    write(item, into);
                    into.push(',');
                }
                into.push(']');
            }
            other => into.push_str(&other.to_string()),
        }
    }
    let mut value = value.clone();
    value[KEY] = Value::Null;
    for field in ["known_host_caveats", "owner_signoff", "date"] {
        value["signoff"][field] = Value::Null;
    }
    let mut text = String::new();
    write(&value, &mut text);
    text
}

/// Whether a report of any format is as it was made, and not too old. Returns
/// when it was made.
pub fn verify(text: &str, max_age: Duration, now: Timestamp) -> Result<Timestamp, VerifyError> {
    let (stated, actual, made) = if let Ok(value) = serde_json::from_str::<Value>(text) {
        let report: Report =
            serde_json::from_value(value.clone()).map_err(|_| VerifyError::NotAReport("its JSON has other fields"))?;
        (report.report_hash, sha256(normal_json(&value).as_bytes()), report.generated_at)
    } else {
        let line = text.lines().rev().find_map(|line| line.strip_prefix(KEY)?.strip_prefix(": "));
        let stated = line.ok_or(VerifyError::NotAReport("it has no line `report_hash`"))?.trim().to_owned();
        (stated, sha256(normal_text(text).as_bytes()), made_at(text)?)
    };
    let actual = format!("{ALGORITHM}{actual}");
    if stated != actual {
        return Err(VerifyError::Changed { stated, actual });
    }
    if made.since(now) > CLOCK_SKEW {
        return Err(VerifyError::FromTheFuture(made.to_string()));
    }
    if now.since(made) > max_age {
        return Err(VerifyError::TooOld { generated_at: made.to_string(), max_age: max_age.into() });
    }
    Ok(made)
}

fn made_at(text: &str) -> Result<Timestamp, VerifyError> {
    let line = text.lines().find_map(|line| {
        line.trim_start_matches(['-', '*', ' ']).strip_prefix("Generated at:").map(|rest| rest.trim().to_owned())
    });
    let line = line.ok_or(VerifyError::NotAReport("it does not say when it was made"))?;
    serde_json::from_value(Value::String(line)).map_err(|_| VerifyError::NotAReport("its time cannot be read"))
}

/// Whether the files beside a JSON report are those it was made with. Other
/// formats name them with their hashes on lines of their own.
pub fn verify_attachments(text: &str, directory: &Path) -> Result<usize, VerifyError> {
    let named = attachments(text);
    for (name, expected) in &named {
        // Only names are written; a path is somebody else's doing.
        if name.contains('/') {
            return Err(VerifyError::AttachmentMissing(name.clone()));
        }
        let bytes = std::fs::read(directory.join(name)).map_err(|_| VerifyError::AttachmentMissing(name.clone()))?;
        if sha256(&bytes) != *expected {
            return Err(VerifyError::AttachmentChanged(name.clone()));
        }
    }
    Ok(named.len())
}

fn attachments(text: &str) -> Vec<(String, String)> {
    if let Ok(report) = serde_json::from_str::<Report>(text) {
        return report.attachments.into_iter().map(|file| (file.name, file.sha256)).collect();
    }
    let line = |line: &str| {
        let (name, hash) = line.strip_prefix("- Attachment: ")?.split_once(" sha256:")?;
        Some((name.to_owned(), hash.trim().to_owned()))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::super::{Attachment, Format, Status};
    use super::*;

    const YEAR: Duration = Duration::from_hours(365 * 24);

    fn now() -> Timestamp {
        Timestamp::from_unix_ms(1_700_000_000_000 + 86_400_000)
    }

    #[test]
    fn every_format_verifies_and_a_change_shows() {
        let report = report(&[Status::Pass, Status::Fail]);
        for format in [Format::Text, Format::Json, Format::Markdown] {
            let text = report.render(format);
            assert_eq!(verify(&text, YEAR, now()), Ok(report.generated_at), "{text}");
            let forged = text.replacen("FAIL", "PASS", 1);
            assert_ne!(forged, text);
            assert!(matches!(verify(&forged, YEAR, now()), Err(VerifyError::Changed { .. })), "{forged}");
            assert!(matches!(verify(&text, Duration::from_hours(1), now()), Err(VerifyError::TooOld { .. })));
            let early = Timestamp::from_unix_ms(1_600_000_000_000);
            assert!(matches!(verify(&text, YEAR, early), Err(VerifyError::FromTheFuture(_))));
        }
        assert!(matches!(verify("hello", YEAR, now()), Err(VerifyError::NotAReport(_))));
        assert!(matches!(verify("{}", YEAR, now()), Err(VerifyError::NotAReport(_))));
    }

    #[test]
    fn signing_by_hand_is_no_change() {
        let report = report(&[Status::Pass]);
        for format in [Format::Text, Format::Markdown] {
            let mut text = report.render(format);
            for label in BY_HAND {
                assert_eq!(text.matches(&format!("{label}:")).count(), 1, "{text}");
                text = text.replace(&format!("{label}:"), &format!("{label}: by hand"));
            }
            assert_eq!(verify(&text, YEAR, now()), Ok(report.generated_at), "{text}");
        }
        let mut value: Value = serde_json::from_str(&report.render(Format::Json)).unwrap();
        value["signoff"]["owner_signoff"] = Value::String("me".to_owned());
        assert!(verify(&value.to_string(), YEAR, now()).is_ok());
        value["signoff"]["runtime"] = Value::String("kata".to_owned());
        assert!(verify(&value.to_string(), YEAR, now()).is_err());
    }

    #[test]
    fn attachments_are_held_to_their_hashes() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = report(&[Status::Pass]);
        report.attachments = vec![Attachment { name: "log".to_owned(), sha256: sha256(b"text") }];
        for format in [Format::Text, Format::Json, Format::Markdown] {
            let text = report.render(format);
            let check = || verify_attachments(&text, directory.path());
            let _ = std::fs::remove_file(directory.path().join("log"));
            assert_eq!(check(), Err(VerifyError::AttachmentMissing("log".to_owned())));
            std::fs::write(directory.path().join("log"), "other").unwrap();
            assert_eq!(check(), Err(VerifyError::AttachmentChanged("log".to_owned())));
            std::fs::write(directory.path().join("log"), "text").unwrap();
            assert_eq!(check(), Ok(1));
        }
    }
}
