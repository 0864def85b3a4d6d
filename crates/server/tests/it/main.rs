//! The server over real sockets, with the engine on the mock runtime.

mod audit;
mod auth;
mod bad_input;
mod commands;
mod docs;
mod events;
mod files;
mod forward;
mod guards;
mod guest;
mod keys;
mod lifecycle;
mod openapi;
mod preview;
mod preview_access;
mod preview_hostile;
mod preview_keys;
mod preview_paths;
mod rate_limits;
mod sandboxes;
mod sockets;
mod streams;
mod support;
mod system;
mod tls;
mod transfers;
