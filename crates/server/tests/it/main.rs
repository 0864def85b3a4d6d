//! The server over real sockets, with the engine on the mock runtime.

mod auth;
mod bad_input;
mod commands;
mod docs;
mod events;
mod files;
mod guards;
mod guest;
mod lifecycle;
mod openapi;
mod preview;
mod preview_access;
mod preview_hostile;
mod sandboxes;
mod sockets;
mod streams;
mod support;
mod system;
mod transfers;
