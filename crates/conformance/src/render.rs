//! A report as text, JSON, JUnit and Markdown.

use std::fmt::Write as _;
use std::str::FromStr;

use crate::{CheckReport, Report, Status};

/// Longest reason on a line of a table; the JSON has all of it.
const TABLE_REASON_CHARS: usize = 300;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    Json,
    /// JUnit XML, as CI systems read it.
    Junit,
    Markdown,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "text" => Self::Text,
            "json" => Self::Json,
            "junit" => Self::Junit,
            "markdown" => Self::Markdown,
            other => return Err(format!("`{other}` is no report format; use text, json, junit or markdown")),
        })
    }
}

impl Report {
    /// The whole report, ending in a newline.
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Text => text(self),
            Format::Json => json(self),
            Format::Junit => junit(self),
            Format::Markdown => markdown(self),
        }
    }

    /// The last line of a run: `42 passed, 1 failed, 3 skipped in 2.1 s`.
    pub fn summary_line(&self) -> String {
        let summary = self.summary;
        format!(
            "{} passed, {} failed, {} skipped in {}",
            summary.passed,
            summary.failed,
            summary.skipped,
            seconds(self.duration_ms)
        )
    }
}

impl CheckReport {
    /// One line: `PASS C07  title  (12 ms)`, with the reason below it.
    pub fn text_line(&self) -> String {
        let mut line = format!("{} {}  {}  ({} ms)", self.status.as_str(), self.id, self.title, self.duration_ms);
        if let Some(reason) = &self.reason {
            let _ = write!(line, "\n         {}", reason.replace('\n', "\n         "));
        }
        line
    }
}

fn text(report: &Report) -> String {
    let mut text = format!("StacyVM contract suite {}: {}, image {}\n\n", report.version, report.target, report.image);
    for check in &report.checks {
        text.push_str(&check.text_line());
        text.push('\n');
    }
    text.push('\n');
    for id in &report.left_behind {
        let _ = writeln!(text, "LEFT BEHIND {id}");
    }
    text.push_str(&report.summary_line());
    text.push('\n');
    text
}

fn json(report: &Report) -> String {
    // Strings and numbers only: this cannot fail.
    serde_json::to_string_pretty(report).unwrap_or_default() + "\n"
}

fn junit(report: &Report) -> String {
    let summary = report.summary;
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        xml,
        "<testsuite name=\"stacyvm conformance\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\" \
         time=\"{}\" timestamp=\"{}\">",
        report.checks.len(),
        summary.failed,
        report.left_behind.len(),
        summary.skipped,
        report.duration_ms as f64 / 1000.0,
        report.started_at.to_whole_seconds(),
    );
    let _ = writeln!(xml, "  <properties>");
    for (name, value) in [("target", &report.target), ("image", &report.image), ("version", &report.version)] {
        let _ = writeln!(xml, "    <property name=\"{name}\" value=\"{}\"/>", escaped_xml(value));
    }
    let _ = writeln!(xml, "  </properties>");
    for check in &report.checks {
        let _ = write!(
            xml,
            "  <testcase classname=\"{}\" name=\"{}\" time=\"{}\"",
            escaped_xml(&report.target),
            escaped_xml(&format!("{} {}", check.id, check.title)),
            check.duration_ms as f64 / 1000.0
        );
        let reason = escaped_xml(check.reason.as_deref().unwrap_or_default());
        let _ = match check.status {
            Status::Pass => writeln!(xml, "/>"),
            Status::Fail => writeln!(xml, ">\n    <failure message=\"{reason}\"/>\n  </testcase>"),
            Status::Skip => writeln!(xml, ">\n    <skipped message=\"{reason}\"/>\n  </testcase>"),
        };
    }
    for id in &report.left_behind {
        let id = escaped_xml(id);
        let _ = writeln!(xml, "  <testcase name=\"cleanup\"><error message=\"left behind: {id}\"/></testcase>");
    }
    xml.push_str("</testsuite>\n");
    xml
}

fn markdown(report: &Report) -> String {
    let mut text = format!("# Contract suite: {}\n\n", report.target);
    let _ = writeln!(text, "- Image: `{}`", report.image);
    let _ = writeln!(text, "- Started: {}", report.started_at);
    let _ = writeln!(text, "- StacyVM: {}", report.version);
    let _ = writeln!(text, "- Result: **{}**", if report.is_success() { "PASS" } else { "FAIL" });
    let _ = writeln!(text, "- {}", report.summary_line());
    for id in &report.left_behind {
        let _ = writeln!(text, "- Left behind: {}", escaped_markdown(id));
    }
    text.push_str("\n| Id | Status | Check | Time | Reason |\n|---|---|---|---|---|\n");
    for check in &report.checks {
        let reason: String = check.reason.as_deref().unwrap_or_default().chars().take(TABLE_REASON_CHARS).collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} ms | {} |",
            check.id,
            check.status.as_str(),
            escaped_markdown(&check.title),
            check.duration_ms,
            escaped_markdown(&reason)
        );
    }
    text
}

fn seconds(millis: u64) -> String {
    format!("{}.{} s", millis / 1000, millis % 1000 / 100)
}

/// Text for an XML attribute. Characters that XML 1.0 cannot hold become U+FFFD.
fn escaped_xml(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' => escaped.push_str("&#10;"),
            '\t' => escaped.push_str("&#9;"),
            '\r' => escaped.push_str("&#13;"),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Text for a cell of a Markdown table: a guest's words stay words.
pub fn escaped_markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '|' | '\\' | '`' | '*' | '_' | '<' | '[' => {
                escaped.push('\\');
                escaped.push(c);
            }
            '\n' | '\r' => escaped.push(' '),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use stacyvm_api::Timestamp;

    use super::*;
    use crate::Summary;

    fn report() -> Report {
        let check = |id: &str, status, reason: Option<&str>| CheckReport {
            id: id.to_owned(),
            title: "a|b <c> \"d\" & `e`".to_owned(),
            status,
            reason: reason.map(str::to_owned),
            duration_ms: 1234,
            evidence: vec!["seen".to_owned()],
        };
        let checks = vec![
            check("C01", Status::Pass, None),
            check("C02", Status::Fail, Some("expected \"x|y\",\ngot \u{1}<z>")),
            check("S50", Status::Skip, Some("no terminals")),
        ];
        Report {
            target: "provider <mock>".to_owned(),
            image: "alpine:latest".to_owned(),
            version: "0.0.0".to_owned(),
            started_at: Timestamp::from_unix_ms(1_700_000_000_000),
            duration_ms: 3456,
            summary: Summary::of(&checks),
            left_behind: vec!["sb-left".to_owned()],
            checks,
        }
    }

    #[test]
    fn text_has_a_line_per_check_and_a_summary() {
        let text = report().render(Format::Text);
        assert!(text.contains("PASS C01  a|b <c> \"d\" & `e`  (1234 ms)\n"), "{text}");
        assert!(text.contains("FAIL C02"), "{text}");
        assert!(text.contains("         expected \"x|y\",\n         got"), "{text}");
        assert!(text.ends_with("LEFT BEHIND sb-left\n1 passed, 1 failed, 1 skipped in 3.4 s\n"), "{text}");
    }

    #[test]
    fn json_reads_back_as_the_same_report() {
        let report = report();
        let back: Report = serde_json::from_str(&report.render(Format::Json)).unwrap();
        assert_eq!(back, report);
    }

    #[test]
    fn junit_escapes_and_counts() {
        let xml = report().render(Format::Junit);
        assert!(xml.contains("tests=\"3\" failures=\"1\" errors=\"1\" skipped=\"1\" time=\"3.456\""), "{xml}");
        assert!(xml.contains("timestamp=\"2023-11-14T22:13:20Z\""), "{xml}");
        assert!(xml.contains("name=\"C01 a|b &lt;c&gt; &quot;d&quot; &amp; `e`\" time=\"1.234\"/>"), "{xml}");
        assert!(xml.contains("<failure message=\"expected &quot;x|y&quot;,&#10;got \u{fffd}&lt;z&gt;\"/>"), "{xml}");
        assert!(xml.contains("<skipped message=\"no terminals\"/>"), "{xml}");
        assert_eq!(xml.matches("<testcase").count(), xml.matches("</testcase>").count() + 1, "{xml}");
    }

    #[test]
    fn markdown_keeps_its_columns() {
        let text = report().render(Format::Markdown);
        for line in text.lines().filter(|line| line.starts_with('|')) {
            let columns = line.replace("\\|", "").matches('|').count();
            assert_eq!(columns, 6, "{line}");
        }
        assert!(text.contains("**FAIL**"), "{text}");
    }

    #[test]
    fn a_run_that_leaves_something_or_passes_nothing_is_no_success() {
        let mut report = report();
        assert!(!report.is_success());
        assert_eq!(report.failed_ids(), ["C02"]);
        report.checks.retain(|check| check.status != Status::Fail);
        report.summary = Summary::of(&report.checks);
        assert!(!report.is_success(), "something is left behind");
        report.left_behind.clear();
        assert!(report.is_success());
        report.checks.retain(|check| check.status == Status::Skip);
        report.summary = Summary::of(&report.checks);
        assert!(!report.is_success(), "nothing passed");
    }
}
