//! A terminal with a program on it, as in front of a person.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

use super::eventually;

pub(crate) struct Terminal {
    keys: File,
    /// Keeps the terminal there when the program is gone.
    line: File,
    screen: Arc<Mutex<Vec<u8>>>,
    child: Child,
}

impl Terminal {
    /// Starts a program on a terminal of this size.
    pub(crate) fn start(command: &Command, columns: u16, rows: u16) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&keys).and_then(|()| unlockpt(&keys)).expect("a terminal");
        let path = ptsname(&keys, Vec::new()).expect("its name").into_string().expect("text");
        let line = File::options().read(true).write(true).open(path).expect("the other end");
        let keys = File::from(keys);
        resize(&keys, columns, rows);

        // util-linux makes it the controlling terminal without unsafe code here.
        let mut on_terminal = Command::new("setsid");
        on_terminal.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args()).env_clear();
        on_terminal.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).env("TERM", "xterm");
        on_terminal.current_dir(command.get_current_dir().expect("a directory"));
        let end = || line.try_clone().expect("a descriptor");
        let child = on_terminal.stdin(end()).stdout(end()).stderr(end()).spawn().expect("setsid starts");

        let screen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (mut reading, shared) = (keys.try_clone().expect("a descriptor"), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reading.read(&mut buffer) {
                shared.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
            }
        });
        Self { keys, line, screen, child }
    }

    pub(crate) fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        resize(&self.keys, columns, rows);
    }

    /// Whether keys go to the program one by one and unseen.
    pub(crate) fn is_raw(&self) -> bool {
        let modes: Termios = tcgetattr(&self.line).expect("its modes");
        !modes.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Everything that was shown so far.
    pub(crate) fn shown(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    pub(crate) async fn shows(&self, text: &str) {
        eventually(&format!("`{}` is shown", text.escape_debug()), async || self.shown().contains(text).then_some(()))
            .await;
    }

    pub(crate) async fn ends(&mut self) -> ExitStatus {
        eventually("the program ends", async || self.child.try_wait().expect("its status")).await
    }
}

fn resize(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).expect("its size");
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
