//! Live preview end to end: the real program, sandboxes without a network, a
//! real server inside, and Debian's Chromium looking at it.

mod browser;
mod command_line;
mod frame;
mod hostile;
mod pages;
mod server;
