//! Rust client of StacyVM's REST API.
//!
//! It covers every call of the API: sandboxes, commands (buffered, streamed and
//! interactive), files of any size, archives, ports, templates, quotas, events,
//! keys, the audit log and the server about itself. Bodies are those of
//! `stacyvm-api`; errors carry the server's code, message, hint and request id.
//!
//! Nothing here has a deadline of its own beyond connecting: a command may run
//! for hours and a file may be larger than memory. Drop a future, or wrap it in
//! `tokio::time::timeout`, to give up earlier.
//!
//! ```no_run
//! # async fn example() -> Result<(), stacyvm_client::ClientError> {
//! use stacyvm_api::{CreateRequest, ExecRequest};
//! use stacyvm_client::{Client, ClientOptions};
//!
//! let client = Client::new(&ClientOptions::new("http://127.0.0.1:7423"))?;
//! let record = client.create(&CreateRequest { image: Some("host".into()), ..Default::default() }).await?;
//! let sandbox = client.sandbox(record.id);
//! let result = sandbox.exec(&ExecRequest { command: "echo hello".into(), ..Default::default() }).await?;
//! assert_eq!(result.stdout, "hello\n");
//! sandbox.destroy().await?;
//! # Ok(()) }
//! ```

mod audit;
mod client;
mod error;
mod event;
mod exec;
mod file;
mod key;
mod lines;
mod port;
mod quota;
mod sandbox;
mod system;
mod template;
mod terminal;

pub use client::{Certificates, Client, ClientOptions};
pub use error::{ApiError, ClientError, TlsProblem};
pub use event::{EventStream, EventsOptions};
pub use exec::{Channel, ExecEvent, ExecStream, Exit};
pub use file::{Download, UploadOptions, WatchOptions, WatchStream};
pub use port::{Forwarded, PreviewAnswer};
pub use sandbox::{Destroyed, Page, SandboxClient};
pub use terminal::{Terminal, TerminalInput, TerminalOutput, TerminalSize};
