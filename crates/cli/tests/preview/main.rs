//! Live preview end to end: the real program, sandboxes and containers
//! without a network, a real server inside, and Debian's Chromium looking at it.

mod browser;
mod command_line;
mod docker;
mod frame;
mod hostile;
mod pages;
mod server;
