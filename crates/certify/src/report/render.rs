//! A report as text, JSON and Markdown.

use std::fmt::Write as _;
use std::str::FromStr;

use stacyvm_conformance::escaped_markdown;

use super::{Outcome, Report, seal};

/// In which form a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
    Markdown,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "markdown" => Ok(Self::Markdown),
            other => Err(format!("`{other}` is none of text, json and markdown")),
        }
    }
}

impl Outcome {
    /// `[STATUS] name: message`, with what to do on a line of its own.
    pub fn text(&self) -> String {
        let mut text = format!("[{}] {}: {}\n", self.status.as_str(), self.name, one_line(&self.message));
        if let Some(fix) = &self.fix {
            let _ = writeln!(text, "    fix: {}", one_line(fix));
        }
        text
    }
}

impl Report {
    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Text => seal::seal_text(&self.text()),
            Format::Markdown => seal::seal_text(&self.markdown()),
            Format::Json => format!("{:#}\n", seal::seal_json(self)),
        }
    }

    /// What happened in one line.
    pub fn summary_line(&self) -> String {
        let summary = &self.summary;
        format!(
            "{} {}: {} passed, {} warned, {} unavailable, {} failed",
            self.status.as_str(),
            self.runtime,
            summary.passed,
            summary.warned,
            summary.unavailable,
            summary.failed
        )
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let host = &self.host;
        vec![
            ("Generated at", self.generated_at.to_string()),
            ("Runtime target", self.runtime.clone()),
            ("Host", host.hostname.clone()),
            ("OS/kernel", format!("{} ({})", host.os, host.distribution)),
            (
                "Hardware",
                format!(
                    "{} processors, {} MiB, virtualization: {}",
                    host.processors, host.memory_mb, host.virtualization
                ),
            ),
            ("Control groups", host.cgroup.clone()),
            ("StacyVM version", format!("{} ({})", self.stacyvm_version, self.stacyvm_commit)),
            ("StacyVM URL", self.stacyvm_url.clone()),
            ("Config file", self.config_file.clone()),
            ("Image", self.image.clone()),
            ("Overall status", self.status.as_str().to_owned()),
        ]
    }

    fn text(&self) -> String {
        let mut text = "StacyVM Runtime Certification\n\n".to_owned();
        for (label, value) in self.facts() {
            let _ = writeln!(text, "{label}: {}", one_line(&value));
        }
        text.push('\n');
        for check in &self.checks {
            text.push_str(&check.text());
            for seen in &check.evidence {
                let _ = writeln!(text, "    seen: {}", one_line(seen));
            }
        }
        self.rest(&mut text, one_line);
        text
    }

    fn markdown(&self) -> String {
        let mut text = "# StacyVM Runtime Certification\n\n".to_owned();
        for (label, value) in self.facts() {
            let _ = writeln!(text, "- {label}: {}", escaped_markdown(&value));
        }
        text.push_str("\n## Checks\n\n| Status | Check | Message | Evidence |\n|---|---|---|---|\n");
        for check in &self.checks {
            let fix = check.fix.as_ref().map(|fix| format!(" Fix: {fix}")).unwrap_or_default();
            let _ = writeln!(
                text,
                "| {} | {}: {} | {} | {} |",
                check.status.as_str(),
                check.name,
                escaped_markdown(&check.title),
                escaped_markdown(&format!("{}{fix}", check.message)),
                escaped_markdown(&check.evidence.join("; "))
            );
        }
        self.rest(&mut text, escaped_markdown);
        text
    }

    /// What both have below the rows.
    fn rest(&self, text: &mut String, form: impl Fn(&str) -> String) {
        if let Some(measured) = &self.measured {
            let memory = measured.memory_overhead_kib.map_or_else(
                || "memory not readable".to_owned(),
                |kib| format!("{:.1} MiB of host memory each", kib as f64 / 1024.0),
            );
            let _ = writeln!(
                text,
                "\n## Measured\n\n- {} sandboxes: p50 {} ms, p95 {} ms, {memory}",
                measured.samples, measured.spawn_p50_ms, measured.spawn_p95_ms
            );
        }
        if !self.caveats.is_empty() {
            text.push_str("\n## Caveats\n\n");
            for caveat in &self.caveats {
                let _ = writeln!(text, "- {}", form(caveat));
            }
        }
        if !self.attachments.is_empty() {
            text.push_str("\n## Attachments\n\n");
            for file in &self.attachments {
                let _ = writeln!(text, "- Attachment: {} sha256:{}", file.name, file.sha256);
            }
        }
        text.push_str("\n## Operator Signoff\n\n");
        for (label, value) in self.signoff.fields() {
            let line = format!("- {label}: {}", form(value));
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = write!(text, "\n{}: {}\n", seal::KEY, seal::blank());
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::super::tests::report;
    use super::*;

    #[test]
    fn text_lines_are_as_published() {
        let text = report(&[Status::Pass, Status::Unavailable]).render(Format::Text);
        assert!(text.contains("\n[PASS] B0: it is | so and on\n    seen: seen <b>\n"), "{text}");
        assert!(text.contains("\n[UNAVAILABLE] B1: it is | so and on\n    fix: do `this`\n"), "{text}");
    }

    #[test]
    fn markdown_keeps_its_columns_and_has_every_field() {
        let text = report(&[Status::Warn]).render(Format::Markdown);
        for line in text.lines().filter(|line| line.starts_with('|')) {
            assert_eq!(line.replace("\\|", "").matches('|').count(), 5, "{line}");
        }
        assert!(text.contains("StacyVM Runtime Certification") && text.contains("seen \\<b>"), "{text}");
        let (_, signoff) = text.split_once("## Operator Signoff\n").unwrap();
        assert_eq!(signoff.lines().filter(|line| line.starts_with("- ")).count(), 15, "{signoff}");
    }

    #[test]
    fn json_reads_back() {
        let report = report(&[Status::Pass]);
        let back: Report = serde_json::from_str(&report.render(Format::Json)).unwrap();
        assert_eq!(Report { report_hash: String::new(), ..back }, report);
    }
}
