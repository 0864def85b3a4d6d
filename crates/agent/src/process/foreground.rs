//! Signals of a terminal, where the kernel's terminals send none.
//!
//! gVisor's pseudo-terminals turned `^C`, `^\\` and `^Z` into signals late
//! (gvisor#422), and tell of a new size only since mid-2026 (gvisor#13317). There
//! the agent takes those characters out of what is typed, and its supervisor,
//! which leads the terminal's session, signals whoever is in the foreground: only
//! a member of the session can ask who that is.

use std::os::fd::AsFd;

use bytes::Bytes;
use rustix::process::{Pid, Signal};
use rustix::termios::{LocalModes, SpecialCodeIndex};

/// Those that the supervisor passes on.
pub(super) const SIGNALS: [Signal; 4] = [Signal::INT, Signal::QUIT, Signal::TSTP, Signal::WINCH];

/// What was typed, piece by piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    Text(Bytes),
    Signal(Signal),
}

/// Takes typed bytes apart as the terminal's own settings say.
pub(super) fn take_apart(terminal: impl AsFd, bytes: Bytes) -> Vec<Typed> {
    let Ok(settings) = rustix::termios::tcgetattr(terminal) else { return vec![Typed::Text(bytes)] };
    if !settings.local_modes.contains(LocalModes::ISIG) {
        return vec![Typed::Text(bytes)];
    }
    let codes = [
        (settings.special_codes[SpecialCodeIndex::VINTR], Signal::INT),
        (settings.special_codes[SpecialCodeIndex::VQUIT], Signal::QUIT),
        (settings.special_codes[SpecialCodeIndex::VSUSP], Signal::TSTP),
    ];
    split(bytes, |byte| codes.iter().find(|(code, _)| *code != 0 && *code == byte).map(|(_, signal)| *signal))
}

fn split(mut bytes: Bytes, signal_of: impl Fn(u8) -> Option<Signal>) -> Vec<Typed> {
    let mut pieces = Vec::new();
    while let Some((at, signal)) = bytes.iter().enumerate().find_map(|(at, byte)| Some((at, signal_of(*byte)?))) {
        let text = bytes.split_to(at);
        pieces.extend((!text.is_empty()).then_some(Typed::Text(text)));
        pieces.push(Typed::Signal(signal));
        let _the_character = bytes.split_to(1);
    }
    pieces.extend((!bytes.is_empty()).then_some(Typed::Text(bytes)));
    pieces
}

/// Has the supervisor pass a signal on.
pub(super) fn tell(supervisor: i32, signal: Signal) {
    if let Some(supervisor) = Pid::from_raw(supervisor) {
        let _ = rustix::process::kill_process(supervisor, signal);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_taken_out_of_what_is_typed_in_order() {
        let interrupt = |byte| (byte == 3).then_some(Signal::INT);
        let text = |text: &'static str| Typed::Text(Bytes::from_static(text.as_bytes()));
        let pieces = |typed: &'static str| split(Bytes::from_static(typed.as_bytes()), interrupt);
        assert_eq!(pieces("a\x03b"), [text("a"), Typed::Signal(Signal::INT), text("b")]);
        assert_eq!(pieces("\x03\x03"), [Typed::Signal(Signal::INT), Typed::Signal(Signal::INT)]);
        assert_eq!(pieces("plain"), [text("plain")]);
        assert_eq!(pieces(""), []);
    }

    #[test]
    fn a_raw_terminal_gets_every_character() {
        let ours = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR).expect("a terminal");
        let typed = Bytes::from_static(b"a\x03");
        assert_eq!(take_apart(&ours, typed.clone()).len(), 2);
        let mut settings = rustix::termios::tcgetattr(&ours).expect("settings");
        settings.make_raw();
        rustix::termios::tcsetattr(&ours, rustix::termios::OptionalActions::Now, &settings).expect("set");
        assert_eq!(take_apart(&ours, typed.clone()), [Typed::Text(typed)]);
    }
}
