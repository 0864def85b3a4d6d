//! `process.Process`, as E2B's SDKs speak it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use connectrpc::{
    ConnectError, Encodable, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures_util::{StreamExt as _, stream};
use stacyvm_envd::process::{self as wire, process_event, process_input, process_selector, stream_input_request};

use super::agent::terminal_size;
use super::{Rpc, keepalive, user};
use crate::Failure;
use crate::process::{
    Event, Exit, InputKind, OutputKind, Process, Reader, ReaderOptions, Selector, StartOptions, TerminalSize,
};

/// As upstream, so that clients see messages of the size they know.
const MAX_CHUNK_BYTES: usize = 32 << 10;

impl wire::Process for Rpc {
    async fn list<'a>(
        &'a self,
        _ctx: RequestContext,
        _request: ServiceRequest<'_, wire::ListRequest>,
    ) -> ServiceResult<impl Encodable<wire::ListResponse> + Send + use<'a>> {
        let processes = self.sandbox.processes.list();
        let running = processes.iter().filter(|process| process.exit().is_none()).map(|process| wire::ProcessInfo {
            config: config(process).into(),
            pid: process.pid,
            tag: process.tag.clone(),
        });
        Response::ok(wire::ListResponse { processes: running.collect() })
    }

    async fn connect(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::ConnectRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::ConnectResponse> + Send + use<>>> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        // From now on; of an ended one everything, so that its end is in context.
        let offset = if process.exit().is_none() { process.output_end() } else { 0 };
        let events = events(process, offset, keepalive(&ctx));
        Response::stream_ok(events.map(|event| event.map(|event| wire::ConnectResponse { event: event.into() })))
    }

    async fn start(
        &self,
        ctx: RequestContext,
        request: ServiceRequest<'_, wire::StartRequest>,
    ) -> ServiceResult<ServiceStream<impl Encodable<wire::StartResponse> + Send + use<>>> {
        let request = request.to_owned_message();
        let config = request.process.into_option().unwrap_or_default();
        let options = StartOptions {
            argv: std::iter::once(config.cmd).chain(config.args).collect(),
            env: config.envs.into_iter().collect(),
            workdir: config.cwd,
            user: user(&ctx)?,
            tag: request.tag,
            deadline: ctx.time_remaining(),
            // Before this field existed stdin was always open.
            stdin: request.stdin.unwrap_or(true),
            terminal: request.pty.as_option().map(size).transpose()?,
        };
        let process = crate::process::start(&self.sandbox, options).await?;
        let events = events(process, 0, keepalive(&ctx));
        Response::stream_ok(events.map(|event| event.map(|event| wire::StartResponse { event: event.into() })))
    }

    async fn update<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::UpdateRequest>,
    ) -> ServiceResult<impl Encodable<wire::UpdateResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.into_option())?;
        if let Some(pty) = request.pty.as_option() {
            process.resize(size(pty)?)?;
        }
        Response::ok(wire::UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        _ctx: RequestContext,
        mut requests: InboundStream<wire::StreamInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::StreamInputResponse> + Send + use<'_>> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match request?.to_owned_message().event {
                Some(stream_input_request::Event::Start(start)) => {
                    process = Some(self.find_running(start.process.into_option())?);
                }
                Some(stream_input_request::Event::Data(data)) => {
                    let Some(process) = &process else {
                        return Err(Failure::InvalidArgument("data before a start event".to_owned()).into());
                    };
                    let (kind, bytes) = input(data.input.into_option())?;
                    process.send_input(kind, bytes).await?;
                }
                Some(stream_input_request::Event::Keepalive(_)) | None => {}
            }
        }
        Response::ok(wire::StreamInputResponse::default())
    }

    async fn send_input<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendInputRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendInputResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.into_option())?;
        let (kind, bytes) = input(request.input.into_option())?;
        process.send_input(kind, bytes).await?;
        Response::ok(wire::SendInputResponse::default())
    }

    async fn send_signal<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::SendSignalRequest>,
    ) -> ServiceResult<impl Encodable<wire::SendSignalResponse> + Send + use<'a>> {
        let request = request.to_owned_message();
        let process = self.find_running(request.process.into_option())?;
        let signal = match request.signal.as_known() {
            Some(wire::Signal::SIGNAL_SIGTERM) => libc::SIGTERM,
            Some(wire::Signal::SIGNAL_SIGKILL) => libc::SIGKILL,
            Some(wire::Signal::SIGNAL_UNSPECIFIED) | None => {
                return Err(Failure::InvalidArgument("this signal cannot be sent".to_owned()).into());
            }
        };
        crate::process::signal(process, signal).await?;
        Response::ok(wire::SendSignalResponse::default())
    }

    async fn close_stdin<'a>(
        &'a self,
        _ctx: RequestContext,
        request: ServiceRequest<'_, wire::CloseStdinRequest>,
    ) -> ServiceResult<impl Encodable<wire::CloseStdinResponse> + Send + use<'a>> {
        let process = self.find_running(request.to_owned_message().process.into_option())?;
        process.close_stdin().await?;
        Response::ok(wire::CloseStdinResponse::default())
    }
}

impl Rpc {
    fn find(&self, selector: Option<wire::ProcessSelector>) -> Result<Arc<Process>, Failure> {
        self.sandbox.processes.find(&own_selector(selector)?)
    }

    fn find_running(&self, selector: Option<wire::ProcessSelector>) -> Result<Arc<Process>, Failure> {
        self.sandbox.processes.find_running(&own_selector(selector)?)
    }
}

fn own_selector(selector: Option<wire::ProcessSelector>) -> Result<Selector, Failure> {
    match selector.and_then(|selector| selector.selector) {
        Some(process_selector::Selector::Pid(pid)) => Ok(Selector::Pid(pid)),
        Some(process_selector::Selector::Tag(tag)) => Ok(Selector::Tag(tag)),
        None => Err(Failure::InvalidArgument("no process is named".to_owned())),
    }
}

fn input(input: Option<wire::ProcessInput>) -> Result<(InputKind, Bytes), Failure> {
    match input.and_then(|input| input.input) {
        Some(process_input::Input::Stdin(bytes)) => Ok((InputKind::Stdin, bytes)),
        Some(process_input::Input::Pty(bytes)) => Ok((InputKind::Terminal, bytes)),
        None => Err(Failure::InvalidArgument("no input is given".to_owned())),
    }
}

fn size(pty: &wire::PTY) -> Result<TerminalSize, Failure> {
    let size = pty.size.as_option();
    terminal_size(size.map_or(80, |size| size.cols), size.map_or(24, |size| size.rows))
}

fn config(process: &Process) -> wire::ProcessConfig {
    wire::ProcessConfig {
        cmd: process.argv.first().cloned().unwrap_or_default(),
        args: process.argv.iter().skip(1).cloned().collect(),
        envs: process.env.clone().into_iter().collect(),
        cwd: process.workdir.clone(),
    }
}

/// The events of a command as envd's clients know them. They have no event for
/// lost output: its amount is the `error` of the end event. A deadline ends the
/// stream with `deadline_exceeded`.
fn events(
    process: Arc<Process>,
    offset: u64,
    keepalive: Duration,
) -> impl futures_util::Stream<Item = Result<wire::ProcessEvent, ConnectError>> + Send + 'static {
    let start = process_event::StartEvent { pid: process.pid };
    let reader = Reader::new(process, &ReaderOptions { offset, keepalive, max_chunk: MAX_CHUNK_BYTES });
    let first = process_event::Event::Start(Box::new(start));
    stream::unfold((Some(first), reader, 0u64), |(first, mut reader, mut dropped)| async move {
        let event = match first {
            Some(first) => Ok(first),
            None => loop {
                match reader.next().await? {
                    Event::Data(kind, bytes) => break Ok(data(kind, bytes)),
                    Event::Dropped(count) => dropped += count,
                    Event::Keepalive => break Ok(process_event::Event::Keepalive(Box::default())),
                    Event::Exited(exit) if exit.timed_out => break Err(Failure::DeadlineExceeded.into()),
                    Event::Exited(exit) => break Ok(process_event::Event::End(Box::new(end(exit, dropped)))),
                }
            },
        };
        let event = event.map(|event| wire::ProcessEvent { event: Some(event) });
        Some((event, (None, reader, dropped)))
    })
}

fn data(kind: OutputKind, bytes: Bytes) -> process_event::Event {
    let output = match kind {
        OutputKind::Stdout => process_event::data_event::Output::Stdout(bytes),
        OutputKind::Stderr => process_event::data_event::Output::Stderr(bytes),
        OutputKind::Terminal => process_event::data_event::Output::Pty(bytes),
    };
    process_event::Event::Data(Box::new(process_event::DataEvent { output: Some(output) }))
}

fn end(exit: Exit, dropped: u64) -> process_event::EndEvent {
    let status = match (exit.code, exit.signal) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal: {}", signal_name(signal)),
        (None, None) => "unknown".to_owned(),
    };
    process_event::EndEvent {
        exit_code: exit.code.unwrap_or(-1),
        exited: exit.code.is_some(),
        status,
        error: (dropped > 0).then(|| format!("{dropped} bytes of output were not read in time and are lost")),
    }
}

/// The words that envd's clients see, which are those of Go.
fn signal_name(signal: i32) -> String {
    match signal {
        libc::SIGHUP => "hangup",
        libc::SIGINT => "interrupt",
        libc::SIGQUIT => "quit",
        libc::SIGILL => "illegal instruction",
        libc::SIGTRAP => "trace/breakpoint trap",
        libc::SIGABRT => "aborted",
        libc::SIGBUS => "bus error",
        libc::SIGFPE => "floating point exception",
        libc::SIGKILL => "killed",
        libc::SIGUSR1 => "user defined signal 1",
        libc::SIGSEGV => "segmentation fault",
        libc::SIGUSR2 => "user defined signal 2",
        libc::SIGPIPE => "broken pipe",
        libc::SIGALRM => "alarm clock",
        libc::SIGTERM => "terminated",
        other => return format!("signal {other}"),
    }
    .to_owned()
}
