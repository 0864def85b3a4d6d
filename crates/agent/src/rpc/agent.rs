//! `stacyvm.agent.v1.Agent`.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{ConnectError, Encodable, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream};
use futures_util::stream;
use stacyvm_envd::ENVD_VERSION;
use stacyvm_envd::agent::{self as wire, process_event, selector};

use super::{Rpc, user};
use crate::Failure;
use crate::files::tree::{self, Removal};
use crate::files::{blocking, glob};
use crate::net::{self, Listeners};
use crate::process::{Event, OutputKind, Process, Reader, ReaderOptions, Selector, StartOptions, TerminalSize};

/// Our own client wants to know soon whether a stream lives.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Longest piece of output in one message.
const MAX_CHUNK_BYTES: usize = 64 << 10;

impl wire::Agent for Rpc {
    async fn ping<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::PingRequest>,
    ) -> ServiceResult<impl Encodable<wire::PingResponse> + Send + use<'a>> {
        Response::ok(wire::PingResponse { version: ENVD_VERSION.to_owned(), generation: self.sandbox.generation })
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ProcessEvent> + Send + use<>>> {
        let request = request.to_owned_message();
        let user = match request.user {
            Some(user) => Some(user),
            None => user(&ctx)?,
        };
        let options = StartOptions {
            argv: request.argv,
            env: request.env.into_iter().collect(),
            workdir: request.workdir,
            user,
            tag: request.tag,
            deadline: request.deadline_ms.map(Duration::from_millis),
            stdin: request.stdin,
            terminal: request.terminal.as_option().map(|size| terminal_size(size.cols, size.rows)).transpose()?,
        };
        let process = crate::process::start(&self.sandbox, options).await?;
        Response::stream_ok(events(process, 0))
    }

    async fn attach(
        &self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::AttachRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ProcessEvent> + Send + use<>>> {
        let request = request.to_owned_message();
        let process = self.sandbox.processes.find(&selector(request.process.into_option())?)?;
        Response::stream_ok(events(process, request.offset))
    }

    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListResponse> + Send + use<'a>> {
        let processes = self.sandbox.processes.list();
        let processes = processes.iter().map(|process| wire::ListedProcess {
            pid: process.pid,
            tag: process.tag.clone(),
            argv: process.argv.clone(),
            exit: process.exit().map(exit).into(),
            terminal: process.has_terminal(),
        });
        Response::ok(wire::ListResponse { processes: processes.collect() })
    }

    async fn signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SignalRequest>,
    ) -> ServiceResult<impl Encodable<wire::SignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.sandbox.processes.find_running(&selector(request.process.into_option())?)?;
        crate::process::signal(process, request.signal).await?;
        Response::ok(wire::SignalResponse::default())
    }

    async fn remove<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::RemoveRequest>,
    ) -> ServiceResult<impl Encodable<wire::RemoveResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        let removal = if request.view().recursive { Removal::Recursive } else { Removal::Single };
        blocking(move || tree::remove(&path, removal)).await?;
        Response::ok(wire::RemoveResponse::default())
    }

    async fn chmod<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ChmodRequest>,
    ) -> ServiceResult<impl Encodable<wire::ChmodResponse> + Send + use<'a>> {
        let path = self.path(&ctx, request.view().path)?;
        let mode = request.view().mode;
        blocking(move || tree::chmod(&path, mode)).await?;
        Response::ok(wire::ChmodResponse::default())
    }

    async fn glob<'a>(
        &'a self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::GlobRequest>,
    ) -> ServiceResult<impl Encodable<wire::GlobResponse> + Send + use<'a>> {
        let pattern = self.path(&ctx, request.view().pattern)?;
        let paths = blocking(move || glob::find(&pattern.to_string_lossy())).await?;
        Response::ok(wire::GlobResponse { paths })
    }

    async fn ports<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::PortsRequest>,
    ) -> ServiceResult<impl Encodable<wire::PortsResponse> + Send + use<'a>> {
        let wanted = if self.sandbox.shares_host_network { Listeners::OwnOnly } else { Listeners::All };
        let ports = blocking(move || net::listening_ports(wanted)).await?;
        Response::ok(wire::PortsResponse { ports: ports.into_iter().map(u32::from).collect() })
    }

    async fn console<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConsoleRequest>,
    ) -> ServiceResult<impl Encodable<wire::ConsoleResponse> + Send + use<'a>> {
        let lines = self.sandbox.processes.console_lines(request.view().lines as usize);
        Response::ok(wire::ConsoleResponse { lines })
    }

    async fn set_deadline<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SetDeadlineRequest>,
    ) -> ServiceResult<impl Encodable<wire::SetDeadlineResponse> + Send + use<'a>> {
        self.sandbox.expires_at_unix_ms.send_replace(request.view().expires_at_unix_ms);
        Response::ok(wire::SetDeadlineResponse::default())
    }
}

/// Columns and rows that fit the kernel's structure.
pub(super) fn terminal_size(cols: u32, rows: u32) -> Result<TerminalSize, Failure> {
    match (u16::try_from(cols), u16::try_from(rows)) {
        (Ok(cols), Ok(rows)) => Ok(TerminalSize { cols, rows }),
        _ => Err(Failure::InvalidArgument(format!("no terminal has {cols} columns and {rows} rows"))),
    }
}

fn selector(selector: Option<wire::Selector>) -> Result<Selector, Failure> {
    match selector.and_then(|selector| selector.selector) {
        Some(selector::Selector::Pid(pid)) => Ok(Selector::Pid(pid)),
        Some(selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => Err(Failure::InvalidArgument("no process is named".to_owned())),
    }
}

fn events(
    process: Arc<Process>,
    offset: u64,
) -> impl futures_util::Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send + 'static {
    let pid = process.pid;
    let started = wire::process_event::Started { pid };
    let options = ReaderOptions { offset, keepalive: KEEPALIVE, max_chunk: MAX_CHUNK_BYTES };
    let reader = Reader::new(process, &options);
    let first = process_event::Event::Started(Box::new(started));
    stream::unfold((Some(first), reader), |(first, mut reader)| async move {
        let event = match first {
            Some(first) => first,
            None => event(reader.next().await?),
        };
        Some((Ok(wire::ProcessEvent { event: Some(event) }), (None, reader)))
    })
}

fn event(event: Event) -> process_event::Event {
    match event {
        Event::Data(OutputKind::Stdout, bytes) => process_event::Event::Stdout(bytes),
        Event::Data(OutputKind::Stderr, bytes) => process_event::Event::Stderr(bytes),
        Event::Data(OutputKind::Terminal, bytes) => process_event::Event::Terminal(bytes),
        Event::Dropped(bytes) => process_event::Event::Dropped(bytes),
        Event::Keepalive => process_event::Event::Keepalive(Box::default()),
        Event::Exited(ended) => process_event::Event::Exited(Box::new(exit(ended))),
    }
}

fn exit(exit: crate::process::Exit) -> wire::Exit {
    wire::Exit { code: exit.code, signal: exit.signal, timed_out: exit.timed_out }
}
