//! The terminal this program runs in: its size, its raw mode, and the driving
//! of a command in a sandbox from it.

mod drive;
mod raw;

pub(crate) use drive::{Capture, Drive, Ended, Input, drive};
pub(crate) use raw::RawMode;

use stacyvm_client::TerminalSize;

/// Size to assume where there is none to be had.
const FALLBACK: TerminalSize = TerminalSize { cols: 80, rows: 24 };

/// Columns and rows of the terminal.
pub(crate) fn size() -> TerminalSize {
    match crossterm::terminal::size() {
        Ok((cols, rows)) if cols > 0 && rows > 0 => TerminalSize { cols, rows },
        _ => FALLBACK,
    }
}
