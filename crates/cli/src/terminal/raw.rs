//! Raw mode: every key goes to the sandbox, and the terminal comes back as it
//! was, whichever way the program ends.

use anyhow::Context as _;

/// The terminal is raw while this lives.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    pub(crate) fn enter() -> anyhow::Result<Self> {
        restore_on_panic();
        crossterm::terminal::enable_raw_mode().context("switch the terminal to raw mode")?;
        Ok(Self(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// A message printed in raw mode is a staircase, so panics restore first.
fn restore_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        before(panic);
    }));
}

fn restore() {
    // Nothing is left to do where this fails: the terminal is gone.
    let _ = crossterm::terminal::disable_raw_mode();
}
