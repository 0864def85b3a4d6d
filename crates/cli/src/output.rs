//! What a command shows: JSON for programs, tables and colours for people.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use stacyvm_api::{SandboxState, Timestamp};

/// Where output goes and in which form.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    form: Form,
    colour: Colour,
}

/// For whom output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Human,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Colour {
    On,
    Off,
}

/// The few meanings a colour has here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Warning,
    Faint,
    Strong,
}

impl Output {
    /// Colours appear on a terminal, unless `NO_COLOR` is set to something or
    /// the terminal is dumb.
    pub(crate) fn new(form: Form) -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = if refused || !std::io::stdout().is_terminal() { Colour::Off } else { Colour::On };
        Self { form, colour }
    }

    pub(crate) fn is_json(self) -> bool {
        self.form == Form::Json
    }

    /// `value` as JSON, or what `human` makes of it.
    pub(crate) fn show<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        match self.form {
            Form::Json => json_line(value),
            Form::Human => print(&human(value)),
        }
    }

    /// Text for people, on standard error: it never mixes with results, and
    /// there is none beside JSON.
    pub(crate) fn note(self, text: &str) {
        if self.form == Form::Human {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Warning => "33",
            Tone::Faint => "2",
            Tone::Strong => "1",
        };
        match self.colour {
            Colour::On => format!("\x1b[{code}m{text}\x1b[0m"),
            Colour::Off => text.to_owned(),
        }
    }

    pub(crate) fn state(self, state: SandboxState) -> String {
        let tone = match state {
            SandboxState::Running => Tone::Good,
            SandboxState::Error => Tone::Bad,
            SandboxState::Unhealthy => Tone::Warning,
            SandboxState::Creating | SandboxState::Paused | SandboxState::Destroying | SandboxState::Destroyed => {
                Tone::Faint
            }
        };
        self.paint(tone, state_name(state))
    }

    /// A table whose columns are as wide as what is in them.
    pub(crate) fn table(self, header: &[&str], rows: Vec<Vec<String>>) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        table.set_header(header.iter().map(|name| self.paint(Tone::Strong, name)));
        for row in rows {
            table.add_row(row);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        lines(table.lines().map(|line| line.trim_end().to_owned()))
    }

    /// A bar on standard error, where a person watches.
    pub(crate) fn progress(self, what: &str, total_bytes: Option<u64>) -> ProgressBar {
        if self.is_json() || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let template = match total_bytes {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            None => "{msg} {spinner} {bytes} {bytes_per_sec}",
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(total_bytes, ProgressDrawTarget::stderr());
        bar.set_style(style.progress_chars("=> "));
        bar.set_message(what.to_owned());
        bar
    }
}

/// `value` as JSON on one line of its own.
pub(crate) fn json_line<T: Serialize>(value: &T) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string(value).context("write JSON")?))
}

/// Writes to standard output. A reader that went away (`| head`) ends the
/// program quietly instead of being an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("write to standard output"),
    }
}

/// What a server says to whoever started it. It goes on when nobody reads that
/// any more.
pub(crate) fn announce(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

pub(crate) fn state_name(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Creating => "creating",
        SandboxState::Running => "running",
        SandboxState::Paused => "paused",
        SandboxState::Unhealthy => "unhealthy",
        SandboxState::Destroying => "destroying",
        SandboxState::Destroyed => "destroyed",
        SandboxState::Error => "error",
    }
}

/// `5 MiB`, `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && value < 10.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A span to the nearest second, minute or hour: `42s`, `5m`, `1h30m`, `2d3h`.
pub(crate) fn span(span: Duration) -> String {
    let seconds = span.as_secs() + u64::from(span.subsec_millis() >= 500);
    if seconds < 60 {
        return format!("{seconds}s");
    }
    let minutes = (seconds + 30) / 60;
    let (hours, rounded) = (minutes / 60, (minutes + 30) / 60);
    match (minutes, rounded) {
        (0..60, _) => format!("{minutes}m"),
        (_, 0..24) => in_two(hours, 'h', minutes % 60, 'm'),
        (_, hours) => in_two(hours / 24, 'd', hours % 24, 'h'),
    }
}

/// Without the smaller unit where there is none of it.
fn in_two(large: u64, unit: char, small: u64, small_unit: char) -> String {
    if small == 0 { format!("{large}{unit}") } else { format!("{large}{unit}{small}{small_unit}") }
}

/// One item a line.
pub(crate) fn lines<T: std::fmt::Display>(items: impl IntoIterator<Item = T>) -> String {
    let mut text = String::new();
    for item in items {
        let _ = writeln!(text, "{item}");
    }
    text
}

/// How long ago, or how long until.
pub(crate) fn relative(at: Timestamp) -> String {
    let now = Timestamp::now();
    if at > now { format!("in {}", span(at.since(now))) } else { format!("{} ago", span(now.since(at))) }
}

/// Milliseconds with one digit below ten: how long something took.
pub(crate) fn took(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1000.0;
    if millis < 10.0 {
        format!("{millis:.1} ms")
    } else if millis < 1000.0 {
        format!("{millis:.0} ms")
    } else {
        format!("{:.1} s", millis / 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_are_short() {
        assert_eq!(
            [0, 1023, 1024, 1536, 10 << 20, 3 << 40].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "10 MiB", "3.0 TiB"]
        );
        assert_eq!(
            [0, 59, 60, 3569, 3599, 5400, 7199, 84_000, 86_400, 100_000].map(|it| span(Duration::from_secs(it))),
            ["0s", "59s", "1m", "59m", "1h", "1h30m", "2h", "23h20m", "1d", "1d4h"]
        );
        assert_eq!([1, 250, 1500].map(|it| took(Duration::from_millis(it))), ["1.0 ms", "250 ms", "1.5 s"]);
    }

    #[test]
    fn tables_are_plain_text_without_colours() {
        let output = Output { form: Form::Human, colour: Colour::Off };
        let table = output
            .table(&["ID", "STATE"], vec![vec!["sb-1".into(), "running".into()], vec!["sb-22".into(), "x".into()]]);
        assert_eq!(table, "ID     STATE\nsb-1   running\nsb-22  x\n");
    }

    #[test]
    fn colours_surround_the_text_only_when_on() {
        let output = Output { form: Form::Human, colour: Colour::On };
        assert_eq!(output.paint(Tone::Bad, "x"), "\x1b[31mx\x1b[0m");
    }
}
