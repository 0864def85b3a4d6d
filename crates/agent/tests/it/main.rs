//! The real agent binary, started on a socket of its own as an ordinary process
//! of this machine and driven through `EnvdSession`, as servers do, and through
//! plain HTTP, as E2B's SDKs do.

mod archive;
mod dial;
mod envd;
mod exec;
mod files;
mod harness;
mod hostile;
mod output;
mod watch;
