//! The server over real sockets, with the engine on the mock runtime.

mod audit;
mod auth;
mod bad_input;
mod commands;
mod docs;
mod events;
mod files;
mod guards;
mod keys;
mod lifecycle;
mod openapi;
mod rate_limits;
mod sandboxes;
mod sockets;
mod streams;
mod support;
mod system;
mod transfers;
